"""An example run both ways: each replaced call against the module's own, and what the whole model gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from crossattention.interop import replacement
from crossattention.interop.replacement import Replacement

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Largest difference in a dtype, relative to the largest number of the output where that is above one."""


class BothWays:
    """Runs an example the replaced way, then the module's own, and compares call by call.

    In a row without a live key the two differ by definition: such rows are not compared, and the own way goes on with the replaced
    way's, so that what follows can be compared.
    """

    def __init__(self, replacements: Sequence[Replacement], tolerance: float | None) -> None:
        self._replacements, self._tolerance = replacements, tolerance
        self._is_replaced_run = True
        self._given: dict[int, list[tuple[Any, Sequence[Tensor | None]]]] = {}
        self._turn: dict[int, int] = {}
        self._live: Sequence[Tensor | None] = ()
        self.worst: dict[int, tuple[float, float]] = {}
        self.had_empty_rows = False

    def run(self, replaced: Replacement, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call, in the way whose turn it is."""
        if not replaced.what.checks_outputs:
            return replaced.what.run(replaced.own, args, kwargs) if self._is_replaced_run else replaced.own(*args, **kwargs)
        if self._is_replaced_run:
            before, self._live = self._live, ()
            out = replaced.what.run(replaced.own, args, kwargs)
            self._given.setdefault(id(replaced), []).append((pytree.tree_map(_kept, out), self._live))
            self._live = before
            return out
        out = replaced.own(*args, **kwargs)
        turn = self._turn.get(id(replaced), 0)
        self._turn[id(replaced)] = turn + 1
        given = self._given.get(id(replaced), [])
        return self._compare(replaced, out, *given[turn]) if turn < len(given) else out

    def note_live(self, live: Sequence[Tensor | None]) -> None:
        """Which rows of the call that runs had a live key."""
        if self._is_replaced_run:
            self._live = live

    def _compare(self, replaced: Replacement, own: Any, ours: Any, live: Sequence[Tensor | None]) -> Any:
        leaves, spec = pytree.tree_flatten(own)
        others, other_spec = pytree.tree_flatten(ours)
        if spec != other_spec:
            self.worst[id(replaced)] = (float("inf"), 0.0)
            return own
        rows = iter(live)
        patched = []
        for leaf, other in zip(leaves, others, strict=True):
            if other is None:  # weights that nobody asked for
                patched.append(leaf)
                continue
            alive = next(rows, None) if isinstance(leaf, Tensor) else None
            if alive is not None and not bool(alive.all()):
                self.had_empty_rows = True
                leaf, other = torch.where(alive, leaf, other.to(leaf.dtype)), other
            patched.append(leaf)
            self._note(replaced, leaf, other)
        return pytree.tree_unflatten(patched, spec)

    def _note(self, replaced: Replacement, own: Any, ours: Any) -> None:
        found = difference(own, ours, self._tolerance)
        self.worst[id(replaced)] = max(self.worst.get(id(replaced), found), found, key=excess)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """While it is entered, replaced calls run by this."""
        for one in self._replacements:
            one.check = self
        replacement._checks.append(self)
        try:
            yield
        finally:
            replacement._checks.remove(self)
            for one in self._replacements:
                one.check = None

    def run_example(self, model: nn.Module, example: Any) -> tuple[float, float]:
        """Run the model both ways in evaluation mode and give the difference of what it gives, and what is allowed."""
        training = {module: module.training for module in model.modules()}
        devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
        model.eval()
        try:
            with torch.no_grad(), self.looking():
                outs = []
                for self._is_replaced_run in (True, False):
                    with torch.random.fork_rng(devices=devices):
                        outs.append(call(model, example))
        finally:
            for module, mode in training.items():
                module.training = mode
        return difference(outs[1], outs[0], self._tolerance)


def call(model: nn.Module, example: Any) -> Any:
    """The model called with an example: a function of the model, keyword arguments, positional ones, or a single one."""
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, tuple | list):
        return model(*example)
    if callable(example) and not isinstance(example, Tensor):
        return example(model)
    return model(example)


def difference(own: Any, ours: Any, tolerance: float | None) -> tuple[float, float]:
    """The largest difference between two outputs, relative to the largest number where that is above one; and what is allowed.

    Of several tensors that which exceeds what is allowed the most. Infinite where structure, shape, integers or NaN differ.
    """
    pairs = list(_tensor_pairs(own, ours))
    found = [(_apart(a, b), _allowed(a, tolerance)) for a, b in pairs]
    return max(found, key=excess, default=(0.0, _allowed(None, tolerance)))


def excess(found: tuple[float, float]) -> float:
    """How many times what is allowed a difference is; above one it is too large."""
    apart, allowed = found
    return apart / allowed if allowed else (float("inf") if apart else 0.0)


def _tensor_pairs(own: Any, ours: Any) -> Iterator[tuple[Any, Any]]:
    """Tensors that stand at the same place of two outputs, objects with attributes included."""
    if isinstance(own, Tensor) or isinstance(ours, Tensor):
        yield own, ours
    elif isinstance(own, Mapping) and isinstance(ours, Mapping):
        for key in {**own, **ours}:
            yield from _tensor_pairs(own.get(key), ours.get(key))
    elif isinstance(own, tuple | list) and isinstance(ours, tuple | list):
        if len(own) != len(ours):
            yield own, ours
        for one, other in zip(own, ours, strict=False):
            yield from _tensor_pairs(one, other)


def _apart(own: Any, ours: Any) -> float:
    if not isinstance(own, Tensor) or not isinstance(ours, Tensor) or own.shape != ours.shape:
        return float("inf")
    if own.is_nested or ours.is_nested:
        return max((_apart(a, b) for a, b in zip(own.unbind(), ours.unbind(), strict=True)), default=0.0)
    if own.numel() == 0:
        return 0.0
    if not own.is_floating_point():
        return 0.0 if torch.equal(own, ours) else float("inf")
    same = (own == ours) | (own.isnan() & ours.isnan())
    if bool(same.all()):
        return 0.0
    own, ours = own.double(), ours.double()
    apart = torch.where(same, 0.0, (own - ours).abs())
    finite = own[own.isfinite()].abs()
    scale = max(1.0, float(finite.amax()) if finite.numel() else 1.0)
    worst = float(apart.amax())
    return float("inf") if worst != worst else worst / scale


def _allowed(own: Any, tolerance: float | None) -> float:
    if tolerance is not None:
        return tolerance
    return TOLERANCES.get(own.dtype, 0.0) if isinstance(own, Tensor) else TOLERANCES[torch.float32]


def _kept(leaf: Any) -> Any:
    """What a replaced call gave, as it was: what follows may write into it."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


Example = Tensor | Sequence[Any] | Mapping[str, Any] | Callable[[nn.Module], Any]
