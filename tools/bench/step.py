"""Where the time of a training step on one thread of a CPU goes, op by op, beside what the machine allows.

    python tools/bench/step.py                         # the model of tools/bench/train.py, vocabulary 8,192
    python tools/bench/step.py --vocab 50304 --rounds 5

The native engine's step, each of PyTorch's operators timed by the thread's own clock, which other processes lengthen
less than the wall's. A table in Markdown: ms a step (the median of the rounds, with their span), share of the step, and
the limit: of products, their operations at the rate at which the machine multiplies the model's matrices (as in
tools/bench/train.py); of attention, the products of its causal half at that of square ones; of all else, the bytes
that it reads and writes, at the bandwidth of a copy that no cache holds. An op whose tensors a cache holds can be
faster than that. `of it` is limit / time.
"""

import argparse
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train import gemm_rates, spans  # beside this file

from megacl.config import EngineConfig, OptimizerConfig
from megacl.engine import build_engine
from megacl.model.config import ModelConfig
from megacl.model.gpt import build_model, flops_per_token
from megacl.parallel.ranks import Ranks

WARM = 2
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "megacl::onednn_product")
ATTENTION = ("_scaled_dot_product_flash_attention_for_cpu", "megacl::c_attention")


@dataclass
class Round:
    """What was measured in one round, of one step."""

    gemm: float
    """FLOP/s of the model's products,"""
    square: float
    """and of square ones."""
    bandwidth: float
    """Bytes a second, read and written, of a copy of 128 MiB."""
    step: float = 0.0
    """Seconds of a step as it is; and by op, seconds, bytes and calls of one that is looked at."""
    seconds: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)


def bytes_of(tree: Any) -> int:
    return sum(leaf.numel() * leaf.itemsize for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


class Timing(TorchDispatchMode):
    """Times every operator, and counts what it reads and writes; a view does neither."""

    def __init__(self, into: Round) -> None:
        super().__init__()
        self.into = into

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begun = time.thread_time()
        result = operator(*args, **(kwargs or {}))
        taken = time.thread_time() - begun
        name = operator._schema.name
        self.into.seconds[name] += taken
        self.into.calls[name] += 1
        given = {**dict(zip((each.name for each in operator._schema.arguments), args, strict=False)), **(kwargs or {})}
        written = [
            given[each.name]
            for each in operator._schema.arguments
            if each.alias_info and each.alias_info.is_write and each.name in given
        ]
        fresh = [each for each in operator._schema.returns if each.alias_info is None]
        if written or fresh:
            read = (
                0
                if name in ("aten::fill_", "aten::zero_", "aten::empty", "aten::empty_like")
                else bytes_of((args, kwargs))
            )
            wrote = 0 if name.startswith("aten::empty") else bytes_of(written or result)
            # What is written over with something else is not read.
            self.into.moved[name] += read + wrote - (bytes_of(args[0]) if name == "aten::copy_" else 0)
        return result


def measure(engine: Any, rows: Any, shape: dict[str, int]) -> Round:
    rates = gemm_rates(shape, time.thread_time, repeats=2)
    source, target = torch.ones(1 << 25), torch.empty(1 << 25)
    copies = []
    for _ in range(6):
        begun = time.thread_time()
        target.copy_(source)
        copies.append(time.thread_time() - begun)
    found = Round(1e9 * rates["own"], 1e9 * rates["square"], 2 * source.nbytes / statistics.median(copies[1:]))
    begun = time.thread_time()
    engine.step(rows, 3e-4)
    found.step = time.thread_time() - begun
    with Timing(found):
        engine.step(rows, 3e-4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, value in {"vocab": 8192, "hidden": 384, "layers": 6, "heads": 6, "seq-length": 256, "batch": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--least", type=float, default=0.004, help="ops of a smaller share of the step are one line")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    config = ModelConfig(
        vocab_size=chosen.vocab,
        hidden_size=chosen.hidden,
        num_layers=chosen.layers,
        num_attention_heads=chosen.heads,
    )
    built = build_model(config, seed=0)
    engine = build_engine(built, engine=EngineConfig(), optimizer=OptimizerConfig(), ranks=Ranks())
    rows = torch.randint(0, chosen.vocab, (chosen.batch, chosen.seq_length + 1)).numpy()
    for _ in range(WARM):
        engine.step(rows, 3e-4)
    shape = {
        "vocab_size": chosen.vocab,
        "hidden_size": chosen.hidden,
        "num_layers": chosen.layers,
        "seq_length": chosen.seq_length,
        "batch": chosen.batch,
    }
    print_table(chosen, config, [measure(engine, rows, shape) for _ in range(chosen.rounds)])


def print_table(chosen: argparse.Namespace, config: ModelConfig, rounds: list[Round]) -> None:
    tokens = chosen.batch * chosen.seq_length
    attention = 12 * chosen.layers * chosen.hidden * chosen.seq_length // 2 * tokens  # the causal half, both ways
    products = flops_per_token(config, chosen.seq_length) * tokens - 2 * attention
    step = statistics.median(each.step for each in rounds)
    print(f"vocabulary {chosen.vocab:,}, one thread, {tokens:,} tokens, {chosen.rounds} rounds. A step takes")
    print(f"{spans((1e3 * each.step for each in rounds), ',.0f')} ms; products")
    print(f"{spans((each.gemm / 1e9 for each in rounds), '.0f')} GFLOP/s, square ones")
    print(f"{spans((each.square / 1e9 for each in rounds), '.0f')}, copy")
    print(f"{spans((each.bandwidth / 1e9 for each in rounds), '.1f')} GB/s.\n")
    print("| op | calls | ms | share | limit, ms | of it |\n|---|---|---|---|---|---|")
    names = sorted(rounds[0].seconds, key=lambda name: -statistics.median(each.seconds[name] for each in rounds))
    groups = {
        "matrix products": [name for name in names if name in PRODUCTS],
        "attention": [name for name in names if any(each in name for each in ATTENTION)],
    }
    rest = [name for name in names if name not in groups["matrix products"] + groups["attention"]]
    small = [name for name in rest if statistics.median(each.seconds[name] for each in rounds) < chosen.least * step]
    groups |= {name.removeprefix("aten::"): [name] for name in rest if name not in small}
    groups[f"{len(small)} others"] = small
    for label, group in groups.items():
        times = [sum(each.seconds[name] for name in group) for each in rounds]
        limits = [sum(each.moved[name] for name in group) / each.bandwidth for each in rounds]
        if label == "matrix products":
            limits = [products / each.gemm for each in rounds]
        elif label == "attention":
            limits = [attention / each.square for each in rounds]
        taken, limit = statistics.median(times), statistics.median(limits)
        calls = sum(rounds[0].calls[name] for name in group)
        shown = spans((1e3 * t for t in times), ",.1f")
        print(f"| {label} | {calls} | {shown} | {taken / step:.3f} | {1e3 * limit:,.1f} | {limit / taken:.2f} |")


if __name__ == "__main__":
    main()
