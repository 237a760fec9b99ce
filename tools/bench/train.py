"""The training step on a CPU: megacl beside a bare PyTorch loop, litgpt, transformers, and the machine's GEMM rate.

    bash tools/bench/make_peers.sh /tmp/peers
    python tools/bench/train.py --peers /tmp/peers --vocab 8192 50304

A table in Markdown for each vocabulary; a figure is the median of the rounds, with their span. In each round all rows
take their turn, each in a process of its own, which counts its steps but the first three and gives their median. What a
row says beside another is worth more than what it says alone: `to megacl` is taken round by round.

    tokens/s           of whole steps: forward, backward, clipping, AdamW
    core ms/token      time on all cores, which other processes on the machine disturb less than tokens/s
    model GFLOP/s      by `flops_per_token`: every matrix product, and attention as if it were not causal
    GEMM GFLOP/s       by the products that are made: attention's causal half
    of the GEMM rate   the last beside the rate of these matrix products alone, attention's left out, measured in each
                       round: forward, gradient of the input, gradient of the weight, each by the faster one of MKL,
                       into memory that was there before, and oneDNN, as PyTorch calls them; a rate above the table
                       is of products whose factors were copied as oneDNN likes them before the clock began
    peak MB            resident memory of the process at its highest

`megacl` is the native engine; `selective` and `full` are activation checkpointing, and each step of `monitored` is
looked into, as `logging.monitor_every_steps` does it now and then; behind each step of `reptile` there is a move, as
`reptile.every_steps` makes it now and then. `bare loop` is the same GPT, loss.backward,
clip_grad_norm_ and AdamW(fused=True), no more.
All rows train a GPT-NeoX model of one shape in fp32, on random tokens, with as many threads.

Then `loop`: `megacl train` as a whole (loader, metrics, lineage) beside the bare loop, step by step in one process, on
real text; and `launch`: from the start of the process `megacl train` to its first step's record, the tiny model.
"""

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
WARM = 3
"""Steps of a process that do not count: allocation, and compilation."""
SQUARE = 2048
Shape = dict[str, int]
"""vocab_size, hidden_size, num_layers, num_attention_heads, seq_length and batch."""


# ---------------------------------------------------------------------------------------------- in a process of its own


def steps_of(kind: str, shape: Shape, steps: int) -> dict[str, Any]:
    """A training run of megacl's or of the bare loop: what tools/bench/peers/train.py prints of a peer's."""
    import torch

    from megacl.config import EngineConfig, OptimizerConfig
    from megacl.engine import build_engine
    from megacl.model.gpt import build_model
    from megacl.parallel.ranks import Ranks

    torch.manual_seed(0)
    rows = torch.randint(0, shape["vocab_size"], (WARM + steps, shape["batch"], shape["seq_length"] + 1))
    if kind == "bare loop":
        model = build_model(model_of(shape), seed=0)
        step = bare_step(model)
    else:
        model = build_model(model_of(shape), seed=0, device="meta")
        engine = EngineConfig(
            kind="deepspeed" if "deepspeed" in kind else "native",
            compile="compile" in kind,
            activation_checkpointing="selective" if "selective" in kind else "full" if "full" in kind else "none",
        )
        built = build_engine(model, engine=engine, optimizer=OptimizerConfig(), ranks=Ranks())

        if "reptile" in kind:
            built.set_anchor()

        def step(rows: Any) -> None:
            built.step(rows.numpy(), 3e-4, monitor="monitored" in kind)
            if "reptile" in kind:
                built.outer_update(0.5)

    seconds, cpu = [], []
    for batch in rows:
        begun, cpu_begun = time.perf_counter(), time.process_time()
        step(batch)
        seconds.append(time.perf_counter() - begun)
        cpu.append(time.process_time() - cpu_begun)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": seconds[WARM:],
        "cpu": cpu[WARM:],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def model_of(shape: Shape) -> Any:
    from megacl.model.config import ModelConfig

    sizes: dict[str, Any] = {key: value for key, value in shape.items() if key not in ("seq_length", "batch")}
    return ModelConfig(**sizes)


