"""A peer's way from JSONL to tokens on disk, in the peers' environment (make_peers.sh); run by tools/bench/prepare.py.

    DIR/bin/python tools/bench/peers/prepare.py PEER INPUT.jsonl TOKENIZER OUT     # prints the seconds it took

PEER: megatron (a pool that pipes ids to one writer), datasets (map and save_to_disk), litdata, mds. Processes: one for
each core. TOKENIZER: a SentencePiece .model or a Hugging Face .json. Every document ends with id 2; ids are uint16.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np

END = 2
LINES = 32
"""Lines that a pool hands to a process at once."""
CORES = len(os.sched_getaffinity(0))

_, PEER, INPUT, TOKENIZER, OUT = sys.argv


@cache
def load_encode() -> Callable[[str], list[int]]:
    """The tokenizer, once in each process."""
    if TOKENIZER.endswith(".json"):
        import tokenizers

        model = tokenizers.Tokenizer.from_file(TOKENIZER)
        return lambda text: model.encode(text, add_special_tokens=False).ids
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=TOKENIZER).encode


def encode_line(line: str) -> list[int]:
    return [*load_encode()(json.loads(line)["text"]), END]


def encode_file(name: str) -> Iterator[object]:
    import torch

    with open(name) as lines:
        for line in lines:
            yield torch.tensor(encode_line(line), dtype=torch.uint16)


def encode_rows(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
    encode = load_encode()
    return {"tokens": [[*encode(text), END] for text in rows["text"]]}


def megatron() -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{OUT}/data.bin", dtype=np.uint16)
    with multiprocessing.Pool(CORES) as pool, open(INPUT) as lines:
        for ids in pool.imap(encode_line, lines, LINES):
            builder.add_document(torch.IntTensor(ids), [len(ids)])
    builder.finalize(f"{OUT}/data.idx")


def datasets() -> None:
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=INPUT, split="train", cache_dir=f"{OUT}/cache")
    made = rows.map(encode_rows, batched=True, num_proc=CORES, remove_columns=rows.column_names)
    made.save_to_disk(f"{OUT}/tokens")


def litdata() -> None:
    from litdata import optimize
    from litdata.streaming.item_loader import TokensLoader

    lines = Path(INPUT).read_text().split("\n")[:-1]
    parts = [Path(OUT) / f"part-{number}.jsonl" for number in range(4 * CORES)]
    for number, part in enumerate(parts):
        part.write_text("\n".join(lines[number :: len(parts)]))
    global begun
    begun = time.perf_counter()  # it takes whole files; cutting the input is not its work
    optimize(
        fn=encode_file, inputs=list(map(str, parts)),
        output_dir=f"{OUT}/tokens", num_workers=CORES, chunk_size=2049 * 1024,
        item_loader=TokensLoader(2049),
    )  # fmt: skip


def mds() -> None:
    from streaming import MDSWriter

    held = np.empty(0, np.uint16)
    columns = {"tokens": "ndarray:uint16"}
    with (
        multiprocessing.Pool(CORES) as pool,
        open(INPUT) as lines,
        MDSWriter(out=f"{OUT}/tokens", columns=columns) as writer,
    ):
        for ids in pool.imap(encode_line, lines, LINES):
            held = np.concatenate([held, np.asarray(ids, np.uint16)])
            while len(held) >= 2048:
                writer.write({"tokens": held[:2048]})
                held = held[2048:]


if __name__ == "__main__":
    Path(OUT).mkdir(parents=True)
    begun = time.perf_counter()
    {"megatron": megatron, "datasets": datasets, "litdata": litdata, "mds": mds}[PEER]()
    print(time.perf_counter() - begun)
