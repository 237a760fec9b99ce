"""Text out of a model: the same call gives the same text, and only real tokens are drawn."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Prepared

from megacl.data.tokenizer import Tokenizer, load_tokenizer
from megacl.sample import sample


class Fixed:
    """An engine whose next token is always the same distribution, and which remembers what it was asked."""

    def __init__(self, logits_V: torch.Tensor) -> None:
        self.logits_V = logits_V
        self.windows: list[list[int]] = []

    def logits(self, tokens: Any) -> torch.Tensor:
        self.windows.append(tokens[0].tolist())
        return self.logits_V[None]


@pytest.fixture(scope="module")
def tokenizer(prepared: Prepared) -> Tokenizer:
    return load_tokenizer(prepared.tokenizer)


def token_of(tokenizer: Tokenizer, text: str) -> int:
    ids = tokenizer.encode([text])[0]
    assert len(ids) == 1
    return int(ids[0])


def draw(engine: Any, tokenizer: Tokenizer, **settings: Any) -> str:
    return sample(engine, tokenizer, "Die", seq_length=8, **{"tokens": 20, **settings})


def test_temperature_zero_takes_the_likeliest_token_and_padding_rows_are_never_drawn(tokenizer: Tokenizer) -> None:
    logits_V = torch.zeros(640)
    logits_V[token_of(tokenizer, "e")] = 1.0
    logits_V[tokenizer.vocab_size :] = 50.0  # rows of the embedding that are no tokens
    assert draw(Fixed(logits_V), tokenizer, temperature=0) == "e" * 20
    drawn = draw(Fixed(logits_V), tokenizer, temperature=5.0, tokens=200)
    assert all(0 <= int(token) < tokenizer.vocab_size for token in tokenizer.encode([drawn])[0])


def test_the_same_seed_gives_the_same_text_and_another_seed_another(tokenizer: Tokenizer) -> None:
    logits_V = torch.zeros(640)
    first = draw(Fixed(logits_V), tokenizer, seed=1)
    assert draw(Fixed(logits_V), tokenizer, seed=1) == first
    assert draw(Fixed(logits_V), tokenizer, seed=2) != first


def test_top_k_keeps_the_k_likeliest(tokenizer: Tokenizer) -> None:
    logits_V = torch.zeros(640)
    logits_V[token_of(tokenizer, "e")] = 2.0
    logits_V[token_of(tokenizer, "n")] = 2.0
    assert set(draw(Fixed(logits_V), tokenizer, top_k=2, tokens=100)) == {"e", "n"}


def test_the_model_ends_a_document_by_itself_and_looks_back_no_further_than_its_length(tokenizer: Tokenizer) -> None:
    logits_V = torch.zeros(640)
    logits_V[tokenizer.eos_id] = 9.0
    assert draw(Fixed(logits_V), tokenizer, temperature=0) == ""
    logits_V[token_of(tokenizer, "e")] = 10.0
    engine = Fixed(logits_V)
    draw(engine, tokenizer, temperature=0)
    assert engine.windows[0][0] == tokenizer.eos_id
    assert max(len(window) for window in engine.windows) == 8


def test_text_comes_out_of_a_run(prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from runs import command_line

    from megacl.configfile import from_tree
    from megacl.trainer import train

    train(from_tree(prepared.tree(tmp_path / "run")))
    capsys.readouterr()
    call = ("sample", f"{tmp_path / 'run'}@english", "--prompt", "The file", "--tokens", "10")
    status, out, _ = command_line(capsys, *call)
    assert status == 0
    assert out.startswith("The file")
    assert command_line(capsys, *call)[1] == out
