"""Runs whose steps go wrong: what is skipped, when they go back, what they pass over, and that a resume is exact."""

import contextlib
import dataclasses
import math
import shutil
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Prepared
from runs import WEIGHTS, last_state, losses, metrics, state

from megacl import trainer
from megacl.checkpoint import checkpoint_path, list_checkpoints, open_checkpoint
from megacl.configfile import from_tree
from megacl.data.stream import PhaseStream, open_recorded
from megacl.errors import CheckpointError, DivergedError
from megacl.lineage import Lineage, load_lineage
from megacl.model.gpt import build_model
from megacl.parallel.ranks import Ranks
from tests.ranks import run_on_ranks

BATCH, LENGTH = 12, 32
Trouble = Mapping[int, str]

# Of a run of 30 steps that saves at every 8th: three in a row, of which two may be, so that it goes back from 23 to 16.
THREE: Trouble = {14: "noise", 21: "noise", 22: "broken", 23: "noise"}
BACK = {"stability": {"spike": 3.0, "window": 10, "skip": 2, "go_back": 1}}


pytestmark = pytest.mark.usefixtures("one_thread")


def tree(prepared: Prepared, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """A run of one phase of English, 30 steps at a constant rate."""
    phase = {"name": "english", "mixture": {"english": 1}, "steps": 30}
    schedule = {"kind": "constant", "max_lr": 5e-3}
    checkpoint = {"every_steps": 8, "keep_last": 1}
    return prepared.tree(
        run_dir, **{"phases": [{**phase, "schedule": schedule}], "checkpoint": checkpoint, **BACK, **changes}
    )


@contextlib.contextmanager
def going_wrong(trouble: Trouble, stop_after: int | None = None) -> Iterator[None]:
    """Makes steps of the run go wrong: `noise` is a batch without sense, `broken` a gradient that is not finite.

    stop_after: the step at which the run is told to stop.
    """
    original = trainer._Run._step

    def step(run: Any, index: int, stream: Any, batch: Any, lr: float, **more: Any) -> None:
        kind, backward = trouble.get(run.step + 1), run.engine._backward
        if kind == "noise":
            noise = np.random.default_rng(run.step).integers(0, 600, batch.tokens.shape)
            batch = dataclasses.replace(batch, tokens=noise)
        if kind == "broken":
            run.engine._backward = lambda loss, last: backward(loss * math.nan, last=last)
        try:
            original(run, index, stream, batch, lr, **more)
        finally:
            run.engine._backward = backward
        if run.step == stop_after:
            signal.raise_signal(signal.SIGUSR1)

    trainer._Run._step = step  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        trainer._Run._step = original  # type: ignore[method-assign]


def train(tree: dict[str, Any], trouble: Trouble, stop_after: int | None = None) -> str:
    with going_wrong(trouble, stop_after):
        return trainer.train(from_tree(tree))


@pytest.fixture(scope="module")
def whole(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run with the troubles THREE."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    changes = {"checkpoint": {"every_steps": 8, "keep_last": None}}
    assert train(tree(prepared, run_dir, **changes), THREE) == "done"
    return run_dir


def batches(run_dir: Path, *numbers: int) -> np.ndarray:
    """The tokens of batches of the first phase, one after another."""
    stream = PhaseStream(Lineage(phases=load_lineage(run_dir).phases[:1]), open_recorded)
    return np.concatenate([stream.read(np.arange((number - 1) * BATCH, number * BATCH)) for number in numbers])


# ---------------------------------------------------------------------------------------------- skipping and going back


def test_a_spike_is_skipped_and_its_batch_and_place_in_the_schedule_are_used_up(whole: Path) -> None:
    steps = metrics(whole, "step")
    assert [record["step"] for record in steps] == list(range(1, 31))
    assert [record["samples"] for record in steps] == [BATCH * k for k in range(1, 31)]
    assert [record["step"] for record in steps if not record["applied"]] == [14, 21, 22, 23]
    assert steps[13]["loss"] > max(record["loss"] for record in steps[3:13])
    assert [record["updates"] for record in steps[12:15]] == [13, 13, 14]
    assert [record["tokens"] for record in steps[12:15]] == [
        13 * BATCH * LENGTH,
        13 * BATCH * LENGTH,
        14 * BATCH * LENGTH,
    ]
    assert steps[21]["grad_norm"] is None


def test_too_many_in_a_row_take_the_run_back_to_its_last_checkpoint_and_over_the_data_since(whole: Path) -> None:
    (record,) = metrics(whole, "go_back")
    assert (record["step"], record["to_step"], record["phase"]) == (23, 16, "english")
    assert record["passed_over"] == [16 * BATCH, 23 * BATCH]
    assert state(checkpoint_path(whole, 23)) == state(checkpoint_path(whole, 16))
    phase = load_lineage(whole).phases[0]
    assert phase.passed_over == ((13 * BATCH, 14 * BATCH), (16 * BATCH, 23 * BATCH))
    assert (phase.samples, phase.updates, phase.tokens) == (30 * BATCH, 22, 22 * BATCH * LENGTH)
    assert metrics(whole, "step")[-1]["updates"] == 22
    assert metrics(whole, "evaluation")[-1]["tokens"] == 22 * BATCH * LENGTH


def test_losses_are_those_of_a_plain_loop_over_what_was_learned_from(whole: Path) -> None:
    """torch's own AdamW and cross-entropy; after batch 16 comes batch 24, as if nothing had been between them."""
    config = from_tree(open_config(whole))
    model = build_model(config.model, seed=config.seed)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=5e-3, betas=(0.9, 0.95), eps=1e-8)
    learned = [number for number in range(1, 31) if number != 14 and not 17 <= number <= 23]
    found = losses(whole)
    for number in learned:
        tokens = torch.from_numpy(batches(whole, number))
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert found[number - 1] == pytest.approx(loss.item(), rel=1e-5), number


def open_config(run_dir: Path) -> dict[str, Any]:
    import yaml

    loaded: dict[str, Any] = yaml.safe_load((run_dir / "config.yaml").read_text())
    return loaded


def test_it_is_said_loudly(prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tree(prepared, tmp_path / "run"), THREE)
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: step 14: the loss, " in said
    assert "warning: step 22: the gradient is not finite; its update was skipped, 2 in a row" in said
    assert "warning: step 23: too many in a row, so the run goes back to " in said
    assert "step-00000016 and passes over samples 192 to 276 of phase 'english'; 0 times more it may" in said


# ---------------------------------------------------------------------------------------------- ending and resuming


@pytest.mark.parametrize("stop", [15, 19, 22, 23, 24])
def test_told_to_stop_and_started_again_the_run_goes_back_as_if_undisturbed(
    prepared: Prepared, whole: Path, tmp_path: Path, stop: int
) -> None:
    run_dir = tmp_path / "run"
    assert train(tree(prepared, run_dir), THREE, stop_after=stop) == "stopped"
    assert train(tree(prepared, run_dir), THREE) == "done"
    assert losses(run_dir) == losses(whole)
    assert last_state(run_dir) == last_state(whole)
    assert load_lineage(run_dir) == dataclasses.replace(
        load_lineage(whole), phases=(dataclasses.replace(load_lineage(whole).phases[0], run="run"),)
    )
    assert [record["step"] for record in metrics(run_dir, "go_back")] == [23]


@pytest.mark.parametrize("last", [8, 16, 23, 24])
def test_killed_and_started_again_the_run_is_the_undisturbed_one(
    prepared: Prepared, whole: Path, tmp_path: Path, last: int
) -> None:
    """A kill leaves the checkpoints up to one of them, and in metrics.jsonl what came after."""
    run_dir = tmp_path / "whole"
    shutil.copytree(whole, run_dir)
    for path in list_checkpoints(run_dir):
        if open_checkpoint(path).state.step > last:
            shutil.rmtree(path)
    assert train(tree(prepared, run_dir), THREE) == "done"
    assert losses(run_dir) == losses(whole)
    assert last_state(run_dir) == last_state(whole)
    assert load_lineage(run_dir) == load_lineage(whole)
    assert [record["step"] for record in metrics(run_dir, "go_back")] == [23]
    assert [record["step"] for record in metrics(run_dir, "step")] == list(range(1, 31))


def test_the_checkpoint_to_go_back_to_is_not_pruned_for_one_that_a_stop_left(
    prepared: Prepared, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    for stop in (17, 18, 22):
        train(tree(prepared, run_dir), THREE, stop_after=stop)
    assert [open_checkpoint(path).state.step for path in list_checkpoints(run_dir)] == [16, 22]
    assert open_checkpoint(checkpoint_path(run_dir, 22)).state.back_to == 16


def test_a_run_that_has_gone_back_as_often_as_it_may_ends(prepared: Prepared, tmp_path: Path) -> None:
    more = {25: "noise", 26: "noise", 27: "noise"}
    with pytest.raises(DivergedError) as caught:
        train(tree(prepared, tmp_path / "run"), {**THREE, **more})
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("step 27: the loss, ")
    assert (
        "and the update was not made, the last of 3 in a row; the run has gone back 1 times, and the last checkpoint is"
        in message
    )
    assert list_checkpoints(tmp_path / "run")[-1].name == "step-00000024"


def test_a_run_may_go_back_twice_and_passes_over_each_stretch(prepared: Prepared, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = {"stability": {**BACK["stability"], "go_back": 2}}
    train(tree(prepared, run_dir, **settings), {**THREE, 25: "noise", 26: "noise", 27: "noise"})
    assert [(record["step"], record["to_step"]) for record in metrics(run_dir, "go_back")] == [(23, 16), (27, 24)]
    assert load_lineage(run_dir).phases[0].passed_over == tuple(
        (first * BATCH, end * BATCH) for first, end in ((13, 14), (16, 23), (24, 27))
    )


def test_without_a_checkpoint_there_is_no_way_back(prepared: Prepared, tmp_path: Path) -> None:
    settings = {"stability": {"skip": 1, "go_back": 5}}
    with pytest.raises(
        DivergedError, match=r"step 5: the gradient is not finite.*2 in a row; no checkpoint was saved yet"
    ):
        train(tree(prepared, tmp_path / "run", **settings), {4: "broken", 5: "broken"})


def test_a_damaged_checkpoint_is_not_gone_back_to(prepared: Prepared, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert train(tree(prepared, run_dir), THREE, stop_after=18) == "stopped"
    weights = checkpoint_path(run_dir, 16) / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"step-00000016.*this checkpoint is damaged"):
        train(tree(prepared, run_dir), THREE)


# ---------------------------------------------------------------------------------------------- phases and parents


@pytest.mark.parametrize("kept", [False, True])
def test_a_phase_that_has_saved_nothing_goes_back_to_what_it_began_with(
    prepared: Prepared, tmp_path: Path, kept: bool
) -> None:
    run_dir = tmp_path / "run"
    settings = tree(prepared, run_dir, **BACK)
    first = settings["phases"][0] | {"steps": 4}
    second = {**first, "name": "german", "mixture": {"german": 1}, "optimizer_state": "keep" if kept else "reset"}
    settings["phases"] = [first, second | {"steps": 7}]
    settings["checkpoint"] = {"every_steps": 100}
    assert train(settings, {6: "broken", 7: "broken", 8: "broken"}) == "done"
    (record,) = metrics(run_dir, "go_back")
    assert (record["step"], record["to_step"], record["phase"]) == (8, 4, "german")
    assert load_lineage(run_dir).phases[1].passed_over == ((0, 4 * BATCH),)
    at_8, at_4 = open_checkpoint(checkpoint_path(run_dir, 8)), open_checkpoint(checkpoint_path(run_dir, 4))
    assert at_8.state.optimizer_step == (4 if kept else 0)
    assert at_8.load_state()("head.weight")["weight"].equal(at_4.load_state()("head.weight")["weight"])
    assert open_checkpoint(list_checkpoints(run_dir)[-1]).state.optimizer_step == (4 if kept else 0) + 3


def test_a_run_that_started_from_another_goes_back_to_it(prepared: Prepared, whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "child"
    settings = tree(prepared, run_dir, start_from=str(whole))
    settings["phases"] = [{**settings["phases"][0], "name": "german", "mixture": {"german": 1}, "steps": 6}]
    assert train(settings, {2: "broken", 3: "broken", 4: "broken"}) == "done"
    (record,) = metrics(run_dir, "go_back")
    assert (record["step"], record["to_step"], record["passed_over"]) == (4, None, [0, 4 * BATCH])
    assert state(checkpoint_path(run_dir, 4)) == last_state(whole)


@pytest.mark.parametrize("started", [True, False], ids=["started from another", "from the beginning"])
def test_what_a_stop_saved_out_of_turn_is_not_gone_back_to(
    prepared: Prepared, whole: Path, tmp_path: Path, started: bool
) -> None:
    settings = tree(prepared, tmp_path / "run", **({"start_from": str(whole)} if started else {}))
    settings["phases"] = [{**settings["phases"][0], "name": "german", "mixture": {"german": 1}, "steps": 6}]
    trouble: Trouble = {3: "broken", 4: "broken", 5: "broken"}
    assert train(settings, trouble, stop_after=2) == "stopped"
    if not started:
        with pytest.raises(DivergedError, match="step 5: the gradient is not finite"):
            train(settings, trouble)
        return
    assert train(settings, trouble) == "done"
    (record,) = metrics(tmp_path / "run", "go_back")
    assert (record["step"], record["to_step"], record["passed_over"]) == (5, None, [0, 5 * BATCH])


def test_what_a_phase_passed_over_is_not_replayed_by_the_next(prepared: Prepared, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = tree(prepared, run_dir)
    settings["phases"][0]["steps"] = 24
    later = {**settings["phases"][0], "name": "german", "mixture": {"german": 1}, "replay": {"share": 0.5}}
    settings["phases"] = [settings["phases"][0], later | {"steps": 8}]
    assert train(settings, THREE) == "done"
    lineage = load_lineage(run_dir)
    stream = PhaseStream(lineage, open_recorded)
    samples = np.arange(8 * BATCH)
    replayed = stream.read(samples[stream.locate(samples).replayed])
    np.testing.assert_array_equal(replayed, batches(run_dir, *range(1, 14))[: 4 * BATCH])
    english = lineage.phases[0]
    assert english.own_samples == 16 * BATCH
    assert english.passed_over == ((13 * BATCH, 14 * BATCH), (16 * BATCH, 23 * BATCH))


def test_losses_of_another_mixture_do_not_judge_a_step(prepared: Prepared, tmp_path: Path) -> None:
    """From step 13 on the data is noise to a model of English, and says so in the mixture: no spike. Then it is one."""
    run_dir = tmp_path / "run"
    settings = tree(prepared, run_dir)
    settings["phases"][0]["mixture_changes"] = [{"at": "12 steps", "mixture": {"german": 1}}]
    assert (
        train(settings, {**dict.fromkeys(range(13, 20), "noise"), 21: "broken", 22: "broken", 23: "broken"}) == "done"
    )
    applied = [record["applied"] for record in metrics(run_dir, "step")]
    assert [number for number, fine in enumerate(applied, 1) if not fine] == [21, 22, 23]
    assert open_checkpoint(checkpoint_path(run_dir, 24)).state.watch.losses == tuple(
        losses(run_dir)[12:16] + losses(run_dir)[23:24]
    )


# ---------------------------------------------------------------------------------------------- precision, ranks


def test_an_fp16_overflow_uses_up_its_batch_and_its_place_in_the_schedule(prepared: Prepared, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = tree(prepared, run_dir, engine={"precision": "fp16"}, stability={})
    settings["phases"][0] |= {"steps": 6, "schedule": {"kind": "linear", "max_lr": 6e-3, "min_lr": 0}}
    assert train(settings, {2: "broken", 3: "broken"}) == "done"
    steps = metrics(run_dir, "step")
    assert [record["applied"] for record in steps] == [True, False, False, True, True, True]
    assert [record["updates"] for record in steps] == [1, 1, 1, 2, 3, 4]
    assert [record["lr"] for record in steps] == pytest.approx([6e-3 * (5 - k) / 5 for k in range(6)])
    assert [record["samples"] for record in steps] == [BATCH * k for k in range(1, 7)]
    checkpoint = open_checkpoint(list_checkpoints(run_dir)[-1])
    assert (checkpoint.state.optimizer_step, checkpoint.state.loss_scale) == (4, (65536 / 4, 3))
    assert checkpoint.lineage.phases[0].passed_over == ((BATCH, 3 * BATCH),)


def test_a_run_in_fp16_that_no_loss_scale_helps_goes_back_as_others_do(prepared: Prepared, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = tree(prepared, run_dir, engine={"precision": "fp16"}, stability={"skip": 1, "go_back": 1})
    assert train(settings, dict.fromkeys(range(4, 26), "broken")) == "done"
    steps = metrics(run_dir, "step")
    assert [record["step"] for record in steps if record["applied"]] == [1, 2, 3, 26, 27, 28, 29, 30]
    (record,) = metrics(run_dir, "go_back")
    assert record["step"] == 25  # 20 lower loss scales, one update skipped, and one too many


def train_on_ranks(ranks: Ranks, settings: dict[str, Any], trouble: Trouble) -> str:
    trainer.start_ranks = lambda **_: ranks  # type: ignore[assignment]
    trainer.stop_ranks = lambda: None
    return train(settings, trouble)


def test_two_ranks_skip_and_go_back_alike(prepared: Prepared, whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = tree(prepared, run_dir, engine={"kind": "deepspeed", "zero_stage": 3, "micro_batch_size": 3})
    assert run_on_ranks(2, train_on_ranks, settings, THREE) == ["done", "done"]
    assert [record["applied"] for record in metrics(run_dir, "step")] == [
        record["applied"] for record in metrics(whole, "step")
    ]
    assert [record["step"] for record in metrics(run_dir, "go_back")] == [23]
    assert load_lineage(run_dir).phases[0].passed_over == load_lineage(whole).phases[0].passed_over
    fine = [number for number in range(30) if number + 1 not in THREE]
    assert [losses(run_dir)[number] for number in fine] == pytest.approx([losses(whole)[n] for n in fine], rel=1e-5)
