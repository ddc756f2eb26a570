"""Held-out examples that several processes score together: each answers some of the batches, and all get all answers, in order.

Batches are those that one process would make, so that the answers are its answers to the last bit, and a score over all of them
(an error rate of a corpus, a mean over targets) is its score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class BrokenOffError(Exception):
    """Another process has broken the evaluation off: by a signal, where `fault` is empty, or by an error, which it tells."""

    def __init__(self, fault: str) -> None:
        super().__init__(fault)
        self.fault = fault


class Together:
    """The processes that score together.

    Args:
        rank: this process's place.
        count: how many there are.
        gather: every process's value, in all of them; a collective call.
        unbroken: within it no signal raises, so that a collective call is not cut in two.

    Example:
        >>> ALONE.map(len, ["ab", "c"])
        [2, 1]
    """

    def __init__(
        self,
        rank: int = 0,
        count: int = 1,
        gather: Callable[[Any], list[Any]] | None = None,
        unbroken: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.rank, self.count = rank, count
        self._gather, self._unbroken = gather, unbroken
        self._is_over = False

    @property
    def is_first(self) -> bool:
        """Whether this process also makes what is shown once, such as the sample."""
        return self.rank == 0

    def map(self, work: Callable[[Item], Answer], items: Iterable[Item]) -> list[Answer]:
        """The work done on every item, in their order, in all processes; of n, each does every n-th. A collective call.

        Args:
            work: gives plain data or CPU tensors.
            items: the same in all processes: batches, or what they are made of.

        Raises:
            BrokenOffError: another process has stopped; the training loop answers it.
        """
        held = list(items)
        own = [work(item) for item in held[self.rank :: self.count]]
        if self.count == 1:
            return own
        parts = self._tell((len(held), own))
        if any(length != len(held) for length, _ in parts):
            raise ValueError(f"the processes must score the same items, got {[length for length, _ in parts]} of them")
        return [parts[place % self.count][1][place // self.count] for place in range(len(held))]

    def finish(self) -> None:
        """Say that this process is done, and wait until all are; Raises as `map`."""
        if self.count > 1:
            self._tell(None)

    def break_off(self, fault: str = "") -> None:
        """Say that this process stops in the middle, where the others do not know it yet; they stop at their next `map`."""
        if self.count > 1 and not self._is_over:
            try:
                self._tell(None, fault=fault)
            except BrokenOffError:
                pass

    def _tell(self, value: Any, *, fault: str | None = None) -> list[Any]:
        assert self._gather is not None
        with self._unbroken():
            told = self._gather((fault, value))
            faults = [found for found, _ in told if found is not None]
            self._is_over = bool(faults)
        if faults:
            raise BrokenOffError(next((found for found in faults if found), ""))
        return [found for _, found in told]


ALONE = Together()
"""One process, which answers everything."""
