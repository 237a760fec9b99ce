"""The fault campaign: nothing is lost by a round of any kind, and what is lost by a broken program is counted."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Prepared
from faultsim import checks
from faultsim.campaign import KINDS, MOUNTS, Verdict, campaign, play, table
from faultsim.disks import why_no_mounts
from faultsim.rounds import HALF, LOST, UNLIKE
from faultsim.world import World

from megacl.checkpoint import list_checkpoints
from megacl.configfile import from_tree
from megacl.trainer import train

PUBLISHES_BY_COPYING = """
import os, shutil, sys, time
from megacl import cli

rename = os.rename

def copy(one, other):
    if os.path.basename(other).startswith("step-"):
        os.mkdir(other)
        for name in sorted(os.listdir(one), key=lambda name: name != "manifest.json"):
            shutil.copy(os.path.join(one, name), other)
            time.sleep(0.1)
        shutil.rmtree(one)
    else:
        rename(one, other)

os.rename = copy
cli.main()
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("campaign"))


@pytest.fixture(scope="module")
def run(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints at 10, 12 (a phase's end), 15 and 20 (the other's)."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    train(from_tree(prepared.tree(run_dir)))
    return run_dir


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_round_of_each_kind_loses_nothing(world: World, kind: str) -> None:
    if kind in MOUNTS and (why := why_no_mounts(world.folder)):
        pytest.skip(why)
    verdict = play(world, kind, seed=0, number=0)
    assert verdict.problems == (), verdict.moment


@pytest.mark.long
def test_a_program_that_publishes_by_copying_is_found_out(world: World, tmp_path: Path) -> None:
    program = tmp_path / "copying.py"
    program.write_text(PUBLISHES_BY_COPYING)
    (tmp_path / "world").mkdir()
    broken = World(tmp_path / "world", (sys.executable, str(program)))
    verdicts = []
    for verdict in campaign(broken, ["kill-save"], rounds=6, seed=0):
        verdicts.append(verdict)
        if verdict.problems:
            break
    assert HALF in {column for column, _ in verdicts[-1].problems}
    assert table(verdicts)[-1].split()[:4] == ["all", f"{len(verdicts)}", f"{len(verdicts)}", "1"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "state.json").write_bytes((path / "state.json").read_bytes()[:-1]),
        lambda path: next(path.glob("optimizer*.safetensors")).unlink(),
        lambda path: (path / "manifest.json").write_text("{"),
    ],
)
def test_a_checkpoint_that_was_copied_by_half_is_half_published(
    run: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    assert checks.half_published(copy) == []
    damage(list_checkpoints(copy)[1])
    (problem,) = checks.half_published(copy)
    assert "step-00000012" in problem


def test_steps_behind_more_than_one_save_are_lost_beyond_an_interval(run: Path, tmp_path: Path) -> None:
    copy, saves = shutil.copytree(run, tmp_path / "run"), (5, 10, 12, 15, 20)
    assert checks.lost(copy, {15, 20}, saves, 20) == []
    shutil.rmtree(copy / "checkpoints" / "step-00000020")
    assert checks.lost(copy, {12, 15}, saves, 20) == []  # it may have been under way
    assert len(checks.lost(copy, {15, 20}, saves, 20)) == 1  # it had been there
    shutil.rmtree(copy / "checkpoints" / "step-00000015")
    assert checks.lost(copy, {12}, saves, 20) == []  # as 15 may, where 20 has not begun to be saved
    shutil.rmtree(copy / "checkpoints" / "step-00000012")
    assert len(checks.lost(copy, {10}, saves, 20)) == 1  # but two never are


def test_an_end_with_one_other_byte_or_number_is_another_end(run: Path, tmp_path: Path) -> None:
    end = checks.end_of(run)
    copy = shutil.copytree(run, tmp_path / "run")
    assert checks.differences(copy, end) == []
    records = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    last = max(index for index, record in enumerate(records) if record["kind"] == "step")
    records[last]["seconds"] += 1.0
    write = (copy / "metrics.jsonl").write_text
    write("".join(json.dumps(record) + "\n" for record in records))
    assert checks.differences(copy, end) == []  # times are no part of it
    records[last]["loss"] += 1e-12
    write("".join(json.dumps(record) + "\n" for record in records))
    assert len(checks.differences(copy, end)) == 1
    write("".join(json.dumps(record) + "\n" for record in records[:last] + records[last + 1 :]))
    assert len(checks.differences(copy, end)) == 1
    manifest = copy / "checkpoints" / "step-00000020" / "manifest.json"
    tree = json.loads(manifest.read_text())
    tree["files"]["state.json"]["xxh3_128"] = "0" * 32
    manifest.write_text(json.dumps(tree))
    assert len(checks.differences(copy, end)) == 2


def test_good_checkpoints_that_a_failed_save_deleted_or_changed_are_named(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    before = checks.published(copy)
    shutil.rmtree(copy / "checkpoints" / "step-00000010")
    assert checks.changed(copy, before, keep=2) == []  # it was to go with the next save
    manifest = copy / "checkpoints" / "step-00000012" / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    shutil.rmtree(copy / "checkpoints" / "step-00000015")
    assert [problem.split(" ")[4] for problem in checks.changed(copy, before, keep=2)] == ["12", "15"]


def test_the_table_counts_a_round_once_in_each_column() -> None:
    def verdict(kind: str, *problems: tuple[str, str], in_the_midst: bool = True) -> Verdict:
        return Verdict(kind, 0, "", in_the_midst, problems, 1.0)

    lines = table(
        [
            verdict("kill-save", (HALF, "one"), (HALF, "two"), (UNLIKE, "three")),
            verdict("kill-save", in_the_midst=False),
            verdict("missing", (LOST, "one")),
        ]
    )
    assert [line.split() for line in lines[1:]] == [
        ["kill-save", "2", "1", "1", "0", "1", "0"],
        ["missing", "1", "1", "0", "1", "0", "0"],
        ["all", "3", "2", "1", "1", "1", "0"],
    ]
