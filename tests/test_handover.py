"""What becomes of the optimizer's state where a phase begins: kept, reset, or its moments kept alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Prepared
from runs import OPTIMIZER, losses

from megacl.checkpoint import RunState, list_checkpoints, open_checkpoint
from megacl.checkpoint_files import Contents, read_index, write_manifest
from megacl.configfile import from_tree, load
from megacl.data.stream import PhaseStream, open_recorded
from megacl.lineage import Lineage, load_lineage
from megacl.model.gpt import build_model
from megacl.parallel.ranks import Ranks
from megacl.saving import save_checkpoint
from megacl.tensorfile import facts_of
from megacl.trainer import train
from tests.plain_loop import Loop, train_by_hand
from tests.ranks import run_on_ranks
from tests.test_engine import ROWS, Outcome, arrays, batch, make_engine, rate, restore

STEPS, BOUNDARY = 8, 5


def train_engine(ranks: Ranks, what: str, **settings: Any) -> Outcome:
    """Eight steps with the boundary before the sixth."""
    engine = make_engine(ranks, **settings)
    rows = ROWS // ranks.dp_size
    outcome = Outcome()
    for step in range(STEPS):
        if step == BOUNDARY and what == "reset":
            engine.reset_optimizer()
        if step == BOUNDARY and what == "reset_step":
            engine.reset_optimizer_step()
        mine = slice(ranks.dp_rank * rows, (ranks.dp_rank + 1) * rows)
        outcome.losses.append(engine.step(batch(step)[mine], rate(step)).loss)
    outcome.state, outcome.optimizer_step = arrays(engine), engine.optimizer_step
    return outcome


def assert_by_hand(outcome: Outcome, expected: Loop) -> None:
    np.testing.assert_allclose(outcome.losses, expected.losses, rtol=1e-5)
    for name, state in outcome.state.items():
        np.testing.assert_allclose(state["weight"], expected.weights[name], atol=2e-4, err_msg=name)
        np.testing.assert_allclose(state["exp_avg"], expected.m[name], atol=2e-4, err_msg=name)
        np.testing.assert_allclose(state["exp_avg_sq"], expected.v[name], atol=2e-4, err_msg=name)


@pytest.mark.parametrize("stage", [None, 1, 3])
@pytest.mark.parametrize("what", ["keep", "reset", "reset_step"])
def test_each_kind_of_boundary_is_that_of_adamw_written_out(what: str, stage: int | None) -> None:
    expected = train_by_hand(STEPS, before={BOUNDARY: what})
    if stage is None:
        outcome = train_engine(Ranks(), what)
    else:
        outcome = run_on_ranks(2, train_engine, what, kind="deepspeed", zero_stage=stage)[0]
    assert_by_hand(outcome, expected)
    assert outcome.optimizer_step == (STEPS if what == "keep" else STEPS - BOUNDARY)


def test_the_three_differ_where_they_should() -> None:
    kept, reset, alone = (train_by_hand(STEPS, before={BOUNDARY: what}) for what in ("keep", "reset", "reset_step"))
    assert kept.losses[: BOUNDARY + 1] == reset.losses[: BOUNDARY + 1] == alone.losses[: BOUNDARY + 1]
    assert len({kept.losses[-1], reset.losses[-1], alone.losses[-1]}) == 3


def test_the_first_update_with_moments_alone_is_larger_by_what_corrects_their_bias() -> None:
    """sqrt(1 - beta2^j) / (1 - beta1^j) with j = 1, over the same with j = 6: 2.24 / 1.10."""

    def update(what: str) -> np.ndarray:
        before, after = (train_by_hand(steps, before={BOUNDARY: what}).weights for steps in (BOUNDARY, BOUNDARY + 1))
        return after["final_norm.bias"] - before["final_norm.bias"]

    def correction(j: int) -> float:
        return float(np.sqrt(1 - 0.95**j) / (1 - 0.9**j))

    np.testing.assert_allclose(update("reset_step") / update("keep"), correction(1) / correction(6), rtol=0.01)


# ---------------------------------------------------------------------------------------------- runs

CONSTANT = {"kind": "constant", "max_lr": 5e-3}


def tree(prepared: Prepared, run_dir: Path) -> dict[str, Any]:
    """Four phases of three steps: the first of a model, and one of each kind."""
    phases: list[dict[str, Any]] = [
        {"name": "first", "mixture": {"english": 1}, "optimizer_state": "keep"},
        {"name": "kept", "mixture": {"german": 1}, "optimizer_state": "keep"},
        {"name": "reset", "mixture": {"english": 1}, "optimizer_state": "reset"},
        {"name": "alone", "mixture": {"german": 1}, "optimizer_state": "reset_step"},
    ]
    return prepared.tree(
        run_dir, phases=[{**phase, "steps": 3, "schedule": CONSTANT} for phase in phases], checkpoint={}
    )


@pytest.fixture(scope="module")
def run(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    assert train(from_tree(tree(prepared, run_dir))) == "done"
    return run_dir


def test_the_lineage_records_what_became_of_the_state_and_checkpoints_hold_the_count(run: Path) -> None:
    assert [phase.optimizer_state for phase in load_lineage(run).phases] == ["new", "kept", "reset", "step_reset"]
    assert [open_checkpoint(path).state.optimizer_step for path in list_checkpoints(run)] == [3, 6, 3, 3]


def test_the_log_says_it_where_a_phase_begins(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(from_tree(tree(prepared, tmp_path / "run")))
    said = " ".join("".join(capsys.readouterr()).split())
    for line in (
        "phase first: 3 steps; optimizer state new",
        "phase kept: 3 steps; optimizer state kept",
        "phase reset: 3 steps; optimizer state reset",
        "phase alone: 3 steps; optimizer moments kept, Adam's count of updates reset",
    ):
        assert line in said


def test_losses_of_a_run_are_those_of_a_plain_loop_with_torchs_own_adamw(run: Path) -> None:
    config, lineage = load([str(run / "config.yaml")]), load_lineage(run)
    model = build_model(config.model, seed=config.seed)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=5e-3, betas=(0.9, 0.95), eps=1e-8)
    expected = []
    for index, phase in enumerate(lineage.phases):
        if phase.name == "reset":
            optimizer.state.clear()
        if phase.name == "alone":
            for state in optimizer.state.values():
                state["step"].zero_()
        stream = PhaseStream(Lineage(phases=lineage.phases[: index + 1]), open_recorded)
        for first in range(0, phase.samples, 12):
            tokens = torch.from_numpy(stream.read(np.arange(first, first + 12)))
            logits = model(tokens[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            expected.append(loss.item())
    assert losses(run) == pytest.approx(expected, rel=1e-5)


def test_a_checkpoint_holds_moments_whose_count_is_zero(prepared: Prepared, run: Path, tmp_path: Path) -> None:
    """As a phase leaves behind that kept the moments alone and has skipped every update so far."""
    before = train_engine(Ranks(), "keep")
    engine = make_engine(Ranks())
    restore(engine, before)
    engine.reset_optimizer_step()
    made = open_checkpoint(list_checkpoints(run)[-1])
    path = save_checkpoint(
        engine,
        Ranks(),
        tmp_path,
        RunState(step=8),
        lineage=made.lineage,
        config=made.config,
        tokenizer=made.tokenizer(),
    )
    assert json.loads((path / "state.json").read_text())["optimizer_step"] == 0
    loaded = make_engine(Ranks())
    open_checkpoint(path).load_into(loaded)
    assert loaded.has_moments
    np.testing.assert_equal(arrays(loaded), before.state)
    assert loaded.step(batch(9), 1e-3) == engine.step(batch(9), 1e-3)
    np.testing.assert_equal(arrays(loaded), arrays(engine))


def take_moments_out(checkpoint: Path) -> None:
    (checkpoint / OPTIMIZER).unlink()
    index = read_index(checkpoint)
    files = {file.name: facts_of(file) for file in checkpoint.iterdir()}
    del files["manifest.json"], files["index.json"]
    weights = {name: file for name, file in index.tensors.items() if name in index.weights}
    write_manifest(checkpoint, [Contents(files, weights, index.weights)])


def test_a_phase_after_weights_alone_says_that_there_was_no_state_to_keep(prepared: Prepared, tmp_path: Path) -> None:
    settings = tree(prepared, tmp_path / "run")
    settings["phases"] = settings["phases"][:1]
    train(from_tree(settings))
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    take_moments_out(checkpoint)
    child = tree(prepared, tmp_path / "child") | {"start_from": str(tmp_path / "run")}
    child["phases"] = child["phases"][1:2]
    train(from_tree(child))
    assert [phase.optimizer_state for phase in load_lineage(tmp_path / "child").phases] == ["new", "new"]
