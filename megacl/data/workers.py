"""A function over many tasks on several processes, which end when their parent does, however it ends.

Not concurrent.futures: tasks carry tens of MB, so each is sent when a worker is free and no earlier; the first error
ends everything at once; and a worker whose parent was killed must not go on writing.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from itertools import chain, islice
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TypeVar

from megacl.errors import LaunchError, MegaclError

Task = TypeVar("Task")
Result = TypeVar("Result")


def usable_cores() -> int:
    """How many cores this process may use."""
    # Under SLURM these may be fewer than the machine has; macOS cannot say.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_on_workers(
    build: Callable[[], Callable[[Task], Result]], tasks: Iterator[Task], workers: int
) -> Generator[Result, None, None]:
    """Yields function(task) for every task, in the order in which they are done.

    build makes the function, once in each process; it, the tasks and the results must pickle. At most one task a
    worker and one more are held at a time. With one worker or one task all happens in this process. A MegaclError in
    a worker is raised here as it is; LaunchError if a worker dies. Close the generator to end the workers early.
    """
    first = list(islice(tasks, 2))
    tasks = chain(first, tasks)
    if workers == 1 or len(first) == 1:
        function = build()
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, BaseProcess] = {}
    busy: set[Connection] = set()
    try:
        for task in tasks:
            if len(processes) < workers:
                ours, theirs = context.Pipe()
                processes[ours] = context.Process(target=_work, args=(build, theirs), daemon=True)
                processes[ours].start()
                theirs.close()
            elif len(busy) == workers:
                yield from _collect(processes, busy)
            free = next(pipe for pipe in processes if pipe not in busy)
            try:
                free.send(task)
            except BrokenPipeError:
                raise _death(processes[free]) from None
            busy.add(free)
        while busy:
            yield from _collect(processes, busy)
    finally:
        # One may not have been started: a signal can end this while it is. Its other end closes, which ends it.
        begun = [process for process in processes.values() if process.pid is not None]
        for process in begun:
            process.terminate()
        for process in begun:
            process.join()
        for pipe in processes:
            pipe.close()


def _collect(processes: dict[Connection, BaseProcess], busy: set[Connection]) -> Iterator[Result]:
    """Waits for a result or more, and takes the workers that gave them out of `busy`."""
    for pipe in multiprocessing.connection.wait(list(busy)):
        assert isinstance(pipe, Connection)
        try:
            error, result = pipe.recv()
        except (EOFError, ConnectionResetError):
            raise _death(processes[pipe]) from None
        busy.discard(pipe)
        if error is not None:
            raise error
        yield result


def _death(process: BaseProcess) -> LaunchError:
    process.join()
    code = process.exitcode or 0
    if code >= 0:  # once it has begun, errors come back as results
        return LaunchError(
            f"a worker process could not start and ended with status {code}; what it said stands above. A worker "
            'imports the script that it belongs to, which must do its work under `if __name__ == "__main__":`.'
        )
    return LaunchError(
        f"a worker process was killed by {signal.Signals(-code).name}; if the machine ran out of memory, use fewer "
        "--workers. The same command goes on from what is done."
    )


def _work(build: Callable[[], Callable[[Task], Result]], pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process a core is enough
    function = None
    answer: tuple[Exception | None, Result | None]
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            function = function or build()
            answer = None, function(task)
        except MegaclError as error:
            answer = error, None
        except Exception:
            answer = RuntimeError(f"in a worker process:\n{traceback.format_exc()}"), None
        pipe.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
