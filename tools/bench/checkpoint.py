"""Saving a checkpoint: megacl beside a plain write of as many bytes, torch.save, PyTorch's DCP and DeepSpeed.

    python tools/bench/checkpoint.py --folder /data/tmp --rounds 5

A table in Markdown for each number of ranks; a figure is the median of the rounds, with their span. In each round every
row saves once, in a process of its own that has saved once before, what fp32 weights and Adam's two moments of a GPT
take. All of them flush to the disk before they count as written (DeepSpeed does not by itself: its files are flushed
behind it, and the time counts).

    waited     for which a training loop stands still: the whole save, or, where it is written behind the loop's back,
               the copy before, as far as no step runs beside it, and the publishing behind it
    written    from the beginning until all bytes are on the disk, and for megacl published under the final name
    MB/s       of the bytes of the state, by `written` less the copy that comes before: what the disk is given
    to plain   MB/s beside the plain write's, round by round

`megacl` hashes what it writes; nobody else does. `megacl, training` trains on while it writes, as a run does: its steps
take the cores that hashing wants, and the other way round; its `waited` is that of the loop.
`dcp` is torch.distributed.checkpoint, `dcp async` its async_save. With 2 ranks the engine is
DeepSpeed's at ZeRO 1, and each rank writes a half.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
ROWS = {
    1: ["plain write", "megacl", "megacl, training", "torch.save", "dcp", "dcp async", "deepspeed"],
    2: ["plain write", "megacl", "megacl, training", "dcp", "deepspeed"],
}
Times = dict[str, float]
"""Seconds: waited, written, and copied, which is of the part of `written` that no disk is written in."""


# ---------------------------------------------------------------------------------------------- in its own process


def engine_of(kind: str, hidden: int, ranks: Any) -> Any:
    """An engine with weights and moments that are not all alike."""
    import torch

    from megacl.config import EngineConfig, OptimizerConfig
    from megacl.engine import build_engine
    from megacl.model.config import ModelConfig
    from megacl.model.gpt import build_model

    shape = ModelConfig(vocab_size=8192, hidden_size=hidden, num_layers=6, num_attention_heads=8)
    deepspeed = kind == "deepspeed" or ranks.world_size > 1
    config = EngineConfig(kind="deepspeed" if deepspeed else "native", zero_stage=1)
    model = build_model(shape, seed=0, device="meta")
    engine = build_engine(model, engine=config, optimizer=OptimizerConfig(), ranks=ranks)
    shapes = engine.shapes

    def load(name: str) -> dict[str, torch.Tensor]:
        return {key: torch.rand(shapes[name]) * 0.01 for key in ("weight", "exp_avg", "exp_avg_sq")}

    engine.import_state(load, optimizer_step=1, loss_scale=None)
    return engine


def saver(kind: str, engine: Any, ranks: Any) -> Callable[[Path], Times]:
    """A function that saves into an empty folder."""
    if kind.startswith("megacl"):
        return megacl_saver(engine, ranks, training="training" in kind)
    if kind == "deepspeed":
        return lambda folder: whole(lambda: save_by_deepspeed(engine._deepspeed, folder))
    from megacl.saving import owners_among

    exported = engine.export_state(owners_among(ranks, engine))
    state = {f"{key}.{name}": tensor for name, tensors in exported for key, tensor in tensors.items()}
    if kind == "plain write":
        return lambda folder: whole(lambda: write_plainly(state, folder / f"{ranks.rank}"))
    if kind == "torch.save":
        return lambda folder: whole(lambda: save_by_torch(state, folder / "state.pt"))
    return lambda folder: save_by_dcp(state, folder, behind="async" in kind)


def whole(save: Callable[[], None]) -> Times:
    begun = time.perf_counter()
    save()
    seconds = time.perf_counter() - begun
    return {"waited": seconds, "written": seconds, "copied": 0.0}


def megacl_saver(engine: Any, ranks: Any, *, training: bool) -> Callable[[Path], Times]:
    import numpy as np

    from megacl.checkpoint import RunState
    from megacl.lineage import Lineage
    from megacl.saving import Saving

    nothing: Any = None
    tokenizer: Any = SimpleNamespace(save=lambda folder: (folder / "tokenizer.json").write_text("{}"))
    saving = Saving(engine, ranks, Path(), config=nothing, tokenizer=tokenizer)
    tokens = np.random.default_rng(0).integers(0, 8192, (2, 129))

    def save(folder: Path) -> Times:
        saving._run_dir = folder
        begun = time.perf_counter()
        with mock.patch("megacl.saving.dump", return_value=""):  # which is not there
            times = save_and_wait(begun)
        return times

    def save_and_wait(begun: float) -> Times:
        saving.begin(RunState(step=1), Lineage())
        begun_in = time.perf_counter() - begun
        if not training:
            engine.before_change()  # as an update would wait
        copied = time.perf_counter() - begun
        waited, saved = begun_in, None
        while saved is None:
            while ranks.sum(np.array([float(saving.written)]))[0] < ranks.world_size:
                if training:
                    engine.step(tokens, 1e-6)
                else:
                    time.sleep(0.001)
            ready = time.perf_counter()
            saved = saving.advance()
            waited += time.perf_counter() - ready
        return {"waited": waited + saved.held_up, "written": time.perf_counter() - begun, "copied": copied}

    return save


def write_plainly(state: dict[str, Any], path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        for tensor in state.values():
            content = tensor.numpy().reshape(-1).view("u1").data
            while content:
                content = content[file.write(content) :]
        os.fsync(file.fileno())


def save_by_torch(state: dict[str, Any], path: Path) -> None:
    import torch

    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def save_by_dcp(state: dict[str, Any], folder: Path, *, behind: bool) -> Times:
    import torch.distributed.checkpoint as dcp

    writer = dcp.FileSystemWriter(folder, sync_files=True)
    if not behind:
        return whole(lambda: dcp.save(state, storage_writer=writer))
    begun = time.perf_counter()
    future: Any = dcp.async_save(state, storage_writer=writer)
    waited = time.perf_counter() - begun
    future.result()
    return {"waited": waited, "written": time.perf_counter() - begun, "copied": waited}


def save_by_deepspeed(engine: Any, folder: Path) -> None:
    engine.save_checkpoint(str(folder), tag="x")
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())


def work(kind: str, hidden: int) -> None:
    """Answers each folder's name on the standard input with the times of a save into it, as JSON."""
    import numpy as np

    from megacl.parallel.ranks import start_ranks

    ranks = start_ranks(timeout=600)
    engine = engine_of(kind, hidden, ranks)
    save = saver(kind, engine, ranks)
    size = 12 * sum(shape.numel() for shape in engine.shapes.values())
    while True:
        folder = ranks.broadcast(sys.stdin.readline().strip() if ranks.rank == 0 else None)
        if not folder:
            return
        times = save(Path(folder))
        keys = sorted(times)
        slowest = ranks.max(np.array([times[key] for key in keys]))
        if ranks.rank == 0:
            print(json.dumps({**dict(zip(keys, slowest.tolist(), strict=True)), "bytes": size}), flush=True)


