"""Reptile: by hand, under every engine, and exact over resumes, engines and ways back."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Prepared
from runs import command_line, last_state, losses, state

from megacl.checkpoint import list_checkpoints, open_checkpoint
from megacl.config import EngineConfig
from megacl.configfile import from_tree
from megacl.engine import Engine
from megacl.errors import ConfigError
from megacl.lineage import load_lineage
from megacl.memory import estimate_memory
from megacl.model.gpt import count_parameters
from megacl.parallel.ranks import Ranks
from megacl.trainer import train
from tests.parallel.test_apply import LLAMA
from tests.plain_loop import train_by_hand
from tests.ranks import arranged, run_on_ranks
from tests.test_engine import NEOX, ROWS, STAGES, Outcome, arrays, assert_close, batch, make_engine, rate, restore

EVERY, EPSILON = 3, 0.4


pytestmark = pytest.mark.usefixtures("one_thread")


def steps_of(engine: Engine, ranks: Ranks, steps: range, epsilon: float | None, outcome: Outcome) -> None:
    """Trains; after every third update there is a move."""
    rows = ROWS // ranks.dp_size
    for step in steps:
        result = engine.step(batch(step)[ranks.dp_rank * rows : (ranks.dp_rank + 1) * rows], rate(step))
        outcome.losses.append(result.loss)
        outcome.norms.append(result.grad_norm)
        outcome.applied.append(result.applied)
        if epsilon is not None and (step + 1) % EVERY == 0:
            engine.outer_update(epsilon)


def train_reptile(
    ranks: Ranks,
    steps: range,
    epsilon: float | None = EPSILON,
    *,
    go_on_from: Outcome | None = None,
    **settings: Any,
) -> Outcome:
    ranks = arranged(ranks, settings.get("tensor_parallel", 1), 1)
    engine = make_engine(ranks, **settings)
    if go_on_from is not None:
        restore(engine, go_on_from)
    if epsilon is not None and not engine.has_anchor:
        engine.set_anchor()
    outcome = Outcome()
    steps_of(engine, ranks, steps, epsilon, outcome)
    outcome.state, outcome.optimizer_step = arrays(engine), engine.optimizer_step
    return outcome


def train_zero(stage: int, *args: Any, **settings: Any) -> Outcome:
    first, second = run_on_ranks(2, train_reptile, *args, kind="deepspeed", zero_stage=stage, **settings)
    assert (first.losses, first.norms) == (second.losses, second.norms)
    return first


@pytest.fixture(scope="module")
def alone() -> Outcome:
    """Eleven steps, moves after the third, sixth and ninth."""
    return train_reptile(Ranks(), range(11))


# ---------------------------------------------------------------------------------------------- engines


@pytest.mark.parametrize("epsilon", [EPSILON, 0.9])
def test_the_weights_are_those_of_a_loop_by_hand(epsilon: float) -> None:
    outcome = train_reptile(Ranks(), range(11), epsilon)
    expected = train_by_hand(11, reptile=(EVERY, epsilon))
    np.testing.assert_allclose(outcome.losses, expected.losses, rtol=1e-5)
    for name, state_of_it in outcome.state.items():
        np.testing.assert_allclose(state_of_it["weight"], expected.weights[name], atol=2e-4, err_msg=name)
        np.testing.assert_allclose(state_of_it["exp_avg"], expected.m[name], atol=2e-4, err_msg=name)


def test_it_moves_the_weights_and_not_the_moments(alone: Outcome) -> None:
    plain = train_reptile(Ranks(), range(11), None)
    assert plain.losses[:EVERY] == alone.losses[:EVERY]
    assert abs(plain.losses[EVERY] - alone.losses[EVERY]) > 1e-2
    engine = make_engine(Ranks())
    engine.set_anchor()
    steps_of(engine, Ranks(), range(2), None, Outcome())
    before = arrays(engine)
    engine.outer_update(EPSILON)
    for name, after in arrays(engine).items():
        for key in ("exp_avg", "exp_avg_sq"):
            np.testing.assert_array_equal(after[key], before[name][key])
        expected = before[name]["anchor"] + EPSILON * (before[name]["weight"] - before[name]["anchor"])
        np.testing.assert_allclose(after["weight"], expected, atol=1e-7)
    assert engine.optimizer_step == 2


@pytest.mark.parametrize("stage", STAGES)
def test_zero_on_two_ranks_moves_as_native_does(stage: int, alone: Outcome) -> None:
    assert_close(train_zero(stage, range(11)), alone)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_anchor_on_the_host_moves_as_native_does(stage: int, alone: Outcome) -> None:
    assert_close(train_zero(stage, range(11), offload_optimizer=True), alone)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_ranks_that_share_layers_move_as_one(stage: int) -> None:
    expected = train_reptile(Ranks(), range(8), model=LLAMA)
    assert_close(train_zero(stage, range(8), model=LLAMA, tensor_parallel=2), expected)


@pytest.mark.parametrize("stage", [None, *STAGES])
def test_with_epsilon_1_it_is_the_run_without_to_the_bit(stage: int | None) -> None:
    if stage is None:
        moved, plain = (train_reptile(Ranks(), range(5), epsilon) for epsilon in (1.0, None))
    else:
        moved, plain = (train_zero(stage, range(5), epsilon) for epsilon in (1.0, None))
    assert moved.losses == plain.losses
    for name, state_of_it in plain.state.items():
        for key, value in state_of_it.items():
            np.testing.assert_array_equal(moved.state[name][key], value, err_msg=f"{name} {key}")


def nats_behind_a_move(ranks: Ranks, **settings: Any) -> tuple[float, float, float]:
    """Of held-out rows before a move, behind it, and in another engine that was given the weights behind it."""
    engine, other = make_engine(ranks, **settings), make_engine(ranks, **settings)
    engine.set_anchor()
    steps_of(engine, ranks, range(EVERY - 1), None, Outcome())
    held_out = batch(1000)
    before = engine.nats(held_out[:, :-1], held_out[:, 1:])
    engine.outer_update(EPSILON)
    moved = ranks.broadcast(Outcome(state=arrays(engine), optimizer_step=engine.optimizer_step))
    restore(other, moved)
    return before, *(each.nats(held_out[:, :-1], held_out[:, 1:]) for each in (engine, other))


# ZeRO 0 does not run in 16 bits.
@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (None, "fp32"),
        (None, "bf16"),
        (3, "bf16"),
        *((stage, "fp32") for stage in range(4)),
        *(pytest.param(stage, "bf16", marks=pytest.mark.long) for stage in (1, 2)),
    ],
)
def test_the_model_computes_with_the_moved_weights_at_once(stage: int | None, precision: str) -> None:
    if stage is None:
        found = [nats_behind_a_move(Ranks(), precision=precision)]
    else:
        found = run_on_ranks(2, nats_behind_a_move, kind="deepspeed", zero_stage=stage, precision=precision)
    for before, moved, given in found:
        assert moved == given
        assert abs(moved - before) > 1e-3 * before


@pytest.mark.parametrize("stage", STAGES)
def test_a_state_between_two_moves_goes_from_zero_to_native_and_back(stage: int, alone: Outcome) -> None:
    """Steps 1 to 4, of which the third is a move, and 5 to 11."""
    first = train_zero(stage, range(4))
    assert set(first.state["head.weight"]) == {"weight", "exp_avg", "exp_avg_sq", "anchor"}
    rest = train_reptile(Ranks(), range(4, 11), go_on_from=first)
    np.testing.assert_allclose(first.losses + rest.losses, alone.losses, rtol=1e-5)
    before = train_reptile(Ranks(), range(4))
    unchanged = train_zero(stage, range(0), go_on_from=before)
    np.testing.assert_equal(unchanged.state, before.state)
    back = train_zero(stage, range(4, 11), go_on_from=before)
    np.testing.assert_allclose(back.losses, alone.losses[4:], rtol=1e-5)


@pytest.mark.parametrize("done", [4, 6])
def test_native_goes_on_bitwise_between_two_moves_and_at_one(done: int, alone: Outcome) -> None:
    first = train_reptile(Ranks(), range(done))
    assert ("anchor" in first.state["head.weight"]) == (done != 6)
    rest = train_reptile(Ranks(), range(done, 11), go_on_from=first)
    assert first.losses + rest.losses == alone.losses
    np.testing.assert_equal(rest.state, alone.state)


def anchors(ranks: Ranks, **settings: Any) -> int:
    """Bytes of a rank's anchor."""
    engine = make_engine(ranks, **settings)
    engine.set_anchor()
    return sum(each["anchor"].nbytes for each in engine._adam.state.values())


