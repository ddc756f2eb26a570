"""An example run both ways: each replaced call against the module's own, and what the whole model gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from crossattention.interop import replacement
from crossattention.interop.comparing import Found, copied, difference
from crossattention.interop.replacement import Replacement


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
        self.worst: dict[int, Found] = {}
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
            self.worst[id(replaced)] = Found(float("inf"), 0.0, "", "it gives an output of another structure")
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
        self.worst[id(replaced)] = max(self.worst.get(id(replaced), found), found, key=lambda one: one.excess)

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

    def run_example(self, model: nn.Module, example: Any) -> Found:
        """Run the model both ways in evaluation mode, on copies of the inputs, and give the difference of what it gives."""
        training = {module: module.training for module in model.modules()}
        devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
        model.eval()
        try:
            with torch.no_grad(), self.looking():
                outs = []
                for self._is_replaced_run in (True, False):
                    with torch.random.fork_rng(devices=devices):
                        outs.append(call(model, example if _makes_inputs(example) else copied(example)))
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
    if _makes_inputs(example):
        return example(model)
    return model(example)


def _makes_inputs(example: Any) -> bool:
    """Whether an example is a function of the model."""
    return callable(example) and not isinstance(example, Tensor | Mapping | tuple | list)


def _kept(leaf: Any) -> Any:
    """What a replaced call gave, as it was: what follows may write into it."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


Example = Tensor | Sequence[Any] | Mapping[str, Any] | Callable[[nn.Module], Any]
