"""Ctrl-C and the request to end, turned into something that the loop can answer between two steps."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_HANDED_ON_WITHIN = 1.0  # seconds


class Interruption:
    """Inside `with`, the first SIGINT or SIGTERM is noted in `signal_number`; a SIGINT after it raises KeyboardInterrupt.

    A SIGTERM after it says nothing new: schedulers and launchers send it to a whole job, and launchers hand it on once more. In a
    run of several processes a SIGINT within a second of the first signal is such a copy too.

    The optimizer's step must not be cut in two, so the loop looks at `signal_number` after it. Inside `at_once` (long
    stretches that change nothing, such as an evaluation) the first one raises as well. Signals that were ignored stay
    ignored, and outside the main thread nothing is changed: signals do not arrive there.
    """

    def __init__(self, *, has_launcher: bool = False) -> None:
        self.signal_number = 0
        self._has_launcher, self._noted_at = has_launcher, 0.0
        self._answered = False
        self._raises = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                previous = signal.getsignal(number)
                # None: set by other than Python, and could not be put back.
                if previous is not None and previous is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        if self.signal_number and not self._answered and exception[0] in (None, GeneratorExit):
            signal.raise_signal(self.signal_number)  # it came too late for the loop: hand it on to who was there before

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside this block the first signal raises KeyboardInterrupt."""
        self._raises = True
        try:
            if self.signal_number:
                raise KeyboardInterrupt
            yield
        finally:
            self._raises = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Inside this block, within `at_once`, a signal waits for the end: of a collective call, which must not be cut in two."""
        raises, self._raises = self._raises, False
        try:
            yield
        finally:
            self._raises = raises
        if raises and self.signal_number:
            raise KeyboardInterrupt

    def answer(self, signal_number: int) -> BaseException:
        """The exception that ends the run: KeyboardInterrupt for SIGINT, SystemExit with the shell's code for SIGTERM."""
        self._answered = True
        return KeyboardInterrupt() if signal_number == signal.SIGINT else SystemExit(128 + signal_number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        is_copy = number == signal.SIGTERM or (self._has_launcher and now - self._noted_at < _HANDED_ON_WITHIN)
        is_second = bool(self.signal_number) and not is_copy
        if not self.signal_number:
            self.signal_number, self._noted_at = number, now
        if is_second or self._raises:
            self._answered = is_second
            raise KeyboardInterrupt
