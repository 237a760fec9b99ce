"""How a rank leaves a run: its last words, its stacks where it hangs, and how the attempt ended, of all words together.

    ending = Ending(run_dir, watchdog)
    with ending.told():                             # LostPeerError for errors that only say that another rank is gone
        with ending.attempt(ranks, step=0):         # once rank 0 holds the run
            ...
            ending.stepped(1)
            ending.ended("done", "all phases are trained")

What is left are files of the attempt (attempts.py). Other ranks, which may not be there any more, are told nothing but
that this one lives, or has left (parallel/alive.py).
"""

import contextlib
import faulthandler
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from megacl.attempts import (
    Attempt,
    Outcome,
    Result,
    Words,
    attempt_folder,
    begin_attempt,
    note_first_step,
    read_words,
    write_outcome,
    write_words,
)
from megacl.errors import (
    DataError,
    DivergedError,
    FencedError,
    LostPeerError,
    MegaclError,
    RendezvousError,
    StoppedError,
    UnhealthyError,
    UnreachableError,
)
from megacl.holders import job_here, node_here
from megacl.parallel.alive import SignsOfLife
from megacl.parallel.ranks import Ranks
from megacl.publish import alone_in
from megacl.stopping import ToldToStop
from megacl.verdict import HUNG, STOPPED, conclude
from megacl.watchdog import Silence, Watchdog, line_of, main_frame, waits_for_others

_KINDS: tuple[tuple[type[BaseException], Result], ...] = (
    (FencedError, "fenced"),
    (UnhealthyError, "unhealthy"),
    (RendezvousError, "no_rendezvous"),
    (UnreachableError, "unreachable"),
    (DivergedError, "diverged"),
    (StoppedError, "stopped"),
    (ToldToStop, "stopped"),
    (MegaclError, "wrong_input"),
)

_STDERR = 2
_LONGEST = 1000
"""Characters of an error that are kept."""


