"""A stream of six phases on an infinite schedule, disturbed at every boundary and in the middle of every phase."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Prepared
from runs import last_state, losses
from test_release import HELD, STEP, anneal, hashes
from test_trainer import stop_after

from megacl import trainer
from megacl.configfile import from_tree, load
from megacl.data.replay import times_replayed
from megacl.lineage import load_lineage
from megacl.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")


def stream_tree(prepared: Prepared, run_dir: Path) -> dict[str, Any]:
    """Six phases of four steps, English and German in turn, each with another way to replay what was before."""
    first = {"kind": "infinite", "max_lr": 5e-3, "constant_lr": 3e-3, "warmup": "1 steps", "cooldown": "2 steps"}
    replays = [
        None,
        {"share": 0.3},
        {"share": 0.25, "policy": "uniform"},
        {"share": 0.3, "policy": "power_law"},
        {"share": 0.4, "policy": "exponential", "age": "tokens"},
        {"share": 0.3, "from": {"p0": 1, "p3": 2}},
    ]
    phases = [
        {
            "name": f"p{number}",
            "mixture": {"german": 5, "english": 2} if number % 2 else {"english": 1},
            "steps": 4,
            "schedule": HELD if number else first,
            **({"replay": replay} if replay else {}),
        }
        for number, replay in enumerate(replays)
    ]
    return prepared.tree(
        run_dir,
        phases=phases,
        checkpoint={"every_steps": 3, "keep_last": None},
        evaluation={"sequences": 1},
    )


@pytest.fixture(scope="module")
def whole(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("streams") / "whole"
    assert train(from_tree(stream_tree(prepared, run_dir))) == "done"
    return run_dir


class KilledError(BaseException):
    """Takes the place of a signal that no process can answer."""


def killed_after(config: Any, *, steps: int) -> None:
    """Trains until it ends in the middle of step `steps`, with nothing saved since its last checkpoint."""
    original = trainer._Run._step

    def step(self: Any, *arguments: Any, **more: Any) -> None:
        original(self, *arguments, **more)
        if self.step == steps:
            self.saves.settle()  # else what was begun a step ago is there or is not, as the disk was fast
            raise KilledError

    trainer._Run._step = step  # type: ignore[method-assign]
    try:
        with pytest.raises(KilledError):
            train(config)
    finally:
        trainer._Run._step = original  # type: ignore[method-assign]


@pytest.mark.parametrize("disturb", [stop_after, killed_after])
def test_disturbed_at_each_boundary_and_in_the_middle_of_each_phase_it_is_the_same_stream(
    prepared: Prepared, whole: Path, tmp_path: Path, disturb: Callable[..., None]
) -> None:
    """And in the middle of it a release is taken off, whose first loss is that of the trunk's next step."""
    run_dir = tmp_path / "whole"
    config = from_tree(stream_tree(prepared, run_dir))
    for steps in range(2, 24, 2):
        disturb(config, steps=steps)
        if steps == 10:
            before = hashes(run_dir)
            assert train(anneal(run_dir, tmp_path / "release", anneal=str(2 * STEP))) == "done"
            assert hashes(run_dir) == before
    assert train(config) == "done"
    assert last_state(run_dir) == last_state(whole)
    assert losses(run_dir) == losses(whole)
    assert load_lineage(run_dir) == load_lineage(whole)
    _, _, taken = str(load([str(tmp_path / "release" / "config.yaml")]).start_from).rpartition("@")
    assert int(taken) in (9, 10)
    assert losses(tmp_path / "release")[0] == losses(whole)[int(taken)]


def test_its_history_adds_up(whole: Path) -> None:
    lineage = load_lineage(whole)
    assert lineage.tokens == 24 * STEP
    assert [phase.replay.samples if phase.replay else 0 for phase in lineage.phases] == [0, 14, 12, 14, 19, 14]
    assert all(times_replayed(lineage, phase.name) < 1 for phase in lineage.phases)