def bare_step(model: Any) -> Callable[[Any], object]:
    """What a user would write around the model: rows, int64 [B, T + 1] -> one update."""
    import torch

    from megacl.kernels import choose_kernels

    model.use(choose_kernels(device="cpu", half=False, compiled=False, overrides={}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(rows: Any) -> None:
        objective, _, _ = model(rows[:, :-1], rows[:, 1:]) / rows[:, 1:].numel()
        objective.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def gemm_rates(shape: Shape, clock: Callable[[], float] = time.perf_counter, repeats: int = 7) -> dict[str, float]:
    """GFLOP/s of the model's matrix products, weighed as a step has them, and of square ones, by that clock.

    `own` is that of PyTorch's calls; `copied`, where a first factor that lies transposed was copied beforehand, which
    PyTorch does on one thread each time that it calls oneDNN.
    """
    import torch

    from megacl.kernels import LOSS_CHUNK, onednn

    tokens, width = shape["batch"] * shape["seq_length"], shape["hidden_size"]
    layers = shape["num_layers"]
    chunk = min(tokens, LOSS_CHUNK["cpu"])
    products = [  # rows, inputs, outputs, how many a step has
        (tokens, width, 3 * width, layers),
        (tokens, width, width, layers),
        (tokens, width, 4 * width, layers),
        (tokens, 4 * width, width, layers),
        (chunk, width, shape["vocab_size"], tokens // chunk),
    ]
    total_flops = total_seconds = copied_seconds = 0.0
    for rows, inputs, outputs, count in products:
        x, weight, y = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
        for one, other, into in ((x, weight.t(), y), (y, weight, x), (y.t(), x, weight)):
            seconds = _median_seconds(functools.partial(torch.mm, one, other, out=into), clock, repeats)
            if onednn.available():
                seconds = min(
                    seconds, _median_seconds(functools.partial(onednn.product, one, other.t()), clock, repeats)
                )
            total_seconds += count * seconds
            if onednn.available() and not one.is_contiguous():
                copied = functools.partial(onednn.product, one.contiguous(), other.t())
                seconds = min(seconds, _median_seconds(copied, clock, repeats))
            copied_seconds += count * seconds
            total_flops += count * 2 * rows * inputs * outputs
    square = torch.randn(SQUARE, SQUARE)
    into = torch.empty_like(square)
    squared = min(
        _median_seconds(functools.partial(torch.mm, square, square, out=into), clock, repeats),
        _median_seconds(functools.partial(onednn.product, square, square), clock, repeats),
    )
    return {
        "own": total_flops / total_seconds / 1e9,
        "copied": total_flops / copied_seconds / 1e9,
        "square": 2 * SQUARE**3 / squared / 1e9,
    }


def _median_seconds(run: Callable[[], object], clock: Callable[[], float], repeats: int) -> float:
    found = []
    for _ in range(repeats + 1):
        begun = clock()
        run()
        found.append(clock() - begun)
    return statistics.median(found[1:])


def loop_overhead(shape: Shape, steps: int, work: Path) -> dict[str, Any]:
    """`megacl train` with a bare loop's step after each of its own: how much longer it takes, for each step."""
    import torch

    from megacl import trainer
    from megacl.configfile import load_arguments
    from megacl.engine import build_engine
    from megacl.model.gpt import build_model

    class Timed:
        """The engine, which notes its steps' times and those of what stands around them."""

        def __init__(self, engine: Any) -> None:
            self.engine, self.ended = engine, 0.0
            self.bare = bare_step(build_model(model_of(shape), seed=0))
            self.own: list[float] = []
            self.around: list[float] = []
            self.bare_times: list[float] = []

        def __getattr__(self, name: str) -> Any:
            return getattr(self.engine, name)

        def step(self, tokens: Any, *arguments: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            self.around.append(begun - self.ended)
            result = self.engine.step(tokens, *arguments, **options)
            done = time.perf_counter()
            self.bare(torch.from_numpy(tokens))
            self.ended = time.perf_counter()
            self.own.append(done - begun)
            self.bare_times.append(self.ended - done)
            return result

    timed: list[Timed] = []

    def build(*arguments: Any, **options: Any) -> Any:
        timed.append(Timed(build_engine(*arguments, **options)))
        return timed[0]

    with mock.patch.object(trainer, "build_engine", build):
        trainer.train(load_arguments([write_run(work, "loop", shape, WARM + steps)]))
    (run,) = timed
    whole = [own + around for own, around in zip(run.own[:-1], run.around[1:], strict=True)]
    pairs = list(zip(whole, run.bare_times, strict=False))[WARM:]
    return {
        "overhead": statistics.median(ours / bare - 1 for ours, bare in pairs),
        "around_ms": 1e3 * statistics.median(run.around[WARM + 1 :]),
        "step_ms": 1e3 * statistics.median(run.own[WARM:]),
        "bare_ms": 1e3 * statistics.median(run.bare_times[WARM:]),
    }


def write_data(work: Path) -> dict[str, Any]:
    """A tokenizer of 2,048 pieces and a data folder of English text."""
    from megacl.configfile import shipped
    from megacl.data.prepare import prepare
    from megacl.data.tokenizer_training import train_tokenizer

    texts = [str(shipped("examples") / "data" / "english_a.jsonl.zst")]
    tokenizer = train_tokenizer(texts, work / "tokenizer.model", 2048)
    prepare(texts, tokenizer=tokenizer, out=work / "english", validation=0.1)
    return {}


def write_run(work: Path, name: str, shape: Shape, steps: int) -> str:
    """A configuration of so many steps on that folder, into a run directory that is not there yet."""
    tree = {
        "run_dir": tempfile.mkdtemp(prefix=name, dir=work) + "/run",
        "sources": {"english": {"path": str(work / "english")}},
        "model": {key: value for key, value in shape.items() if key not in ("seq_length", "batch")},
        "seq_length": shape["seq_length"],
        "global_batch_size": shape["batch"],
        "phases": [
            {"name": "one", "mixture": {"english": 1}, "steps": steps, "schedule": {"kind": "constant", "max_lr": 3e-4}}
        ],
        "evaluation": {"sequences": 16},
        "logging": {"tensorboard": False},  # its import alone takes seconds
    }
    path = Path(f"{tree['run_dir']}.yaml")
    path.write_text(json.dumps(tree))  # JSON is YAML
    return str(path)


def launch_seconds(work: Path) -> float:
    """From the start of `megacl train` to the record of its first step."""
    tiny = {"vocab_size": 2048, "hidden_size": 128, "num_layers": 4, "num_attention_heads": 4}
    config = write_run(work, "launch", {**tiny, "seq_length": 128, "batch": 16}, 1)
    begun = time.time()
    run([sys.executable, "-m", "megacl", "train", config])
    records = map(json.loads, Path(config).with_suffix("").joinpath("metrics.jsonl").read_text().splitlines())
    return next(float(record["time"]) for record in records if record["kind"] == "step") - begun


# ---------------------------------------------------------------------------------------------- the tables


def run(command: list[str]) -> str:
    """The last line that a command prints."""
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return (done.stdout.strip().splitlines() or [""])[-1]


def one(what: str, *arguments: object) -> Any:
    return json.loads(run([sys.executable, __file__, "--one", what, *map(str, arguments)]))


def rows_of(peers: Path | None) -> dict[str, Callable[[Shape, int], Any]]:
    """The table's rows: what measures each."""
    rows: dict[str, Callable[[Shape, int], Any]] = {}
    for settings in ("", ", compile", ", deepspeed", ", selective", ", full", ", monitored", ", reptile"):
        rows[f"megacl{settings}"] = functools.partial(_own_row, f"megacl{settings}")
    rows["bare loop"] = functools.partial(_own_row, "bare loop")
    if peers is not None:
        for name in ("litgpt", "litgpt, compile", "transformers", "transformers, compile"):
            rows[name] = functools.partial(_peer_row, peers, name)
    return rows


def _own_row(name: str, shape: Shape, steps: int) -> Any:
    return one(name, json.dumps(shape), steps)


def _peer_row(peers: Path, name: str, shape: Shape, steps: int) -> Any:
    peer, *compiled = name.split(", ")
    command = [
        f"{peers}/train/bin/python",
        str(ROOT / "tools/bench/peers/train.py"),
        peer,
        json.dumps(shape),
        str(steps),
    ]
    return json.loads(run([*command, *(f"--{option}" for option in compiled)]))


def spans(values: Iterable[float], form: str = ",.0f") -> str:
    values = list(values)
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def print_steps(shape: Shape, rows: dict[str, Callable[[Shape, int], Any]], *, rounds: int, steps: int) -> None:
    from megacl.model.gpt import flops_per_token

    found: dict[str, list[Any]] = {name: [] for name in rows}
    gemm = []
    for number in range(rounds):
        gemm.append(one("gemm", json.dumps(shape)))
        for name, measure in rows.items():
            found[name].append(measure(shape, steps))
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr)
    sizes = {result["parameters"] for results in found.values() for result in results}
    if len(sizes) > 1:
        sys.exit(f"the rows train models of different sizes: {sizes}")
    tokens = shape["batch"] * shape["seq_length"]
    flops = flops_per_token(model_of(shape), shape["seq_length"])
    attention = 12 * shape["num_layers"] * shape["hidden_size"] * shape["seq_length"]
    products = flops - attention // 2
    print(f"\n{sizes.pop():,} parameters, vocabulary {shape['vocab_size']:,}, {shape['batch']} x {shape['seq_length']}")
    print(f"tokens; {flops / 1e6:.1f} model MFLOP, {products / 1e6:.1f} GEMM MFLOP a token. GEMM rate on the model's")
    own, copied, square = (spans((rate[key] for rate in gemm), ".0f") for key in ("own", "copied", "square"))
    print(f"shapes {own} GFLOP/s, with factors copied beforehand {copied}, {SQUARE} x {SQUARE} {square}.\n")
    heads = ["tokens/s", "to megacl", "core ms/token", "model GFLOP/s", "GEMM GFLOP/s", "of the GEMM rate", "peak MB"]
    print("| | " + " | ".join(heads) + " |\n|" + "---|" * (len(heads) + 1))
    rates = {name: [tokens / statistics.median(r["seconds"]) for r in results] for name, results in found.items()}
    reference = rates.get("megacl", next(iter(rates.values())))
    for name, results in found.items():
        rate = rates[name]
        cells = [
            spans(rate),
            spans((a / b for a, b in zip(rate, reference, strict=True)), ".2f"),
            spans((1e3 * statistics.median(result["cpu"]) / tokens for result in results), ".3f"),
            f"{statistics.median(rate) * flops / 1e9:.1f}",
            f"{statistics.median(rate) * products / 1e9:.1f}",
            spans((r * products / 1e9 / g["own"] for r, g in zip(rate, gemm, strict=True)), ".2f"),
            spans(result["peak"] for result in results),
        ]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def print_loop(shape: Shape, *, rounds: int, steps: int) -> None:
    with tempfile.TemporaryDirectory() as work:
        one("data", work)
        loops = [one("loop", json.dumps(shape), steps, work) for _ in range(rounds)]
        launches = [launch_seconds(Path(work)) for _ in range(rounds + 1)][1:]  # the first one reads from the disk
    overhead = spans((100 * found["overhead"] for found in loops), "+.1f")
    own, around, bare = (spans((found[key] for found in loops), ",.1f") for key in ("step_ms", "around_ms", "bare_ms"))
    print(f"\nloop: megacl train takes {overhead} % longer than the bare loop; ms a step: engine {own}, around it")
    print(f"{around}, bare loop {bare}.")
    print(f"launch: {spans(launches, '.2f')} s from the start of `megacl train` to the first step of the tiny model.")


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        what, *rest = sys.argv[2:]
        if what == "data":
            found = write_data(Path(rest[0]))
        elif what == "gemm":
            found = gemm_rates(json.loads(rest[0]))
        elif what == "loop":
            found = loop_overhead(json.loads(rest[0]), int(rest[1]), Path(rest[2]))
        else:
            found = steps_of(what, json.loads(rest[0]), int(rest[1]))
        print(json.dumps(found))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peers", type=Path, metavar="DIR", help="what make_peers.sh made")
    parser.add_argument(
        "--only", nargs="*", metavar="ROW", help="rows of the table to measure; none for the loop alone"
    )
    parser.add_argument("--vocab", type=int, nargs="*", default=[8192])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="steps of a process that count")
    arguments = parser.parse_args()
    rows = rows_of(arguments.peers)
    if arguments.only is not None:
        rows = {name: rows[name] for name in arguments.only}
    for vocabulary in arguments.vocab:
        shape = {
            "vocab_size": vocabulary,
            "hidden_size": arguments.hidden,
            "num_layers": arguments.layers,
            "num_attention_heads": arguments.heads,
            "seq_length": arguments.seq_length,
            "batch": arguments.batch,
        }
        if rows:
            print_steps(shape, rows, rounds=arguments.rounds, steps=arguments.steps)
    print_loop({**shape, "vocab_size": arguments.vocab[0]}, rounds=arguments.rounds, steps=arguments.steps)


if __name__ == "__main__":
    main()
