"""`record_attention`: what a model's cross-attention reads, seen while the model runs as it always does."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from crossattention.interop import diffusers, huggingface, ours, timm, torch_nn
from crossattention.interop.page import page_of
from crossattention.interop.recording import Generation, Layer, copied, recorded_of
from crossattention.interop.running import check_runs_in_python
from crossattention.interop.seats import Look, Seat, seat_at, unwatch, watch
from crossattention.maps.compute import check_summaries
from crossattention.maps.summaries import Highlight, Summary, TopK

if TYPE_CHECKING:
    from crossattention.maps.blocks import MapRows


def record_attention(model: nn.Module, summaries: Sequence[Summary] | None = None, *, self_attention: bool = False) -> Recording:
    """Record summaries of the cross-attention inside a model while it runs.

    weights[z, h, n, m] = softmax over m of the scores that the model's own kernel computes, before dropout

    What the model hands to its attention kernel is read beside the kernel, which runs as it is: outputs are the same to the last
    bit, fused kernels stay, and the matrix is never held, unless the model makes it itself. Known are the layers of this library,
    `torch.nn.MultiheadAttention`, and the attention modules of transformers, timm and diffusers. After the block nothing is left.

    Args:
        model: the model, or a part of it; not compiled.
        summaries: what to keep, as for `attention_map`; default `[TopK(8), Highlight()]`. Each call works on copies.
        self_attention: whether to record self-attention too.

    Returns:
        A `Recording`, to be entered once.

    Raises:
        TypeError: `model` is no module, is compiled or scripted, or something in the list is no summary.
        ValueError: no attention in the model that could be cross-attention; an empty list of summaries.

    Cost: beside each call its scores once more, in blocks of 1.5 million; for `torch.nn.MultiheadAttention` its projections of
        queries and keys too, for our layers that of queries. Memory: what the summaries keep; while something is generated also its
        queries and one set of keys (docs/record.md).

    Example:
        >>> import torch
        >>> from crossattention import CrossAttention
        >>> layer = CrossAttention(48, 32, heads=4)
        >>> with record_attention(layer, [Highlight()]) as seen:
        ...     out = layer(torch.randn(2, 5, 48), torch.randn(2, 7, 32))
        >>> seen.layers["CrossAttention"].merged[0].shape
        torch.Size([2, 4, 7])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"record_attention expects a torch.nn.Module, got {type(model).__name__}; pass the model itself")
    summaries = (TopK(8), Highlight()) if summaries is None else summaries
    check_summaries(summaries)
    check_runs_in_python(model, "record")
    return Recording(model, copied(summaries), self_attention)


