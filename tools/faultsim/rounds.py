"""One round of a campaign: a folder of its own, a draw, the processes that it starts, and what was found wrong."""

import contextlib
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from faultsim.checks import changed, differences, half_published, left_over, lost, steps_recorded
from faultsim.world import KEPT, PATIENCE, SAVES, World

HALF, LOST, UNLIKE, FAILED = "half-published", "lost beyond an interval", "not bitwise", "failures"
COLUMNS = (HALF, LOST, UNLIKE, FAILED)
"""What may be wrong, as the table has it."""

_LOOK = 0.0003
"""Seconds between two looks at what a process does."""


@dataclass
class Process:
    """A command under way."""

    popen: "subprocess.Popen[bytes]"
    log: Path

    @property
    def going(self) -> bool:
        return self.popen.poll() is None

    @property
    def step(self) -> int:
        """The last step that a run has said, whatever befalls its own folder."""
        said = re.findall(rb"^step (\d+)/", self.log.read_bytes(), re.MULTILINE)
        return int(said[-1]) if said else 0


@dataclass
class Round:
    """What a kind of fault is given. It draws from `draw` alone, and notes what is wrong."""

    world: World
    folder: Path
    draw: random.Random
    moment: str = ""
    """The fault and when it came, in words."""
    in_the_midst: bool = False
    """Whether it met what it was aimed at."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """Each: one of COLUMNS, and what is wrong."""
    run_dir: Path = Path()
    _processes: list[Process] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.place(self.folder)

    def place(self, folder: Path) -> None:
        """Puts the run directory into a folder. Its own name stands in lineages, so it is the same in all rounds."""
        self.run_dir = folder / "run"

    def note(self, column: str, *lines: str) -> None:
        self.problems.extend((column, line) for line in lines)

    def start(self, *arguments: str) -> Process:
        """Starts a command."""
        log = self.folder / f"{len(self._processes)}-{arguments[0]}.log"
        process = Process(self.world.start(arguments, log), log)
        self._processes.append(process)
        return process

    def train(self) -> Process:
        """Starts the run, or goes on with it."""
        config = self.run_dir.with_suffix(".yaml")
        return self.start("train", str(config) if config.exists() else self.world.config_file(self.run_dir))

    def wait(self, process: Process, happened: Callable[[], bool]) -> bool:
        """Waits until something has happened; False where the process ended, or hangs, before."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            if not process.going or time.monotonic() > deadline:
                return False
            time.sleep(_LOOK)
        return True

    def ended(self, process: Process, *statuses: int) -> tuple[int, str]:
        """Waits for a command's end: its status, which must be one of these, and what it printed."""
        try:
            status = process.popen.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.popen.kill()
            status = process.popen.wait()
            self.note(FAILED, f"{process.log}: it hung")
        text = process.log.read_text(errors="replace")
        if status not in statuses:
            self.note(FAILED, f"{process.log}: status {status}, not {' or '.join(map(str, statuses))}: {text[-300:]!r}")
        elif "Traceback" in text:
            self.note(FAILED, f"{process.log}: a traceback")
        return status, text

    def kill(self, process: Process) -> None:
        """SIGKILL. A command that has ended meanwhile must have ended well."""
        process.popen.kill()
        self.ended(process, -signal.SIGKILL, 0)

    def close(self) -> None:
        """Kills what is still going on."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.popen.kill()
            process.popen.wait()

    # ---------------------------------------------------------------------------------- what must hold

    def check_loss(self, before: set[int]) -> None:
        """After a kill: every checkpoint is whole, and no more is lost than the last interval. before: steps seen."""
        self.note(HALF, *half_published(self.run_dir))
        self.note(LOST, *lost(self.run_dir, before, SAVES, steps_recorded(self.run_dir)))

    def check_failed_save(self, before: dict[int, str]) -> None:
        """After saves that failed: every checkpoint is whole, and those that were there before stand as they were."""
        self.note(HALF, *half_published(self.run_dir))
        self.note(FAILED, *changed(self.run_dir, before, KEPT))

    def go_on(self) -> str:
        """The same command again: it comes to the undisturbed run's end, and clears up. What it printed."""
        _, text = self.ended(self.train(), 0)
        self.check_end()
        return text

    def check_end(self) -> None:
        """The run has come to the undisturbed one's end."""
        self.note(HALF, *half_published(self.run_dir))
        self.note(UNLIKE, *differences(self.run_dir, self.world.end)[:3])
        self.note(FAILED, *left_over(self.run_dir / "checkpoints"), *left_over(self.run_dir))
