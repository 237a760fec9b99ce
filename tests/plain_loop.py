"""A training loop by hand, over the batches of tests/test_engine.py: AdamW is written out, Reptile is one line."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from megacl.model.gpt import build_model
from tests.test_engine import NEOX, OPTIMIZER, batch, rate


@dataclass
class Loop:
    """What the loop came to."""

    losses: list[float] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    m: dict[str, np.ndarray] = field(default_factory=dict)
    v: dict[str, np.ndarray] = field(default_factory=dict)


def train_by_hand(
    steps: int,
    *,
    reptile: tuple[int, float] | None = None,
    before: Mapping[int, str] | None = None,
) -> Loop:
    """Updates 0 to steps - 1. reptile: k and epsilon; before: what is done to the optimizer's state before a step."""
    model = build_model(NEOX, seed=1)
    parameters = dict(model.named_parameters())
    m = {name: torch.zeros_like(p) for name, p in parameters.items()}
    v = {name: torch.zeros_like(p) for name, p in parameters.items()}
    anchor = {name: p.detach().clone() for name, p in parameters.items()}
    t, loop, o = 0, Loop(), OPTIMIZER
    for step in range(steps):
        what = (before or {}).get(step, "keep")
        if what == "reset":
            for moment in (*m.values(), *v.values()):
                moment.zero_()
        if what != "keep":
            t = 0
        tokens = torch.from_numpy(batch(step))
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.max_grad_norm or torch.inf)
        t += 1
        with torch.no_grad():
            for name, p in parameters.items():
                assert p.grad is not None
                m[name] = o.beta1 * m[name] + (1 - o.beta1) * p.grad
                v[name] = o.beta2 * v[name] + (1 - o.beta2) * p.grad**2
                p *= 1 - rate(step) * (o.weight_decay if p.ndim >= 2 else 0)
                unbiased = m[name] / (1 - o.beta1**t), v[name] / (1 - o.beta2**t)
                p -= rate(step) * unbiased[0] / (unbiased[1].sqrt() + o.eps)
                if reptile is not None and (step + 1) % reptile[0] == 0:
                    p.copy_(anchor[name] + reptile[1] * (p - anchor[name]))
                    anchor[name].copy_(p)
        loop.losses.append(loss.item())
    for name, p in parameters.items():
        loop.weights[name], loop.m[name], loop.v[name] = p.detach().numpy(), m[name].numpy(), v[name].numpy()
    return loop
