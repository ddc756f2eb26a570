"""What `speed_up` puts in the place of a module's method, and what a file of an outside library says of that library's modules.

A library's file has one function, `find(model)`, which yields a `Replaceable` for each method that it can run in another way and a
`LeftAlone` for each attention module that it cannot, with the reason. Nothing of a model is changed while it is looked through.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from crossattention.attention.products import is_transformed
from crossattention.interop.seats import Look, Stand

Own = Callable[..., Any]
Run = Callable[[Own, tuple[Any, ...], dict[str, Any]], Any]


class Plans(Protocol):
    """What runs the attention of a replaced method: it can say what it does, and drop what it keeps."""

    def describe(self) -> list[str]:
        """Lines for `print(changes)`: sizes, and the plans that ran."""
        ...

    def forget(self) -> None:
        """Drop what was made of contexts and kept."""
        ...


@dataclass(frozen=True)
class Replaceable:
    """A method of a module that can be run in another way.

    Args:
        owner: the module.
        run: called with the owner's own method, positional and keyword arguments as the caller gave them. It gives what the own
            method would give; for a call that it does not take it calls that. It is not called inside graphs, traces and functional
            transforms, where the own method runs.
        plans: what runs its attention, for `print(changes)` and `undo`.
        method: name of the method.
        notes: what a reader of `print(changes)` has to know, a sentence each: in which calls the own method runs, what is kept.
        checks_outputs: whether `speed_up(model, example=...)` compares what this method gives; False where that is not a result, as
            the arguments of a loop.
    """

    owner: nn.Module
    run: Run
    plans: tuple[Plans, ...] = ()
    method: str = "forward"
    notes: tuple[str, ...] = ()
    checks_outputs: bool = True


@dataclass(frozen=True)
class LeftAlone:
    """An attention module that is left as it is, and why: a sentence that stands by itself, without a full stop."""

    owner: nn.Module
    why: str


class Library(Protocol):
    """What a file of an outside library offers."""

    def find(self, model: nn.Module) -> Iterator[Replaceable | LeftAlone]:
        """Each method of the model's modules that can be replaced, and each attention module that is left, with the reason."""
        ...


# ------------------------------------------------------------------------------------------------- in a method's place


@dataclass
class _Watched(threading.local):
    """Who records the replaced call that runs in this thread: the module and the recordings, None outside of one."""

    now: tuple[nn.Module, Sequence[Any]] | None = None


_watched = _Watched()


def watchers_of(owner: nn.Module) -> Sequence[Any]:
    """The recordings that want to be told what this module's replaced method reads, in the call that runs now."""
    now = _watched.now
    return now[1] if now is not None and now[0] is owner else ()


def is_watched() -> bool:
    """Whether a recording looks at the replaced call that runs in this thread."""
    return _watched.now is not None


class Check(Protocol):
    """Who compares both ways of running an example (`interop.checking`)."""

    def run(self, replacement: Replacement, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call of a replaced method one way, and note or compare what it gives."""
        ...

    def note_live(self, live: Sequence[torch.Tensor | None]) -> None:
        """Hear which rows of a replaced call had a live key."""
        ...


_checks: list[Check] = []


def is_checking() -> bool:
    """Whether an example is run both ways now, so that `note_live` is heard."""
    return bool(_checks)


def note_live(*live: torch.Tensor | None) -> None:
    """Tell, from within a replaced call, which rows of its output had a live key: only those are compared with the own method's.

    Args:
        live: for each tensor of what the call will give, in order, a bool tensor that broadcasts to it; None if all rows had one.
    """
    for check in _checks:
        check.note_live(live)


REPLICATE = "_replicate_for_data_parallel"
"""The method by which `torch.nn.DataParallel` copies a module's dictionary, with what stands in it, to other devices."""


class Replicas:
    """Makes replicas of a module that run its class's own methods: what stands in their places belongs to the module itself.

    It stands in the module's dictionary beside replacements; a copy of the module, whose methods stand there too, has its own.
    """

    def __init__(self, owner: nn.Module, methods: tuple[str, ...] = ()) -> None:
        self.owner, self.methods = owner, methods

    def __call__(self) -> nn.Module:
        """A replica."""
        replica: nn.Module = getattr(type(self.owner), REPLICATE)(self.owner)
        for name in (REPLICATE, *self.methods):
            replica.__dict__.pop(name, None)
        return replica

    def __deepcopy__(self, memo: dict[int, Any]) -> Replicas:
        return Replicas(memo.get(id(self.owner), self.owner), self.methods)

    def __reduce__(self) -> Any:
        return getattr, (self.owner, REPLICATE)


class Replacement(Stand):
    """A method that runs in another way; a copy of its module, and a pickled one, has the plain method.

    Args:
        what: what is replaced.
    """

    def __init__(self, what: Replaceable) -> None:
        super().__init__(what.owner, what.method)
        self.what = what
        self.own = self._method
        self.is_retired = False
        self.check: Check | None = None
        functools.update_wrapper(self, self._method, updated=())  # the dictionary of what stood here is its own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The method, by a plan; the module's own inside graphs, traces and transforms, and after `undo`."""
        if self.is_retired or torch.compiler.is_compiling() or is_transformed() or torch._C._get_tracing_state():
            return self.own(*args, **kwargs)
        if self.check is not None:
            return self.check.run(self, args, kwargs)
        return self.what.run(self.own, args, kwargs)

    def take_place(self) -> None:
        """Stand before the method from now on."""
        self.owner.__dict__[self.method] = self
        if self._before is None:
            replicas = self.owner.__dict__.setdefault(REPLICATE, Replicas(self.owner))
            if isinstance(replicas, Replicas):
                replicas.methods = (*replicas.methods, self.method)

    def retire(self) -> None:
        """Give the place back; where something else stands before it by now, pass every call on to the own method."""
        self.is_retired = True
        for plans in self.what.plans:
            plans.forget()
        if self.owner.__dict__.get(self.method) is self:
            self._give_back()
        replicas = self.owner.__dict__.get(REPLICATE)
        if isinstance(replicas, Replicas):
            replicas.methods = tuple(name for name in replicas.methods if name != self.method)
            if not replicas.methods:
                del self.owner.__dict__[REPLICATE]

    def looked_at_by(self, look: Look) -> Look:
        """How to look into the replaced method: what runs by a plan tells of itself; `look` looks into calls of the own method."""
        return replace(look, run=functools.partial(self._run_watched, look))

    def _run_watched(self, look: Look, listeners: list[Any], method: Own, args: Any, kwargs: Any) -> Any:
        def own(*own_args: Any, **own_kwargs: Any) -> Any:
            before, _watched.now = _watched.now, None
            try:
                return look.run(listeners, self.own, own_args, own_kwargs)
            finally:
                _watched.now = before

        if self.is_retired:
            return own(*args, **kwargs)
        before, _watched.now = _watched.now, (self.owner, listeners)
        try:
            return self.what.run(own, args, kwargs)
        finally:
            _watched.now = before


def replacement_at(module: nn.Module, method: str = "forward") -> Replacement | None:
    """What stands in the place of a module's method, if it is a replacement that runs."""
    stands = module.__dict__.get(method)
    return stands if isinstance(stands, Replacement) and not stands.is_retired else None
