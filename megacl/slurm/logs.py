"""What the jobs of a run have written: all of it, one rank's, one attempt's, and what comes.

    for line in read_lines(run_dir, rank=3): ...
    for line in follow_lines(run_dir, over=lambda: ...): ...      # a requeued job goes on in the same file

A log holds the script's lines and those of all ranks, each behind its rank's number ("3: "), and all starts of its job,
one behind another (docs/formats.md).
"""

import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from megacl.attempts import Attempt, read_attempts
from megacl.errors import DataError
from megacl.slurm.jobs import check_run, read_jobs

_LABEL = re.compile(r" *(?P<rank>\d+): ?(?P<line>.*)", re.DOTALL)
_START = re.compile(r"=== job (?P<job>\S+), restart (?P<restart>\d+), ")
_END = "=== srun ended with status "
"""What the script says behind each start of the ranks."""


def read_lines(run_dir: Path, *, rank: int | None = None, attempt: int | None = None) -> Iterator[str]:
    """The lines of a run's newest log, each with its end; or those of one attempt, in whichever log they are.

    rank: its lines alone, without its number. Raises DataError where there is no such log or attempt.
    """
    check_run(run_dir)
    if attempt is not None:
        lines = _of_attempt(run_dir, attempt)
    elif (log := newest_log(run_dir)) is not None:
        lines = _lines(log)
    else:
        raise DataError(_none_yet(run_dir))
    return lines if rank is None else _of_rank(lines, rank)


def follow_lines(
    run_dir: Path, *, rank: int | None = None, over: Callable[[], bool], pause: float = 0.5
) -> Iterator[str]:
    """The lines of a run's newest log, and those that come, until the run is over and its log has no more.

    A log that is not there yet is waited for; where the run is submitted again, the new job's log follows on.
    over: whether nothing more will come; asked where nothing came for some `pause`s of so many seconds.
    """
    lines = _coming(run_dir, over, pause)
    return lines if rank is None else _of_rank(lines, rank)


def newest_log(run_dir: Path) -> Path | None:
    """The log of the job that was submitted last, of those that have begun to write one."""
    for job in reversed(read_jobs(run_dir)):
        if "%" not in job.log:
            found = [Path(job.log)]
        else:
            pattern = Path(job.log).name.replace("%A", job.job_id).replace("%j", "*").replace("%a", "*")
            found = sorted(Path(job.log).parent.glob(pattern), key=lambda file: file.stat().st_mtime, reverse=True)
        if found and found[0].is_file():
            return found[0]
    return None


def _none_yet(run_dir: Path) -> str:
    jobs = read_jobs(run_dir)
    if not jobs:
        return f"{run_dir}: no job was submitted for it, so it has no logs; what it said went to its terminal."
    return f"{run_dir}: job {jobs[-1].job_id} has not begun, so it has no log; --follow waits for it."


def _lines(log: Path) -> Iterator[str]:
    try:
        with open(log, encoding="utf-8", errors="replace", newline="") as file:
            yield from file
    except OSError as error:
        raise DataError(f"{log}: cannot be read: {error.strerror}.") from None


def _of_rank(lines: Iterable[str], rank: int) -> Iterator[str]:
    for line in lines:
        label = _LABEL.match(line)
        if label is not None and int(label["rank"]) == rank:
            yield label["line"]


def _of_attempt(run_dir: Path, number: int) -> Iterator[str]:
    """The part of a log that an attempt wrote: that of the job's start, and in it of that start of the ranks."""
    attempts = read_attempts(run_dir)
    wanted = next((attempt for attempt in attempts if attempt.number == number), None)
    if wanted is None:
        known = f"it has {len(attempts)}, the last is {attempts[-1].number}" if attempts else "it has none yet"
        raise DataError(f"{run_dir}: no attempt {number}: {known}.")
    log = _log_of(run_dir, wanted)
    alike = [each.number for each in attempts if (each.job, each.restart) == (wanted.job, wanted.restart)]
    return _part(_lines(log), wanted, alike.index(number))


def _log_of(run_dir: Path, attempt: Attempt) -> Path:
    log = run_dir / "logs" / f"{attempt.job}.log"
    if attempt.job is None or not log.is_file():
        raise DataError(f"{run_dir}: attempt {attempt.number} has no log: what it said went elsewhere.")
    return log


def _part(lines: Iterator[str], attempt: Attempt, place: int) -> Iterator[str]:
    """The lines of the attempt, the `place`-th of those in one start of its job."""
    current = -1
    for line in lines:
        start = _START.match(line)
        if start is not None:
            if current >= 0:
                return
            current = 0 if int(start["restart"]) == attempt.restart else -1
        if current == place:
            yield line
        if current >= 0 and line.startswith(_END):
            current += 1


def _coming(run_dir: Path, over: Callable[[], bool], pause: float) -> Iterator[str]:
    log: Path | None = None
    place, rest = 0, b""
    for silent in itertools.count():
        if (newest := newest_log(run_dir)) != log and newest is not None:
            if log is not None:  # what its last moments wrote
                yield from (line.decode(errors="replace") for line in _new(log, place)[0].splitlines(keepends=True))
            log, place, rest = newest, 0, b""
        came, place = _new(log, place) if log is not None else (b"", 0)
        *whole, rest = (rest + came).split(b"\n")
        yield from (line.decode(errors="replace") + "\n" for line in whole)
        if not came:
            if silent % 8 == 1 and over() and not (log is not None and _new(log, place)[0]):
                break
            time.sleep(pause)
    if rest:
        yield rest.decode(errors="replace") + "\n"


def _new(log: Path, place: int) -> tuple[bytes, int]:
    """What stands behind a place in a file, and the place behind that; from its beginning where it is shorter now."""
    try:
        with open(log, "rb") as file:
            size = file.seek(0, 2)
            file.seek(place if size >= place else 0)
            came = file.read()
            return came, file.tell()
    except FileNotFoundError:
        return b"", 0
    except OSError as error:
        raise DataError(f"{log}: cannot be read: {error.strerror}.") from None
