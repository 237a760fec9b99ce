"""Signals that ask a run to stop.

with StopSignal() as stop:
    while not stop.received:
        train_a_step()
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self


class ToldToStop(BaseException):
    """Raised by a signal where there is nothing to save; not an Exception, so that nothing takes it for an error."""


class StopSignal:
    """Notes SIGTERM, SIGUSR1 and Ctrl-C while it is entered: the run saves after the step under way, and ends.

    A second Ctrl-C ends it at once, without saving.
    """

    def __init__(self) -> None:
        self.received = False
        self._at_once = False
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}
        self._mask: set[int] = set()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._at_once:
            raise ToldToStop

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that a signal ends where it stands, by ToldToStop."""
        self._at_once = True
        try:
            if self.received:
                raise ToldToStop
            yield
        finally:
            self._at_once = False

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        # __main__ held it back until here, and does again from the end on: a script says it more than once.
        self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        return self

    def __exit__(self, *error: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, before in self._before.items():
            signal.signal(number, before)
