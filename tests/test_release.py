"""Annealed releases: what they read, the rates they take, how they go on; the trunk stays as it is."""

import hashlib
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Prepared
from runs import REPTILE, command_line, last_state, losses, metrics
from test_trainer import stop_after

from megacl import trainer
from megacl.checkpoint import checkpoint_path, list_checkpoints, open_checkpoint
from megacl.config import RunConfig
from megacl.configfile import from_tree, load
from megacl.data.stream import PhaseStream, open_recorded
from megacl.errors import CheckpointError, ConfigError
from megacl.lineage import Lineage, load_lineage
from megacl.parallel.ranks import Ranks
from megacl.plan import peak_of
from megacl.release import anneal_config
from megacl.trainer import train
from tests.ranks import run_on_ranks

Capture = pytest.CaptureFixture[str]
STEP = 12 * 32
"""Tokens of an optimizer step."""
HELD = {"kind": "infinite", "max_lr": "last", "constant_lr": "last", "warmup": "0 steps", "cooldown": "0 steps"}


pytestmark = pytest.mark.usefixtures("one_thread")


def trunk_tree(prepared: Prepared, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """English with warm-up and cool-down to step 6, then more German than English with replay, at a constant rate.

    A batch has 3.6 replayed samples, so that from a checkpoint in the second phase on no pattern begins anew.
    """
    first = {"kind": "infinite", "max_lr": 5e-3, "constant_lr": 3e-3, "warmup": "2 steps", "cooldown": "4 steps"}
    phases = [
        {"name": "english", "mixture": {"english": 1}, "steps": 14, "schedule": first},
        {
            "name": "mixed",
            "mixture": {"german": 5, "english": 2},
            "mixture_changes": [{"at": "9 steps", "mixture": {"german": 1}}],
            "steps": 12,
            "schedule": HELD,
            "replay": {"share": 0.3},
        },
    ]
    every = {"checkpoint": {"every_steps": 3, "keep_last": None}, "evaluation": {"sequences": 4}}
    return prepared.tree(run_dir, **{"phases": phases, **every, **changes})


@pytest.fixture(scope="module")
def trunk(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("trunks") / "trunk"
    assert train(from_tree(trunk_tree(prepared, run_dir))) == "done"
    return run_dir


def silent(line: str) -> None:
    raise AssertionError(line)


def anneal(trunk: Path | str, out: Path, **more: Any) -> RunConfig:
    return anneal_config(str(trunk), out=out, **{"anneal": str(6 * STEP), "warn": silent, **more})


@pytest.fixture(scope="module")
def released(trunk: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps off step 21, the seventh of the second phase, undisturbed."""
    out = tmp_path_factory.mktemp("releases") / "released"
    assert train(anneal(f"{trunk}@21", out)) == "done"
    return out


def hashes(folder: Path) -> dict[str, str]:
    """Every file and folder below one, with what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


# ---------------------------------------------------------------------------------------------- what a release is


def test_its_first_samples_are_those_that_the_trunk_reads_next(trunk: Path, released: Path) -> None:
    """Own ones and replayed ones, beyond the trunk's change of its mixture, and beyond its end."""
    past = load_lineage(trunk)
    longer = replace(past.phases[-1], budget_samples=13 * 12)
    there = PhaseStream(Lineage(phases=(*past.phases[:-1], longer)), open_recorded)
    here = PhaseStream(load_lineage(released), open_recorded)
    assert here.record.name == "release"
    taken = 7 * 12
    assert taken * 3 % 10, "so replays do not begin anew there"
    assert np.array_equal(here.read(np.arange(72)), there.read(np.arange(taken, taken + 72)))
    first = metrics(released, "step")[0]
    assert first["loss"] == losses(trunk)[21], "the same weights on the same batch"
    assert first["tokens"] == 22 * STEP


def test_the_rate_falls_from_the_trunks_to_exactly_the_last_one(released: Path) -> None:
    rates = [record["lr"] for record in metrics(released, "step")]
    assert rates == pytest.approx([3e-3 * 0.1 ** (k / 6) for k in range(1, 7)])
    assert rates[-1] == 0.1 * 3e-3
    record = load_lineage(released).phases[-1]
    assert (record.optimizer_state, record.start_lr) == ("kept", 3e-3)


@pytest.mark.parametrize(
    ("shape", "passed"),
    [("linear", [1 / 3, 2 / 3]), ("cosine", [0.25, 0.75]), ("1-sqrt", [np.sqrt(1 / 3), np.sqrt(2 / 3)])],
)
def test_other_shapes_reach_the_last_rate_too(trunk: Path, tmp_path: Path, shape: Any, passed: list[float]) -> None:
    config = anneal(f"{trunk}@21", tmp_path / "r", anneal=f"{3 * STEP} tokens", shape=shape, min_lr=1e-4)
    assert train(config) == "done"
    rates = [record["lr"] for record in metrics(tmp_path / "r", "step")]
    assert rates[:2] == pytest.approx([3e-3 + (1e-4 - 3e-3) * part for part in passed])
    assert rates[2] == 1e-4


def test_all_else_is_as_in_the_trunk(trunk: Path, released: Path) -> None:
    there, here = load([str(trunk / "config.yaml")]), load([str(released / "config.yaml")])
    assert here.start_from == f"{trunk}@21"
    assert replace(here, run_dir=there.run_dir, start_from=None, phases=there.phases) == there
    assert {source.generation for source in here.sources.values()} == {1}
    evaluations = [(each["phase"], each["at"], each["step"]) for each in metrics(released, "evaluation")]
    assert evaluations == [("release", "start", 0), ("release", "end", 6)]


def test_a_part_of_what_the_trunk_has_seen_is_a_budget(trunk: Path, tmp_path: Path) -> None:
    config = anneal(trunk, tmp_path / "r", anneal="10%")
    assert config.phases[0].tokens == 26 * STEP // 10
    assert config.start_from == f"{trunk}@26"


def test_a_trunk_with_reptile_is_annealed_without_it_also_between_two_moves(prepared: Prepared, tmp_path: Path) -> None:
    settings = trunk_tree(prepared, tmp_path / "trunk")
    constant = {"kind": "constant", "max_lr": 3e-3}
    reptile = {"every_steps": 8, "epsilon": 0.5}
    settings["phases"] = [settings["phases"][0] | {"steps": 9, "schedule": constant, "reptile": reptile}]
    train(from_tree(settings))
    assert (checkpoint_path(tmp_path / "trunk", 6) / REPTILE).exists()
    said = list[str]()
    config = anneal(f"{tmp_path / 'trunk'}@6", tmp_path / "released", anneal=str(3 * STEP), warn=said.append)
    assert len(said) == 1
    assert "and its release without" in said[0]
    assert "between two moves; the nearest step at one is 8 (--at)" in said[0]
    assert train(config) == "done"
    trunk, release = load_lineage(tmp_path / "released").phases
    assert trunk.reptile is not None
    assert (release.reptile, release.optimizer_state) == (None, "kept")


@pytest.mark.parametrize(
    ("kind", "max_lr", "start", "expected"),
    [("infinite", 3e-3, 0.0, 3e-3), ("infinite", "last", 2e-3, 2e-3), ("anneal", "last", 1e-3, 5e-3)],
)
def test_independent_decay_is_measured_by_the_trunks_peak(
    trunk: Path, tmp_path: Path, kind: str, max_lr: Any, start: float, expected: float
) -> None:
    phase = anneal(f"{trunk}@21", tmp_path / "r").phases[0]
    first, last = load_lineage(trunk).phases  # the first one's peak is 5e-3
    before = replace(last, schedule={"kind": kind, "max_lr": max_lr}, start_lr=start, last_lr=1e-3)
    lineage = Lineage(phases=(first, before, replace(last, name="release", start_lr=1e-3)))
    assert peak_of(phase, lineage) == expected


# ---------------------------------------------------------------------------------------------- the trunk


def test_the_trunk_stays_as_it_is_and_goes_on_as_if_nothing_had_been(
    prepared: Prepared, trunk: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "trunk"
    config = from_tree(trunk_tree(prepared, run_dir))
    stop_after(config, steps=20)
    before = hashes(run_dir)
    assert train(anneal(run_dir, tmp_path / "r")) == "done"
    assert hashes(run_dir) == before
    assert train(config) == "done"
    assert last_state(run_dir) == last_state(trunk)
    assert losses(run_dir) == losses(trunk)


# ---------------------------------------------------------------------------------------------- going on


def test_interrupted_and_repeated_it_ends_bitwise_as_if_undisturbed_wherever_the_trunk_stands_by_then(
    prepared: Prepared, released: Path, tmp_path: Path
) -> None:
    run_dir, out = tmp_path / "trunk", tmp_path / "r"
    tree = trunk_tree(prepared, run_dir, checkpoint={"every_steps": 3, "keep_last": 1})
    stop_after(from_tree(tree), steps=21)
    stop_after(anneal(run_dir, out), steps=4)
    assert train(from_tree(tree)) == "done"
    assert not checkpoint_path(run_dir, 21).exists(), "the trunk has gone on, and what it was is pruned"
    again = anneal(run_dir, out)
    assert again == anneal(f"{run_dir}@21", out)
    assert train(again) == "done"
    assert last_state(out) == last_state(released)
    assert losses(out) == losses(released)
    assert train(anneal(run_dir, out)) == "done"  # nothing is left to do
    assert len(metrics(out, "step")) == 6


def test_another_command_for_the_same_folder_is_refused(trunk: Path, released: Path, tmp_path: Path) -> None:
    for change, message in (
        ({"shape": "linear"}, "schedule.shape 'exponential', and this configuration has 'linear'"),
        ({"min_lr": 1e-5}, "schedule.min_lr"),
        ({"anneal": str(9 * STEP)}, "steps 6, and this configuration has 9"),
        ({"step": 24}, f"start_from '{trunk}@21', and this configuration has '{trunk}@24'"),
    ):
        with pytest.raises(ConfigError, match="holds a run with") as caught:
            train(anneal(trunk, released, **change))  # type: ignore[arg-type]
        assert message in str(caught.value)
    with pytest.raises(ConfigError, match=r"holds a run that is no annealed release; name another folder"):
        anneal(trunk, trunk)


@pytest.mark.parametrize("steps", [2, 6])
def test_a_signal_during_a_release_is_answered_with_75(
    trunk: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    original = trainer._Run._step

    def step(self: Any, *arguments: Any, **more: Any) -> None:
        original(self, *arguments, **more)
        if self.step == steps:
            signal.raise_signal(signal.SIGTERM)

    arguments = ("release", str(trunk), "--at", "21", "--anneal", str(6 * STEP), "--out", str(tmp_path / "r"))
    with monkeypatch.context() as patched:
        patched.setattr(trainer._Run, "_step", step)
        assert command_line(capsys, *arguments)[0] == 75
    assert command_line(capsys, *arguments)[0] == 0
    assert len(metrics(tmp_path / "r", "step")) == 6


def train_on(ranks: Ranks, config: RunConfig) -> str:
    """Trains as one of several ranks would that torchrun had started."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "start_ranks", lambda **_: ranks)
        patched.setattr(trainer, "stop_ranks", lambda: None)
        return train(config)


def test_two_ranks_anneal_as_one_does(trunk: Path, released: Path, tmp_path: Path) -> None:
    """DeepSpeed's ZeRO-2, where the trunk ran natively; on each rank the command composes the same run."""
    config = anneal(f"{trunk}@21", tmp_path / "two")
    config = replace(config, engine=replace(config.engine, kind="deepspeed", zero_stage=2))
    assert run_on_ranks(2, train_on, config) == ["done", "done"]
    assert losses(tmp_path / "two") == pytest.approx(losses(released), rel=1e-5)
    last = [metrics(run, "evaluation")[-1]["sources"]["english"]["loss"] for run in (tmp_path / "two", released)]
    assert last[0] == pytest.approx(last[1], rel=1e-5)


# ---------------------------------------------------------------------------------------------- the command


def test_the_dry_run_says_what_it_will_read_and_at_which_rates(trunk: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = ("release", str(trunk), "--at", "21", "--anneal", str(6 * STEP), "--out", str(tmp_path / "r"))
    status, out, err = command_line(capsys, *arguments, "--dry-run")
    assert (status, err) == (0, "")
    assert f"goes on from {checkpoint_path(trunk, 21)}: 2 phases, {21 * STEP:,} tokens" in out
    assert f"phases[0] release: {6 * STEP:,} tokens = 6 steps x 12 sequences x 32" in out
    assert "  mixed from step 1 on german 5/7, english 2/7\n  mixed from step 3 on german 1/1" in out
    assert "  schedule anneal: 0.002044 at the first update, 0.002044 at the highest, 0.0003 at the last" in out
    assert not (tmp_path / "r").exists()


def other_schedule(prepared: Prepared, run_dir: Path, schedule: dict[str, Any], steps: int = 10) -> Path:
    phase = {"name": "english", "mixture": {"english": 1}, "steps": steps, "schedule": schedule}
    checkpoint = {"every_steps": 2, "keep_last": None}
    tree = prepared.tree(run_dir, phases=[phase], checkpoint=checkpoint, evaluation={"sequences": 1})
    assert train(from_tree(tree)) == "done"
    return run_dir


def test_a_decayed_run_has_no_trunk_and_the_error_says_what_to_do(
    prepared: Prepared, tmp_path: Path, capsys: Capture
) -> None:
    run_dir = other_schedule(prepared, tmp_path / "cosine", {"kind": "cosine", "max_lr": 1e-3})
    capsys.readouterr()
    status, out, err = command_line(capsys, "release", str(run_dir), "--anneal", "9e9", "--out", str(tmp_path / "r"))
    assert (status, out) == (2, "")
    assert err == (
        f"ConfigError: {run_dir}@10 has no trunk to release from: the rate of phase 'english' follows schedule cosine, "
        "which falls all the time. It is a release as it is; for new data, start_from it with a schedule that warms up "
        "again, and for releases now and then train with infinite, constant or wsd.\n"
    )
    assert not (tmp_path / "r").exists()


def test_from_where_to_where_a_trunk_can_be_released_is_said(prepared: Prepared, trunk: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"@3 is not on its constant rate yet.*until step 6; release from that step"):
        anneal(f"{trunk}@3", tmp_path / "r")
    assert anneal(f"{trunk}@6", tmp_path / "r").start_from == f"{trunk}@6"
    schedule = {"kind": "wsd", "max_lr": 1e-3, "warmup": "1 steps", "decay": "4 steps", "min_lr": 2e-5}
    run_dir = other_schedule(prepared, tmp_path / "wsd", schedule)
    with pytest.raises(ConfigError, match=r"@8 has no trunk.*falling since step 6.*steps 1 to 6 \(--at\)"):
        anneal(run_dir, tmp_path / "r", step=8)
    before = anneal(run_dir, tmp_path / "r", step=6)
    assert before.phases[0].schedule == replace(before.phases[0].schedule, min_lr=2e-5), "the trunk's own"  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--anneal", "100"], "phases[0].tokens is 100; it must hold at least one batch"),
        (["--anneal", "lots"], "--anneal is 'lots'; it must be a number of tokens, such as 2e9, or a part"),
        (
            ["--anneal", "9999", "--at", "20"],
            "has no checkpoint at step 20; it has 3, 6, 9, 12, 14, 15, 18, 21, 24, 26",
        ),
        (["--anneal", "9999", "--min-lr", "1"], "min_lr is 1; it must lie between 0 and the trunk's rate, 0.003"),
        (["--anneal", "9999", "--min-lr", "0"], "min_lr is 0, which an exponential anneal never reaches"),
        (["--anneal", "9999", "--shape", "mean"], "--shape is mean, which is no way to lower a rate"),
        (["--anneal", "9999", "--merge", "last:2"], "give one of them"),
        ([], "give one of them"),
    ],
)
def test_what_makes_no_sense_is_said_in_one_line(
    trunk: Path, tmp_path: Path, capsys: Capture, arguments: list[str], message: str
) -> None:
    status, _, err = command_line(capsys, "release", str(trunk), *arguments, "--out", str(tmp_path / "r"))
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_a_place_is_given_once(trunk: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="and so does --at 21; give one of them"):
        anneal(f"{trunk}@21", tmp_path / "r", step=21)
    with pytest.raises(CheckpointError, match="no such run"):
        anneal(tmp_path / "nothing", tmp_path / "r")
    folder = list_checkpoints(trunk)[-1]
    assert anneal(folder, tmp_path / "r").start_from == f"{trunk}@26"
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert anneal(moved, tmp_path / "r").start_from == str(moved)
    assert open_checkpoint(folder).state.step == 26


def test_a_release_of_a_release_is_refused_and_a_later_one_has_a_name_of_its_own(
    prepared: Prepared, released: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="follows schedule anneal, which falls all the time"):
        anneal(released, tmp_path / "r")
    phase = {"name": "next", "mixture": {"english": 1}, "steps": 3, "schedule": {"kind": "constant", "max_lr": 1e-3}}
    tree = prepared.tree(tmp_path / "next", phases=[phase], start_from=str(released), evaluation={"sequences": 1})
    assert train(from_tree(tree)) == "done"
    assert anneal(tmp_path / "next", tmp_path / "r").phases[0].name == "release-2"
