"""AdamW and its parameter groups: matrices decay, norms and biases do not. The engine sets the rate at each step."""

from typing import Any

import torch
from torch import nn

from megacl.config import OptimizerConfig


def build_parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameters with two or more dimensions (matrices, the embedding) with weight decay, the others without.

    Each group lists its parameters in the order of `named_parameters`; a group without parameters is left out.
    """
    parameters = list(model.parameters())
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with a fused kernel; its rate is 0 until one is set."""
    return torch.optim.AdamW(
        build_parameter_groups(model, config),
        lr=0.0,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
