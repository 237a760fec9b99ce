"""The runs of a study as processes: several at a time, each when the one that it goes on from is done.

A run is an ordinary command, `python -m megacl train ...`, with its own log. It dies with the study, saving first, even
where the study is killed; told to stop, the study tells its runs, and waits until they have saved.
"""

import contextlib
import ctypes
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megacl.errors import DataError, RunFailedError, StoppedError
from megacl.publish import alone_in, disk_errors, publish_text
from megacl.stopping import StopSignal, ToldToStop
from megacl.study_places import Place
from megacl.study_tree import Node, Tree

_LOOK = 0.1
"""Seconds between two looks at the processes."""
_LINE_EVERY = 30.0
"""Seconds between two lines on how far the study is, where the terminal is not interactive."""
_PATIENCE = 120.0
"""Seconds for which a run that an earlier study left behind is waited for: it saves, and ends."""
_PR_SET_PDEATHSIG = 1

Outcome = Literal["done", "stopped"]


@dataclass
class _Running:
    node: Node
    place: Place
    process: "subprocess.Popen[bytes]"
    log: IO[bytes]


class Jobs:
    """Trains the nodes of a tree that are not done, and says how far it is."""

    def __init__(self, tree: Tree, places: Sequence[Place], mark_done: Callable[[Node], None], done: set[Node]) -> None:
        """mark_done: called for each node whose command has ended with status 0. done: those that are already."""
        self._tree, self._places, self._mark_done, self._done = tree, places, mark_done, set(done)
        self._running: list[_Running] = []
        self._console = Console(file=sys.stderr, highlight=False)

    def run(self, stop: StopSignal) -> Outcome:
        """Returns when all nodes are done, or when a signal told it to stop and the runs have saved.

        Raises RunFailedError, once the other runs have saved and ended, where one fails.
        """
        try:
            with stop.at_once():
                self._wait_for_strays()
        except ToldToStop:
            return "stopped"
        with self._ending_all(), _Meter(self._console, self._tree, self._done) as meter:
            while len(self._done) < len(self._tree.nodes):
                if stop.received:
                    self._stop_all()
                    self._say("told to stop: the runs have saved; the same command goes on from there")
                    return "stopped"
                self._start_what_can()
                time.sleep(_LOOK)
                if stop.received:
                    continue  # where a scheduler tells every process to stop, runs end like this too
                for ended in [each for each in self._running if each.process.poll() is not None]:
                    if self._end(ended) == "stopped":
                        self._stop_all()
                        self._say(f"run {ended.node.name} was told to stop and has saved; the same command goes on")
                        return "stopped"
                meter.show(self._done, [each.node for each in self._running])
        return "done"

    def _start_what_can(self) -> None:
        """Starts runs in the free places, those first that most is to come after."""
        begun = {each.node for each in self._running} | self._done
        ready = [n for n in self._tree.nodes if n not in begun and (n.parent is None or n.parent in self._done)]
        ready.sort(key=lambda node: -self._tree.tokens_below[node])
        taken = [each.place for each in self._running]
        free = [place for place in self._places if not any(place is other for other in taken)]
        for node, place in zip(ready, free, strict=False):
            self._running.append(_start(node, place))

    def _end(self, ended: _Running) -> Outcome:
        """Counts a run that has ended. Raises RunFailedError where it failed, when the others have saved."""
        self._running.remove(ended)
        ended.log.close()
        status = ended.process.returncode
        if status == 0:
            self._mark_done(ended.node)
            self._done.add(ended.node)
            return "done"
        if status == StoppedError.exit_status:
            return "stopped"
        self._stop_all()
        raise _failure(ended.node, status)

    def _stop_all(self) -> None:
        """Tells every run to stop, and waits until they have saved and ended; those that are done meanwhile count."""
        for each in self._running:
            each.process.send_signal(each.place.stop_signal)
        for each in [*self._running]:
            each.process.wait()
            if each.process.returncode == 0:
                self._mark_done(each.node)
            each.log.close()
            self._running.remove(each)

    @contextlib.contextmanager
    def _ending_all(self) -> Iterator[None]:
        """A block at whose end, however it comes, no run is left."""
        try:
            yield
        finally:
            for each in self._running:
                each.process.kill()
                each.process.wait()
                each.log.close()

    def _wait_for_strays(self) -> None:
        """Waits for runs that an earlier study, which was killed, left behind: they are saving. Raises DataError."""
        left = [node for node in self._tree.nodes if node not in self._done and node.run_dir.is_dir()]
        until = time.monotonic() + _PATIENCE
        for node in left:
            while True:
                try:
                    with alone_in(node.run_dir, "a run that an earlier study left behind"):
                        break
                except DataError:
                    if time.monotonic() > until:
                        raise
                    time.sleep(_LOOK)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)


