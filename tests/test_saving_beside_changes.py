"""What is saved is the state where the save began, though the engine is told to change it while it is copied."""

import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from conftest import Prepared

from megacl.checkpoint import RunState, list_checkpoints, open_checkpoint, verify_checkpoint
from megacl.checkpoint_files import TensorFiles, tensor_name
from megacl.config import EngineConfig, OptimizerConfig
from megacl.configfile import from_tree
from megacl.engine import Engine, build_engine
from megacl.model.gpt import build_model
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
    checkpoint = open_checkpoint(made)
    model = build_model(checkpoint.config.model, seed=0, device="meta")
    kind = "native" if ranks.world_size == 1 else "deepspeed"
    config = EngineConfig(kind=kind, tensor_parallel=tp, **settings)
    engine = build_engine(model, engine=config, optimizer=OptimizerConfig(), ranks=ranks)
    checkpoint.load_into(engine)
    saving = Saving(engine, ranks, run_dir, config=checkpoint.config, tokenizer=checkpoint.tokenizer())
    changing = threading.Event()
    original = Saving._write

    def slow(saving: Saving, save: Any) -> None:
        assert changing.wait(60)
        threading.Event().wait(0.2)  # for which an engine that does not wait would have time
        original(saving, save)

    held_up = 0.0
    for step in (1, 2):
        engine.set_anchor()
        assert engine.step(TOKENS, 1e-2).applied  # away from the anchor
        before = {
            tensor_name(name, key): tensor for name, state in engine.export_state() for key, tensor in state.items()
        }
        changing.clear()
        with patch.object(Saving, "_write", slow):
            saving.begin(RunState(step=step), checkpoint.lineage)
            changing.set()
            change(engine, how, made)
            saved = saving.conclude()
        held_up += saved.held_up
        if ranks.rank == 0:
            files = TensorFiles(saved.path)
            assert files.index.tensors.keys() == before.keys()
            for name, tensor in before.items():
                np.testing.assert_array_equal(files.read(name).numpy(), tensor.numpy(), err_msg=name)
            assert verify_checkpoint(saved.path) == []
    return {"held_up": held_up, "files": len(list(saved.path.glob("weights-*")))}


@pytest.mark.parametrize("how", ["update", "outer update", "reset", "load"])
def test_what_is_saved_is_what_was_there_when_the_save_began(made: Path, tmp_path: Path, how: str) -> None:
    assert saved_beside(Ranks(), made, tmp_path, how, 1)["held_up"] > 0


CASES = [
    (2, 1, {"zero_stage": 1}),
    (2, 1, {"zero_stage": 1, "precision": "bf16"}),
    pytest.param(2, 1, {"zero_stage": 0}, marks=pytest.mark.long),
    pytest.param(2, 1, {"zero_stage": 2, "offload_optimizer": True}, marks=pytest.mark.long),
    pytest.param(2, 1, {"zero_stage": 3}, marks=pytest.mark.long),
    pytest.param(4, 2, {"zero_stage": 1}, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("world", "tp", "settings"), CASES, ids=str)
@pytest.mark.parametrize("how", ["update", "load"])
def test_on_several_ranks_too(made: Path, tmp_path: Path, world: int, tp: int, settings: Any, how: str) -> None:
    results = run_on_ranks(world, saved_beside, made, tmp_path, how, tp, **settings)
    assert all(each["files"] == world for each in results)
    if settings["zero_stage"] < 3:  # whose every tensor travels, and is there when the save has begun
        assert any(each["held_up"] > 0 for each in results)
