"""The attempts of a run, and how it stands after the last: files that outlive the processes, whose exit codes get lost.

    RUN/outcome.json                    how the run stands; absent while it is under way, or where it was killed
    RUN/attempts/0001/attempt.json      one for each start of the ranks, by rank 0 once it holds the run
    RUN/attempts/0001/rank-3.json       the last words of a rank that fails
    RUN/attempts/0001/stacks-3.txt      what all threads of a rank were doing, where it was found hanging
    RUN/attempts/0001/outcome.json      how the attempt ended

A rank that is killed says nothing. Its peers lose their connection to it, and their words must not hide that: how an
attempt ended is worked out of all words together, of who is silent, and of the launcher's exit status if it is known.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from megacl.errors import CheckpointError
from megacl.holders import job_here
from megacl.publish import disk_errors, publish_text

Result = Literal[
    "done",
    "stopped",
    "wrong_input",
    "diverged",
    "lost_rank",
    "hung",
    "no_rendezvous",
    "unhealthy",
    "unreachable",
    "fenced",
    "failed",
]


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a run's ranks."""

    number: int
    job: str | None
    """SLURM's number of the job; None without SLURM."""
    restart: int
    """How often SLURM had requeued the job."""
    ranks: tuple[str, ...]
    """The node of each rank; empty where the ranks ended before they held the run."""
    step: int
    """At which it began."""
    started: float
    """When rank 0's process started, seconds since 1970."""
    time: float
    """When rank 0 held the run."""
    first_step: float | None = None
    """When its first step was done."""

    @property
    def nodes(self) -> tuple[str, ...]:
        """Its nodes, in the order of their ranks."""
        return tuple(dict.fromkeys(self.ranks))

    def where(self, rank: int) -> str | None:
        """The node of a rank, if it is known."""
        return self.ranks[rank] if rank < len(self.ranks) else None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended, and how a run stands after it."""

    outcome: Result
    exit_status: int
    """Of the command, or of the process that died: 128 and the signal."""
    step: int | None
    """How many steps were done."""
    message: str
    rank: int | None = None
    """The rank at fault, where there is one."""
    node: str | None = None
    nodes: tuple[str, ...] = ()
    """All nodes at fault."""
    attempt: int | None = None
    job: str | None = None
    time: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Words:
    """The last words of a rank."""

    rank: int
    node: str
    kind: Result | Literal["lost_peer"]
    """lost_peer: the rank itself is well, but another one does not answer."""
    message: str
    exit_status: int
    step: int
    """How many steps were done."""
    doing: str
    """What was under way."""
    silent: float = 0.0
    """Seconds since something had moved on."""
    waiting: bool = False
    """Whether it waited for other ranks."""
    stopped: float = 0.0
    """Seconds for which the whole process stood still before that, as one that is suspended does."""
    missed: tuple[int, ...] = ()
    """Ranks that gave no sign of life, where it only waited for them."""
    where: str = ""
    """The line of code."""
    nodes: tuple[str, ...] = ()
    """Nodes that it says are at fault."""
    time: float


_Record = TypeVar("_Record", Attempt, Outcome, Words)
_ADAPTERS: dict[type, TypeAdapter[Any]] = {kind: TypeAdapter(kind) for kind in (Attempt, Outcome, Words)}


def attempt_folder(run_dir: Path, number: int) -> Path:
    """Where the files of an attempt lie."""
    return run_dir / "attempts" / f"{number:04d}"


def begin_attempt(run_dir: Path, *, ranks: Sequence[str], step: int, started: float) -> Attempt:
    """Records the next attempt of a run, and takes away how it stood after the last. For who holds the run.

    ranks: the node of each. step: at which it begins. Raises DataError where the disk refuses.
    """
    with disk_errors(run_dir / "outcome.json", "that the run is under way"):
        (run_dir / "outcome.json").unlink(missing_ok=True)
    job, restart = job_here()
    attempt = Attempt(
        number=_next_number(run_dir),
        job=job,
        restart=restart,
        ranks=tuple(ranks),
        step=step,
        started=started,
        time=time.time(),
    )
    _write_attempt(run_dir, attempt)
    return attempt


def note_first_step(run_dir: Path, attempt: Attempt) -> Attempt:
    """Records that the attempt's first step is done. Raises DataError where the disk refuses."""
    noted = dataclasses.replace(attempt, first_step=time.time())
    _write_attempt(run_dir, noted)
    return noted


def read_attempts(run_dir: Path) -> list[Attempt]:
    """All attempts of a run that can be read, oldest first."""
    found = (_read(folder / "attempt.json", Attempt) for folder in _folders(run_dir))
    return [attempt for attempt in found if attempt is not None]


def write_words(run_dir: Path, attempt: int, words: Words) -> None:
    """Leaves a rank's last words. Raises DataError where the disk refuses."""
    folder = attempt_folder(run_dir, attempt)
    publish_text(folder / f"rank-{words.rank}.json", _text(words), "last words")


def read_words(run_dir: Path, attempt: int) -> list[Words]:
    """The last words that ranks have left, by rank; what cannot be read is passed over."""
    files = attempt_folder(run_dir, attempt).glob("rank-*.json")
    found = (_read(file, Words) for file in files)
    return sorted((words for words in found if words is not None), key=lambda words: words.rank)


def write_outcome(run_dir: Path, outcome: Outcome) -> None:
    """Records how an attempt ended; the run stands so too, unless a later attempt has begun.

    Raises DataError where the disk refuses.
    """
    if outcome.attempt is not None:
        folder = attempt_folder(run_dir, outcome.attempt)
        _make(folder)
        publish_text(folder / "outcome.json", _text(outcome), "the outcome")
        if outcome.attempt < _next_number(run_dir) - 1:
            return
    publish_text(run_dir / "outcome.json", _text(outcome), "the outcome")


def read_outcome(run_dir: Path, attempt: int | None = None) -> Outcome | None:
    """How a run stands, or how one of its attempts ended; None where it has no end.

    Raises CheckpointError where the file is damaged.
    """
    file = (run_dir if attempt is None else attempt_folder(run_dir, attempt)) / "outcome.json"
    found = _read(file, Outcome)
    if found is None and file.exists():
        raise CheckpointError(f"{file}: cannot be read; delete it: the next attempt writes it again.")
    return found


def _folders(run_dir: Path) -> list[Path]:
    folder = run_dir / "attempts"
    return sorted(path for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []


def _next_number(run_dir: Path) -> int:
    return max((int(path.name) for path in _folders(run_dir)), default=0) + 1


def _write_attempt(run_dir: Path, attempt: Attempt) -> None:
    folder = attempt_folder(run_dir, attempt.number)
    _make(folder)
    publish_text(folder / "attempt.json", _text(attempt), "the attempt")


def _make(folder: Path) -> None:
    with disk_errors(folder, "an attempt's files"):
        folder.mkdir(parents=True, exist_ok=True)


def _text(record: Attempt | Outcome | Words) -> str:
    return _ADAPTERS[type(record)].dump_json(record, indent=1).decode() + "\n"


def _read(file: Path, kind: type[_Record]) -> _Record | None:
    """A record, or None where there is none that can be read. Keys that are not known are passed over."""
    try:
        found: _Record = _ADAPTERS[kind].validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None
    return found