def _start(node: Node, place: Place) -> _Running:
    """Starts a node's command; what it says goes to its log, after what it said before."""
    logs = node.run_dir / "logs"
    with disk_errors(logs, "a run's log"):
        logs.mkdir(parents=True, exist_ok=True)
    if node.ending is None:
        publish_text(node.config_file, node.config_text(), "a run's configuration")
    with disk_errors(node.log_file, "a run's log"):
        log = open(node.log_file, "ab")  # noqa: SIM115 (closed when the run ends)
    process = subprocess.Popen(
        [*place.launcher, *node.command()],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env={**os.environ, **place.environment},
        start_new_session=True,  # a Ctrl-C in the terminal is for the study, which tells its runs
        preexec_fn=_die_with_parent(place.stop_signal),
    )
    return _Running(node, place, process, log)


def _die_with_parent(number: signal.Signals) -> Callable[[], None]:
    """What a new process does first, so that the kernel sends it a signal when the study is gone, however it ended."""
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:  # it was gone before
            os._exit(StoppedError.exit_status)

    return prepare


def _failure(node: Node, status: int) -> RunFailedError:
    """The error of a study whose run ended with a status that is not 0; negative: the signal that killed it."""
    lines = node.log_file.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    if status < 0:
        name = signal.Signals(-status).name
        why = " (is there enough memory?)" if status == -signal.SIGKILL else ""
        last, status = f"killed by {name}{why}; its last line: {last}", 128 - status
    return RunFailedError(f"run {node.name}: {last} (its log: {node.log_file})", status)


# ---------------------------------------------------------------------------------------------- how far it is


class _Meter:
    """Tokens trained of all the study's, with the time left: a bar in a terminal, elsewhere a line now and then."""

    def __init__(self, console: Console, tree: Tree, done: set[Node]) -> None:
        self._console, self._nodes = console, tree.nodes
        self._total = sum(node.tokens for node in tree.nodes)
        self._began, self._at_first = time.monotonic(), self._tokens(done, [n for n in tree.nodes if n not in done])
        self._said, self._said_done = self._began, len(done)
        self._progress: Progress | None = None

    def __enter__(self) -> "_Meter":
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[tokens]}"),
                TimeRemainingColumn(),
                console=self._console,
                auto_refresh=False,  # it would be a thread, and runs are forked
            )
            self._progress.add_task("", total=self._total, completed=self._at_first, tokens="")
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, done: set[Node], running: Sequence[Node]) -> None:
        """Says how far it is: at once where a run has ended, else now and then."""
        now = time.monotonic()
        due = 1.0 if self._progress is not None else _LINE_EVERY
        if len(done) == self._said_done and now < self._said + due:
            return
        self._said, self._said_done = now, len(done)
        tokens = self._tokens(done, running)
        runs = f"{len(done)}/{len(self._nodes)} runs"
        counts = f"{tokens:,} of {self._total:,} tokens"
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=tokens, description=runs, tokens=counts)
            self._progress.refresh()
            return
        left = "time left unknown"
        if tokens > self._at_first:
            seconds = (now - self._began) / (tokens - self._at_first) * (self._total - tokens)
            left = f"{datetime.timedelta(seconds=round(seconds))} left"
        names = f"; running: {', '.join(node.name for node in running)}" if running else ""
        self._console.print(f"{runs}  {counts}  {left}{names}", markup=False, soft_wrap=True)

    def _tokens(self, done: set[Node], begun: Sequence[Node]) -> int:
        trained = sum(node.tokens for node in done)
        return trained + sum(min(node.tokens, _last_step(node) * _tokens_per_step(node)) for node in begun)


def _tokens_per_step(node: Node) -> int:
    return node.config.tokens_per_step(node.phase)


def _last_step(node: Node) -> int:
    """The last step that a run has recorded, from the end of its metrics; 0 where there is none yet."""
    try:
        with open(node.run_dir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65_536))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            return int(json.loads(line)["step"])
    return 0
