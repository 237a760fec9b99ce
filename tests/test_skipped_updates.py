"""Updates that an engine skips, and going back to an earlier state, leave nothing behind, natively and under ZeRO."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from megacl.config import EngineConfig, OptimizerConfig
from megacl.engine import Engine, build_engine
from megacl.model.config import ModelConfig
from megacl.model.gpt import build_model
from megacl.parallel.ranks import Ranks
from tests.ranks import run_on_ranks

MODEL = ModelConfig(vocab_size=2223, hidden_size=45, num_layers=2, num_attention_heads=3)
ROWS, LENGTH = 8, 12
KINDS = [("native", 0, "fp32"), *(("deepspeed", stage, "fp32") for stage in range(4))]
HALF = [
    ("deepspeed", 3, "bf16"),
    *(
        pytest.param("deepspeed", *other, marks=pytest.mark.long)
        for other in ((1, "bf16"), (2, "bf16"), (2, "fp16"), (3, "fp16"))
    ),
]


@dataclass
class Outcome:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    applied: list[bool] = field(default_factory=list)
    state: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    updates: int = 0
    loss_scale: tuple[float, int] | None = None


def train(
    ranks: Ranks, plan: Sequence[str], kind: str, stage: int, precision: str, offload_optimizer: bool = False
) -> Outcome:
    """One step a word: `good`; `spike`, whose loss is above what is borne; `broken`, whose gradient is not finite;
    `lost`, whose loss is not finite, with a gradient that is.

    `pass` leaves out a batch, `keep` notes the state, and `back` goes back to it.
    """
    if precision == "fp16":
        from deepspeed import get_accelerator

        accelerator = get_accelerator()
        accelerator.is_fp16_supported = lambda: True
        accelerator.supported_dtypes = lambda: [torch.float32, torch.bfloat16, torch.float16]
    config = EngineConfig(
        kind=kind,  # type: ignore[arg-type]
        zero_stage=stage,  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        offload_optimizer=offload_optimizer,
        micro_batch_size=2,
    )
    model = build_model(MODEL, seed=1, device="meta")
    engine = build_engine(model, engine=config, optimizer=OptimizerConfig(eps=1e-6), ranks=ranks)
    lost = False
    model.register_forward_hook(
        lambda module, inputs, sums: sums + torch.tensor([0.0, math.nan, 0.0]) if lost else sums,
    )
    if precision == "fp16":
        reload(engine, exported(engine), 0, loss_scale=(256.0, 0))
    outcome, step, kept = Outcome(), 0, None
    backward = engine._backward
    for word in plan:
        if word == "keep":
            kept = exported(engine), engine.optimizer_step, engine.loss_scale
        elif word == "back":
            assert kept is not None
            reload(engine, *kept)
        elif word == "pass":
            step += 1
        else:
            tokens = np.random.Generator(np.random.Philox([3, step])).integers(0, 50, (ROWS, LENGTH + 1))
            rows = ROWS // ranks.world_size
            if word == "broken":
                engine._backward = lambda loss, last: backward(loss * float("nan"), last=last)  # type: ignore[method-assign]
            lost = word == "lost"
            result = engine.step(
                tokens[ranks.rank * rows : (ranks.rank + 1) * rows], 1e-3, skip_above=1.0 if word == "spike" else 99.0
            )
            engine._backward = backward  # type: ignore[method-assign]
            outcome.losses.append(result.loss)
            outcome.norms.append(result.grad_norm)
            outcome.applied.append(result.applied)
            step += word == "good"
    outcome.state, outcome.updates, outcome.loss_scale = exported(engine), engine.optimizer_step, engine.loss_scale
    return outcome


def exported(engine: Engine) -> dict[str, dict[str, np.ndarray]]:
    return {name: {key: value.numpy() for key, value in state.items()} for name, state in engine.export_state()}


def reload(engine: Engine, state: Any, updates: int, loss_scale: tuple[float, int] | None) -> None:
    # What rank 0 exports is whole; a rank of its own would load it from a file.
    whole: list[Any] = [state]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(whole, 0)

    def load(name: str) -> dict[str, torch.Tensor]:
        return {key: torch.from_numpy(value) for key, value in whole[0][name].items()}

    engine.import_state(load, optimizer_step=updates, loss_scale=loss_scale)


def run(plan: Sequence[str], kind: str, *settings: Any) -> Outcome:
    if kind == "native":
        return train(Ranks(), plan, kind, *settings)
    first, second = run_on_ranks(2, train, plan, kind, *settings)
    np.testing.assert_equal((first.losses, first.applied), (second.losses, second.applied))
    return first


def assert_same(outcome: Outcome, expected: Outcome) -> None:
    assert outcome.updates == expected.updates
    assert outcome.loss_scale == expected.loss_scale
    for name, state in expected.state.items():
        for key, value in state.items():
            np.testing.assert_array_equal(outcome.state[name][key], value, err_msg=f"{name} {key}")


@pytest.mark.parametrize("bad", ["spike", "broken", "lost"])
@pytest.mark.parametrize(("kind", "stage", "precision"), [*KINDS, *HALF])
def test_a_run_with_skipped_updates_is_the_run_without_them(kind: str, stage: int, precision: str, bad: str) -> None:
    plan = [bad, "good", "good", bad, bad, "good"]
    outcome, expected = run(plan, kind, stage, precision), run(["good"] * 3, kind, stage, precision)
    assert outcome.applied == [word == "good" for word in plan]
    if precision == "fp16" and bad != "spike":  # its loss scale answers, and with it other numbers are rounded
        assert outcome.loss_scale is not None
        assert outcome.loss_scale[0] < 256
        assert outcome.losses[-1] == pytest.approx(expected.losses[-1], rel=1e-3)
        return
    assert [loss for loss, fine in zip(outcome.losses, outcome.applied, strict=True) if fine] == expected.losses
    assert_same(outcome, expected)


@pytest.mark.parametrize("bad", ["spike", "broken", "lost"])
@pytest.mark.parametrize(
    ("stage", "precision"),
    [(1, "fp32"), *(pytest.param(stage, "bf16", marks=pytest.mark.long) for stage in (1, 2)), (3, "bf16"), (2, "fp16")],
)
def test_with_an_optimizer_on_the_host_nothing_is_left_of_a_skipped_update(
    stage: int, precision: str, bad: str
) -> None:
    plan = ["good", bad, "good", "good"]
    outcome = run(plan, "deepspeed", stage, precision, True)
    assert outcome.applied == [True, False, True, True]
    if precision == "fp16" and bad != "spike":
        here = run(plan, "deepspeed", stage, precision)
        assert outcome.losses[2:] == pytest.approx(here.losses[2:], rel=1e-3)
        assert outcome.loss_scale == here.loss_scale
        return
    expected = run(["good"] * 3, "deepspeed", stage, precision, True)
    assert_same(outcome, expected)


@pytest.mark.parametrize(("kind", "stage", "precision"), [*KINDS, *HALF])
def test_going_back_in_the_middle_of_a_run_gives_the_state_from_there(kind: str, stage: int, precision: str) -> None:
    gone_back = run(["good", "good", "keep", "good", "spike", "back", "good"], kind, stage, precision)
    straight = run(["good", "good", "pass", "good"], kind, stage, precision)
    assert gone_back.losses[-1] == straight.losses[-1]
    assert_same(gone_back, straight)
