"""Which checkpoints stay: the rules against a plain reading of them, and what a run and its commands make of them."""

import json
import math
import pydoc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Prepared
from hypothesis import given
from hypothesis import strategies as st
from runs import metrics

from megacl.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    newest_checkpoint,
    step_folders,
    step_of,
    verify_checkpoint,
)
from megacl.checkpoint_names import changing_names, give_name, read_names, take_name
from megacl.config_checkpoint import CheckpointConfig, KeepBestConfig
from megacl.configfile import from_tree
from megacl.errors import CheckpointError, ConfigError, DataError
from megacl.publish import sweep_unfinished
from megacl.retention import Facts, losses_by_step, prune_checkpoints, reasons_to_keep
from megacl.trainer import train

KEEP_LAST_1 = CheckpointConfig(keep_last=1)

# ---------------------------------------------------------------------------------------------- the rules


@st.composite
def facts(draw: st.DrawFn) -> list[Facts]:
    steps = draw(st.lists(st.integers(0, 40), unique=True, min_size=1, max_size=12))
    losses = st.none() | st.sampled_from([1.0, 2.0, 3.0, math.nan])
    names = st.sampled_from([(), (), (), ("a",), ("a", "b")])
    ends = st.sampled_from([False, False, False, True, None])
    return [Facts(step=step, phase_end=draw(ends), names=draw(names), loss=draw(losses)) for step in steps]


SETTINGS = st.builds(
    CheckpointConfig,
    keep_last=st.none() | st.integers(1, 5),
    keep_every=st.none() | st.integers(1, 10),
    keep_best=st.none() | st.builds(KeepBestConfig, keep=st.integers(1, 4)),
)


def stays(each: Facts, found: list[Facts], settings: CheckpointConfig, newest: int, back_to: int | None) -> bool:
    """The rules as docs/checkpoints.md says them, one checkpoint at a time, without sorting."""
    if settings.keep_last is None or each.phase_end is not False:
        return True
    if each.names or each.step == back_to or each.step >= newest:
        return True
    if settings.keep_every and not each.step % settings.keep_every:
        return True
    later = [one for one in found if one.phase_end is False and each.step < one.step <= newest]
    if len(later) < settings.keep_last:
        return True
    if settings.keep_best is None or each.loss is None or math.isnan(each.loss):
        return False
    better = [
        one
        for one in found
        if one.phase_end is not None
        and one.step <= newest
        and one.loss is not None
        and (one.loss < each.loss or (one.loss == each.loss and one.step < each.step))
    ]
    return len(better) < settings.keep_best.keep


@given(facts(), SETTINGS, st.data())
def test_what_goes_is_what_no_rule_keeps(found: list[Facts], settings: CheckpointConfig, data: st.DataObject) -> None:
    newest = data.draw(st.sampled_from([each.step for each in found]))
    back_to = data.draw(st.none() | st.sampled_from([each.step for each in found]))
    kept = reasons_to_keep(found, settings, newest=newest, back_to=back_to)
    assert list(kept) == [each.step for each in found]
    for each in found:
        assert bool(kept[each.step]) == stays(each, found, settings, newest, back_to), (each, kept)
    assert kept[newest]


def test_each_checkpoint_says_why_it_stays() -> None:
    found = [
        Facts(step=5, phase_end=False, loss=3.0),
        Facts(step=10, phase_end=False, loss=1.0),
        Facts(step=12, phase_end=True),
        Facts(step=15, phase_end=False, names=("october", "shipped")),
        Facts(step=20, phase_end=False),
        Facts(step=25, phase_end=False),
        Facts(step=30, phase_end=None),
    ]
    settings = CheckpointConfig(every_steps=5, keep_last=1, keep_every=20, keep_best=KeepBestConfig(source="english"))
    assert reasons_to_keep(found, settings, newest=25, back_to=20) == {
        5: (),
        10: ("best by english",),
        12: ("phase end",),
        15: ("named october, shipped",),
        20: ("every 20", "to go back to"),
        25: ("newest", "last 1"),
        30: ("cannot be read", "beyond the newest good one"),
    }


