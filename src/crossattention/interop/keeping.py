"""What was made of a context, kept for as long as the same context and the same weights arrive.

Kept is only what surely is not stale. Seen are: another tensor, also one at the same address; edits in place, through any view;
other weights, optimizer steps, loading, moving, casting. Tensors of inference mode have no versions: their numbers are compared
with a copy. An edit through `.data`, or of memory that another library shares, leaves no trace: call `changes.forget()` after one.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from crossattention.attention import PreparedContext
from crossattention.attention.prepared import fingerprint, watch


@dataclass(frozen=True)
class _Made:
    """What was made of a context, and of which numbers and weights."""

    prepared: PreparedContext
    is_context: tuple[bool, bool]
    planned_length: int
    copies: tuple[Tensor | None, ...]
    weights: tuple[Tensor, ...]
    prints: tuple[Any, ...]


class Arrival:
    """A context that arrived, and what was made of it; a thread that holds it never meets what was made of another's."""

    def __init__(self, roots: tuple[weakref.ref[Tensor], ...], mark: tuple[Any, ...]) -> None:
        self._roots, self._mark = roots, mark
        self._made: _Made | None = None

    def is_of(self, roots: Sequence[Tensor], mark: tuple[Any, ...]) -> bool:
        """Whether the same context arrived again."""
        return self._mark == mark and all(ref() is root for ref, root in zip(self._roots, roots, strict=True))

    def recall(self, contexts: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[PreparedContext, int] | None:
        """What was made of the context, and the length of queries that it was planned for; None if nothing was, or it is stale."""
        made = self._made
        if made is None or made.prints != _prints(weights):
            return None
        if any(copy is not None and not torch.equal(copy, now) for copy, now in zip(made.copies, contexts, strict=True)):
            return None
        prepared, (keys_are, values_are) = made.prepared, made.is_context
        if keys_are:
            prepared = replace(prepared, keys=contexts[0].unsqueeze(1))
        if values_are:
            prepared = replace(prepared, values=contexts[-1].unsqueeze(1))
        return prepared, made.planned_length

    def keep(self, contexts: Sequence[Tensor], weights: Sequence[Tensor], prepared: PreparedContext, planned_length: int) -> None:
        """Keep what was made of it. Weights of inference mode leave no trace of an edit, so nothing is kept of them."""
        if any(weight.is_inference() for weight in weights):
            return
        for weight in weights:
            watch(weight)
        copies = tuple(context.clone() if context.is_inference() else None for context in contexts)
        # A view of the context would keep it alive, so that its end is never heard of: it is taken anew of what arrives.
        is_context = _shares(prepared.keys, contexts[0]), _shares(prepared.values, contexts[-1])
        nothing = prepared.keys.new_empty(0)
        prepared = replace(
            prepared,
            keys=nothing if is_context[0] else prepared.keys,
            values=nothing if is_context[1] else prepared.values,
        )
        # The weights themselves are held too: the address of one that is gone may be another's.
        self._made = _Made(prepared, is_context, planned_length, copies, tuple(weights), _prints(weights))


class Kept:
    """The last context that arrived and what was made of it, dropped with the context."""

    def __init__(self) -> None:
        self._last: Arrival | None = None

    def arrival(self, contexts: Sequence[Tensor], arrived: Sequence[Tensor] = ()) -> tuple[Arrival | None, bool]:
        """The arrival of contexts that a call brings, and whether they are those of the call before.

        None where it cannot be told whether they are what they were. `arrived` are the same as the caller holds them, where the
        contexts are views made of them at each call: a view of an inference tensor does not know whose it is.
        """
        if any(type(context) not in (Tensor, nn.Parameter) for context in contexts):
            return None, False
        roots, mark = [_root(context) for context in arrived or contexts], _mark(contexts)
        last = self._last
        if last is not None and last.is_of(roots, mark):
            return last, True
        self._last = last = Arrival(tuple(weakref.ref(root, self._drop) for root in roots), mark)
        return last, False

    def was_last(self, context: Tensor) -> bool:
        """Whether this, or the tensor that it is a view of, arrived last, whatever was written to it since."""
        last = self._last
        return last is not None and last._roots[0]() is _root(context)

    def forget(self) -> None:
        """Drop it."""
        self._last = None

    def _drop(self, gone: weakref.ref[Tensor]) -> None:
        last = self._last
        if last is not None and any(ref is gone for ref in last._roots):
            self._last = None


def _shares(made: Tensor, context: Tensor) -> bool:
    """Whether what was made of a context is the context itself, under another shape."""
    return made.untyped_storage().data_ptr() == context.untyped_storage().data_ptr()


def _root(tensor: Tensor) -> Tensor:
    """The tensor whose memory and version a view shares."""
    return tensor if tensor._base is None else tensor._base


def _mark(contexts: Sequence[Tensor]) -> tuple[Any, ...]:
    """What tells a context from another and from itself after an edit, beside its identity; and the mode that it is read in."""
    device = contexts[0].device.type
    is_cast = torch.is_autocast_enabled(device)
    mode = (torch.is_inference_mode_enabled(), torch.get_autocast_dtype(device) if is_cast else None)
    return (
        mode,
        *(
            (-1 if t.is_inference() else t._version, t.data_ptr(), t.shape, t.stride(), t.dtype, t.device, t.is_conj(), t.is_neg())
            for t in contexts
        ),
    )


def _prints(weights: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple((*fingerprint(weight), weight.device) for weight in weights)
