"""Merged releases: a mean of a trunk's checkpoints as a run directory that everything else takes for one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Prepared
from runs import OPTIMIZER, WEIGHTS, command_line, losses, metrics, state
from safetensors.numpy import load_file
from test_release import STEP, hashes, silent, trunk_tree

from megacl import release_merge
from megacl.checkpoint import Checkpoint, checkpoint_path, find_checkpoint, list_checkpoints, mark_of, open_checkpoint
from megacl.config import EngineConfig
from megacl.configfile import from_tree, load
from megacl.errors import CheckpointError, ConfigError
from megacl.lineage import MergeRecord, load_lineage
from megacl.lineage_text import describe
from megacl.merging import decay_over, merge_weights
from megacl.parallel.ranks import Ranks
from megacl.plan import plan_text
from megacl.release import anneal_config
from megacl.release_merge import Merge, choose, merge, publish_merge
from megacl.report import render_report
from megacl.report_plots import loss_figure
from megacl.report_run import read_run
from megacl.trainer import train
from megacl.transfer import UNTRAINED, read_matrix
from tests.ranks import run_on_ranks

Capture = pytest.CaptureFixture[str]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trunk(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints at steps 3, 6, 9, 12, 14 (the end of the first phase), 15, 18, 21, 24 and 26; constant from 6 on."""
    run_dir = tmp_path_factory.mktemp("trunks") / "trunk"
    assert train(from_tree(trunk_tree(prepared, run_dir))) == "done"
    return run_dir


