"""A thread on each rank that notices when nothing moves on any more, and says what the rank is doing.

    watchdog = Watchdog(450)
    with watchdog.watching(hung, look):
        watchdog.begin("step 13")       # from here on the time counts
        watchdog.progress()             # something was done: it counts anew
        with watchdog.resting("saving at step 13"):
            ...                         # may take as long as it likes

The time is measured from what moved on last, on each rank by itself. A rank that hangs holds up all others, so `hung`
is called on all of them. Where it does not count, another rank that gives no sign of life is still missed.
"""

import contextlib
import faulthandler
import linecache
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from megacl.parallel.alive import Missed

_LOOK = 1.0
"""Seconds between two looks, at most."""
_STDERR = 2


@dataclass(frozen=True)
class Silence:
    """Nothing moves on."""

    seconds: float
    """For so long."""
    stopped: float
    """The longest time in it for which this process stood still as a whole."""
    missed: tuple[int, ...] = ()
    """Where this rank only waits: the ranks that have given no sign of life for so long."""


class Watchdog:
    """What this rank is doing, and since when. A call costs about a microsecond."""

    def __init__(self, seconds: float) -> None:
        """seconds: of silence after which the rank counts as hanging."""
        self.seconds = seconds
        self.doing = "starting"
        self._moved: float | None = None  # since when the time counts; None: it does not
        self._allowed = seconds
        self._stood = 0.0  # seconds that do not count, for which the whole process stood still

    def _now(self) -> float:
        return time.monotonic() - self._stood

    def begin(self, doing: str, *, allow: float = 0.0) -> None:
        """Says what begins. It may take `allow` seconds longer than others."""
        self.doing, self._allowed = doing, self.seconds + allow
        self._moved = self._now()

    def note(self, doing: str) -> None:
        """Says what is done now, as a part of what was begun: the time goes on."""
        self.doing = doing

    def progress(self) -> None:
        """Says that something was done."""
        if self._moved is not None:
            self._moved = self._now()

    def rest(self, doing: str) -> None:
        """Says what begins, which may take as long as it likes."""
        self.doing, self._moved = doing, None

    @contextlib.contextmanager
    def resting(self, doing: str) -> Iterator[None]:
        """A block that may take as long as it likes; behind it, what was done before goes on."""
        before, watched = self.doing, self._moved is not None
        self.rest(doing)
        yield
        self.doing = before  # not where it failed: what was under way then is said
        if watched:
            self._moved = self._now()

    @property
    def silent(self) -> float:
        """Seconds since something moved on; 0 where the time does not count."""
        moved = self._moved
        return 0.0 if moved is None else max(0.0, self._now() - moved)

    @contextlib.contextmanager
    def watching(
        self,
        hung: Callable[[Silence], None],
        look: Callable[[bool], bool],
        *,
        others: Callable[[float], Missed | None] = lambda seconds: None,
        alone: bool = False,
    ) -> Iterator[None]:
        """A block in which this rank is watched.

        hung: called once, by the thread, where nothing moves on. look: called at each look, with whether the silence is
        suspicious; where it says so, `hung` is called before the time is up. An OSError of its own says nothing.
        others: asked at each look at which the time does not count, with how long a silence is allowed, for the ranks
        that have given no sign of life for longer; `hung` is called for them.
        alone: whether there is no other rank. Then it may be suspended (Ctrl-Z, `scontrol suspend`) for as long as one
        likes: that time does not count. Among several ranks it does, since the others' collectives run out of time.
        """
        ended = threading.Event()
        thread = threading.Thread(
            target=self._watch, args=(ended, hung, look, others, alone), name="watchdog", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(2 * _LOOK)
            faulthandler.cancel_dump_traceback_later()

    def _watch(
        self,
        ended: threading.Event,
        hung: Callable[[Silence], None],
        look: Callable[[bool], bool],
        others: Callable[[float], Missed | None],
        alone: bool,
    ) -> None:
        pause = min(_LOOK, self.seconds / 10)
        stopped, seen = 0.0, time.monotonic()
        try:
            while not ended.wait(pause):
                now = time.monotonic()
                late, seen = max(0.0, now - seen - pause), now
                if alone:
                    self._stood += late
                else:
                    stopped = max(stopped, late) if self.silent >= late else 0.0
                # Where something in C keeps Python's lock, this thread cannot go on, and only faulthandler's own can.
                # It cannot tell that from a process that was suspended, so that it ends none which might go on alone.
                faulthandler.dump_traceback_later(2 * self._allowed + 60, exit=not alone, file=_STDERR)
                silent, heard = self.silent, False
                with contextlib.suppress(OSError):
                    heard = look(silent > self.seconds / 4)
                if heard or silent > self._allowed:
                    hung(Silence(silent, stopped))
                    return
                if self._moved is None and (missed := others(self._allowed)) is not None:
                    hung(Silence(missed.seconds, 0.0, missed.ranks))
                    return
        finally:
            faulthandler.cancel_dump_traceback_later()


def main_frame() -> FrameType | None:
    """Where the main thread is."""
    ident = threading.main_thread().ident
    return None if ident is None else sys._current_frames().get(ident)


def line_of(frame: FrameType, line: int | None = None) -> str:
    """`layers.py:40 in forward`, with the last two folders before it."""
    code = frame.f_code
    return f"{'/'.join(code.co_filename.split('/')[-3:])}:{line or frame.f_lineno} in {code.co_name}"


def waits_for_others(frame: FrameType) -> bool:
    """Whether a thread that is there waits for other ranks, as far as its Python code shows."""
    file = frame.f_code.co_filename
    return "/torch/distributed/" in file or ".wait(" in linecache.getline(file, frame.f_lineno)
