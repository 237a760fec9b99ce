"""A run goes from any layout of ranks to any other: native, and ZeRO 0 to 3 x data parallel x tensor parallel.

What is left of a run behind a checkpoint is trained in another layout than what came before it. Every sample is read
where an undisturbed run on one process reads it, and the losses are that run's to 1e-5; and what a layout has loaded it
saves again to the bit. Each layout saves once, told to stop amid a phase with replay, by a signal that reaches one rank
alone.
"""

import itertools
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
from conftest import Prepared
from runs import losses, state

from megacl.checkpoint import list_checkpoints, open_checkpoint, step_of
from megacl.configfile import from_tree
from megacl.engine import build_engine
from megacl.model.gpt import build_model
from megacl.parallel.ranks import Ranks
from megacl.saving import save_checkpoint
from megacl.trainer import train
from tests.ranks import arranged, run_on_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

SAVED, STEPS = 6, 26
"""The step at which a layout saves, two into the second phase, and those of the whole run."""


class Layout(NamedTuple):
    """ZeRO stage, data-parallel ranks, ranks that share each layer; stage None is the native engine."""

    stage: int | None
    dp: int
    tp: int

    def __str__(self) -> str:
        return "native" if self.stage is None else f"zero{self.stage}-dp{self.dp}-tp{self.tp}"


NATIVE = Layout(None, 1, 1)
LAYOUTS = [Layout(stage, dp, tp) for dp, tp in [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)] for stage in range(4)]
PAIRS = random.Random(20).sample([(one, other) for one in LAYOUTS for other in LAYOUTS if one != other], 10)


def tree(prepared: Prepared, run_dir: Path, layout: Layout) -> dict[str, Any]:
    """A run whose second phase replays a third, and keeps Adam's moments."""
    schedule = {"kind": "cosine", "max_lr": 2e-3, "warmup": "2 steps"}
    second = {"mixture": {"german": 1}, "replay": {"share": 1 / 3}, "optimizer_state": "keep"}
    engine: dict[str, Any] = {"kind": "native"}
    if layout.stage is not None:
        engine = {"kind": "deepspeed", "zero_stage": layout.stage, "tensor_parallel": layout.tp, "micro_batch_size": 2}
    return prepared.tree(
        run_dir,
        model={"vocab_size": 642, "hidden_size": 48, "num_layers": 2, "num_attention_heads": 4},
        phases=[
            {"name": "english", "mixture": {"english": 1}, "steps": 4, "schedule": schedule},
            {"name": "german", **second, "steps": STEPS - 4, "schedule": schedule},
        ],
        # Part of the key bias has a gradient of zero but for rounding, which Adam would blow up with its usual epsilon.
        optimizer={"eps": 1e-6},
        checkpoint={},
        evaluation={"sequences": 2},
        engine=engine,
    )


def train_noting(ranks: Ranks, settings: dict[str, Any], stop_after: int | None = None) -> list[list[int]]:
    """Trains on this rank, until its last one is told to stop behind a step; the samples that it read, step by step."""
    from megacl import trainer

    read: list[list[int]] = []
    original: Callable[..., None] = trainer._Run._step

    def step(run: Any, index: int, stream: Any, batch: Any, *arguments: Any, **more: Any) -> None:
        original(run, index, stream, batch, *arguments, **more)
        read.append(batch.samples.tolist())
        if run.step == stop_after and ranks.rank == ranks.world_size - 1:
            signal.raise_signal(signal.SIGUSR1)

    with (
        patch.object(trainer, "start_ranks", lambda **_: ranks),
        patch.object(trainer, "stop_ranks", lambda: None),
        patch.object(trainer._Run, "_step", step),
    ):
        outcome = train(from_tree(settings))
    assert outcome == ("done" if stop_after is None else "stopped")
    return read


