"""Runs on ranks that share layers or sequences, started with torchrun: the losses and the state are those of one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Prepared
from runs import command_line, losses, metrics, start, tensors

from megacl.checkpoint import list_checkpoints
from megacl.configfile import from_tree
from megacl.trainer import train

LAUNCHER = ["torch.distributed.run", "--nproc-per-node=2", "--standalone"]
SCHEDULE = {"kind": "cosine", "max_lr": 5e-3, "warmup": "2 steps"}
PHASES = [
    {"name": "english", "mixture": {"english": 1}, "steps": 6, "schedule": SCHEDULE},
    {"name": "german", "mixture": {"german": 1}, "steps": 5, "schedule": SCHEDULE, "replay": {"share": 0.25}},
    {"name": "both", "mixture": {"english": 1, "german": 1}, "steps": 4, "schedule": SCHEDULE},
]


def settings(phases: int, **engine: Any) -> dict[str, Any]:
    """Documents kept apart and packed, so that rows have padding, on as many of the phases."""
    return {
        "phases": PHASES[:phases],
        "boundaries": "attention",
        "packing": "best_fit",
        "checkpoint": {},
        "engine": engine,
    }


pytestmark = pytest.mark.usefixtures("one_thread")


def on_two_ranks(verb: str, *arguments: str) -> str:
    """What `megacl VERB` prints, under torchrun."""
    process = start(verb, *arguments, launcher=LAUNCHER)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def alone(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of all phases on one rank."""
    run_dir = tmp_path_factory.mktemp("runs") / "alone"
    assert train(from_tree(prepared.tree(run_dir, **settings(3)))) == "done"
    return run_dir


@pytest.mark.parametrize(
    "engine",
    [
        {"tensor_parallel": 2, "zero_stage": 1},
        pytest.param({"sequence_parallel": 2, "zero_stage": 2}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_run_goes_from_ranks_in_groups_to_one_rank(
    prepared: Prepared, alone: Path, tmp_path: Path, engine: dict[str, Any]
) -> None:
    run_dir = tmp_path / "run"
    shared = settings(2, kind="deepspeed", micro_batch_size=4, **engine)
    on_two_ranks("train", prepared.config_file(run_dir, **shared))
    assert train(from_tree(prepared.tree(run_dir, **settings(3)))) == "done"
    assert losses(run_dir) == pytest.approx(losses(alone), rel=1e-5)
    for key in ("samples", "tokens", "real_tokens"):
        ours, expected = ([record[key] for record in metrics(each, "step")] for each in (run_dir, alone))
        assert ours == expected
    ends, expected_ends = (
        [record for record in metrics(each, "evaluation") if record["at"] == "end"] for each in (run_dir, alone)
    )
    for ours, expected in zip(ends, expected_ends, strict=True):
        assert_alike(ours["sources"], expected["sources"])
    last, expected_last = (tensors(list_checkpoints(each)[-1]) for each in (run_dir, alone))
    for name, value in expected_last.items():
        np.testing.assert_allclose(last[name], value, atol=2e-3, err_msg=name)


@pytest.mark.long
def test_evaluate_gives_the_same_on_ranks_that_share_layers_and_on_one(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    on_two_ranks("train", prepared.config_file(run_dir, **settings(1, kind="deepspeed", tensor_parallel=2)))
    evaluated = on_two_ranks("evaluate", str(run_dir), "--json")
    capsys.readouterr()
    _, out, _ = command_line(capsys, "evaluate", str(run_dir), "--json")
    assert_alike(json.loads(evaluated)["sources"], json.loads(out)["sources"])
    on_two_ranks("sample", str(run_dir), "--prompt", "The", "--tokens", "3")


def assert_alike(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    """Losses of the same sources over as many tokens."""
    assert set(ours) == set(expected)
    for name, result in expected.items():
        assert ours[name]["loss"] == pytest.approx(result["loss"], rel=1e-5)
        assert ours[name]["tokens"] == result["tokens"]
