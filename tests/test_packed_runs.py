"""Runs whose sequences hold several documents: kept apart in attention, and packed without cutting."""

import dataclasses
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Prepared
from runs import command_line, last_state, losses, metrics, start
from torch.nn import functional

from megacl.checkpoint import find_checkpoint, list_checkpoints, open_checkpoint
from megacl.configfile import from_tree, load
from megacl.data.stream import PhaseStream, open_recorded
from megacl.errors import ConfigError
from megacl.lineage import load_lineage
from megacl.model.gpt import GPT, build_model
from megacl.plan import plan_text
from megacl.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def apart(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both phases with `boundaries: attention`."""
    run_dir = tmp_path_factory.mktemp("runs") / "apart"
    assert train(from_tree(prepared.tree(run_dir, boundaries="attention", evaluation={}))) == "done"
    return run_dir


def nats_of_documents(model: GPT, row: list[int], end: int) -> tuple[torch.Tensor, int]:
    """(sum of -log p, targets) of one sequence, each document through a plain model on its own."""
    total, targets = torch.zeros(()), 0
    begins = [0, *(place for place in range(1, len(row) - 1) if row[place] == end), len(row) - 1]
    for begin, next_begin in itertools.pairwise(begins):
        piece = torch.tensor(row[begin : next_begin + 1])
        logits = model(piece[None, :-1])[0]
        total = total + functional.cross_entropy(logits, piece[1:], reduction="sum")
        targets += len(piece) - 1
    return total, targets


def losses_of_a_plain_loop(run_dir: Path) -> list[float]:
    """The same model under torch's own AdamW, a document at a time, fed from the lineage."""
    config = load([str(run_dir / "config.yaml")])
    model = build_model(config.model, seed=config.seed)
    end = open_checkpoint(find_checkpoint(str(run_dir), pytest.fail)).tokenizer().eos_id
    lineage = load_lineage(run_dir)
    rates = iter([record["lr"] for record in metrics(run_dir, "step")])
    expected = []
    for index, phase in enumerate(lineage.phases):
        groups = [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
        stream = PhaseStream(dataclasses.replace(lineage, phases=lineage.phases[: index + 1]), open_recorded)
        for first in range(0, phase.samples, 12):
            rows = stream.read(np.arange(first, first + 12))
            parts = [nats_of_documents(model, row[row >= 0].tolist(), end) for row in rows]
            loss = sum(nats for nats, _ in parts) / sum(targets for _, targets in parts)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            rate = next(rates)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            expected.append(loss.item())
    return expected


@pytest.fixture(scope="module")
def packed(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both phases whose documents are packed whole and kept apart."""
    run_dir = tmp_path_factory.mktemp("runs") / "packed"
    assert train(from_tree(packed_tree(prepared, run_dir))) == "done"
    return run_dir


def packed_tree(prepared: Prepared, run_dir: Path, **changes: Any) -> dict[str, Any]:
    return prepared.tree(run_dir, boundaries="attention", packing="best_fit", seq_length=192, **changes)


# ---------------------------------------------------------------------------------------------- boundaries


def test_losses_with_boundaries_are_those_of_a_plain_loop_over_single_documents(apart: Path) -> None:
    assert losses(apart) == pytest.approx(losses_of_a_plain_loop(apart), rel=1e-5)


def test_held_out_documents_are_evaluated_under_the_boundaries_of_the_run(
    apart: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = open_checkpoint(find_checkpoint(str(apart), pytest.fail))
    model = build_model(checkpoint.config.model, seed=0)
    load_weight = checkpoint.load_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(load_weight(name))
        for record in checkpoint.lineage.sources.values():
            source = open_recorded(record)
            stream = [source.eos_id, *source.validation.read(0, source.validation.tokens).tolist()]
            windows = [stream[begin : begin + 33] for begin in range(0, len(stream) - 1, 32)]
            nats = sum(float(nats_of_documents(model, window, source.eos_id)[0]) for window in windows)
            recorded = metrics(apart, "evaluation")[-1]["sources"][record.name]
            assert recorded["loss"] == pytest.approx(nats / source.validation.tokens, rel=1e-5)
    _, out, _ = command_line(capsys, "evaluate", str(apart), "--json")
    now = {name: result["loss"] for name, result in json.loads(out)["sources"].items()}
    recorded = metrics(apart, "evaluation")[-1]["sources"]
    assert now == pytest.approx({name: result["loss"] for name, result in recorded.items()})


def test_a_run_cannot_change_its_boundaries(apart: Path, prepared: Prepared) -> None:
    with pytest.raises(ConfigError, match="with boundaries 'attention', and this configuration has 'ignore'"):
        train(from_tree(prepared.tree(apart)))


# ---------------------------------------------------------------------------------------------- packing


def test_losses_of_packed_documents_are_those_of_a_plain_loop_over_single_documents(packed: Path) -> None:
    assert losses(packed) == pytest.approx(losses_of_a_plain_loop(packed), rel=1e-5)


def test_packed_runs_on_two_ranks_under_zero_give_the_losses_of_native_on_one(
    prepared: Prepared, packed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    engine = {"kind": "deepspeed", "zero_stage": 2, "micro_batch_size": 3}
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(packed_tree(prepared, run_dir, engine=engine)))
    launcher = ["torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    process = start("train", str(config), launcher=launcher)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert losses(run_dir) == pytest.approx(losses(packed), rel=1e-5)
    assert [record["real_tokens"] for record in metrics(run_dir, "step")] == [
        record["real_tokens"] for record in metrics(packed, "step")
    ]


def test_a_packed_run_resumes_bitwise(prepared: Prepared, packed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(packed, run_dir)
    for path in list_checkpoints(run_dir)[1:]:
        shutil.rmtree(path)
    assert train(from_tree(packed_tree(prepared, run_dir))) == "done"
    assert losses(run_dir) == losses(packed)
    assert last_state(run_dir) == last_state(packed)


def test_a_packed_run_says_how_full_its_sequences_are_and_counts_their_tokens(
    prepared: Prepared, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = metrics(packed, "step")
    real = sum(record["real_tokens"] for record in steps)
    assert 0.7 * steps[-1]["tokens"] < real < steps[-1]["tokens"] == 20 * 12 * 192
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(packed_tree(prepared, tmp_path / "run")))
    _, out, _ = command_line(capsys, "train", str(config), "--dry-run")
    assert re.search(r"english: packed into \d+ sequences, \d\d\.\d\d% full", out)
    _, out, _ = command_line(capsys, "lineage", str(packed))
    assert "144 packed sequences of 192" in out


def test_a_run_cannot_change_its_packing(prepared: Prepared, packed: Path) -> None:
    tree = {**packed_tree(prepared, packed), "packing": "cut"}
    with pytest.raises(ConfigError, match="with packing 'best_fit', and this configuration has 'cut'"):
        train(from_tree(tree))


def test_a_child_that_is_cut_otherwise_than_its_parent_is_told_so(
    prepared: Prepared, packed: Path, tmp_path: Path
) -> None:
    phase = {"name": "p", "mixture": {"german": 1}, "steps": 1, "schedule": {"kind": "constant", "max_lr": 1e-3}}
    child = prepared.tree(tmp_path / "child", start_from=str(packed), seq_length=192, phases=[phase])
    text = "\n".join(plan_text(from_tree(child)))
    assert re.search("warning: boundaries is ignore, and the model of .* was trained with boundaries attention", text)
    assert re.search("warning: packing is cut, and the model of .* was trained with packing best_fit", text)
    alike = {**child, "boundaries": "attention", "packing": "best_fit"}
    assert "was trained with" not in "\n".join(plan_text(from_tree(alike)))


def test_the_plan_of_the_data_says_how_full_packed_sequences_are(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(packed_tree(prepared, tmp_path / "run")))
    status, out, _ = command_line(capsys, "data", "plan", str(config))
    assert status == 0
    assert re.search(r"  english: packed into [\d,]+ sequences, \d+\.\d\d% full\n", out)
    status, out, _ = command_line(capsys, "data", "plan", str(config), "--json")
    assert [len(phase["packed"]) for phase in json.loads(out)["phases"]] == [1, 1]
