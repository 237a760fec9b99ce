"""What tests ask of a model that was opened from another format: its tensors in megacl's GPT, and its logits."""

from typing import Any

import numpy as np
import torch

from megacl.convert.opened import OpenedModel
from megacl.model.gpt import GPT, build_model

TOKENS = np.random.default_rng(3).integers(0, 40, (2, 17))


def loaded(opened: OpenedModel) -> GPT:
    """megacl's model with the weights that were read, in fp32."""
    model = build_model(opened.model, seed=0)
    state = {}
    for name, parameter in model.named_parameters():
        tensor = opened.read(name)
        assert tensor.shape == parameter.shape, name
        assert tensor.dtype == opened.dtypes[name], name
        state[name] = tensor.float()
    model.load_state_dict(state, strict=False)
    model.tie()
    return model


def logits(opened: OpenedModel, tokens: Any = TOKENS) -> np.ndarray:
    with torch.no_grad():
        return loaded(opened)(torch.from_numpy(tokens)).numpy()