class Recording:
    """What `record_attention` returns: a context manager, and afterwards what was seen.

    A recording hears of the calls that its own thread makes, and of those of threads that have no recording of this model open.
    """

    def __init__(self, model: nn.Module, summaries: tuple[Summary, ...], self_attention: bool) -> None:
        self.thread = threading.get_ident()
        self._of, self._summaries = type(model).__name__, summaries
        self._kinds = ("cross", "memory", "self") if self_attention else ("cross", "memory")
        self._names = {id(module): name or type(model).__name__ for name, module in model.named_modules()}
        self._looks = list(_looks_into(model, self_attention))
        self._generating = ours.generating_modules(model)
        self._seats: list[Seat] | None = None
        self._lock = threading.RLock()
        self._layers: dict[tuple[int, str], Layer] = {}
        self._obstacles: dict[str, str] = {}
        self._generations: dict[int, Generation] = {}
        self._ran_self = False

    def __enter__(self) -> Recording:
        if self._seats is not None:
            raise ValueError("this recording was entered before; call record_attention(model, ...) again for another one")
        self.thread, self._seats = threading.get_ident(), []
        for look in self._looks:
            self._seats.append(seat_at(look, self))
        for module in self._generating:
            watch(module, self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for seat in self._seats or ():
            seat.leave(self)
        for module in self._generating:
            unwatch(module, self)
        self._generations.clear()
        self._seats, self._looks, self._generating = [], [], []  # the model may go

    # ------------------------------------------------------------------------------------------------- what was seen

    @property
    def layers(self) -> dict[str, Layer]:
        """What was recorded, by the names of `model.named_modules()`, in the order in which the layers first ran.

        Raises:
            ValueError: nothing was recorded yet, or a layer ran a kernel that cannot be seen.
        """
        if self._obstacles:
            name, why = next(iter(self._obstacles.items()))
            raise ValueError(f"{name} cannot be recorded: {why}")
        if not self._layers:
            raise ValueError(self._why_nothing())
        kinds = [layer.name for layer in self._layers.values()]
        return {
            layer.name if kinds.count(layer.name) == 1 else f"{layer.name} ({layer.kind})": layer for layer in self._layers.values()
        }

    def view(
        self,
        path: str | Path,
        *,
        queries: Any = None,
        context: Any = None,
        item: int | tuple[int, int] = 0,
        title: str | None = None,
        layers: Sequence[str] | None = None,
    ) -> Path:
        """Write a page (.html) or figure (.png, .svg) of one item: what each query reads, layer by layer.

        Args:
            path: where to; its ending says what.
            queries: a label for each query, as tokens; or a side of `crossattention.views.pages`. Default: numbers.
            context: the same for the context: tokens, or a `TextSide`, `ImageSide`, `SoundSide`, `LongSide`.
            item: which item of the batch, (z', r') where r sequences read each context.
            title: default: the model's class.
            layers: names of those that are shown, as in `.layers`; default all, which must then read the same two sequences.

        Returns:
            The path.

        Raises:
            ValueError: nothing was recorded, no `TopK` was asked for, several calls that are not merged, labels that do not fit, an
                item or a layer that is not there, layers of unlike lengths, another ending.
            TypeError: labels that are neither a list nor a side; one name in the place of a list of them.
        """
        from crossattention.views import pages

        shown = self._chosen(layers)
        view = page_of(pages, shown, self._summaries, queries, context, item, title or self._of)
        path = Path(path)
        if path.suffix.lower() not in (".html", ".png", ".svg"):
            raise ValueError(f"view writes .html, .png or .svg, got {path.name!r}; choose one of these endings")
        (pages.write_page if path.suffix.lower() == ".html" else pages.write_figure)(view, path)
        return path

    def _chosen(self, names: Sequence[str] | None) -> dict[str, Layer]:
        """Some of the layers, by their names."""
        found = self.layers
        if names is None:
            return found
        if isinstance(names, str):
            raise TypeError(f"layers expects a list of names, got the text {names!r}; write [{names!r}]")
        wrong = [name for name in names if name not in found]
        if wrong or not names:
            what = f"{wrong[0]!r}" if wrong else "an empty list"
            raise ValueError(f"layers expects names of layers that were recorded, {', '.join(found)}; got {what}")
        return {name: found[name] for name in names}

    def __repr__(self) -> str:
        rows = [f"  {layer.name}: {layer.kind}, {layer.heads} heads, {len(layer.calls)} calls" for layer in self._layers.values()]
        return "\n".join([f"Recording of {self._of}, {len(rows)} layers", *rows])

    def _why_nothing(self) -> str:
        if self._seats is None:
            return "nothing was recorded: run the model within `with record_attention(model, ...) as seen:`"
        if self._ran_self:
            return (
                "nothing was recorded: only self-attention ran, and record_attention keeps cross-attention; give the model a "
                "second sequence, or pass self_attention=True"
            )
        return (
            "nothing was recorded: no attention layer of the model ran within the block; run the model there, itself and not a "
            "compiled, scripted or replicated copy, and in this thread or one without a recording of its own"
        )

    # -------------------------------------------------------------------------------------------- what looks tell it

    def wants(self, kind: str) -> bool:
        """Whether attention of this kind is recorded."""
        self._ran_self = self._ran_self or kind == "self"
        return kind in self._kinds

    def take(self, module: nn.Module, kind: str, make_rows: Callable[[], MapRows], cache: object = None) -> None:
        """A call of an attention layer. What fails here is told when the recording is used, and never stops the model."""
        try:
            with torch.no_grad():
                rows = make_rows()
            recorded = recorded_of(rows, self._summaries)
        except Exception as error:
            self.trouble(module, kind, f"{type(error).__name__}: {error}")
            return
        with self._lock:
            layer = self._layers.setdefault((id(module), kind), Layer(self._names[id(module)], kind))
            layer.heads = recorded.shape[-3]
            layer.calls.append(recorded)
            generation = self._generations.get(threading.get_ident())
            if generation is None:
                layer._sequences.append(recorded)
            else:
                generation.add(layer, rows, cache)

    def trouble(self, module: nn.Module, kind: str, why: str) -> None:
        """A call that cannot be recorded."""
        if self.wants(kind):
            self._obstacles.setdefault(self._names[id(module)], why)

    def begin(self) -> None:
        """This thread begins to generate."""
        self._generations[threading.get_ident()] = Generation(self._summaries)

    def follow(self, beams: torch.Tensor) -> None:
        """The rows (z, beams, t) whose steps gave the best sequences so far their symbols, -1 after their ends."""
        generation = self._generations.get(threading.get_ident())
        if generation is not None:
            generation.beams = beams

    def end(self, count: int | None) -> None:
        """This thread has generated so many sequences; None if it broke off."""
        generation = self._generations.pop(threading.get_ident(), None)
        if generation is not None:
            generation.end(count)

    def end_with(self, hypotheses: Sequence[Sequence[Any]] | None) -> None:
        """This thread has generated these hypotheses; None if it broke off."""
        generation = self._generations.pop(threading.get_ident(), None)
        if generation is not None and hypotheses is not None:
            generation.end_with([[one.rows for one in some] for some in hypotheses])


def _looks_into(model: nn.Module, self_attention: bool) -> Iterator[Look]:
    """How to look into every attention layer of a model.

    Raises:
        ValueError: there is none that could be asked for.
    """
    own = ours.attention_modules(model)
    theirs = [(torch_nn, module) for module in torch_nn.attention_modules(model)]
    for library in (huggingface, timm, diffusers):
        if library.__name__.rpartition(".")[2].replace("huggingface", "transformers") in sys.modules:
            theirs += [(library, module) for module in library.attention_modules(model)]
    possible = [m for m in own if self_attention or not isinstance(m, ours.SelfAttention)]
    possible += [m for library, m in theirs if self_attention or library is torch_nn or library.can_cross(m)]
    if not possible:
        raise ValueError(_why_none(model, len(own) + len(theirs)))
    if self_attention and (fast := torch_nn.fast_encoder_layers(model)):
        torch_nn.refuse_fast_path(fast)
    for module in own:
        yield from ours.looks(module)
    for library, module in theirs:
        yield library.look(module)
    yield from huggingface.generation_looks(model)


def _why_none(model: nn.Module, others: int) -> str:
    if others:
        return (
            f"{type(model).__name__} has {others} attention layers, and none that reads another sequence; record_attention keeps "
            "cross-attention, pass self_attention=True to record these"
        )
    return (
        f"{type(model).__name__} has no attention layer that is known here: this library's, torch.nn.MultiheadAttention, and those "
        "of transformers, timm and diffusers are; attention_map(layer, a, b) shows one layer's weights"
    )
