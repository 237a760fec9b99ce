"""Maximal update parametrization: the table by hand, and what it is for: one rate for every width."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megacl.config import EngineConfig, OptimizerConfig
from megacl.engine import Engine, build_engine
from megacl.kernels import REFERENCE
from megacl.model.config import ModelConfig, MupConfig
from megacl.model.gpt import GPT, build_model
from megacl.optimizer import build_optimizer, set_rates
from megacl.parallel.ranks import Ranks

BASE = MupConfig(base_hidden_size=32, base_head_dim=8)
FORMS = pytest.mark.parametrize("form", ["gpt_neox", "llama"])


def shape(form: Any, width: int, mup: MupConfig | None, **changes: Any) -> ModelConfig:
    """Two layers of four heads, whose width is an eighth of `width` x 2, and an MLP of four times the width."""
    return ModelConfig(
        **{"form": form, "vocab_size": 64, "hidden_size": width, "num_layers": 2, "num_attention_heads": 4, **changes},
        mup=mup,
    )


def train(model: GPT, lr: float, steps: int) -> Engine:
    engine = build_engine(model, engine=EngineConfig(), optimizer=OptimizerConfig(), ranks=Ranks())
    for step in range(steps):
        engine.step(walks(step), lr)
    return engine


def walks(step: int) -> np.ndarray:
    """Sixteen random walks over the vocabulary, int64 [16, 17]: the next token is near the last one."""
    rng = np.random.Generator(np.random.Philox([9, step]))
    return rng.integers(0, 64, (16, 1)) + rng.integers(1, 4, (16, 17)).cumsum(1) & 63


# ------------------------------------------------------------------------------------------------ the table


@FORMS
def test_at_the_base_width_it_is_the_standard_parametrization_to_the_bit(form):
    states = []
    for mup in (BASE, None):
        engine = train(build_model(shape(form, 32, mup), seed=3), 3e-3, 3)
        states.append({name: state["weight"] for name, state in engine.export_state()})
    for name, weight in states[0].items():
        torch.testing.assert_close(weight, states[1][name], rtol=0, atol=0)


@FORMS
def test_embedding_and_head_begin_as_at_the_base_width_and_all_else_as_ever(form):
    config = replace(shape(form, 256, BASE), vocab_size=400)
    standard = dict(build_model(replace(config, mup=None), seed=5).named_parameters())
    for name, parameter in build_model(config, seed=5).named_parameters():
        if name in ("embed.weight", "head.weight"):
            assert parameter.std().item() == pytest.approx(math.sqrt(2 / (5 * 32)), rel=0.02)
        else:
            torch.testing.assert_close(parameter, standard[name], rtol=0, atol=0)


@FORMS
def test_logits_are_divided_by_the_width_ratio_and_attention_by_the_width_of_a_head(form):
    config = shape(form, 128, BASE)
    model, standard = build_model(config, seed=5), build_model(replace(config, mup=None), seed=5)
    standard.load_state_dict(model.state_dict())
    scales = []

    def rescaled(q_BHTE, k_BKTE, v_BKTE, scale):
        scales.append(scale)
        return REFERENCE.attention(q_BHTE, k_BKTE, v_BKTE, math.sqrt(8) / 32)

    standard.use(replace(REFERENCE, attention=rescaled))
    tokens_BT = torch.from_numpy(walks(0))
    torch.testing.assert_close(model(tokens_BT), standard(tokens_BT) / 4)
    assert scales == pytest.approx([1 / math.sqrt(32)] * 2)
    torch.testing.assert_close(
        model(tokens_BT, tokens_BT)[1].item(),
        torch.nn.functional.cross_entropy(model(tokens_BT).flatten(0, 1), tokens_BT.flatten(), reduction="sum").item(),
        rtol=1e-5,
        atol=0,
    )


@pytest.mark.parametrize("weight_decay", [None, 0.01])
def test_matrices_of_layers_are_updated_at_a_divided_rate_and_decay_undivided(weight_decay):
    """With a gradient of 1 everywhere, Adam's first direction is 1, so an update shows its rate and its decay."""
    model = build_model(shape("gpt_neox", 128, BASE), seed=5)
    config = OptimizerConfig(weight_decay=0.1)
    optimizer = build_optimizer(model, config, width_ratio=model.config.width_ratio)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_rates(optimizer.param_groups, config, 0.02, weight_decay)
    optimizer.step()
    for name, parameter in model.named_parameters():
        decayed = 0.0 if parameter.ndim < 2 else 0.02 * 0.1 if weight_decay is None else weight_decay
        rate = 0.02 / 4 if parameter.ndim == 2 and name.startswith("layers.") else 0.02
        torch.testing.assert_close(parameter.detach(), (1 - decayed) * before[name] - rate, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------ coordinate check


def coordinates(model: GPT) -> dict[str, torch.Tensor]:
    """What leaves each layer, its attention and its MLP, and the logits, on tokens that are not trained on."""
    seen = {}

    def keep(name: str, value: Any) -> None:
        seen[name] = value[0] + value[1] if isinstance(value, tuple) else value

    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: keep(name, output))
        for name, module in model.named_modules()
        if name.count(".") == 1 or name.endswith((".attention", ".mlp"))
    ]
    with torch.no_grad():
        keep("logits", model(torch.from_numpy(walks(1000))[:, :-1]))
    for hook in hooks:
        hook.remove()
    return seen