# ---------------------------------------------------------------------------------------------- the table


class Row:
    """The processes of one row."""

    def __init__(self, kind: str, world: int, hidden: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.kind = kind
        self._processes: list[subprocess.Popen[str]] = []
        for rank in range(world):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": port}
            environment = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT)}
            environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
            command = [sys.executable, __file__, "--work", kind, "--hidden", str(hidden)]
            pipe = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            streams: dict[str, Any] = {"stdin": pipe, "stdout": pipe, "stderr": subprocess.DEVNULL}
            self._processes.append(subprocess.Popen(command, env=environment, text=True, **streams))
        self.found: list[dict[str, float]] = []

    def save(self, folder: Path) -> dict[str, float]:
        with tempfile.TemporaryDirectory(dir=folder) as inside:
            first = self._processes[0]
            assert first.stdin is not None
            assert first.stdout is not None
            first.stdin.write(f"{inside}\n")
            first.stdin.flush()
            line = first.stdout.readline()
            while line and not line.startswith("{"):  # DeepSpeed speaks there
                line = first.stdout.readline()
            if not line:
                raise SystemExit(f"{self.kind} has ended by itself")
            return dict(json.loads(line))

    def close(self) -> None:
        self._processes[0].stdin.close()  # type: ignore[union-attr]
        for process in self._processes:
            process.wait(60)


def table(world: int, rounds: int, hidden: int, folder: Path) -> None:
    rows = [Row(kind, world, hidden) for kind in ROWS[world]]
    try:
        for row in rows:
            row.save(folder)  # memory, imports and the page cache
        for _ in range(rounds):
            for row in rows:
                os.sync()  # what others have left to write is no part of it
                row.found.append(row.save(folder))
    finally:
        for row in rows:
            row.close()
    size = rows[0].found[0]["bytes"]
    print(f"\n{world} rank(s), {size / 1e6:,.0f} MB, {rounds} rounds, in {folder}\n")
    print("| | waited, s | written, s | MB/s | to plain | waited to written |")
    print("|---|---|---|---|---|---|")
    rates = [[size / 1e6 / (each["written"] - each["copied"]) for each in row.found] for row in rows]
    for row, rate in zip(rows, rates, strict=True):
        beside = [one / plain for one, plain in zip(rate, rates[0], strict=True)]
        cells = [
            span([each["waited"] for each in row.found], ".3f"),
            span([each["written"] for each in row.found], ".2f"),
            span(rate, ",.0f"),
            span(beside, ".2f"),
            span([each["waited"] / each["written"] for each in row.found], ".1%"),
        ]
        print(f"| {row.kind} | {' | '.join(cells)} |")


def span(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the disk is")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=768, help="width of the model; 768 has about 55 million weights")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.hidden)
        return
    if shutil.disk_usage(arguments.folder).free < 10 * 2**30:
        raise SystemExit(f"{arguments.folder} has less than 10 GiB left; name another one with --folder")
    for world in arguments.ranks:
        table(world, arguments.rounds, arguments.hidden, arguments.folder)


if __name__ == "__main__":
    main()