# ---------------------------------------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def run(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps its best by German beside the rules that have no loss in them."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    keep = {"every_steps": 2, "keep_last": 1, "keep_every": 8, "keep_best": {"source": "german", "keep": 2}}
    train(from_tree(prepared.tree(run_dir, checkpoint=keep, evaluation={"every_steps": 1, "sequences": 4})))
    return run_dir


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def test_a_run_keeps_its_best_checkpoints_beside_the_last_and_every_kth(run: Path) -> None:
    by_step = losses_by_step(run, "german")
    best = sorted((loss, step) for step, loss in by_step.items() if step and step % 2 == 0)[:2]
    last = max(step for step in by_step if step not in (12, 20))  # of those inside phases
    expected = {8, 12, 16, 20, last - last % 2, *(step for _, step in best)}
    assert [step_of(path) for path in list_checkpoints(run)] == sorted(expected)
    assert not list((run / "checkpoints").glob(".*.tmp"))


def test_the_mean_is_over_the_sources_of_the_last_evaluation(run: Path) -> None:
    means = losses_by_step(run, None)
    for record in metrics(run, "evaluation"):
        losses = [result["loss"] for result in record["sources"].values()]
        assert means[record["step"]] == pytest.approx(sum(losses) / len(losses))


def test_a_loss_of_updates_that_were_undone_makes_no_best_checkpoint(copy: Path) -> None:
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    at = next(index for index, line in enumerate(lines) if json.loads(line)["step"] == 10)
    lines.insert(at, json.dumps({"kind": "go_back", "time": 0.0, "step": 9, "phase": "english", "to_step": 8}))
    (copy / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert 9 not in losses_by_step(copy, "english")
    assert {8, 10} <= set(losses_by_step(copy, "english"))


def test_what_has_a_name_stays_until_the_name_is_taken_back(copy: Path) -> None:
    give_name(copy, 8, "october")
    give_name(copy, 8, "october")
    newest = list_checkpoints(copy)[-1]
    before = [step_of(path) for path in list_checkpoints(copy)]
    gone = prune_checkpoints(copy, newest, KEEP_LAST_1, pytest.fail)
    assert 8 not in map(step_of, gone)
    assert find_checkpoint(f"{copy}@october", pytest.fail) == find_checkpoint(f"{copy}@8", pytest.fail)
    assert take_name(copy, "october") == 8
    assert [step_of(path) for path in prune_checkpoints(copy, newest, KEEP_LAST_1, pytest.fail)] == [8]
    assert {step_of(path) for path in list_checkpoints(copy)} == set(before) - {8, *map(step_of, gone)}


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".a", "a b", "12", "a@b", "x" * 65, "a\n"])
def test_a_name_that_could_be_something_else_is_refused(copy: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="is no name for a checkpoint"):
        give_name(copy, 8, name)
    assert read_names(copy) == {}


def test_a_name_means_one_checkpoint_that_is_there(copy: Path) -> None:
    give_name(copy, 8, "october")
    with pytest.raises(ConfigError, match=r"'october' is step 8 already; `megacl checkpoint forget .*@october` frees"):
        give_name(copy, 12, "october")
    with pytest.raises(CheckpointError, match="its checkpoint at step 3 was pruned meanwhile"):
        give_name(copy, 3, "september")
    with pytest.raises(CheckpointError, match="no checkpoint is named 'may'; named: october"):
        take_name(copy, "may")
    with pytest.raises(CheckpointError, match=r"no checkpoint ends a phase 'may'; .*; named: october"):
        find_checkpoint(f"{copy}@may", pytest.fail)