def lay_down(ranks: Ranks, path: Path, run_dir: Path, layout: Layout, settings: dict[str, Any]) -> None:
    """Loads a checkpoint into this rank's engine, and saves that engine at once."""
    checkpoint, config = open_checkpoint(path), from_tree(settings)
    model = build_model(config.model, seed=1, device="meta")
    ranks = arranged(ranks, layout.tp, 1)
    engine = build_engine(model, engine=config.engine, optimizer=config.optimizer, ranks=ranks)
    checkpoint.load_into(engine)
    save_checkpoint(
        engine,
        ranks,
        run_dir,
        checkpoint.state,
        lineage=checkpoint.lineage,
        config=checkpoint.config,
        tokenizer=checkpoint.tokenizer(),
    )


def train_in(layout: Layout, prepared: Prepared, run_dir: Path, stop_after: int | None = None) -> list[list[int]]:
    """Trains a run directory on in a layout: the samples of each step's global batch, in order."""
    settings = tree(prepared, run_dir, layout)
    if layout.stage is None:
        return train_noting(Ranks(), settings, stop_after)
    by_rank = run_on_ranks(layout.dp * layout.tp, train_noting, settings, stop_after)
    assert all(by_rank[rank] == by_rank[rank // layout.tp * layout.tp] for rank in range(len(by_rank)))
    return [[*itertools.chain(*parts)] for parts in zip(*by_rank[:: layout.tp], strict=True)]


class Runs:
    """An undisturbed run on one process, and what each layout has saved of such a one."""

    def __init__(self, prepared: Prepared, folder: Path) -> None:
        self._prepared, self._folder = prepared, folder
        self._read = train_in(NATIVE, prepared, folder / "whole")
        self._losses = losses(folder / "whole")
        self._saved: set[Layout] = set()
        assert len(self._losses) == STEPS

    def saved_by(self, layout: Layout) -> Path:
        """The run directory of a layout that was told to stop."""
        run_dir = self._folder / str(layout)
        if layout not in self._saved:
            assert train_in(layout, self._prepared, run_dir, SAVED) == self._read[:SAVED]
            assert step_of(list_checkpoints(run_dir)[-1]) == SAVED
            self._saved.add(layout)
        return run_dir

    def check(self, one: Layout, other: Layout, run_dir: Path) -> None:
        """What one layout has saved is trained on in the other, as if nothing had happened."""
        shutil.copytree(self.saved_by(one), run_dir)
        self._check_loaded(other, list_checkpoints(run_dir)[-1], run_dir.with_name("loaded"))
        assert train_in(other, self._prepared, run_dir) == self._read[SAVED:]
        assert losses(run_dir) == pytest.approx(self._losses, rel=1e-5)

    def _check_loaded(self, layout: Layout, path: Path, run_dir: Path) -> None:
        """What a layout has loaded it saves again to the bit: weights, moments and what is counted."""
        arguments = (path, run_dir, layout, tree(self._prepared, run_dir, layout))
        if layout.stage is None:
            lay_down(Ranks(), *arguments)
        else:
            run_on_ranks(layout.dp * layout.tp, lay_down, *arguments)
        (again,) = list_checkpoints(run_dir)
        assert state(again) == state(path)
        assert open_checkpoint(again).state == open_checkpoint(path).state


@pytest.fixture(scope="module")
def runs(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(prepared, tmp_path_factory.mktemp("runs"))


def test_two_ranks_that_share_the_weights_save_what_two_that_share_each_layer_train_on(
    runs: Runs, tmp_path: Path
) -> None:
    runs.check(Layout(3, 2, 1), Layout(1, 1, 2), tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_a_layout_saves_is_trained_on_by_one_process(runs: Runs, tmp_path: Path, layout: Layout) -> None:
    runs.check(layout, NATIVE, tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("layout", [NATIVE, *LAYOUTS], ids=str)
def test_what_one_process_saves_is_trained_on_by_a_layout(runs: Runs, tmp_path: Path, layout: Layout) -> None:
    runs.check(NATIVE, layout, tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize(("one", "other"), PAIRS, ids=str)
def test_what_a_layout_saves_is_trained_on_by_another_one(
    runs: Runs, tmp_path: Path, one: Layout, other: Layout
) -> None:
    runs.check(one, other, tmp_path / "run")
