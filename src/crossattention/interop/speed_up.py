"""`speed_up`: the cross-attention of somebody else's model, run by the planner in place, and given back by `undo`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn

from crossattention.interop import replace_torch_nn
from crossattention.interop.checking import BothWays, Example
from crossattention.interop.replacement import LeftAlone, Library, Replaceable, Replacement, replacement_at
from crossattention.interop.running import check_runs_in_python
from crossattention.interop.seats import Seat

LIBRARIES = ("timm", "diffusers", "x_transformers", "transformers")
"""Looked for where they are imported; each has a file `replace_NAME` here that implements `replacement.Library`."""


def speed_up(model: nn.Module, example: Example | None = None, *, tolerance: float | None = None) -> Changes:
    """Run the cross-attention inside a model by plans, on the model's own weights, in place, until `changes.undo()`.

    out[z, n] = sum over heads of softmax(A Wq Wk^T B^T scale) B Wv Wo, evaluated in the order that the planner chooses by size

    Replaced is how modules compute, never what they are: state dict, parameters, hooks, dtype, device and training mode stay, and
    gradients reach the same parameters. Where the planner sees no gain, while a module trains with dropout, inside `torch.compile`,
    exports, traces and functional transforms, the module's own code runs. Without gradients, a context that arrives twice in a row
    is projected once more and that is kept, as long as the context and the weights stay what they are. A copy of the model, or a
    pickled one, is the model as it was.

    A row that may attend nothing gets zero attention (the output bias), where the module's own code may give NaN or the mean of
    what is masked; while that code runs, its own.

    Args:
        model: the model, or a part of it; not compiled.
        example: what the model is called with to check it: a tensor, a tuple of positional arguments, a mapping of keyword
            arguments, or a function of the model, as `lambda model: model.generate(ids)`. It runs both ways, in evaluation mode,
            without gradients, each time on a copy of the inputs (a function makes its own); every replaced call is compared with
            the module's own, and the outputs with each other, caches, numbers and texts in them included. Rows without a live key
            are not compared.
        tolerance: largest difference allowed in the check, relative to the largest number of an output where that is above one;
            default 1e-5 in float32, 1e-10 in float64, 1e-2 and 4e-2 in float16 and bfloat16.

    Returns:
        The changes: `print` them for what was replaced, the plans, what was left alone and why; `changes.undo()` takes them back.

    Raises:
        TypeError: `model` is no module, or is compiled, scripted or replicated.
        ValueError: no attention module in it is known; a recording of it is open; or the example came out differently: then
            everything is as it was before, and the message says in which module, and by how much.

    Cost: nothing is copied. Kept, for the last context of each layer, are its keys and values. The check runs the example twice.
    Source: docs/speed_up.md.

    Example:
        >>> import torch
        >>> decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, batch_first=True), 2).eval()
        >>> inputs = torch.randn(2, 1, 32), torch.randn(2, 70, 32)
        >>> before = decoder(*inputs)
        >>> changes = speed_up(decoder, example=inputs)
        >>> len(changes.replaced), torch.allclose(decoder(*inputs), before, atol=1e-5)
        (2, True)
        >>> changes.undo()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"speed_up expects a torch.nn.Module, got {type(model).__name__}; pass the model itself")
    check_runs_in_python(model, "speed up")
    if tolerance is not None and not tolerance >= 0.0:
        raise ValueError(f"tolerance must be a number of zero or more, got {tolerance!r}")
    names = {id(module): name or type(model).__name__ for name, module in model.named_modules()}
    _refuse_recorded(model, names)
    replacements, left = _look_through(model, names)
    if not replacements and not left:
        raise ValueError(
            f"{type(model).__name__} has no attention module that is known here: torch.nn.MultiheadAttention is, and those of "
            "timm, diffusers, x-transformers and transformers if imported; crossattention.CrossAttention plans by itself"
        )
    for replacement in replacements:
        replacement.take_place()
    changes = Changes(type(model).__name__, names, replacements, left)
    if example is not None:
        try:
            changes._check(model, example, tolerance)
        except BaseException:
            changes.undo()
            raise
    return changes


@dataclass(frozen=True)
class Left:
    """An attention module that `speed_up` left as it is.

    Args:
        name: as in `model.named_modules()`.
        kind: its class.
        why: the reason.
    """

    name: str
    kind: str
    why: str


