"""What stands in the place of a module's method while recordings look at it, and gives the place back when the last one leaves.

It sits in the module's own dictionary, which its class never sees: hooks would take `torch.nn`'s encoder from its fast path, and so
change the last bits of what it gives, and a hook that opens something is not told of a KeyboardInterrupt.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

_lock = threading.RLock()


class Listener(Protocol):
    """Who looks: it has the thread in which it was begun."""

    thread: int


@dataclass(frozen=True)
class Look:
    """How to look into one module.

    Args:
        method: the name of the method to stand before.
        run: called with the listeners of the calling thread, the method itself, its positional and its keyword arguments; it calls
            the method once and gives what that gives.
        owner: whose method it is.
    """

    method: str
    run: Callable[[list[Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
    owner: nn.Module


class Stand:
    """What stands in the place of a method, in its module's own dictionary; a copy of the module, or a pickled one, has the method.

    Args:
        owner: the module.
        method: the name of the method.
    """

    is_retired = False
    """Whether it only passes calls on, and is left out where what stands on it leaves."""

    def __init__(self, owner: nn.Module, method: str) -> None:
        self.owner, self.method = owner, method
        self._before = owner.__dict__.get(method)
        self._method = getattr(owner, method)

    def _unseated(self, owner: nn.Module) -> Any:
        """The plain method of the module or of its copy."""
        before = self._before
        if isinstance(before, Stand):
            return before._unseated(owner)
        if isinstance(before, types.MethodType) and before.__self__ is self.owner:  # as a copy has it
            return types.MethodType(before.__func__, owner)
        return types.MethodType(getattr(type(owner), self.method), owner) if before is None else before

    def looked_at_by(self, look: Look) -> Look:
        """How to look into what stands here, where `look` says how to look into the plain method."""
        return look

    def _give_back(self) -> None:
        """Leave the place to what stood there before."""
        before = self._before
        while isinstance(before, Stand) and before.is_retired:
            before = before._before
        if before is None:
            del self.owner.__dict__[self.method]
        else:
            self.owner.__dict__[self.method] = before

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._unseated(memo.get(id(self.owner), self.owner))

    def __reduce__(self) -> Any:
        method = self._unseated(self.owner)
        if isinstance(method, types.MethodType) and method.__self__ is self.owner:
            if getattr(type(self.owner), self.method, None) is method.__func__:
                return getattr, (self.owner, self.method)  # which its class has: what is read back does not need this library
        return _same, (method,)


class Seat(Stand):
    """A method that tells listeners of its calls; it can be copied with its module, and the copy is the plain method."""

    def __init__(self, look: Look) -> None:
        super().__init__(look.owner, look.method)
        self._look = look
        functools.update_wrapper(self, self._method, updated=())  # the dictionary of what stood here is its own
        self._listeners: list[Listener] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The method, looked at if someone listens; never inside a graph, nor when a checkpoint runs it again for its gradient."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return self._method(*args, **kwargs)
        listeners = self._here()
        return self._look.run(listeners, self._method, args, kwargs) if listeners else self._method(*args, **kwargs)

    def _here(self) -> list[Listener]:
        """The listeners that this thread began; where it began none, all: a model may run in a thread beside the recording's."""
        everyone = list(self._listeners)
        here = threading.get_ident()
        return [listener for listener in everyone if listener.thread == here] or everyone

    def sit(self, listener: Listener) -> None:
        """Tell a listener too."""
        self._listeners = [*self._listeners, listener]

    def leave(self, listener: Listener) -> None:
        """Tell it no more; with the last one the method is what it was."""
        with _lock:
            self._listeners = [other for other in self._listeners if other is not listener]
            if (
                not self._listeners and self.owner.__dict__.get(self.method) is self
            ):  # whoever replaced it may call it: it passes on
                self._give_back()


def seat_at(look: Look, listener: Listener) -> Seat:
    """The seat before a method, with a listener in it."""
    with _lock:
        seat = look.owner.__dict__.get(look.method)
        if not isinstance(seat, Seat):
            seat = Seat(seat.looked_at_by(look) if isinstance(seat, Stand) else look)
            look.owner.__dict__[look.method] = seat
        seat.sit(listener)
        return seat


class Watchers(list[Any]):
    """Who is told of a model's generation; a copy of the model tells nobody."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Watchers:
        return Watchers()

    def __reduce__(self) -> Any:
        return Watchers, ()


def watch(model: nn.Module, listener: Listener) -> None:
    """Tell a listener where `crossattention.models.generate` begins and ends with this model."""
    with _lock:
        model.__dict__.setdefault("generation_watchers", Watchers()).append(listener)


def unwatch(model: nn.Module, listener: Listener) -> None:
    """Tell it no more."""
    with _lock:
        watchers = model.__dict__["generation_watchers"]
        watchers.remove(listener)
        if not watchers:
            del model.__dict__["generation_watchers"]


def _same(method: Any) -> Any:
    """What a pickled seat is read back as: the method."""
    return method