@pytest.fixture(scope="module")
def merged(trunk: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("releases") / "merged"
    merge(str(trunk), "last:5", shape="linear", out=out, warn=silent)
    return out


def steps(chosen: Merge) -> list[int]:
    return [checkpoint.state.step for checkpoint in chosen.checkpoints]


# ---------------------------------------------------------------------------------------------- what is merged


def test_the_last_n_checkpoints_imitate_a_decay_over_the_steps_between_them(trunk: Path) -> None:
    chosen = choose(str(trunk), "last:5", shape="linear", warn=silent)
    assert steps(chosen) == [15, 18, 21, 24, 26]
    assert chosen.weights == tuple(merge_weights(decay_over("linear", [15, 18, 21, 24, 26], floor=0.1)))
    lower = choose(str(trunk), "last:5", shape="linear", min_lr=0.0, warn=silent)
    assert lower.weights == tuple(merge_weights(decay_over("linear", [15, 18, 21, 24, 26])))
    earlier = choose(str(trunk), "last:3", shape="1-sqrt", step=18, warn=silent)
    assert steps(earlier) == [14, 15, 18]


def test_named_steps_over_two_phases_may_lie_at_any_distance_and_a_mean_weighs_all_alike(trunk: Path) -> None:
    chosen = choose(str(trunk), "21,9,14", shape="mean", warn=silent)
    assert steps(chosen) == [9, 14, 21]
    assert chosen.weights == (1 / 3, 1 / 3, 1 / 3)


def test_every_weight_is_the_mean_of_the_checkpoints(trunk: Path, merged: Path) -> None:
    weights = merge_weights(decay_over("linear", [15, 18, 21, 24, 26], floor=0.1))
    files = [load_file(checkpoint_path(trunk, step) / WEIGHTS) for step in (15, 18, 21, 24, 26)]
    found = load_file(checkpoint_path(merged, 26) / WEIGHTS)
    assert found.keys() == files[0].keys()
    for name, tensor in found.items():
        mean = sum(weight * file[name].astype(np.float64) for weight, file in zip(weights, files, strict=True))
        assert np.array_equal(tensor, np.asarray(mean).astype(np.float32)), name


def test_the_lineage_names_every_checkpoint_with_its_weight(trunk: Path, merged: Path) -> None:
    lineage = load_lineage(merged)
    assert lineage == load_lineage(checkpoint_path(merged, 26))
    assert lineage.phases == load_lineage(trunk).phases
    event = lineage.events[-1]
    assert isinstance(event, MergeRecord)
    assert (event.after, event.shape) == (2, "linear")
    assert [each.step for each in event.checkpoints] == [15, 18, 21, 24, 26]
    assert sum(each.weight for each in event.checkpoints) == pytest.approx(1)
    mark = mark_of(open_checkpoint(checkpoint_path(trunk, 18)))
    assert (event.checkpoints[1].id, event.checkpoints[1].weights) == (mark.id, mark.weights)


# ---------------------------------------------------------------------------------------------- what it is good for


def test_it_is_evaluated_as_the_end_of_a_phase_that_the_trunk_did_not_have(trunk: Path, merged: Path) -> None:
    (record,) = metrics(merged, "evaluation")
    assert (record["step"], record["phase"], record["at"], record["tokens"]) == (26, "release", "end", 26 * STEP)
    there = metrics(trunk, "evaluation")[-1]["sources"]
    assert record["sources"].keys() == there.keys()
    for name, result in record["sources"].items():
        assert result["tokens"] == there[name]["tokens"]
        assert result["loss"] == pytest.approx(there[name]["loss"], abs=0.5)
        assert result["loss"] != there[name]["loss"]


def test_the_verbs_take_it_for_a_run(merged: Path, capsys: Capture) -> None:
    status, out, _ = command_line(capsys, "evaluate", str(merged), "--json")
    assert status == 0
    assert set(json.loads(out)["sources"]) == {"english", "german"}
    status, out, _ = command_line(capsys, "sample", str(merged), "--prompt", "The", "--tokens", "3")
    assert (status, out[:3]) == (0, "The")
    status, out, _ = command_line(capsys, "lineage", str(merged))
    assert status == 0
    assert "merge" in out
    assert train(load([str(merged / "config.yaml")])) == "done"  # there is nothing in it to train


def test_a_report_shows_its_evaluation_alone_and_beside_the_trunks_curves(trunk: Path, merged: Path) -> None:
    run = read_run(merged, "merged")
    assert (len(run.steps["step"]), run.tokens, run.first_tokens) == (0, 26 * STEP, 26 * STEP)
    alone = render_report([merged])
    assert "merged, not trained" in alone
    assert "<h2>Training</h2>" not in alone
    held_out = [trace for trace in loss_figure([run]).data if trace.name == "german"]
    assert [len(trace.x) for trace in held_out] == [1]
    both = render_report([trunk, merged])
    assert "<h2>Training</h2>" in both
    for page in (alone, both):
        matrix = page.split("What was learned and what was forgotten")[1].split("</section>")[0]
        assert ">release" in matrix
    assert "nan tokens" not in alone


def test_a_run_goes_on_from_it_with_a_new_optimizer(prepared: Prepared, merged: Path, tmp_path: Path) -> None:
    schedule = {"kind": "constant", "max_lr": "last"}
    phase = {"name": "next", "mixture": {"english": 1}, "steps": 2, "schedule": schedule}
    tree = prepared.tree(tmp_path / "next", phases=[phase], start_from=str(merged), evaluation={"sequences": 4})
    assert train(from_tree(tree)) == "done"
    record = load_lineage(tmp_path / "next").phases[-1]
    assert (record.optimizer_state, record.last_lr) == ("new", 3e-3), "there was no state to keep"
    assert open_checkpoint(list_checkpoints(tmp_path / "next")[-1]).state.optimizer_step == 2
    began = metrics(tmp_path / "next", "evaluation")[0]["sources"]["english"]["loss"]
    assert began == metrics(merged, "evaluation")[0]["sources"]["english"]["loss"]


def test_a_second_merge_has_a_name_and_a_row_of_its_own(prepared: Prepared, merged: Path, tmp_path: Path) -> None:
    """Trunk, merge, a phase, merge."""
    phase = {"name": "next", "mixture": {"german": 1}, "steps": 2, "schedule": {"kind": "constant", "max_lr": 3e-3}}
    more = {"checkpoint": {"every_steps": 1, "keep_last": None}, "evaluation": {"sequences": 4}}
    tree = prepared.tree(tmp_path / "next", phases=[phase], start_from=str(merged), **more)
    assert train(from_tree(tree)) == "done"
    merge(str(tmp_path / "next"), "1,2", shape="mean", out=tmp_path / "second", warn=silent)
    (record,) = metrics(tmp_path / "second", "evaluation")
    assert record["phase"] == "release-2"
    matrix = read_matrix(tmp_path / "second", warn=pytest.fail)
    assert [row.label for row in matrix.rows] == [UNTRAINED, "english", "mixed", "release", "next", "release-2"]
    first = metrics(merged, "evaluation")[0]
    for row, held in ((3, first), (5, record)):
        assert matrix.rows[row].values == {name: result["loss"] for name, result in held["sources"].items()}
    text = describe(load_lineage(tmp_path / "second"))
    assert "merge  release  of 5 checkpoints" in text
    assert "merge  release-2  of 2 checkpoints" in text
    taken = {**phase, "name": "release"}
    tree = prepared.tree(tmp_path / "taken", phases=[taken], start_from=str(merged), **more)
    with pytest.raises(ConfigError, match="already been through a phase or a merge named 'release'"):
        train(from_tree(tree))


# ---------------------------------------------------------------------------------------------- the trunk, repeating


def test_the_trunk_is_left_bit_for_bit_and_a_repeated_command_changes_nothing(
    trunk: Path, tmp_path: Path, capsys: Capture
) -> None:
    before, out = hashes(trunk), tmp_path / "r"
    arguments = ("release", str(trunk), "--merge", "18,24", "--shape", "mean", "--out", str(out))
    assert command_line(capsys, *arguments)[0] == 0
    assert hashes(trunk) == before
    made = hashes(out)
    assert command_line(capsys, *arguments)[0] == 0
    assert hashes(out) == made
    metrics_file = out / "metrics.jsonl"
    metrics_file.unlink()  # killed while it was evaluated
    assert command_line(capsys, *arguments)[0] == 0
    assert len(metrics(out, "evaluation")) == 1


def test_a_repeated_command_finds_its_merge_where_the_trunk_has_moved_on(
    trunk: Path, tmp_path: Path, capsys: Capture
) -> None:
    moving = shutil.copytree(trunk, tmp_path / "trunk")
    for step in (24, 26):
        checkpoint_path(moving, step).rename(tmp_path / f"{step}")
    arguments = ("release", str(moving), "--merge", "last:2", "--out", str(tmp_path / "r"))
    assert command_line(capsys, *arguments)[0] == 0
    made = hashes(tmp_path / "r")
    for step in (24, 26):
        (tmp_path / f"{step}").rename(checkpoint_path(moving, step))
    shutil.rmtree(checkpoint_path(moving, 18))  # pruned
    (tmp_path / "r" / "metrics.jsonl").unlink()  # killed while it was evaluated
    status, _, said = command_line(capsys, *arguments)
    assert (status, "merged already, from steps 18, 21" in said) == (0, True)
    assert hashes(tmp_path / "r").keys() == made.keys()
    assert len(metrics(tmp_path / "r", "evaluation")) == 1
    status, said, _ = command_line(capsys, *arguments, "--dry-run")
    assert (status, "merged already, from steps 18, 21" in said) == (0, True)
    for others in (("--shape", "mean"), ("--min-lr", "0"), ("--at", "26")):
        status, _, said = command_line(capsys, *arguments, *others)
        assert (status, "holds another model" in said) == (2, True)


def test_a_lowest_rate_goes_with_a_shape_that_has_one(trunk: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = ("--merge", "last:2", "--shape", "mean", "--min-lr", "1e-4", "--out", str(tmp_path / "r"))
    status, _, said = command_line(capsys, "release", str(trunk), *arguments)
    assert (status, "leave out --min-lr" in said) == (2, True)
    assert not (tmp_path / "r").exists()


def test_a_dry_run_shows_the_weights(trunk: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = ("release", str(trunk), "--merge", "last:2", "--out", str(tmp_path / "r"), "--dry-run")
    status, out, _ = command_line(capsys, *arguments)
    assert (status, out) == (
        0,
        f"a mean of 2 checkpoints, shape linear\n  {trunk}@24  weight 0.675\n  {trunk}@26  weight 0.325\n",
    )
    assert not (tmp_path / "r").exists()


def merge_on(ranks: Ranks, trunk: Path, out: Path, engine: EngineConfig) -> list[str]:
    """Merges as one of several ranks would that torchrun had started; what it raised."""

    def open_with_engine(path: Path) -> Checkpoint:
        checkpoint = open_checkpoint(path)
        return replace(checkpoint, config=replace(checkpoint.config, engine=engine))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(release_merge, "start_ranks", lambda **_: ranks)
        patched.setattr(release_merge, "stop_ranks", lambda: None)
        patched.setattr(release_merge, "open_checkpoint", open_with_engine)
        try:
            merge(str(trunk), "last:5", shape="linear", out=out, warn=silent)
        except ConfigError as error:
            return [str(error)]
    return []


def test_two_ranks_merge_and_evaluate_as_one_does(trunk: Path, merged: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    assert run_on_ranks(2, merge_on, trunk, out, EngineConfig(kind="deepspeed")) == [[], []]
    assert state(checkpoint_path(out, 26)) == state(checkpoint_path(merged, 26))
    (one,), (two,) = metrics(merged, "evaluation"), metrics(out, "evaluation")
    for name, result in two["sources"].items():
        assert result["loss"] == pytest.approx(one["sources"][name]["loss"], rel=1e-5)
    refused = run_on_ranks(2, merge_on, trunk, tmp_path / "native", EngineConfig())
    assert all("engine.kind is native, which runs on one rank, and there are 2" in said for (said,) in refused)
    assert not (tmp_path / "native").exists()


# ---------------------------------------------------------------------------------------------- what cannot be merged


@pytest.mark.parametrize(
    ("which", "more", "message"),
    [
        ("last:1", {}, "names one checkpoint; a mean is of two or more"),
        ("last:0", {}, "--merge is 'last:0'; it must be last:N, or steps such as 800,900,1000"),
        ("18,20", {}, "has no checkpoint at step 20; it has 3, 6, 9, 12, 14, 15, 18, 21, 24, 26"),
        ("3,18", {}, "@3 is not on its constant rate yet"),
        ("last:10", {}, "@3 is not on its constant rate yet"),
        ("last:2", {"min_lr": 0.0, "shape": "exponential"}, "min_lr is 0, which an exponential decay never reaches"),
        ("last:2", {"min_lr": 0.5}, "min_lr is 0.5; it must lie between 0 and the trunk's rate"),
        ("18,24", {"step": 24}, "--merge 18,24 names steps of a run, and"),
    ],
)
def test_what_is_no_merge_is_said_in_one_line(trunk: Path, which: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        choose(str(trunk), which, **{"shape": "linear", "warn": silent, **more})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_trunk_that_has_pruned_its_checkpoints_says_how_many_to_keep(prepared: Prepared, tmp_path: Path) -> None:
    tree = trunk_tree(prepared, tmp_path / "trunk", checkpoint={"every_steps": 3, "keep_last": 2})
    assert train(from_tree(tree)) == "done"
    with pytest.raises(CheckpointError) as caught:
        choose(str(tmp_path / "trunk"), "last:6", shape="linear", warn=silent)
    assert "there are 4 checkpoints up to step 26, and --merge last:6 takes 6" in str(caught.value)
    assert "checkpoint.keep_last (now 2) at 6 or more, or merge fewer" in str(caught.value)


def test_other_runs_and_other_shapes_are_named(prepared: Prepared, trunk: Path, tmp_path: Path) -> None:
    """Checkpoints that were copied into the run's folder from another one."""
    other = tmp_path / "other" / "trunk"
    assert train(from_tree(trunk_tree(prepared, other, seed=1))) == "done"
    mixed = shutil.copytree(trunk, tmp_path / "mixed" / "trunk")
    shutil.rmtree(checkpoint_path(mixed, 24))
    shutil.copytree(checkpoint_path(other, 24), checkpoint_path(mixed, 24))
    with pytest.raises(ConfigError, match=r"@24 does not lead to .*@26: it is of another run"):
        choose(str(mixed), "last:3", shape="linear", warn=silent)
    chosen = choose(str(trunk), "last:2", shape="linear", warn=silent)
    small = prepared.tree(tmp_path / "small")
    small["model"]["hidden_size"] = 16
    assert train(from_tree(small)) == "done"
    forged = Merge(
        "linear", (open_checkpoint(find_checkpoint(str(tmp_path / "small"), silent)), chosen.newest), (0.5, 0.5)
    )
    with pytest.raises(CheckpointError, match=r"embed.weight is \[640, 32\], and in .* it is \[640, 16\]"):
        publish_merge(forged, tmp_path / "r")
    assert list_checkpoints(tmp_path / "r") == []


def test_a_rate_that_was_not_constant_in_between_is_named(prepared: Prepared, tmp_path: Path) -> None:
    tree = trunk_tree(prepared, tmp_path / "trunk")
    tree["phases"][1]["schedule"] = {"kind": "constant", "max_lr": 3e-3, "warmup": "3 steps"}
    assert train(from_tree(tree)) == "done"
    with pytest.raises(ConfigError) as caught:
        choose(str(tmp_path / "trunk"), "12,24", shape="linear", warn=silent)
    assert "phase 'mixed', schedule constant, is at its constant rate in its steps 3 to 12 of 12" in str(caught.value)
    assert steps(choose(str(tmp_path / "trunk"), "18,24", shape="linear", warn=silent)) == [18, 24]


def test_another_constant_rate_in_between_is_named(prepared: Prepared, tmp_path: Path) -> None:
    tree = trunk_tree(prepared, tmp_path / "trunk")
    tree["phases"][1]["schedule"] = {"kind": "constant", "max_lr": 1e-3}
    assert train(from_tree(tree)) == "done"
    with pytest.raises(ConfigError, match=r"the rate went from 0\.\d+ to 0\.001, in phase 'mixed'; merge"):
        choose(str(tmp_path / "trunk"), "12,24", shape="linear", warn=silent)
    assert steps(choose(str(tmp_path / "trunk"), "18,24", shape="linear", warn=silent)) == [18, 24]


def test_a_damaged_checkpoint_is_named_and_its_moments_are_not_looked_at(trunk: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trunk, tmp_path / "trunk")
    (checkpoint_path(copy, 18) / OPTIMIZER).write_bytes(b"")
    choose(str(copy), "18,24", shape="linear", warn=silent)
    weights = checkpoint_path(copy, 18) / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match="its content has changed"):
        choose(str(copy), "18,24", shape="linear", warn=silent)


def test_a_folder_that_holds_something_else_is_refused(trunk: Path, merged: Path, tmp_path: Path) -> None:
    for held in (trunk, merged):
        before = hashes(held)
        with pytest.raises(ConfigError, match=r"holds another model, .*; name another folder"):
            merge(str(trunk), "last:2", shape="linear", out=held, warn=silent)
        assert hashes(held) == before
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.yaml").write_text((trunk / "config.yaml").read_text())
    with pytest.raises(ConfigError, match="holds a run that is no such merge"):
        merge(str(trunk), "last:2", shape="linear", out=tmp_path / "r", warn=silent)


def test_a_data_folder_is_no_place_for_a_release_or_a_run(prepared: Prepared, trunk: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "manifest.json").write_text('{"format": "megacl-data"}')
    with pytest.raises(ConfigError, match=r"is a data folder or a checkpoint, by its manifest.json; name another"):
        merge(str(trunk), "last:2", shape="linear", out=data, warn=silent)
    with pytest.raises(ConfigError, match=r"is a data folder or a checkpoint, by its manifest.json; name another"):
        train(from_tree(trunk_tree(prepared, data)))
    assert {path.name for path in data.iterdir()} <= {"manifest.json", ".lock"}


@pytest.mark.parametrize("asked", ["keep", "reset_step"])
def test_a_state_that_a_merged_model_does_not_have_is_warned_of(
    prepared: Prepared, merged: Path, tmp_path: Path, asked: str
) -> None:
    schedule = {"kind": "constant", "max_lr": "last"}
    phase = {"name": "next", "mixture": {"english": 1}, "steps": 2, "schedule": schedule, "optimizer_state": asked}
    config = from_tree(prepared.tree(tmp_path / "next", phases=[phase], start_from=str(merged)))
    (line,) = [line for line in plan_text(config) if line.startswith("warning:")]
    assert f"optimizer_state of phases[0] is {asked}" in line
    assert "it begins anew" in line


def test_a_merged_model_is_no_trunk(merged: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is itself merged from checkpoints of a trunk; release from that trunk"):
        anneal_config(str(merged), anneal="9e9", out=tmp_path / "r", warn=silent)
    assert losses(merged) == []
