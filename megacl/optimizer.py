"""AdamW and its parameter groups: matrices decay, norms and biases do not. The engine sets the rate at each step."""

import inspect
from typing import Any

import torch
from torch import nn

from megacl.config import OptimizerConfig


def build_parameter_groups(
    model: nn.Module, config: OptimizerConfig, *, width_ratio: float = 1.0
) -> list[dict[str, Any]]:
    """Parameters with two or more dimensions (matrices, the embedding) with weight decay, the others without.

    width_ratio: m of muP (`MupConfig`): the matrices of `model.layers` are updated at 1 / m of the rate, and so stand
    in a group of their own where m is not 1. Each group lists its parameters in the order of `named_parameters`; a
    group without parameters is left out.
    """
    hidden: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # where ZeRO-3 has emptied it, its shape is kept there
        scaled = width_ratio != 1 and name.startswith("layers.")
        (vectors if len(shape) < 2 else hidden if scaled else matrices).append(parameter)
    decay = config.weight_decay
    groups = [
        {"params": hidden, "lr_scale": 1 / width_ratio, "weight_decay": decay * width_ratio, "decays": True},
        {"params": matrices, "lr_scale": 1.0, "weight_decay": decay, "decays": True},
        {"params": vectors, "lr_scale": 1.0, "weight_decay": 0.0, "decays": False},
    ]
    return [group for group in groups if group["params"]]


def decayed_part(config: OptimizerConfig, *, lr: float, peak: float) -> float | None:
    """What `set_rates` takes as weight_decay for an update at rate lr of a schedule whose highest rate is `peak`.

    None for AdamW's own decay, lr x weight_decay. Independent of the rate it is weight_decay x lr / peak: the schedule
    shapes it, and another peak leaves it as it is (Wortsman et al. 2023, arXiv 2309.14322).
    """
    return config.weight_decay * lr / peak if config.independent_weight_decay else None


def set_rates(
    groups: list[dict[str, Any]], config: OptimizerConfig, lr: float, weight_decay: float | None = None
) -> None:
    """Sets what the next update does: p <- (1 - weight_decay) p - lr x Adam's direction, the first for matrices alone.

    weight_decay: None for lr x config.weight_decay. A group's lr_scale multiplies its rate, and not what decays.
    torch's AdamW multiplies a group's weight_decay by its rate, so nothing decays at a rate of 0.
    """
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
        if group["decays"]:
            own = config.weight_decay if weight_decay is None or lr == 0 else weight_decay / lr
            group["weight_decay"] = own / group["lr_scale"]


class EagerAdamW(torch.optim.AdamW):
    """torch's AdamW without what keeps torch.compile out of it, which imports all of the compiler at the first call.

    That is a third of the time from a command to its first step. Nothing here compiles an optimizer's update. DeepSpeed
    knows optimizers by their very class, and is given torch's.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    *,
    width_ratio: float = 1.0,
    kind: type[torch.optim.AdamW] = torch.optim.AdamW,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with a fused kernel; its rate is 0 until one is set."""
    return kind(
        build_parameter_groups(model, config, width_ratio=width_ratio),
        lr=0.0,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
