"""How long a conversion takes beside a plain copy of the same bytes, and how much memory: on a model made for it.

python tools/bench/convert.py --parameters 1e9 [--layers 4] [--to hf] [--folder DIR] [--keep]

Makes a Hugging Face folder of a Llama of about so many parameters in bfloat16, whose files are sparse: they read as
zeros and take no room. Then, each in a process of its own: copies the files and flushes the copy to the disk; converts
them to hf (as many bytes) or to megacl (twice as many: float32). The conversion also hashes what it reads and writes,
and reads all of it again to compare. Peak memory is the most that the process ever held resident. DIR needs room for
the result: 2 bytes a parameter for hf, 4 for megacl; 10e9 is the size that docs/conversion.md speaks of. A cached read
of a sparse file costs next to nothing, so the copy is as fast as writing. --layers: no more layers than that, as wide
as they are, where there is less room: memory follows the largest tensor.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from megacl.convert.hf import table_of
from megacl.convert.hf_config import config_tree
from megacl.convert.mapping import expand, foreign_shapes
from megacl.convert.plan import in_files
from megacl.data.tokenizer_training import train_tokenizer
from megacl.model.config import ModelConfig
from megacl.tensorfile import TensorWriter

_CHUNK = 2**24
_SHARD = 5 * 10**9


def model_of(parameters: float) -> ModelConfig:
    """A Llama of about so many parameters: 12 x layers x width^2, and a vocabulary of 50,304."""
    layers = max(2, round((parameters / 12 / 128**2) ** (1 / 3)))
    width = max(1, round(math.sqrt(parameters / 12 / layers) / 128)) * 128
    return ModelConfig(
        form="llama",
        vocab_size=50_304,
        hidden_size=width,
        num_layers=layers,
        num_attention_heads=width // 128,
        intermediate_size=8 * width // 3 // 128 * 128,
        rotary_pct=1.0,
    )


class _SparseWriter(TensorWriter):
    """Writes the header, and leaves the tensors to be holes."""

    def leave_holes(self, size: int) -> None:
        """The file's tensors take `size` bytes."""
        self._file.truncate(self._file.tell() + size)


def make_source(folder: Path, model: ModelConfig) -> int:
    """A Hugging Face folder in bfloat16 whose tensors are holes; returns its bytes."""
    folder.mkdir(parents=True)
    shapes = foreign_shapes(expand(table_of("llama"), model), model)
    shards = in_files({name: (torch.bfloat16, shape) for name, shape in shapes.items()}, _SHARD)
    weight_map, total = {}, 0
    for number, entries in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        size = sum(2 * math.prod(shape) for _, shape in entries.values())
        with _SparseWriter(folder / name, entries, {"format": "pt"}) as file:
            file.leave_holes(size)
        weight_map.update(dict.fromkeys(entries, name))
        total += size
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    tree = config_tree(model, "llama", seq_length=2048, dtype="bfloat16", bos=None, eos=None)
    (folder / "config.json").write_text(json.dumps(tree))
    return total


def copy(source: Path, destination: Path, times: int) -> None:
    """Writes each file's bytes `times` times over, and flushes them to the disk."""
    destination.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        with open(destination / file.name, "wb", buffering=0) as out:
            for _ in range(times):
                with open(file, "rb", buffering=0) as read:
                    while chunk := read.read(_CHUNK):
                        out.write(chunk)
            os.fsync(out.fileno())


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident GiB of a process that must end well."""
    begun = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command}: ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - begun, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parameters", type=float, default=1e9)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--to", choices=("hf", "megacl"), default="hf")
    parser.add_argument("--folder", type=Path, help="where to write; by default a temporary folder")
    parser.add_argument("--keep", action="store_true", help="leave what was written")
    parser.add_argument("--copy", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.copy:
        source, destination, times = arguments.copy
        return copy(Path(source), Path(destination), int(times))
    folder = Path(tempfile.mkdtemp(prefix="megacl-convert-", dir=arguments.folder))
    try:
        model = model_of(arguments.parameters)
        run(folder, replace(model, num_layers=arguments.layers or model.num_layers), arguments.to)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)


def run(folder: Path, model: ModelConfig, to: str) -> None:
    """Copies and converts, and prints a line each."""
    source, times = folder / "source", {"hf": 1, "megacl": 2}[to]
    size = make_source(source, model)
    print(f"{size / 2:,.0f} parameters, {size / 1e9:.2f} GB in bfloat16; written: {times * size / 1e9:.2f} GB")
    seconds, memory = measured([sys.executable, __file__, "--copy", str(source), str(folder / "copy"), str(times)])
    shutil.rmtree(folder / "copy")
    print(f"plain copy  {seconds:8.1f} s  {times * size / 1e9 / seconds:6.2f} GB/s  peak {memory:5.2f} GiB", flush=True)
    (folder / "text.txt").write_text("to be or not to be, that is the question " * 99)
    tokenizer = train_tokenizer([str(folder / "text.txt")], folder / "tokenizer.model", 280)
    command = [sys.executable, "-m", "megacl", "convert", str(source), str(folder / "out"), "--to", to]
    taken, memory = measured([*command, "--tokenizer", str(tokenizer.file)])
    print(
        f"convert     {taken:8.1f} s  {times * size / 1e9 / taken:6.2f} GB/s  peak {memory:5.2f} GiB"
        f"  {taken / seconds:.2f} times the copy"
    )


if __name__ == "__main__":
    main()
