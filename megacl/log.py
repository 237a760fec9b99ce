"""What a run writes while it goes: metrics.jsonl first, the terminal, and TensorBoard where it is installed.

metrics.jsonl holds one JSON object a line, flushed line by line: a `step` record for each optimizer step, a `monitor`
record for those that were looked into, an `evaluation` record for each evaluation (docs/formats.md). Only rank 0
writes; on the others every call does nothing.
"""

import contextlib
import datetime
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from megacl.errors import CheckpointError, DataError, FencedError
from megacl.publish import disk_errors, publish_text


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl. A torn last line (a crash while it was written) is passed over.

    Raises CheckpointError where it cannot be read, or, naming the line, where any other is not a JSON object.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from None
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not (isinstance(record, dict) and isinstance(record.get("step", 0), int)):
                raise ValueError(line)
        except ValueError:
            if number == len(lines):
                return
            raise CheckpointError(f"{path}: line {number} is not a record; take that line out to go on.") from None
        yield record


def last_records(path: Path, size: int = 1 << 18) -> list[dict[str, Any]]:
    """The records in the last bytes of a metrics.jsonl, which may hold gigabytes; some 600 steps by default.

    A torn line, and one that is no record, is passed over; so is a file that is not there or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - size))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    records = []
    for line in lines[1:] if end > size else lines:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def without_nan(value: Any) -> Any:
    """The value with null in place of every number that is not finite: JSON has none."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunLog:
    """The log of one run on one rank."""

    def __init__(self, run_dir: Path, *, rank: int, every_steps: int, tensorboard: bool) -> None:
        """every_steps: optimizer steps between two lines where the terminal is not interactive."""
        self._path = run_dir / "metrics.jsonl"
        self._writes = rank == 0
        self._every_steps = every_steps
        self._file: IO[bytes] | None = None
        self._owed = bytearray()
        self._permit: Callable[[], None] | None = None
        self._has_warned = False
        self._progress: Progress | None = None
        self._first: tuple[int, float] | None = None
        self._console = Console(file=sys.stderr, quiet=not self._writes, highlight=False)
        self._wants_tensorboard = tensorboard
        self._tensorboard: Any = None

    def keep_until(self, step: int, permit: Callable[[], None] = lambda: None) -> None:
        """Forgets the records after `step`: what an interrupted run did after its last checkpoint is done again.

        permit: called before this is published, and from now on before anything is written; it may raise.
        """
        self._permit = permit
        if self._writes and self._path.exists():
            kept = [record for record in read_metrics(self._path) if record.get("step", 0) <= step]
            publish_text(self._path, "".join(json.dumps(record) + "\n" for record in kept), "metrics", permit)

    def evaluated_at(self, step: int) -> set[str]:
        """The sources of which an evaluation at `step` has been recorded; none on ranks that do not write."""
        records = read_metrics(self._path) if self._writes else ()
        return {
            source
            for record in records
            if record["kind"] == "evaluation" and record["step"] == step
            for source in record["sources"]
        }

    def record(self, kind: str, **values: Any) -> None:
        """Appends a record; a number in it that is not finite is written as null.

        Where the disk refuses it, that is said, and it is written with the next one, or by `flush`. Raises what the
        permit of `keep_until` does, on the rank that writes.
        """
        if not self._writes:
            return
        self._owed += json.dumps(without_nan({"kind": kind, **values, "time": time.time()})).encode() + b"\n"
        try:
            self.flush()
        except DataError as error:
            if not self._has_warned:
                self.warn(f"{error} Until then records are kept in memory")
            self._has_warned = True
        if self._tensorboard is not None:
            with contextlib.suppress(OSError):  # metrics.jsonl is what counts
                _to_tensorboard(self._tensorboard, kind, without_nan(values))

    def flush(self) -> None:
        """Writes what the disk has refused so far. Raises DataError where it still does."""
        if not self._owed:
            return
        with disk_errors(self._path, "metrics"):
            if self._file is None:
                self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)
                if self._wants_tensorboard and self._tensorboard is None:
                    self._tensorboard = _open_tensorboard(self._path.parent)
            if self._permit is not None:  # once it is open: a later start of the run replaces the file that it finds
                self._permit()
            try:
                while self._owed:  # a disk that is nearly full takes a part of it
                    del self._owed[: self._file.write(self._owed)]
            except OSError:
                self._file.close()  # it may have been of a mount that is lost
                self._file = None
                raise
        self._has_warned = False

    def sync(self) -> None:
        """Waits until the disk has what was written, which a power cut then leaves. For any thread; raises OSError."""
        if self._writes and self._path.exists():
            with open(self._path, "rb") as file:
                os.fsync(file.fileno())

    def say(self, line: str) -> None:
        """Prints a line above the progress bar."""
        self._console.print(line, markup=False, soft_wrap=True)

    def warn(self, line: str) -> None:
        """Prints a warning."""
        self._console.print(f"warning: {line}", style="yellow", markup=False, soft_wrap=True)

    def progress(self, step: int, total: int, text: str) -> None:
        """Moves the progress bar; where the terminal is not interactive, prints a line every so many steps."""
        if not self._writes:
            return
        if self._first is None:
            self._first = (step, time.monotonic())
        if not self._console.is_terminal:
            if step % self._every_steps == 0 or step == total:
                self.say(f"step {step}/{total}  {text}  {self._time_left(step, total)}")
            return
        if self._progress is None:
            columns: list[ProgressColumn] = [
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            ]
            self._progress = Progress(*columns, console=self._console)
            self._progress.add_task(text, total=total, completed=step)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=step, description=text)

    def _time_left(self, step: int, total: int) -> str:
        assert self._first is not None
        first, begun = self._first
        if step == first:
            return "time left unknown"
        seconds = (time.monotonic() - begun) / (step - first) * (total - step)
        return f"{datetime.timedelta(seconds=round(seconds))} left"

    def close(self) -> None:
        """Ends the progress bar and closes the files; what the disk refused is tried once more."""
        with contextlib.suppress(DataError, FencedError):
            self.flush()
        if self._progress is not None:
            self._progress.stop()
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _open_tensorboard(run_dir: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run_dir / "tensorboard"))


def _to_tensorboard(writer: Any, kind: str, values: dict[str, Any]) -> None:
    if kind == "step":
        for name in ("loss", "lr", "grad_norm", "log_z", "tokens_per_second"):
            if values[name] is not None:
                writer.add_scalar(f"train/{name}", values[name], values["step"])
    elif kind == "monitor":
        parts = {f"layers.{index}": layer for index, layer in enumerate(values["layers"])}
        parts |= {name: part for name, part in values.items() if isinstance(part, dict)}
        for part, found in parts.items():
            for quantity, value in found.items():
                if value is not None:
                    writer.add_scalar(f"{quantity}/{part}", value, values["step"])
    elif kind == "evaluation":
        for source, result in values["sources"].items():
            if result["loss"] is not None:
                writer.add_scalar(f"loss/{source}", result["loss"], values["step"])


def table_text(header: list[str], rows: Iterable[list[str]], align: str = "") -> Iterator[str]:
    """Lines of a plain table. align: "l" or "r" for each column; by default "l" for the first, "r" for the others."""
    cells = [header, *rows]
    align = align or "l" + "r" * (len(header) - 1)
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        padded = [
            cell.ljust(width) if side == "l" else cell.rjust(width)
            for cell, width, side in zip(row, widths, align, strict=True)
        ]
        yield "  ".join(padded).rstrip()
