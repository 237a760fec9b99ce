"""What packing without cutting costs, and how full its sequences are.

    python tools/bench/packing.py                       # documents with lengths as of web text, drawn
    python tools/bench/packing.py data/english          # a prepared folder: its index, and reading from it

On one core. Drawn lengths are log-normal with sigma 1. "next fit" is what a packer that keeps one open row reaches.
"""

import sys
import time

import numpy as np

from megacl.data.packing import PackedSequences, pack
from megacl.data.sequences import Sequences
from megacl.data.source import open_source

DOCUMENTS = 10_000
"""Of one shard."""


def next_fit(lengths: list[int], row_length: int) -> int:
    """Rows where each document goes into the last row, or else into a new one."""
    rows, room = 0, 0
    for length in lengths:
        rest = length % row_length
        rows += length // row_length
        if rest > room:
            rows, room = rows + 1, row_length
        room -= rest
    return rows


def drawn() -> None:
    print("row length  mean document  ms a shard  s for 1e9 tokens     full  next fit  KB kept")
    for row_length in (512, 2048, 8192):
        for mean in (200, 600, 1500):
            draw = np.random.default_rng(0).lognormal(np.log(mean) - 0.5, 1.0, DOCUMENTS)
            lengths = np.maximum(2, draw.astype(np.int64))
            seconds = []
            for _ in range(5):
                begun = time.perf_counter()
                packing = pack(lengths, row_length)
                seconds.append(time.perf_counter() - begun)
            tokens, best = int(lengths.sum()), min(seconds)
            kept = sum(array.nbytes for array in (packing.bounds, packing.starts, packing.lengths)) / 1e3
            others = tokens / (next_fit(lengths.tolist(), row_length) * row_length)
            print(
                f"{row_length:10}  {mean:13}  {1e3 * best:10.1f}  {best * 1e9 / tokens:16.2f}  "
                f"{tokens / (len(packing) * row_length):7.2%}  {others:8.2%}  {kept:7.0f}"
            )


def prepared(folder: str) -> None:
    source = open_source(folder)
    print(f"{folder}: {len(source.train.shards)} shards, {source.train.documents:,} documents")
    for seq_length in (512, 2048):
        packed, cut = PackedSequences(source, seq_length, 0), Sequences(source, seq_length, 0)
        begun = time.perf_counter()
        rows = packed.n
        index = time.perf_counter() - begun
        print(f"sequences of {seq_length}: {rows:,} rows, {packed.fill:.2%} full, index made in {1e3 * index:.1f} ms")
        for name, sequences in (("packed", packed), ("cut", cut)):
            sequences.read(sequences.starts(np.arange(sequences.n)))  # what is on disk comes into memory
            begun, read = time.perf_counter(), 0
            while time.perf_counter() - begun < 1:
                read += sequences.read(sequences.starts(np.arange(read, read + 64))).shape[0]
            rate = read * seq_length / (time.perf_counter() - begun)
            print(f"  {name}: {rate / 1e6:,.0f} million tokens a second")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        prepared(sys.argv[1])
    else:
        drawn()
