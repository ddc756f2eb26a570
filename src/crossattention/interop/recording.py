"""What a recording holds: the results of each call of each layer, and what generations came to.

Legend: z batch, r repeats on one context, h heads, n queries, m context positions; t steps of a generation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from crossattention.attention.score_rows import ScoreRows, rows_of_steps
from crossattention.maps.blocks import Block, MapRows
from crossattention.maps.compute import summarise
from crossattention.maps.summaries import Summary


class Recorded:
    """What the summaries came to over the map of one call, or of all steps of a generation together.

    Args:
        shape: of the map, (z, h, n, m), or (z, r, h, n, m).
        outcomes: for each summary its result, or the error that it ended with.

    `recorded[i]` is the result of the i-th summary, `recorded.results` the list of all, so that `top, mass = recorded.results`.
    """

    def __init__(self, shape: tuple[int, ...], outcomes: Sequence[Any]) -> None:
        self.shape, self._outcomes = shape, tuple(outcomes)

    def __getitem__(self, index: int) -> Any:
        outcome = self._outcomes[index]
        if isinstance(outcome, _Failed):
            raise type(outcome.error)(*outcome.error.args)
        return outcome

    def __len__(self) -> int:
        return len(self._outcomes)

    @property
    def results(self) -> list[Any]:
        """The result of each summary, in the order of `record_attention`'s list; raises what a summary raised on these rows."""
        return [self[index] for index in range(len(self))]

    def __repr__(self) -> str:
        return f"Recorded(shape={self.shape}, summaries={len(self)})"


@dataclass
class Layer:
    """What was recorded of one attention layer.

    Args:
        name: as in `model.named_modules()`.
        kind: "cross", "self", or "memory" for a learned one.
        heads: h.
        calls: what each call came to, in order. Of a generation each step is a call.
    """

    name: str
    kind: str
    heads: int = 0
    calls: list[Recorded] = field(default_factory=list)
    _sequences: list[Recorded | str] = field(default_factory=list, repr=False)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each call's map, (z, h, n, m), or (z, r, h, n, m) where r query sequences read each context."""
        return [call.shape for call in self.calls]

    @property
    def sequences(self) -> list[Recorded]:
        """One for each context that was read: each generation as a whole, and each call outside of one."""
        for one in self._sequences:
            if isinstance(one, str):
                raise ValueError(f"the steps of {self.name} cannot be merged: {one}; `calls` has each of them")
        return [one for one in self._sequences if isinstance(one, Recorded)]

    @property
    def merged(self) -> Recorded:
        """The whole of the one generation, or of the one call, that was recorded."""
        found = self.sequences
        if len(found) != 1:
            raise ValueError(
                f"{self.name} was recorded over {len(found)} separate calls or generations, so they are not merged; take one of "
                "`sequences`, or record one at a time"
            )
        return found[0]


@dataclass(frozen=True)
class _Failed:
    """The error that a summary ended with."""

    error: Exception


class _Guarded:
    """A summary whose error is kept for whoever asks for its result: a model must run as if nobody looked."""

    def __init__(self, summary: Summary) -> None:
        self._summary = summary
        self.heads = getattr(summary, "heads", "each")
        self._failed: _Failed | None = None

    def update(self, block: Block) -> None:
        """Let the summary take in some rows."""
        if self._failed is None:
            self._try(lambda: self._summary.update(block))

    def result(self) -> Any:
        """Its result, or its error."""
        return self._failed or self._try(self._summary.result)

    def _try(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:
            self._failed = _Failed(error.with_traceback(None))  # with it, the block would be kept
            return self._failed


@torch.no_grad()
def recorded_of(rows: MapRows, summaries: Sequence[Summary]) -> Recorded:
    """What the summaries come to over some rows."""
    return Recorded(tuple(rows.shape), summarise(rows, [_Guarded(summary) for summary in summaries]))


class Generation:
    """The steps of what is being generated in one thread, and the beams that its sequences went through.

    What is kept of a step is its newest queries; of the first one also its keys, which are the same for all. All go when it ends.
    """

    def __init__(self, summaries: Sequence[Summary]) -> None:
        self._summaries = summaries
        self._tracks: dict[int, _Track] = {}
        self.beams: Tensor | None = None

    def add(self, layer: Layer, rows: Any, cache: object) -> None:
        """A call of a layer; one with another cache than the last begins another sequence."""
        track = self._tracks.get(id(layer))
        if track is not None and track.cache is not cache:
            self.end(None)
            track = None
        if track is None:
            track = self._tracks[id(layer)] = _Track(layer, cache)
        track.add(rows)

    def end(self, count: int | None) -> None:
        """What was generated so far is whole; `count` is how many sequences it gave, where that is known."""
        picks = self.beams
        if picks is not None:
            z, kept, _ = picks.shape
            each = kept if count is None or count % z else min(kept, count // z)
            picks = picks[:, :each].flatten(0, 1)
        self._close(picks)

    def end_with(self, rows: list[list[tuple[int, ...]]]) -> None:
        """The same, where the row of each step is known of each source's sequences."""
        most, longest = max(map(len, rows), default=0), max((len(one) for some in rows for one in some), default=0)
        picks = torch.full((len(rows), most, longest), -1)
        for source, some in enumerate(rows):
            for number, one in enumerate(some):
                picks[source, number, : len(one)] = torch.tensor(one, dtype=torch.long)
        self._close(picks)

    def _close(self, picks: Tensor | None) -> None:
        for track in self._tracks.values():
            track.layer._sequences.append(track.merged(picks, self._summaries))
        self._tracks, self.beams = {}, None


class _Track:
    """The steps of one layer in one generation."""

    def __init__(self, layer: Layer, cache: object) -> None:
        self.layer, self.cache = layer, cache
        self._steps: list[Any] = []
        self._obstacle: str | None = "each step of a self-attention reads a longer context" if layer.kind == "self" else None

    def add(self, rows: Any) -> None:
        """The next step."""
        if self._obstacle is not None:
            return
        n = rows.shape[-2]
        if self._steps and n not in (1, self._steps[0].shape[-2] + len(self._steps)):
            self._obstacle = f"a step came with {n} queries, as where an assistant guesses ahead"
            self._steps = []
            return
        last = self._steps[-1] if self._steps else None
        try:
            self._steps.append(rows if isinstance(rows, ScoreRows) else rows.step_after(last))
        except Exception as error:  # told to whoever asks for the merged map; the model goes on
            self._obstacle, self._steps = str(error), []

    def merged(self, picks: Tensor | None, summaries: Sequence[Summary]) -> Recorded | str:
        """One map of the steps, or why there is none."""
        if self._obstacle is not None:
            return self._obstacle
        if len(self._steps) == 1 and picks is None:
            return self.layer.calls[-1]
        try:
            return recorded_of(self._of(picks), summaries)
        except ValueError as error:
            return str(error)

    def _of(self, picks: Tensor | None) -> MapRows:
        """The rows of whole sequences; without picks each item is one."""
        first = self._steps[0]
        if picks is None:
            picks = torch.arange(first.shape[0]).unsqueeze(1).expand(-1, len(self._steps))
        picks = picks[..., : len(self._steps)].to(first.device)
        steps = self._steps[: picks.shape[-1]]
        return rows_of_steps(steps, picks) if isinstance(first, ScoreRows) else type(first).of_steps(steps, picks)


def copied(summaries: Sequence[Summary]) -> tuple[Summary, ...]:
    """Copies, so that what a caller does with his later changes nothing."""
    return tuple(copy.deepcopy(summary) for summary in summaries)
