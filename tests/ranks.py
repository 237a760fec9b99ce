"""Runs a function on several gloo ranks of this machine. The ranks are started once per world size and kept.

    losses = run_on_ranks(2, train, "deepspeed", steps=20)     # [rank 0's result, rank 1's result]

The function is called as function(ranks, *args, **kwargs) and must be importable by name (a test module's own function
is); arguments and results are pickled, so tensors travel as numpy arrays.
"""

import atexit
import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

from megacl.parallel.ranks import Ranks

SECONDS = 300
"""How long a call may take on any rank; compiling takes minutes on a busy machine."""


def run_on_ranks(world_size: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """The function's results, by rank; AssertionError with the traceback of the first rank that failed."""
    pool = _pool(world_size)
    try:
        return pool.run(function, args, kwargs)
    except BaseException:
        pool.close()  # a rank may still wait for one that failed: the next call starts new ones
        _pool.cache_clear()
        raise


def run_on_fresh_ranks(world_size: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """The same on ranks that have run nothing before and end with the call, for what is asked of the process itself."""
    pool = _Pool(world_size)
    try:
        return pool.run(function, args, kwargs)
    finally:
        pool.close()


@functools.cache
def arranged(ranks: Ranks, tensor_parallel: int, sequence_parallel: int) -> Ranks:
    """`Ranks.arrange`, in groups that a rank keeps for the next test."""
    return ranks.arrange(tensor_parallel=tensor_parallel, sequence_parallel=sequence_parallel)


@functools.cache
def _pool(world_size: int) -> "_Pool":
    return _Pool(world_size)


class _Pool:
    def __init__(self, world_size: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        spawn = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            ours, theirs = spawn.Pipe()
            place = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "OMP_WAIT_POLICY": "passive",
                "TORCH_EXTENSIONS_DIR": os.path.join(self._folder.name, "extensions"),
            }
            process = spawn.Process(target=_serve, args=(theirs, place), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        atexit.register(self.close)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + SECONDS
        while len(results) < len(self._pipes):
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = multiprocessing.connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            assert ready, f"no answer within {SECONDS} s from {len(waiting)} of {len(self._pipes)} ranks"
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    failure, results[rank] = pipe.recv()
                except EOFError:
                    failure = "the process ended"
                assert failure is None, f"rank {rank} of {len(self._pipes)}: {failure}"
        return [results[rank] for rank in range(len(self._pipes))]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        with contextlib.suppress(OSError):
            self._folder.cleanup()
        atexit.unregister(self.close)


def _serve(pipe: multiprocessing.connection.Connection, place: dict[str, str]) -> None:
    os.environ.update(place)  # before torch is imported
    from megacl.parallel.ranks import start_ranks

    ranks = start_ranks(timeout=SECONDS)
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            answer = (None, function(ranks, *args, **kwargs))
        except Exception:
            answer = (traceback.format_exc(), None)
        pipe.send(answer)
