"""What is saved is the state where the save began, though the engine is told to change it while it is copied."""

import errno
import math
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import Prepared
from runs import to_save

from megacl.checkpoint import RunState, list_checkpoints, open_checkpoint, verify_checkpoint
from megacl.checkpoint_files import TensorFiles, tensor_name
from megacl.configfile import from_tree
from megacl.engine import Engine
from megacl.engine.adapter import slices_of
from megacl.errors import MegaclError
from megacl.parallel.ranks import Ranks
from megacl.saving import Saving
from megacl.trainer import train
from tests.ranks import arranged, run_on_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = np.random.default_rng(0).integers(0, 640, (2, 33))


@pytest.fixture(scope="module")
def made(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run of 12 steps."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    tree = prepared.tree(run_dir)
    train(from_tree({**tree, "phases": tree["phases"][:1]}))
    return list_checkpoints(run_dir)[-1]


CHANGES = ("update", "outer update", "reset", "load")


def change(engine: Engine, how: str, made: Path) -> None:
    match how:
        case "update":
            assert engine.step(TOKENS, 1e-2).applied
        case "outer update":
            engine.outer_update(0.5)
        case "reset":
            engine.reset_optimizer()
        case "load":
            open_checkpoint(made).load_into(engine)


def saved_beside(ranks: Ranks, made: Path, run_dir: Path, how: str, tp: int, **settings: Any) -> dict[str, Any]:
    """Saves, and changes the engine before anything is copied; then the same again into the same memory."""
    ranks = arranged(ranks, tp, 1)
    engine, saving, checkpoint = to_save(ranks, made, run_dir, tp, **settings)
    about_to_change = threading.Event()
    original = Saving._write

    def slow(saving: Saving, save: Any) -> None:
        about_to_change.wait(5)  # an engine that does not say so has changed by then
        threading.Event().wait(0.2)  # for which one that says so, and does not wait, has time
        original(saving, save)

    def asked() -> None:
        about_to_change.set()
        saving._finish_copying()

    held_up = 0.0
    for step in (1, 2):
        engine.set_anchor()
        assert engine.step(TOKENS, 1e-2).applied  # away from the anchor
        before = {
            tensor_name(name, key): tensor for name, state in engine.export_state() for key, tensor in state.items()
        }
        about_to_change.clear()
        with patch.object(Saving, "_write", slow):
            saving.begin(RunState(step=step), checkpoint.lineage)
            engine.before_change = asked
            change(engine, how, made)
            engine.before_change = saving._finish_copying
            saved = saving.conclude()
        held_up += saved.held_up
        if ranks.rank == 0:
            files = TensorFiles(saved.path)
            assert files.index.tensors.keys() == before.keys()
            for name, tensor in before.items():
                np.testing.assert_array_equal(files.read(name).numpy(), tensor.numpy(), err_msg=name)
            assert verify_checkpoint(saved.path) == []
    return {"held_up": held_up, "files": len(list(saved.path.glob("weights-*")))}


@pytest.mark.parametrize("how", CHANGES)
def test_what_is_saved_is_what_was_there_when_the_save_began(made: Path, tmp_path: Path, how: str) -> None:
    assert saved_beside(Ranks(), made, tmp_path, how, 1)["held_up"] > 0


CASES = [
    *((2, 1, {"zero_stage": 1}, how) for how in CHANGES),
    (2, 1, {"zero_stage": 1, "precision": "bf16"}, "update"),
    *(
        pytest.param(world, tp, settings, how, marks=pytest.mark.long)
        for world, tp, settings in [
            (2, 1, {"zero_stage": 0}),
            (2, 1, {"zero_stage": 2, "offload_optimizer": True}),
            (2, 1, {"zero_stage": 3}),
            (4, 2, {"zero_stage": 1}),
        ]
        for how in ("update", "load")
    ),
]


@pytest.mark.parametrize(("world", "tp", "settings", "how"), CASES, ids=str)
def test_on_several_ranks_too(made: Path, tmp_path: Path, world: int, tp: int, settings: Any, how: str) -> None:
    for each in run_on_ranks(world, saved_beside, made, tmp_path, how, tp, **settings):
        assert each["files"] == world
        assert each["held_up"] > 0


def broken_on_one_rank(ranks: Ranks, made: Path, run_dir: Path, full: int | None) -> tuple[str, str]:
    """What is said of a save of which the last rank owns an infinite weight, and rank `full` cannot write."""
    engine, saving, checkpoint = to_save(ranks, made, run_dir, zero_stage=1)
    name = next(name for name, size in reversed(engine.holdings().items()) if size == engine.shapes[name].numel())
    if ranks.rank == ranks.world_size - 1:
        engine._held(next(each for each in slices_of(engine._deepspeed) if each.name == name)).state["weight"][0] = (
            math.inf
        )
    saving._permit = refuse if ranks.rank == full else lambda: None
    saving.begin(RunState(step=7), checkpoint.lineage)
    try:
        saving.conclude()
    except MegaclError as error:
        return type(error).__name__, str(error)
    return "saved", ""


def refuse() -> None:
    raise OSError(errno.ENOSPC, "full")


@pytest.mark.parametrize("full", [None, 0])
def test_a_number_that_is_not_finite_on_one_rank_ends_the_save_on_all_whatever_else_fails(
    made: Path, tmp_path: Path, full: int | None
) -> None:
    results = run_on_ranks(2, broken_on_one_rank, made, tmp_path, full)
    assert results[0] == results[1]
    kind, said = results[0]
    assert kind == "DivergedError"
    assert "step 7: " in said
    assert "is not finite, and no checkpoint was made of it; there is none yet." in said
    assert not list(tmp_path.glob("checkpoints/*"))


def test_what_cannot_be_copied_fails_the_save_and_holds_up_nothing(made: Path, tmp_path: Path) -> None:
    engine, saving, checkpoint = to_save(Ranks(), made, tmp_path)
    copy = torch.Tensor.copy_

    def failing(into: torch.Tensor, source: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if threading.current_thread().name == "save 7":
            raise RuntimeError("no memory")
        return copy(into, source, *arguments)

    with patch.object(torch.Tensor, "copy_", failing):
        saving.begin(RunState(step=7), checkpoint.lineage)
        assert engine.step(TOKENS, 1e-2).applied
        with pytest.raises(RuntimeError, match="no memory"):
            saving.conclude()
    assert not list(tmp_path.glob("checkpoints/*"))
    saving.begin(RunState(step=8), checkpoint.lineage)
    assert verify_checkpoint(saving.conclude().path) == []
