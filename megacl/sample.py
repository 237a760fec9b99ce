"""Text out of a checkpoint: the prompt goes on, token by token, by the model's own probabilities."""

import numpy as np
import torch

from megacl.data.tokenizer import Tokenizer
from megacl.engine import Engine


def sample(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tokens: int,
    seq_length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> str:
    """The text that follows `prompt`: up to `tokens` tokens, fewer where the model ends the document.

    seq_length: how many tokens back the model looks. temperature 0 takes the likeliest token; top_k keeps the k
    likeliest. Rows of the embedding that are no tokens (its padding) are never drawn. Each token is drawn from
    (seed, its place), so the same call gives the same text.
    """
    context = [tokenizer.eos_id, *(int(token) for token in tokenizer.encode([prompt])[0])]
    drawn: list[int] = []
    for place in range(tokens):
        window = np.array([(context + drawn)[-seq_length:]], dtype=np.int64)
        logits_V = engine.logits(window)[0, : tokenizer.vocab_size]
        token = _draw(logits_V, temperature, top_k, seed + place * 1_000_003)
        if token == tokenizer.eos_id:
            break
        drawn.append(token)
    return tokenizer.decode(drawn)


def _draw(logits_V: torch.Tensor, temperature: float, top_k: int | None, seed: int) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k is not None and top_k < logits_V.numel():
        worst = torch.topk(logits_V, top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < worst, float("-inf"))
    probabilities_V = torch.softmax(logits_V / temperature, dim=-1)
    return int(torch.multinomial(probabilities_V, 1, generator=torch.Generator().manual_seed(seed)))
