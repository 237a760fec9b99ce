"""How fast a peer reads random sequences: python load.py PEER FOLDER, in the environment that make_peers.sh made.

PEER: megatron, datasets or mds. FOLDER is what tools/bench/loader.py wrote: megatron.bin and .idx, and flat.bin, the
same tokens without boundaries. What a peer needs besides is made first and not counted. Prints the milliseconds to the
first sequence, and the tokens a second from then on.
"""

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

T, BATCH, READS = 2048, 16, 20_000


def megatron(folder: Path) -> Iterator[int]:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Tokenizer:
        eod, pad, vocab_size, unique_identifiers = 2, -1, 32_000, {"name": "none"}

    tokens = (folder / "flat.bin").stat().st_size // 2
    shutil.rmtree(folder / "megatron-index", ignore_errors=True)
    yield 0
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=T,
        blend=([str(folder / "megatron")], None),
        split="1,0,0",
        path_to_cache=str(folder / "megatron-index"),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, [tokens // T, 0, 0], lambda: True, config).build()[0]
    for index in range(min(READS, len(dataset))):
        yield len(dataset[index]["tokens"])


def rows_of(folder: Path) -> np.ndarray:
    flat = np.memmap(folder / "flat.bin", np.uint16, "r")
    return flat[: len(flat) // (T + 1) * (T + 1)].reshape(-1, T + 1)


def datasets(folder: Path) -> Iterator[int]:
    import datasets as library
    import pyarrow as pa

    library.disable_progress_bars()
    if not (folder / "datasets").exists():
        rows = rows_of(folder)
        offsets = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * (T + 1))
        lists = pa.ListArray.from_arrays(offsets, pa.array(rows.ravel()))
        library.Dataset(pa.table({"tokens": lists})).save_to_disk(str(folder / "datasets"))
    yield 0
    dataset = library.load_from_disk(str(folder / "datasets")).shuffle(seed=1).with_format("numpy")
    for first in range(0, min(READS // 5, len(dataset)) - BATCH, BATCH):
        yield len(dataset[first : first + BATCH]["tokens"]) * T


def mds(folder: Path) -> Iterator[int]:
    from streaming import MDSWriter, StreamingDataset

    if not (folder / "mds").exists():
        with MDSWriter(out=str(folder / "mds"), columns={"tokens": f"ndarray:uint16:{T + 1}"}) as writer:
            for row in rows_of(folder):
                writer.write({"tokens": np.array(row)})
    yield 0
    dataset = iter(StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=BATCH))
    for _, row in zip(range(READS), dataset, strict=False):
        yield len(row["tokens"].astype(np.int64)) - 1


def main() -> None:
    reads = {"megatron": megatron, "datasets": datasets, "mds": mds}[sys.argv[1]](Path(sys.argv[2]))
    next(reads)
    begun = time.perf_counter()
    next(reads)
    first = time.perf_counter()
    tokens = sum(reads)
    print((first - begun) * 1000, tokens / (time.perf_counter() - first))


if __name__ == "__main__":
    main()
