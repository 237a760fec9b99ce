"""Disks that refuse: a full one, and one that is read-only. Both are mounts, which only root may make."""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from faultsim.checks import published
from faultsim.rounds import FAILED, Round
from faultsim.world import SAVES, STEPS
from megacl.checkpoint import list_checkpoints
from megacl.log import read_metrics

_DISK = 32 * 2**20
_LOOK = 0.002


def why_no_mounts(folder: Path) -> str | None:
    """Why these faults cannot be made here; None: they can."""
    if os.geteuid():
        return "only root may mount"
    try:
        with _small_disk(folder / "a-disk"):
            return None
    except subprocess.CalledProcessError as error:
        return str(error.stderr).strip()


def disk_full(turn: Round) -> None:
    """Others fill the disk behind a drawn step, all but some bytes, and free it a drawn number of steps later, or not.

    The run says that it cannot save. Where there is room again it goes on by itself, or else with the same command.
    """
    with _small_disk(turn.folder / "disk") as disk:
        turn.place(disk)
        size = sum(file.stat().st_size for file in list_checkpoints(turn.world.run_dir)[-1].iterdir())
        room = turn.draw.randrange(size)

        @contextlib.contextmanager
        def filling() -> Iterator[Callable[[], None]]:
            with open(disk / "filler", "wb") as file:
                yield lambda: _fill(file.fileno(), room)
            (disk / "filler").unlink()

        _refuse(turn, filling(), f"a disk with {room:,} bytes free", "no space left", records=False)


def read_only(turn: Round) -> None:
    """The run's folder, or that of its checkpoints, becomes read-only behind a drawn step, for a drawn number."""
    whole = turn.draw.random() < 0.5

    @contextlib.contextmanager
    def mounted() -> Iterator[Callable[[], None]]:
        folder = turn.run_dir if whole else turn.run_dir / "checkpoints"
        with _bound(folder, turn.folder / "read-only") as beside:
            _mount("-o", "remount,bind,ro", beside)  # not in its place, where the run may be writing through it
            with _bound(beside, folder):
                yield lambda: None

    _refuse(turn, mounted(), f"{'the run' if whole else 'checkpoints/'} read-only", "read-only", records=not whole)


def _refuse(
    turn: Round,
    fault: contextlib.AbstractContextManager[Callable[[], None]],
    what: str,
    reason: str,
    *,
    records: bool,
) -> None:
    """Runs with a fault behind a drawn step, ended while the run goes on or not, and sees that nothing is lost by it.

    fault: yields what is to be called again and again while it lasts. reason: what the run must say. records: whether
    metrics.jsonl can be written meanwhile.
    """
    first = turn.draw.randint(SAVES[0] + 1, STEPS - 1)
    last = first + turn.draw.randint(3, 20) if turn.draw.random() < 0.6 else STEPS + 1
    turn.moment = f"{what} from step {first} " + (f"to {last}" if last <= STEPS else "on")
    process = turn.train()
    turn.wait(process, lambda: process.step >= first)
    with fault as again:
        before = published(turn.run_dir)
        while process.going and process.step < last:
            again()
            time.sleep(_LOOK)
    records = records or process.going
    status, text = turn.ended(process, 0, 2)
    turn.in_the_midst = status == 2 or "is not saved: " in text
    if turn.in_the_midst and reason not in text:
        turn.note(FAILED, f"it did not say why a save failed: {text[-300:]!r}")
    if turn.in_the_midst and records and not _failed_saves(turn.run_dir):
        turn.note(FAILED, "metrics.jsonl has no record of the save that failed")
    turn.check_failed_save(before)
    if status == 0:
        turn.check_end()
    else:
        turn.go_on()


def _failed_saves(run_dir: Path) -> list[int]:
    """The steps of which metrics.jsonl says that a save has failed."""
    records = read_metrics(run_dir / "metrics.jsonl")
    return [record["step"] for record in records if record["kind"] == "save" and record["error"]]


def _fill(file: int, room: int) -> None:
    disk = os.fstatvfs(file)
    taken = disk.f_bavail * disk.f_frsize - room
    if taken > 0:
        with contextlib.suppress(OSError):  # the run was quicker
            os.posix_fallocate(file, os.fstat(file).st_size, taken)


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", folder)
    try:
        yield folder
    finally:
        _unmount(folder)
        folder.rmdir()


@contextlib.contextmanager
def _bound(folder: Path, place: Path) -> Iterator[Path]:
    """A folder, seen at another place too."""
    place.mkdir(exist_ok=True)
    _mount("--bind", folder, place)
    try:
        yield place
    finally:
        _unmount(place)


def _mount(*words: str | Path) -> None:
    subprocess.run(["mount", *map(str, words)], check=True, capture_output=True, text=True)


def _unmount(place: Path) -> None:
    subprocess.run(["umount", "--lazy", str(place)], check=True)
