"""How fast tokens are read: megacl beside numpy and the peers, the first batch at any size, and what an order fetches.

    bash tools/bench/make_peers.sh /tmp/peers
    python tools/bench/loader.py --work /tmp/loader --peers /tmp/peers --repeats 5

Four tables in Markdown; a figure is the median of the repeats, with their span. All but the last table are measured in
processes of their own, on files that are in the page cache; imports are not counted.

    first batch     open_source, plan_phase, PhaseStream and the Loader's first batch of 2 x 2,048 tokens: milliseconds,
                    and MB of memory above the imports. Shards have 1e8 tokens at most; more are links to the first two.
                    The last row mixes 20 sources of 1e6 tokens by a temperature.
    random reads    sequences of 2,048 in random order, 16 at a time, as int64. `numpy, rows` copies each from one flat
                    memory map, `numpy, batches` 16 together: that is the limit. `megacl` reads at given places,
                    `megacl, samples` finds them by the order too, 128 at a time as the loader does, and `loader` is all
                    of it, from opening the folder on. The peers read the same documents.
    time waited     steps of 50 ms that do nothing: seconds waited for batches of 16 after the first
    fetches         of an epoch, with a cache of 32 of 512 shards: shards fetched, and times each one is fetched
"""

import argparse
import collections
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megacl.config_phase import ConstantSchedule, PhaseConfig
from megacl.data.loader import Loader
from megacl.data.manifest import Generation, Manifest, TokenizerRecord, publish_manifest
from megacl.data.megatron import write_megatron
from megacl.data.order import Int64, WindowedOrder, permuted
from megacl.data.planning import plan_phase
from megacl.data.sequences import build_sequences
from megacl.data.shard_list import ShardList, ShardRow
from megacl.data.shards import Documents, write_shard
from megacl.data.source import Source, open_source
from megacl.data.stream import PhaseStream
from megacl.lineage import Lineage

ROOT = Path(__file__).resolve().parents[2]
T, BATCH, READS = 2048, 16, 20_000
RANKS = 16_384
LARGEST = 10**8
"""Tokens of a shard."""


# ---------------------------------------------------------------------------------------------- the data