def changes(form: str, mup: MupConfig | None, **settings: Any) -> dict[str, list[float]]:
    """How far a few updates move each of `coordinates`, the mean of absolute values, at widths 32 to 512."""
    found: dict[str, list[float]] = {}
    for width in (32, 64, 128, 256, 512):
        heads = settings.get("heads", lambda width: 4)(width)
        model = build_model(shape(form, width, mup, num_attention_heads=heads), seed=3)
        before = coordinates(model)
        train(model, 3e-3, 4)
        for name, after in coordinates(model).items():
            found.setdefault(name, []).append((after - before[name]).abs().mean().item())
    assert len(found) == 2 * 3 + 1
    return found


@FORMS
def test_updates_move_activations_as_far_at_every_width(form):
    for name, moved in changes(form, BASE).items():
        if name == "logits":  # the part that comes of the head's initial weights vanishes with the width
            assert sorted(moved, reverse=True) == moved
        else:
            assert max(moved) < 1.5 * min(moved), name


def test_it_holds_where_heads_grow_in_number():
    for name, moved in changes("llama", BASE, heads=lambda width: width // 8).items():
        assert max(moved) < 1.5 * min(moved) or name == "logits", name


@FORMS
def test_without_it_they_move_activations_the_further_the_wider_the_model_is(form):
    """The control: what the check before would say of the standard parametrization."""
    for name, moved in changes(form, None).items():
        assert sorted(moved) == moved, name
        assert moved[-1] > 3 * moved[0], name


# ------------------------------------------------------------------------------------------------ one rate


RATES = [2.0**-power for power in (9, 8, 7, 6, 5)]


def chains(steps: int) -> list[np.ndarray]:
    """Batches of a Markov chain over the vocabulary that has few likely successors, int64 [16, 33] each."""
    cumulative_VV = np.random.Generator(np.random.Philox(77)).dirichlet(np.full(64, 0.05), size=64).cumsum(1)
    batches = []
    for step in range(steps):
        rng = np.random.Generator(np.random.Philox([9, step]))
        drawn = rng.random((16, 33))
        tokens = np.empty((16, 33), np.int64)
        tokens[:, 0] = rng.integers(0, 64, 16)
        for t in range(1, 33):
            tokens[:, t] = np.minimum((cumulative_VV[tokens[:, t - 1]] < drawn[:, t : t + 1]).sum(1), 63)
        batches.append(tokens)
    return batches


def best_rate(width: int, mup: MupConfig | None) -> float:
    """log2 of the rate with the lowest loss: the vertex of the parabola through the lowest of RATES and its neighbours.

    Each rate is trained at for 100 steps, warmed up and brought down to 0 in a straight line; the loss is the mean of
    the last ten.
    """
    batches, found = chains(100), []
    for rate in RATES:
        engine = build_engine(
            build_model(shape("llama", width, mup), seed=3),
            engine=EngineConfig(),
            optimizer=OptimizerConfig(weight_decay=0.0),
            ranks=Ranks(),
        )
        losses = [
            engine.step(tokens, rate * min(1, (step + 1) / 10) * (1 - step / 100)).loss
            for step, tokens in enumerate(batches)
        ]
        found.append(float(np.mean(losses[-10:])))
    lowest = min(max(int(np.argmin(found)), 1), len(found) - 2)
    left, middle, right = found[lowest - 1 : lowest + 2]
    return math.log2(RATES[lowest]) + (left - right) / (left - 2 * middle + right) / 2


@pytest.mark.long
def test_the_best_rate_of_a_narrow_model_is_that_of_a_wide_one():
    """It moves by less than a factor of 2 from width 64 to 256; in the standard parametrization by more than 2^1.5."""
    narrow = MupConfig(base_hidden_size=64, base_head_dim=16)
    base = best_rate(64, None)
    assert abs(best_rate(256, narrow) - base) < 1
    assert base - best_rate(256, None) > 1.5