def test_nothing_is_pruned_while_names_cannot_be_read_or_somebody_gives_one(copy: Path) -> None:
    newest, before = list_checkpoints(copy)[-1], list_checkpoints(copy)
    warnings: list[str] = []
    with changing_names(copy):
        assert prune_checkpoints(copy, newest, KEEP_LAST_1, warnings.append) == []
        with pytest.raises(DataError, match="a command that names or prunes checkpoints is at work there"):
            give_name(copy, 8, "october")
    (copy / "checkpoints" / "names.json").write_text('{"format": "megacl-checkpoint-names"')
    assert prune_checkpoints(copy, newest, KEEP_LAST_1, warnings.append) == []
    assert list_checkpoints(copy) == before
    assert [line.startswith("no checkpoint is pruned: ") for line in warnings] == [True, True]
    with pytest.raises(CheckpointError, match=r"names.json: cannot be read: .*restore it, or delete it"):
        find_checkpoint(f"{copy}@october", pytest.fail)
    assert find_checkpoint(f"{copy}@8", pytest.fail)
    assert newest_checkpoint(copy, pytest.fail) == newest


def test_what_cannot_be_deleted_is_named_and_no_hindrance(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    rename = os.rename

    def refuse(source: Path, to: Path) -> None:
        if "step-00000008" in str(source):
            raise PermissionError(13, "Permission denied")
        rename(source, to)

    monkeypatch.setattr("os.rename", refuse)
    warnings: list[str] = []
    gone = prune_checkpoints(copy, list_checkpoints(copy)[-1], KEEP_LAST_1, warnings.append)
    assert 16 in map(step_of, gone)
    assert find_checkpoint(f"{copy}@8", pytest.fail)
    assert [line.endswith("step-00000008: cannot be deleted: Permission denied") for line in warnings] == [True]


@pytest.mark.parametrize("last", range(6))
def test_a_prune_that_is_killed_leaves_whole_checkpoints_and_what_is_swept(
    copy: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    """Killed before the last-th thing that it does to the disk: two renames, then twice an unlink and a tree."""
    done = []

    def killed_before(function: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*arguments: Any, **more: Any) -> None:
            if len(done) == last:
                raise KeyboardInterrupt
            done.append(function)
            function(*arguments, **more)

        return wrapped

    before, newest = list_checkpoints(copy), list_checkpoints(copy)[-1]
    for name in ("os.rename", "pathlib.Path.unlink", "shutil.rmtree"):
        monkeypatch.setattr(name, killed_before(pydoc.locate(name)))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoints(copy, newest, KEEP_LAST_1, pytest.fail)
    monkeypatch.undo()
    left = list_checkpoints(copy)
    assert set(left) <= set(before)
    assert newest in left
    assert all(verify_checkpoint(path) == [] for path in step_folders(copy))
    sweep_unfinished(copy / "checkpoints")
    assert {path.name for path in (copy / "checkpoints").iterdir()} == {".lock", *(path.name for path in left)}


def test_a_source_that_is_not_evaluated_cannot_choose_the_best(prepared: Prepared, tmp_path: Path) -> None:
    keep: dict[str, Any] = {"every_steps": 2, "keep_best": {"source": "germn"}}
    tree = prepared.tree(tmp_path / "run", checkpoint=keep, evaluation={"every_steps": 2})
    with pytest.raises(ConfigError, match=r"keep_best.source is 'germn', .*did you mean 'german'"):
        train(from_tree(tree))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("checkpoint", "evaluation", "message"),
    [
        ({"keep_last": None, "keep_every": 4}, None, "keep_every is given, and keep_last is null"),
        ({"keep_every": 4}, None, "keep_every is given, and no checkpoints are saved inside a phase"),
        ({"every_steps": 3, "keep_every": 4}, None, "keep_every is 4; it must be a multiple of checkpoint.every_steps"),
        (
            {"every_steps": 3, "keep_best": {}},
            None,
            "evaluation.every_steps is null; make it checkpoint.every",
        ),
        ({"every_steps": 3, "keep_best": {}}, 2, "evaluation.every_steps is 2; make it checkpoint.every_steps, 3"),
    ],
)
def test_rules_that_could_not_work_are_refused(
    prepared: Prepared, tmp_path: Path, checkpoint: dict[str, Any], evaluation: int | None, message: str
) -> None:
    tree = prepared.tree(tmp_path, checkpoint=checkpoint, evaluation={"every_steps": evaluation})
    with pytest.raises(ConfigError) as caught:
        from_tree(tree)
    assert message in str(caught.value)