@pytest.mark.parametrize("stage", [None, *STAGES])
def test_the_anchor_takes_the_memory_that_is_estimated(stage: int | None) -> None:
    settings: dict[str, Any] = {} if stage is None else {"kind": "deepspeed", "zero_stage": stage}
    found = anchors(Ranks()) if stage is None else run_on_ranks(2, anchors, **settings)[0]
    with_it, without = (
        estimate_memory(
            NEOX,
            EngineConfig(**settings),
            seq_length=16,
            micro_batch_size=4,
            ranks=1 if stage is None else 2,
            reptile=reptile,
            device="cpu",
        )
        for reptile in (True, False)
    )
    said = with_it.peak.optimizer - without.peak.optimizer
    assert said == -(-4 * count_parameters(NEOX) // (2 if stage else 1))
    assert found == pytest.approx(said, rel=0.01)
    host = EngineConfig(kind="deepspeed", zero_stage=2, offload_optimizer=True)
    on_host = [
        estimate_memory(NEOX, host, seq_length=16, micro_batch_size=4, ranks=2, reptile=reptile, device="cuda")
        for reptile in (True, False)
    ]
    assert on_host[0].host - on_host[1].host == -(-4 * count_parameters(NEOX) // 2)
    assert on_host[0].peak == on_host[1].peak


# ---------------------------------------------------------------------------------------------- runs

REPTILE = {"every_steps": 4, "epsilon": 0.3}


def tree(prepared: Prepared, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """Twelve steps of English without, then ten of German with Reptile, saved at every second step."""
    settings = prepared.tree(run_dir, **changes)
    settings["phases"][1] |= {"steps": 10, "reptile": REPTILE}
    return settings | {"checkpoint": {"every_steps": 2, "keep_last": None}}


@pytest.fixture(scope="module")
def whole(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert train(from_tree(tree(prepared, run_dir))) == "done"
    return run_dir


def step_of(checkpoint: Path) -> int:
    return open_checkpoint(checkpoint).state.step


def test_a_checkpoint_holds_the_anchor_between_two_moves_alone(whole: Path) -> None:
    """The moves come behind steps 4 and 8 of the phase; behind its last one there is nothing left to move."""
    held = [step_of(path) for path in list_checkpoints(whole) if any(path.glob("reptile-*"))]
    assert held == [12 + 2, 12 + 6]


def test_the_lineage_records_it(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = load_lineage(whole).phases
    assert first.reptile is None
    assert second.reptile is not None
    assert (second.reptile.every_steps, second.reptile.epsilon) == (4, 0.3)
    assert "  Reptile every 4 steps, epsilon 0.3\n" in command_line(capsys, "lineage", str(whole))[1]


@pytest.mark.parametrize("last", [12, 14, 16, 18])
def test_killed_and_started_again_the_run_is_the_undisturbed_one(
    prepared: Prepared, whole: Path, tmp_path: Path, last: int
) -> None:
    run_dir = tmp_path / "whole"
    shutil.copytree(whole, run_dir)
    for path in list_checkpoints(run_dir):
        if step_of(path) > last:
            shutil.rmtree(path)
    assert train(from_tree(tree(prepared, run_dir))) == "done"
    assert losses(run_dir) == losses(whole)
    assert last_state(run_dir) == last_state(whole)


def test_with_epsilon_1_a_run_is_the_one_without(prepared: Prepared, tmp_path: Path) -> None:
    found = []
    for name, reptile in (("with", {**REPTILE, "epsilon": 1}), ("without", None)):
        settings = tree(prepared, tmp_path / name)
        settings["phases"][1]["reptile"] = reptile
        train(from_tree(settings))
        found.append((losses(tmp_path / name), last_state(tmp_path / name)))
    assert found[0] == found[1]


def test_a_run_that_starts_between_two_moves_has_an_anchor_of_its_own(
    prepared: Prepared, whole: Path, tmp_path: Path
) -> None:
    """Without Reptile its checkpoints hold none; with it the first move is from where it starts."""
    for name, reptile in (("without", None), ("with", {"every_steps": 3, "epsilon": 0.5})):
        settings = tree(prepared, tmp_path / name, start_from=f"{whole}@14")
        settings["phases"] = [settings["phases"][0] | {"name": "on", "steps": 3, "reptile": reptile}]
        train(from_tree(settings))
    plain, moved = (
        {path.name: state(path) for path in list_checkpoints(tmp_path / name)} for name in ("without", "with")
    )
    assert not any(key.startswith("anchor.") for held in plain.values() for key in held)
    states = state(whole / "checkpoints" / "step-00000014"), plain["step-00000003"], moved["step-00000003"]
    begin, end, last = (np.frombuffer(each["head.weight"], np.float32) for each in states)
    np.testing.assert_allclose(last, (begin + end) / 2, atol=1e-6)


def test_the_dry_run_counts_the_anchor(prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for reptile in (REPTILE, None):
        settings = prepared.tree(tmp_path / "run")
        settings["phases"] = [settings["phases"][0] | {"reptile": reptile}]
        (tmp_path / "run.json").write_text(json.dumps(settings))
        said.append(command_line(capsys, "train", str(tmp_path / "run.json"), "--dry-run")[1])
    assert ["  Reptile every 4 steps, epsilon 0.3\n" in out for out in said] == [True, False]
    optimizer = [float(next(line for line in out.splitlines() if " optimizer " in line).split()[1]) for out in said]
    assert optimizer[0] == pytest.approx(1.5 * optimizer[1], abs=0.11)


@pytest.mark.parametrize(
    ("reptile", "message"),
    [
        ({"every_steps": 0, "epsilon": 0.5}, r"^phases\[1\]\.reptile\.every_steps is 0; it must be greater than"),
        ({"every_steps": 4, "epsilon": 0}, r"^phases\[1\]\.reptile\.epsilon is 0; it must be greater than 0"),
        ({"every_steps": 4, "epsilon": 1.5}, r"^phases\[1\]\.reptile\.epsilon is 1\.5; it must be less than or equal"),
        ({"every_steps": 4}, r"^phases\[1\]\.reptile\.epsilon is missing"),
        (
            {"every_step": 4, "epsilon": 0.5},
            r"every_step is not a setting; did you mean phases\[1\]\.reptile\.every_ste",
        ),
        ({"every_steps": 11, "epsilon": 0.5}, r"every_steps is 11, and the phase has 10 steps, so that there would be"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said_in_one_line(prepared: Prepared, tmp_path: Path, reptile: Any, message: str) -> None:
    settings = tree(prepared, tmp_path / "run")
    settings["phases"][1]["reptile"] = reptile
    with pytest.raises(ConfigError, match=message) as caught:
        from_tree(settings)
    assert "\n" not in str(caught.value)
