"""Evaluation against a loop by hand: every token of the held-out documents once, nats and bits per byte."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Prepared

from megacl.config import EngineConfig, OptimizerConfig
from megacl.data.source import open_source
from megacl.engine import build_engine
from megacl.errors import DataError
from megacl.evaluate import evaluate_source
from megacl.model.config import ModelConfig
from megacl.model.gpt import build_model
from megacl.parallel.ranks import Ranks

SHAPE = ModelConfig(vocab_size=640, hidden_size=32, num_layers=2, num_attention_heads=2)
T = 32


def engine_of(model: Any) -> Any:
    return build_engine(model, engine=EngineConfig(), optimizer=OptimizerConfig(), ranks=Ranks())


def nats_by_hand(model: Any, source: Any, tokens: int) -> float:
    """Token by token: the log-probability of each, given what stands before it in its window."""
    stream = [source.eos_id, *source.validation.read(0, tokens).tolist()]
    total = 0.0
    for start in range(0, tokens, T):
        window = torch.tensor([stream[start : start + min(T, tokens - start)]])
        log_probabilities = torch.log_softmax(model(window)[0].double(), dim=-1)
        for place in range(window.shape[1]):
            total -= log_probabilities[place, stream[start + place + 1]].item()
    return total


def test_every_held_out_token_is_predicted_once_and_bits_are_per_byte_of_text(prepared: Prepared) -> None:
    source = open_source(prepared.sources["german"])
    model = build_model(SHAPE, seed=3)
    result = evaluate_source(engine_of(model), Ranks(), source, seq_length=T, micro_batch_size=5)
    with torch.no_grad():
        nats = nats_by_hand(model, source, source.validation.tokens)
    assert (result.tokens, result.fingerprint) == (source.validation.tokens, source.fingerprint)
    assert result.nats == pytest.approx(nats, rel=1e-5)
    assert result.loss == pytest.approx(nats / source.validation.tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / source.validation.tokens), rel=1e-4)
    text = held_out_text(prepared.documents["german"])
    assert source.validation.text_bytes == len(text.encode())
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


def held_out_text(path: Path) -> str:
    """The documents that the rule holds out, by the rule: BLAKE2b's first 8 bytes below a fifth of 2^64."""
    import hashlib
    import json

    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    small = [
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), byteorder) < 0.2 * 2**64
        for text in texts
        for byteorder in ("big",)
    ]
    return "".join(text for text, held in zip(texts, small, strict=True) if held)


def test_fewer_sequences_read_a_part_and_scale_the_bytes(prepared: Prepared) -> None:
    source = open_source(prepared.sources["english"])
    model = build_model(SHAPE, seed=3)
    result = evaluate_source(engine_of(model), Ranks(), source, seq_length=T, micro_batch_size=4, sequences=7)
    with torch.no_grad():
        nats = nats_by_hand(model, source, 7 * T)
    assert result.tokens == 7 * T
    assert result.nats == pytest.approx(nats, rel=1e-5)
    assert result.text_bytes == pytest.approx(source.validation.text_bytes * 7 * T / source.validation.tokens)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_windows_and_call_the_model_equally_often(prepared: Prepared, world_size: int) -> None:
    source = open_source(prepared.sources["english"])
    engine = engine_of(build_model(SHAPE, seed=3))
    whole = evaluate_source(engine, Ranks(), source, seq_length=T, micro_batch_size=4, sequences=9)

    class Counting:
        """One rank of several, which hands its own part back instead of summing."""

        calls = 0
        vocab_size = SHAPE.vocab_size

        def nats(self, tokens: Any, targets: Any) -> float:
            self.calls += 1
            return float(engine.nats(tokens, targets))

    parts, calls = [], set()
    for rank in range(world_size):
        counting: Any = Counting()
        alone: Any = OneOf(rank, world_size)
        part = evaluate_source(counting, alone, source, seq_length=T, micro_batch_size=4, sequences=9)
        parts.append(part.nats)
        calls.add(counting.calls)
    assert sum(parts) == pytest.approx(whole.nats, rel=1e-6)
    assert len(calls) == 1


class OneOf(Ranks):
    """A rank that keeps its sums to itself."""

    def sum(self, array: Any) -> Any:
        return np.asarray(array)


def test_a_source_without_held_out_documents_is_refused(prepared: Prepared, tmp_path: Path) -> None:
    from megacl.data.prepare import prepare
    from megacl.data.tokenizer import load_tokenizer

    out = tmp_path / "all"
    prepare([str(prepared.documents["german"])], tokenizer=load_tokenizer(prepared.tokenizer), out=out, validation=0)
    engine = engine_of(build_model(SHAPE, seed=3))
    with pytest.raises(DataError, match=r"source 'all' .* has no held-out documents"):
        evaluate_source(engine, Ranks(), open_source(out), seq_length=T, micro_batch_size=4)
