"""Models of transformers with random weights, in files, and their logits beside megacl's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacl.checkpoint import find_checkpoint, open_checkpoint
from megacl.convert.opened import OpenedModel
from megacl.model.config import ModelConfig
from megacl.model.gpt import build_model

VOCAB = 300

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 44,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def transformers_model(model_type: str, seed: int = 0, **settings: Any) -> Any:
    """A model of transformers' own, every weight drawn, those of norms and biases too."""
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            middle = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(middle + 0.2 * torch.randn(parameter.shape, generator=draw))
    return model


def saved(model: Any, folder: Path, **how: Any) -> Path:
    model.save_pretrained(folder, **how)
    return folder


def some_tokens(vocab_size: int = VOCAB) -> Tensor:
    return torch.randint(0, vocab_size, (3, 37), generator=torch.Generator().manual_seed(1))


def logits_of_transformers(folder_or_model: Any, tokens: Tensor) -> Tensor:
    import transformers

    model = folder_or_model
    if isinstance(model, Path):
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, output_loading_info=True
        )
        assert not any(found.values()), found
    with torch.no_grad():
        logits: Tensor = model.eval()(tokens, use_cache=False).logits
    return logits


def logits_of(config: ModelConfig, state: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """The logits of megacl's model with these weights, in fp32."""
    model = build_model(config, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name])
        logits: Tensor = model(tokens)
    return logits


def logits_of_opened(model: OpenedModel, tokens: Tensor) -> Tensor:
    return logits_of(model.model, {name: model.read(name) for name in model.shapes}, tokens)


def logits_of_checkpoint(folder: Path, tokens: Tensor) -> Tensor:
    checkpoint = open_checkpoint(find_checkpoint(str(folder), print))
    read, names = checkpoint.load_weights(), dict(build_model(checkpoint.config.model, seed=0).named_parameters())
    return logits_of(checkpoint.config.model, {name: read(name) for name in names}, tokens)


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())
