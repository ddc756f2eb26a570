"""Summaries of the map of a context that comes in blocks: what A looks at in a B that is never held whole.

The first pass over the blocks gives each row's log-sum-exp, the second its weights, some columns at a time: so what is kept is of
query size, and the blocks have to be readable twice.

Legend: z batch, r repeats on one context, h heads, n queries, m context positions of all blocks together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from crossattention.attention import BlocksState, CrossAttention, Plan
from crossattention.attention.partial import Part, scores_of_part
from crossattention.attention.sequences import check_is_tensor
from crossattention.attention.streamed import Stream
from crossattention.maps.blocks import BLOCK_SCORES
from crossattention.maps.compute import check_summaries
from crossattention.maps.summaries import Argmax, Entropy, Highlight, Rows, Top, TopK
from crossattention.maps.top import top


def attention_map_blocks(
    layer: CrossAttention,
    a: Tensor,
    blocks: Iterable[Any],
    summaries: Sequence[Any],
    *,
    query_positions: Tensor | None = None,
    progress: Callable[[BlocksState], object] | None = None,
    state: BlocksState | None = None,
    plan: Plan | None = None,
) -> list[Any]:
    """Summaries of the weights with which every query reads a context that comes in blocks; equals those of the blocks end to end.

    weights[z, h, n, m] = exp(score[z, h, n, m] - lse[z, h, n]), lse from a first pass over all blocks

    Args:
        layer: the layer whose weights are asked for.
        a: queries (z, n, a), learned queries (n, a), or (z, r, n, a).
        blocks: as `CrossAttention.attend_blocks` takes them, but for iterators: they are read twice.
        summaries: `TopK`, `Highlight`, `Entropy`, `Argmax`, `Rows`, each of "each" head or of the "mean".
        query_positions: integers (n,) or (z, n), for a position part.
        progress: called after each block of the first pass with the state.
        state: as `attend_blocks` takes it; one of a finished pass spares the first.
        plan: read by this plan.

    Returns:
        A list with what each summary gives, on the CPU or device of the blocks. `Highlight` and `Rows` have a number for each
        position of B, so their results, and nothing else, grow with it.

    Raises:
        ValueError: as `attend_blocks`; an iterator, which can be read once.
        TypeError: `Alignment`, whose path needs whole rows in order, or a summary that is not of this library.

    Cost: two passes; a block of 1.5 million scores at a time.

    Example:
        >>> import torch
        >>> from crossattention.maps import TopK, attention_map_blocks
        >>> layer = CrossAttention(48, 32, heads=4)
        >>> b = torch.randn(1, 700, 32)
        >>> [best] = attention_map_blocks(layer, torch.randn(1, 5, 48), b.split(256, 1), [TopK(3)])
        >>> best.positions.shape
        torch.Size([1, 4, 5, 3])
    """
    check_summaries(summaries)
    check_is_tensor("queries", a)
    for summary in summaries:
        if type(summary) not in _KEPT:
            raise TypeError(
                f"{type(summary).__name__} needs whole rows of the map, which a context in blocks never has; over blocks there are "
                f"{', '.join(kind.__name__ for kind in _KEPT)}"
            )
    with torch.no_grad():
        stream = Stream(layer, a, blocks, query_positions, plan)
        if stream.is_once:
            raise ValueError("maps read the blocks twice, but an iterator can be read once; pass a list, a RowFile, or the like")
        state = BlocksState() if state is None else state
        stream.start(state)
        lse = stream.read(state, progress, stream.queries, stream.projected).lse
        kept = [_KEPT[type(summary)](summary) for summary in summaries]
        for start, weights in _columns(stream, lse):
            if a.dim() == 4:
                weights = weights.unflatten(2, (a.shape[1], a.shape[2])).transpose(1, 2)
            mean = weights.mean(-3) if any(summary.heads == "mean" for summary in summaries) else None
            for one, summary in zip(kept, summaries, strict=True):
                one.update(weights if mean is None or summary.heads == "each" else mean, start)
        return [one.result() for one in kept]


def _columns(stream: Stream, lse: Tensor) -> Any:
    """Some columns of the map in turn: the first one's position, and weights (z, h, n, columns)."""
    rows, start = max(1, lse.numel()), 0
    step = max(1, BLOCK_SCORES // rows)
    base = lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)
    heads = stream.layer.heads
    for block, mask in stream.read_from(0):
        part = stream.part(block, mask, start, stream.projected)
        for first in range(0, block.shape[1], step):
            here = slice(first, first + step)
            cut = part.mask if part.mask is None or part.mask.shape[-1] == 1 else part.mask[..., here]
            scores = scores_of_part(stream.queries, Part(part.keys[:, :, here], part.values[:, :, here], cut), stream.layer.scale)
            weights = scores.sub_(base).exp_()
            yield start + first, weights.unflatten(2, (heads // weights.shape[1], -1)).flatten(1, 2)
        if block.shape[1] == 0 and start == 0:  # so that every summary has seen the shape of the rows
            yield 0, lse.new_zeros(*lse.shape, 0).unflatten(2, (heads // lse.shape[1], -1)).flatten(1, 2)
        start += block.shape[1]


class _Top:
    """The k largest so far: those of earlier columns stand first, so that of equal weights the lowest position stays."""

    def __init__(self, summary: TopK) -> None:
        self.k = summary.k
        self.weights: Tensor | None = None
        self.positions: Tensor | None = None

    def update(self, weights: Tensor, start: int) -> None:
        best, at = top(weights, min(self.k, weights.shape[-1])) if weights.shape[-1] else (weights, weights.long())
        at = at + start
        if self.weights is not None and self.positions is not None:
            best, at = torch.cat((self.weights, best), -1), torch.cat((self.positions, at), -1)
            best, order = top(best, min(self.k, best.shape[-1])) if best.shape[-1] else (best, at)
            at = at.gather(-1, order)
        self.weights, self.positions = best, at

    def result(self) -> Top:
        assert self.weights is not None and self.positions is not None
        return Top(self.weights, self.positions)


class _Mass:
    def __init__(self, summary: Highlight) -> None:
        self.found: list[Tensor] = []

    def update(self, weights: Tensor, start: int) -> None:
        self.found.append(weights.sum(-2, dtype=torch.float64).to(weights.dtype))

    def result(self) -> Tensor:
        return torch.cat(self.found, -1)


class _Spread:
    def __init__(self, summary: Entropy) -> None:
        self.total: Tensor | None = None

    def update(self, weights: Tensor, start: int) -> None:
        more = torch.special.entr(weights).sum(-1, dtype=torch.float64)
        self.total = more if self.total is None else self.total.add_(more)
        self.dtype = weights.dtype

    def result(self) -> Tensor:
        assert self.total is not None
        return self.total.to(self.dtype)


class _Most(_Top):
    def __init__(self, summary: Argmax) -> None:
        self.k, self.weights, self.positions = 1, None, None

    def result(self) -> Any:
        assert self.weights is not None and self.positions is not None
        if self.weights.shape[-1] == 0:
            return torch.full(self.weights.shape[:-1], -1, device=self.weights.device)
        return self.positions[..., 0].masked_fill(self.weights[..., 0] == 0.0, -1)


class _Some:
    def __init__(self, summary: Rows) -> None:
        self.queries = summary.queries
        self.found: list[Tensor] = []

    def update(self, weights: Tensor, start: int) -> None:
        n = weights.shape[-2]
        for query in self.queries:
            if not -n <= query < n:
                raise ValueError(f"Rows asks for query {query}, but there are {n} queries; indices go from {-n} to {n - 1}")
        self.found.append(weights[..., [query % n for query in self.queries], :])

    def result(self) -> Tensor:
        return torch.cat(self.found, -1)


_KEPT: dict[type, Any] = {TopK: _Top, Highlight: _Mass, Entropy: _Spread, Argmax: _Most, Rows: _Some}
