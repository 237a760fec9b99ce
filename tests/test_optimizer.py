"""Parameter groups, and AdamW against its published algorithm."""

import math

import pytest
import torch

from megacl.config import OptimizerConfig
from megacl.model.config import ModelConfig
from megacl.model.gpt import build_model
from megacl.optimizer import build_optimizer, build_parameter_groups, decayed_part, set_rates

MODEL = ModelConfig(vocab_size=11, hidden_size=8, num_layers=2, num_attention_heads=2)


def test_matrices_decay_and_vectors_do_not():
    model = build_model(MODEL, seed=0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices, vectors = build_parameter_groups(model, OptimizerConfig(weight_decay=0.3))
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    decaying = [names[id(parameter)] for parameter in matrices["params"]]
    assert decaying == [
        name for name, _ in model.named_parameters() if name.endswith("weight") and not name.endswith("norm.weight")
    ]
    others = [names[id(parameter)] for parameter in vectors["params"]]
    assert sorted(decaying + others) == sorted(names.values())


def test_each_parameter_stands_in_one_group_where_embeddings_are_tied():
    model = build_model(ModelConfig(**{**vars(MODEL), "form": "llama", "tie_embeddings": True}), seed=0)
    grouped = [parameter for group in build_parameter_groups(model, OptimizerConfig()) for parameter in group["params"]]
    assert len(grouped) == len(set(map(id, grouped))) == len(list(model.parameters()))


def test_a_model_without_vectors_has_one_group():
    assert len(build_parameter_groups(torch.nn.Linear(3, 2, bias=False), OptimizerConfig())) == 1


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_updates_are_those_of_adamw(decay):
    config = OptimizerConfig(beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=decay)
    layer = torch.nn.Linear(1, 1)
    start = {name: parameter.item() for name, parameter in layer.named_parameters()}
    optimizer = build_optimizer(layer, config)
    moments = dict.fromkeys(start, (0.0, 0.0))
    for step, (gradient, lr) in enumerate([(0.5, 0.1), (-2.0, 0.05), (0.3, 0.2)], start=1):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, parameter in layer.named_parameters():
            parameter.grad = torch.full_like(parameter, gradient)
            m, v = moments[name]
            m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
            moments[name] = m, v
            start[name] -= lr * (decay if name == "weight" else 0.0) * start[name]
            start[name] -= lr * (m / (1 - 0.8**step)) / (math.sqrt(v / (1 - 0.9**step)) + 1e-3)
        optimizer.step()
    for name, parameter in layer.named_parameters():
        assert parameter.item() == pytest.approx(start[name], rel=1e-5)


def test_nothing_moves_before_a_rate_is_set():
    layer = torch.nn.Linear(2, 2)
    before = layer.weight.detach().clone()
    optimizer = build_optimizer(layer, OptimizerConfig())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight, before)


def decayed_by(config: OptimizerConfig, *, lr: float, weight_decay: float | None) -> tuple[float, float]:
    """The factors by which an update with a gradient of 0 multiplies a weight and a bias."""
    layer = torch.nn.Linear(1, 1)
    optimizer = build_optimizer(layer, config)
    with torch.no_grad():
        layer.weight.fill_(1.0), layer.bias.fill_(1.0)
    layer.weight.grad, layer.bias.grad = torch.zeros(1, 1), torch.zeros(1)
    set_rates(optimizer.param_groups, config, 0.5, 0.3)  # what an update before this one was given leaves no trace
    set_rates(optimizer.param_groups, config, lr, weight_decay)
    optimizer.step()
    return layer.weight.item(), layer.bias.item()


@pytest.mark.parametrize("lr", [1e-3, 0.2])
def test_adamws_own_decay_is_proportional_to_the_rate(lr):
    config = OptimizerConfig(weight_decay=0.1)
    part = decayed_part(config, lr=lr, peak=0.2)
    assert part is None
    assert decayed_by(config, lr=lr, weight_decay=part) == (pytest.approx(1 - 0.1 * lr), 1.0)


@pytest.mark.parametrize("peak", [1e-4, 0.3])
@pytest.mark.parametrize("position", [1.0, 0.25])
def test_independent_decay_takes_the_same_part_whatever_the_peak(peak, position):
    config = OptimizerConfig(weight_decay=0.01, independent_weight_decay=True)
    part = decayed_part(config, lr=position * peak, peak=peak)
    assert decayed_by(config, lr=position * peak, weight_decay=part) == (pytest.approx(1 - 0.01 * position), 1.0)


def test_nothing_decays_at_a_rate_of_zero():
    config = OptimizerConfig(weight_decay=0.01, independent_weight_decay=True)
    assert decayed_by(config, lr=0.0, weight_decay=decayed_part(config, lr=0.0, peak=0.1)) == (1.0, 1.0)