class Ending:
    """What this rank leaves behind. Before an attempt has begun, only the outcome."""

    def __init__(self, run_dir: Path, watchdog: Watchdog) -> None:
        self.watchdog = watchdog
        self._run_dir = run_dir
        self._attempt: Attempt | None = None
        self._rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
        self._step = 0
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115 (of the whole process: a signal may write to it any time)
        self._copied = 0

    @contextlib.contextmanager
    def attempt(self, ranks: Ranks, *, step: int) -> Iterator[None]:
        """A block in which this rank takes part in an attempt, is watched, and shows its stacks at SIGUSR2.

        step: at which it begins. Every rank calls it. Raises DataError on all where the disk refuses.
        """
        nodes, attempt = ranks.gather(node_here()), None
        with ranks.together():
            if ranks.rank == 0:
                attempt = begin_attempt(self._run_dir, ranks=nodes, step=step, started=_process_start())
        self._attempt, self._rank, self._step = ranks.broadcast(attempt), ranks.rank, step
        life = SignsOfLife(ranks, every=self.watchdog.seconds / 8)
        # Into a file of this node's: the signal's own code can do no more than write, and a look copies it from there.
        faulthandler.register(signal.SIGUSR2, file=self._spool, all_threads=True)
        try:
            alone = ranks.world_size == 1
            with life.given(), self.watchdog.watching(self._hung, self._look, others=life.missed, alone=alone):
                yield
        finally:
            self._copy_stacks()
            faulthandler.register(signal.SIGUSR2, file=_STDERR)

    def stepped(self, step: int) -> None:
        """Says how many steps are done."""
        self._step = step
        if self._attempt is not None and self._attempt.first_step is None:
            with contextlib.suppress(DataError):
                if self._rank == 0:
                    self._attempt = note_first_step(self._run_dir, self._attempt)

    def ended(self, result: Literal["done", "stopped"], message: str) -> None:
        """Records how the run ended on all ranks alike. A disk that refuses is passed over: what counts is saved."""
        if self._rank == 0:
            with contextlib.suppress(DataError):
                status = STOPPED if result == "stopped" else 0
                write_outcome(self._run_dir, self._outcome(result, status, message))

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """A block whose errors are this rank's last words.

        Raises LostPeerError in their place where they only say that the connection to another rank broke.
        """
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            self._failed(error)
            raise

    def _failed(self, error: BaseException) -> None:
        lost = not isinstance(error, MegaclError) and is_lost_peer(error)
        alike = not lost and isinstance(error, MegaclError | ToldToStop) and getattr(error, "on_every_rank", True)
        # What the disk refuses, or has damaged, is passed over: there is an error to be told already.
        with contextlib.suppress(MegaclError, OSError):
            if self._attempt is None:
                if not lost and (self._rank == 0 or not alike or isinstance(error, RendezvousError)):
                    self._failed_before(error)
            elif self._rank == 0 or not alike:
                self._leave_words(self._attempt, error, lost)
        if lost:
            raise LostPeerError(
                f"rank {self._rank} lost another rank ({self.watchdog.doing}): {_one_line(error).partition('. ')[0]}. "
                f"{self._run_dir / 'outcome.json'} says who failed, if anybody could tell."
            ) from None

    def _leave_words(self, attempt: Attempt, error: BaseException, lost: bool) -> None:
        if _kind(error) == "stopped":
            self.ended("stopped", _one_line(error) or "told to stop")
            return
        if lost:
            self._write_stacks("".join(traceback.format_exception(error)))
        write_words(self._run_dir, attempt.number, self._words(error, lost))
        if not lost or self._rank == min(_with_words(self._run_dir, attempt.number), default=None):
            conclude(self._run_dir, attempt)

    def _outcome(self, result: Result, status: int, message: str, nodes: Sequence[str] = ()) -> Outcome:
        attempt = self._attempt
        return Outcome(
            outcome=result,
            exit_status=status,
            step=self._step if attempt else None,
            message=message,
            node=nodes[0] if nodes else None,
            nodes=tuple(nodes),
            attempt=attempt.number if attempt else None,
            job=job_here()[0],
            time=time.time(),
        )

    def _failed_before(self, error: BaseException) -> None:
        """The outcome of a start that never held the run; nothing where somebody else holds it, or there is no run."""
        if isinstance(error, FencedError):
            return  # how the run stands is the later start's to say
        if not ((self._run_dir / "config.yaml").is_file() or (self._run_dir / "jobs").is_dir()):
            return
        with alone_in(self._run_dir, "a run"):
            outcome = self._outcome(_kind(error), _status(error), _one_line(error), _nodes(error))
            write_outcome(self._run_dir, outcome)

    def _words(self, error: BaseException, lost: bool) -> Words:
        last = error.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        return Words(
            rank=self._rank,
            node=node_here(),
            kind="lost_peer" if lost else _kind(error),
            message=_one_line(error),
            exit_status=_status(error),
            step=self._step,
            doing=self.watchdog.doing,
            silent=self.watchdog.silent,
            where=f"{line_of(last.tb_frame, last.tb_lineno)}" if last is not None else "",
            nodes=tuple(_nodes(error)),
            time=time.time(),
        )

    def _look(self, suspicious: bool) -> bool:
        """Copies the stacks that a signal asked for. Whether another rank says that it hangs, as this one may."""
        self._copy_stacks()
        if not suspicious or self._attempt is None:
            return False
        return any(words.kind == "hung" for words in read_words(self._run_dir, self._attempt.number))

    def _copy_stacks(self) -> None:
        size = os.fstat(self._spool.fileno()).st_size
        if size > self._copied:
            text = os.pread(self._spool.fileno(), size - self._copied, self._copied)
            self._copied = size
            with contextlib.suppress(OSError):
                self._write_stacks(text.decode(errors="replace"))

    def _write_stacks(self, text: str) -> None:
        assert self._attempt is not None
        path = attempt_folder(self._run_dir, self._attempt.number) / f"stacks-{self._rank}.txt"
        head = f"=== rank {self._rank} on {node_here()}, {time.strftime('%Y-%m-%d %H:%M:%S')}: {self.watchdog.doing}\n"
        with open(path, "a", encoding="utf-8") as file:
            file.write(head + text.rstrip() + "\n")

    def _hung(self, silence: Silence) -> None:
        """Leaves stacks and last words, lets the other ranks do so, and ends the process. Called by the watchdog."""
        assert self._attempt is not None
        # A disk that does not answer may be why the rank hangs, and must not keep it from ending.
        faulthandler.dump_traceback_later(60 + self.watchdog.seconds / 3, exit=True, file=_STDERR)
        frame, number = main_frame(), self._attempt.number
        who = f"rank{'s' * (len(silence.missed) > 1)} {', '.join(map(str, silence.missed))} gave no sign of life"
        what = who if silence.missed else "nothing moved on"
        words = Words(
            rank=self._rank,
            node=node_here(),
            kind="hung",
            message=f"{what} for {silence.seconds:.0f} s ({self.watchdog.doing})",
            exit_status=HUNG,
            step=self._step,
            doing=self.watchdog.doing,
            silent=silence.seconds,
            waiting=frame is not None and waits_for_others(frame),
            stopped=silence.stopped,
            missed=silence.missed,
            where=line_of(frame) if frame is not None else "",
            time=time.time(),
        )
        faulthandler.dump_traceback(file=self._spool, all_threads=True)
        self._copy_stacks()
        with contextlib.suppress(MegaclError, OSError):
            write_words(self._run_dir, number, words)
            print(
                f"rank {self._rank} on {words.node} {'waits' if words.missed else 'hangs'}: {words.message}, at "
                f"{words.where}; the stacks of all ranks: {attempt_folder(self._run_dir, number)}/stacks-*.txt",
                file=sys.stderr,
                flush=True,
            )
            # Whoever ends first breaks the connections of the others, which then leave their places.
            until = time.monotonic() + min(30.0, self.watchdog.seconds / 6)
            ranks = len(self._attempt.ranks)
            while len(_with_words(self._run_dir, number)) < ranks and time.monotonic() < until:
                time.sleep(max(0.2, ranks / 500))
            if self._rank == min(_with_words(self._run_dir, number), default=None):
                conclude(self._run_dir, self._attempt)
        os._exit(HUNG)


def _process_start() -> float:
    """When this process started, seconds since 1970."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):  # no Linux
        return time.time()


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error of PyTorch's only says that another rank is not there, or does not answer."""
    import torch.distributed as dist

    if dist.is_available() and isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("gloo/" in text or "gloo::" in text or "NCCL" in text)


def _with_words(run_dir: Path, attempt: int) -> list[int]:
    files = attempt_folder(run_dir, attempt).glob("rank-*.json")
    return [int(file.stem.removeprefix("rank-")) for file in files]


def _kind(error: BaseException) -> Result:
    return next((kind for of, kind in _KINDS if isinstance(error, of)), "failed")


def _status(error: BaseException) -> int:
    return STOPPED if isinstance(error, ToldToStop) else getattr(error, "exit_status", 1)


def _nodes(error: BaseException) -> Sequence[str]:
    return error.nodes if isinstance(error, RendezvousError | UnhealthyError) else ()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, MegaclError):
        return text[:_LONGEST]
    # PyTorch puts the place in its own sources before what it says.
    said = re.sub(r"^\[[^]]*\] ", "", text)
    return f"{type(error).__name__}: {said}"[:_LONGEST]