def write_source(folder: Path, tokens: int) -> None:
    """A data folder of so many random tokens, in documents of 800 on average; shards are links to the first two."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    count, size = max(1, tokens // LARGEST), min(tokens, LARGEST)
    written = []
    for number in range(min(2, count)):
        lengths = np.maximum(rng.lognormal(6.2, 1.0, size // 400).astype(np.int64), 2)
        ends = np.cumsum(lengths)
        ends = np.append(ends[ends < size - 1], size)
        values = rng.integers(3, 32_000, size, dtype=np.uint16)
        values[ends - 1] = 2
        ones = np.ones(len(ends), np.int64)
        documents = Documents(values, np.append(0, ends).astype(np.int32), ones, ones.astype(np.uint64))
        written.append(write_shard(folder / f"train-{number:05d}.arrow", documents, split="train"))
    rows = []
    for index in range(count):
        row = written[index % len(written)]
        path = f"train-{index:05d}.arrow"
        if index >= len(written):
            os.link(folder / row.path, folder / path)
        rows.append(ShardRow(**{**vars(row), "path": path, "added": 1}))
    shards, fingerprint = ShardList.of_rows(rows), "0" * 64
    tokenizer = TokenizerRecord("tokenizer.model", fingerprint, 32_000, 2)
    totals = [shards.totals(split) for split in ("train", "validation")]
    state = Generation(1, count, *totals, shards.fingerprint(fingerprint, "uint16"), "prepare", {})
    publish_manifest(folder, Manifest("megacl-data", 2, "random", "uint16", tokenizer, 0, (state,)), shards, [])


def export(source: Source, folder: Path) -> None:
    """The same documents for numpy and the peers."""
    shards = [source.train.documents_of(shard) for shard in range(len(source.train.shards))]
    tokens = (each.tokens(index) for each in shards for index in range(len(each)))
    write_megatron(str(folder / "megatron"), tokens, np.dtype(np.uint16))
    with open(folder / "flat.bin", "wb") as file:
        for each in shards:
            file.write(each.values)


def open_phase(
    folder: Path, *, batch_size: int, steps: int, window: int | None = None, sources: int = 1
) -> PhaseStream:
    """What a run does before its first step, without the model; sources: as so many the folder is opened and mixed."""
    opened = {
        f"random-{number}": Source(**{**vars(open_source(folder)), "window": window, "fingerprint": f"{number:064x}"})
        for number in range(sources)
    }
    mixture = {name: float(number + 1) for number, name in enumerate(opened)}
    schedule = ConstantSchedule(kind="constant", max_lr=1e-3)
    record = plan_phase(
        Lineage(),
        PhaseConfig(name="phase", mixture=mixture, temperature=3 if sources > 1 else 1, steps=steps, schedule=schedule),
        opened,
        run="bench",
        seed=0,
        seq_length=T,
        global_batch_size=batch_size,
        steps=steps,
        schedule={},
        optimizer_state="new",
        start_lr=0.0,
    )
    return PhaseStream(Lineage().with_phase(record), lambda wanted: opened[wanted.name])


def open_loader(stream: PhaseStream, *, rank: int = 0, world_size: int = 1) -> Loader:
    batch_size = stream.record.global_batch_size
    return Loader(stream, batch_size=batch_size, rank=rank, world_size=world_size, vocab_size=32_000)


# ---------------------------------------------------------------------------------------------- in a process of its own


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def first(folder: Path, rank: str, world_size: str, sources: str = "1") -> tuple[float, float]:
    """Milliseconds to the first batch, and MB above the imports."""
    before, begun = resident(), time.perf_counter()
    stream = open_phase(folder, batch_size=2 * int(world_size), steps=1, sources=int(sources))
    next(iter(open_loader(stream, rank=int(rank), world_size=int(world_size))))
    return (time.perf_counter() - begun) * 1000, (resident() - before) / 1e6


def reads(folder: Path, what: str) -> tuple[float]:
    """Tokens a second."""
    if what == "loader":
        begun = time.perf_counter()
        tokens = sum(len(b.tokens) * T for b in open_loader(open_phase(folder, batch_size=BATCH, steps=READS // BATCH)))
        return (tokens / (time.perf_counter() - begun),)
    read, places, at_once = reader(folder, what)
    read(places)  # so that all of the files is in the page cache, and mapped
    begun = time.perf_counter()
    for begin in range(0, READS, at_once):
        read(places[begin : begin + at_once])
    return (READS * T / (time.perf_counter() - begun),)


def reader(folder: Path, what: str) -> tuple[Callable[[Int64], object], Int64, int]:
    """(what reads sequences at some places, all places, how many are read at once)."""
    if what == "megacl, samples":
        return open_phase(folder, batch_size=BATCH, steps=READS // BATCH).read, np.arange(READS), 128
    sequences = build_sequences(open_source(folder), T, 0, None)
    places = sequences.starts(np.arange(READS))
    if what == "megacl":
        return sequences.read, places, BATCH
    flat = np.memmap(folder / "flat.bin", np.uint16, "r")
    if what == "numpy, rows":
        return lambda some: [flat[p : p + T + 1].astype(np.int64) for p in some.tolist()], places, BATCH
    rows = np.lib.stride_tricks.sliding_window_view(flat, T + 1)
    return lambda some: rows[some].astype(np.int64), places, BATCH


def waited(folder: Path, window: str) -> tuple[float, float]:
    """Seconds waited for all batches but the first, and for the first."""
    loader = open_loader(open_phase(folder, batch_size=BATCH, steps=100, window=int(window) or None))
    to_first = 0.0
    for _ in loader:
        to_first = to_first or loader.waited
        time.sleep(0.05)
    return loader.waited - to_first, to_first


# ---------------------------------------------------------------------------------------------- the tables


def run(command: list[str], repeats: int) -> list[list[float]]:
    """What a command prints, for each repeat."""
    found = []
    for _ in range(repeats):
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
        found.append([float(word) for word in done.stdout.strip().split("\n")[-1].split()])
    return found


def one(repeats: int, *arguments: object) -> list[list[float]]:
    return run([sys.executable, __file__, "--one", *map(str, arguments)], repeats)


def spans(found: list[list[float]], form: str = ".1f") -> str:
    columns = zip(*found, strict=True)
    return " | ".join(f"{statistics.median(c):{form}} ({min(c):{form}}-{max(c):{form}})" for c in columns)


def fetches(order: Any, shards: int, size: int, cache: int) -> int:
    """How many shards an epoch fetches through a cache of so many, the least recently used of which go."""
    held: collections.OrderedDict[int, None] = collections.OrderedDict()
    count = 0
    for shard in order(np.arange(shards * size)).tolist():
        if shard in held:
            held.move_to_end(shard)
            continue
        count += 1
        held[shard] = None
        if len(held) > cache:
            held.popitem(last=False)
    return count


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        what, folder, *rest = sys.argv[2:]
        print(*{"first": first, "reads": reads, "waited": waited}[what](Path(folder), *rest))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where the data is written: 3 GB")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="what make_peers.sh made")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", type=float, nargs="*", default=[1e6, 1e7, 1e8, 1e9, 1e10, 1e13])
    parser.add_argument("--tokens", type=float, default=2e8, help="tokens of the random reads")
    arguments = parser.parse_args()
    repeats, work = arguments.repeats, arguments.work
    print("| tokens | shards | rank | first batch, ms | memory, MB |\n|---|---|---|---|---|")
    for size in map(int, arguments.sizes):
        write_source(work / "growing", size)
        for rank in (0, RANKS // 2 - 1, RANKS - 1) if size * 2 > RANKS * T * 4 else (0,):
            world_size = RANKS if rank else 1
            found = one(repeats, "first", work / "growing", rank, world_size)
            print(f"| {size:.0e} | {max(1, size // LARGEST):,} | {rank:,} of {world_size:,} | {spans(found)} |")
    write_source(work / "growing", 10**6)
    print(f"| 20 x 1e+06 | 20 | 0 of 1 | {spans(one(repeats, 'first', work / 'growing', 0, 1, 20))} |")
    shutil.rmtree(work / "growing", ignore_errors=True)
    folder = work / "reads"
    write_source(folder, int(arguments.tokens))
    export(open_source(folder), folder)
    print("\n| random reads | million tokens/s |\n|---|---|")
    for what in ("numpy, rows", "numpy, batches", "megacl", "megacl, samples", "loader"):
        rates = [[value / 1e6 for value in values] for values in one(repeats, "reads", folder, what)]
        print(f"| {what} | {spans(rates)} |")
    for peer in ("megatron", "datasets", "mds") if arguments.peers else ():
        command = [str(arguments.peers / "bin/python"), str(ROOT / "tools/bench/peers/load.py"), peer, str(folder)]
        found = run(command, repeats)
        to_first = spans([[milliseconds] for milliseconds, _ in found])
        print(f"| {peer} (first sequence after {to_first} ms) | {spans([[rate / 1e6] for _, rate in found])} |")
    print("\n| order | waited in 100 steps of 50 ms, s | for the first batch, s |\n|---|---|---|")
    for name, window in (("permutation", 0), ("window 1", 1)):
        print(f"| {name} | {spans(one(repeats, 'waited', folder, window), '.4f')} |")
    print("\n| order | shards fetched in an epoch | times each |\n|---|---|---|")
    shards, size, cache = 512, 1000, 32
    orders: list[tuple[str, Any]] = [("permutation", lambda draws: permuted(draws, shards * size, 1) // size)]
    for window in (1, 8, 16):
        windows = WindowedOrder(np.full(shards, size), window, 1)
        orders.append((f"window {window}", lambda draws, windows=windows: windows.locate(draws)[0]))
    for name, order in orders:
        count = fetches(order, shards, size, cache)
        print(f"| {name} | {count:,} | {count / shards:.1f} |")


if __name__ == "__main__":
    main()