class Changes:
    """What `speed_up` changed in a model. `print` it; `undo()` it; as a context manager it is undone at the end of the block.

    Several changes of one model, or of parts of it, may be undone in any order.
    """

    def __init__(self, of: str, names: dict[int, str], replacements: Sequence[Replacement], left: Sequence[Left]) -> None:
        self._of, self._names, self._replacements = of, names, tuple(replacements)
        self.left = tuple(left)
        self.checked: str | None = None

    @property
    def replaced(self) -> tuple[str, ...]:
        """Names of the modules whose attention runs by plans, as in `model.named_modules()`; each once."""
        return tuple(dict.fromkeys(self._name(one) for one in self._replacements if one.what.plans))

    @property
    def is_undone(self) -> bool:
        """Whether they were taken back."""
        return all(one.is_retired for one in self._replacements)

    def undo(self) -> None:
        """Give every module its own methods back, and drop what is kept. Does nothing the second time."""
        for one in self._replacements:
            if not one.is_retired:
                one.retire()

    def forget(self) -> None:
        """Drop what is kept of contexts: after an edit that leaves no trace, as through `.data`."""
        for one in self._replacements:
            for plans in one.what.plans:
                plans.forget()

    def __enter__(self) -> Changes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def __repr__(self) -> str:
        state = ", undone" if self._replacements and self.is_undone else ""
        return f"Changes({self._of}: {len(self.replaced)} modules replaced, {len(self.left)} left alone{state})"

    def _lines(self) -> Iterator[str]:
        state = " (undone)" if self._replacements and self.is_undone else ""
        yield f"{self._of}: attention of {len(self.replaced)} modules runs by plans, {len(self.left)} left alone{state}"
        for (kind, lines), names in self._alike().items():
            yield f"  {', '.join(names)} ({kind})"
            yield from (f"    {line}" for line in lines)
        for note in dict.fromkeys(note for one in self._replacements for note in one.what.notes):
            yield f"  note: {note}"
        for why, names in self._left_by_reason().items():
            yield f"  left alone: {', '.join(names)}: {why}"
        if self._replacements:
            yield "  rows without a live key give zero attention, so the output bias, whatever the model gave before"
        if self.checked is not None:
            yield f"  {self.checked}"

    def _alike(self) -> dict[tuple[str, tuple[str, ...]], list[str]]:
        """Names of the replaced methods by what there is to say of them."""
        alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for one in self._replacements:
            lines = tuple(line for plans in one.what.plans for line in plans.describe())
            method = "" if one.method == "forward" else f".{one.method}"
            alike.setdefault((type(one.owner).__name__, lines), []).append(self._name(one) + method)
        return alike

    def _left_by_reason(self) -> dict[str, list[str]]:
        reasons: dict[str, list[str]] = {}
        for left in self.left:
            reasons.setdefault(left.why, []).append(f"{left.name} ({left.kind})")
        return reasons

    def _name(self, one: Replacement) -> str:
        return self._names[id(one.owner)]

    def _check(self, model: nn.Module, example: Any, tolerance: float | None) -> None:
        both = BothWays(self._replacements, tolerance)
        whole = both.run_example(model, example)
        worst = {one: both.worst[id(one)] for one in self._replacements if id(one) in both.worst}
        apart = [one for one, found in worst.items() if found.excess > 1.0]
        if apart:
            first = max(apart, key=lambda one: worst[one].excess)
            more = f", and {len(apart) - 1} others" if len(apart) > 1 else ""
            raise ValueError(
                f"{self._name(first)} ({type(first.owner).__name__}) gave something else on the example: {worst[first]}{more}; "
                "the model is as it was before. Pass a tolerance if that is good enough"
            )
        if whole.excess > 1.0:
            raise ValueError(
                f"the output of {self._of} on the example is another: {whole}, though every replaced call agreed by itself; "
                "the model is as it was before. Pass a tolerance if that is good enough"
            )
        largest = max((found.apart for found in worst.values()), default=0.0)
        empty = "; rows without a live key were left out" if both.had_empty_rows else ""
        self.checked = (
            f"checked on the example: {len(worst)} replaced methods ran, largest difference {largest:.1e} in one, "
            f"{whole.apart:.1e} in the model's output{empty}"
        )


def _look_through(model: nn.Module, names: dict[int, str]) -> tuple[list[Replacement], list[Left]]:
    """What can be replaced, and what is left; nothing is changed yet."""
    replacements, left, seen = [], [], set()
    for library in _libraries():
        for found in library.find(model):
            method = found.method if isinstance(found, Replaceable) else "forward"
            if (id(found.owner), method) in seen:
                continue
            seen.add((id(found.owner), method))
            why = found.why if isinstance(found, LeftAlone) else _why_not(found.owner, method)
            if why is None:
                replacements.append(Replacement(found))  # type: ignore[arg-type]
            else:
                left.append(Left(names[id(found.owner)], type(found.owner).__name__, why))
    return replacements, left


def _libraries() -> Iterator[Library]:
    yield replace_torch_nn
    for name in LIBRARIES:
        if name in sys.modules and importlib.util.find_spec(f"crossattention.interop.replace_{name}"):
            yield importlib.import_module(f"crossattention.interop.replace_{name}")  # type: ignore[misc]


def _why_not(owner: nn.Module, method: str) -> str | None:
    """Why nothing can be put in the place of a method, or None."""
    if replacement_at(owner, method) is not None:
        return "it runs by plans already, by an earlier speed_up"
    stands = owner.__dict__.get(method)
    if stands is None or isinstance(stands, Replacement):
        return None
    if isinstance(stands, types.MethodType) and stands.__self__ is owner and stands.__func__ is getattr(type(owner), method):
        return None
    return f"it has a {method} of its own, which something else put there"


def _refuse_recorded(model: nn.Module, names: dict[int, str]) -> None:
    for module in model.modules():
        if any(isinstance(stands, Seat) for stands in module.__dict__.values()):
            raise ValueError(
                f"{names[id(module)]} is being recorded, and a recording has to see one way of computing; call speed_up before "
                "`with record_attention(...)`, or after it"
            )


__all__ = ["Changes", "Left", "speed_up"]
