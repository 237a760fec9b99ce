"""A tokenizer gives the ids that its library gives for the whole text, wherever the text was cut."""

import io
import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers

from megacl.data import boundaries
from megacl.data.documents import read_documents
from megacl.data.tokenizer import load_tokenizer

DATA = Path(__file__).resolve().parents[2] / "examples/data"

Encode = Callable[[str], list[int]]

# What a cut could go wrong at: spaces of all kinds, contractions, digits of three scripts, marks that compose, the
# names of pieces, and what the tokenizers below know as symbols.
CHUNKS = [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\x0b", "\x0c", "\x1c", "\x00", "\x7f", "\u00a0", "\u0085"]
CHUNKS += ["\u2003", "\u3000", "\u200b", "\u180e", "\ufeff", "\u2581", "\u2581\u2581", "</s>", "<s>", "<unk>", "<0x41>"]
CHUNKS += ["'", "'s", "'S", "'re", "'ſ", "n't", "’s", "the", "The", "THE", "ab", "abc", "word", "x", "Straße", "ſ", "İ"]
CHUNKS += ["1", "12", "123", "2024", "٣", "²", "Ⅷ", ".", ",", "--", "((", "/", "\n/", "#", "_", "|", "e\u0301", "é"]
CHUNKS += ["\u0301", "\u0338", "=\u0338", "\u1100", "\u1161", "\u2126", "\u2000", "日本", "。", "अ", "🙂", "👩\u200d👧"]
CHUNKS += ["<sep>", "a b", "é.", "<|im end|>", "<|endoftext|>", "q7", "  x", "~\n", "ﬁ"]
texts = st.lists(st.sampled_from(CHUNKS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=30)
texts = texts.map("".join)


def check(text: str, pairs: dict[str, tuple[Encode, Encode]]) -> None:
    for name, (ours, theirs) in pairs.items():
        assert ours(text) == theirs(text), name


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """Both languages, and the odd chunks, so that pieces are learned of them."""
    found = [
        text
        for name in ("english_b", "german")
        for index, text in enumerate(read_documents([str(DATA / f"{name}.jsonl.zst")]))
        if index < 12
    ]
    return [*found, *(f"word {chunk}{chunk}word {chunk} 12{chunk}34\n{chunk}" for chunk in CHUNKS)]


# ---------------------------------------------------------------------------------------------- SentencePiece

PLAIN = {
    "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "split_digits": True,
    "remove_extra_whitespaces": False, "add_dummy_prefix": False, "allow_whitespace_only_pieces": True,
}  # fmt: skip
BY_UNITS = {
    "plain": {},
    "space in front": {"add_dummy_prefix": True},
    "digits together": {"split_digits": False, "add_dummy_prefix": True},
    "pieces over spaces": {
        "split_by_whitespace": False,
        "split_by_unicode_script": False,
        "max_sentencepiece_length": 9,
    },
    "symbols": {"user_defined_symbols": ["<sep>", "a\u2581b", "\u2581\u2581x", "é.", "\n\n", "~\n"]},
    "symbols, space in front": {"user_defined_symbols": ["<sep>", "\u2581\u2581", "q7"], "add_dummy_prefix": True},
    "all characters": {"character_coverage": 1.0},
}
AS_IT_IS = {
    "unigram": {"model_type": "unigram"},
    "char": {"model_type": "char"},
    "no bytes": {"byte_fallback": False},
    "one space": {"remove_extra_whitespaces": True, "add_dummy_prefix": True},
    "normalised": {"normalization_rule_name": "nmt_nfkc"},
    "space behind": {"treat_whitespace_as_suffix": True, "add_dummy_prefix": True},
}


@pytest.fixture(scope="module")
def sentencepiece_pairs(tmp_path_factory, documents) -> dict[str, tuple[Encode, Encode]]:
    folder, pairs = tmp_path_factory.mktemp("sentencepiece"), {}
    for name, changes in (BY_UNITS | AS_IT_IS).items():
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line[:4000] for text in documents for line in re.split("(?<=\n)", text)),
            model_writer=model, vocab_size=900, hard_vocab_limit=False, num_threads=1, minloglevel=2,
            **(PLAIN | changes),
        )  # fmt: skip
        file = folder / f"{name}.model"
        file.write_bytes(model.getvalue())
        ours, theirs = load_tokenizer(file), sentencepiece.SentencePieceProcessor(model_file=str(file))
        cut = boundaries.of_sentencepiece(theirs)
        assert (cut is None) == (name in AS_IT_IS), name
        pairs[name] = (lambda text, ours=ours: ours.encode([text])[0].tolist(), theirs.encode)
    return pairs


@given(text=texts)
@example(text="a \u2581 b")
@example(text=" ")
@example(text=" \u2581")
@settings(max_examples=300, deadline=None)
def test_a_sentencepiece_model_gives_the_ids_of_the_whole_text(sentencepiece_pairs, text):
    check(text, sentencepiece_pairs)


def test_a_sentencepiece_model_gives_the_ids_of_whole_documents(sentencepiece_pairs, documents):
    for text in documents:
        check(text, sentencepiece_pairs)


def test_digits_that_are_split_are_boundaries_and_letters_that_form_pieces_are_not(tmp_path, documents):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_writer=model, vocab_size=900, minloglevel=2, **PLAIN
    )
    found = boundaries.of_sentencepiece(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()))
    assert found is not None
    cut = found.reshape(256, 256)
    assert cut[ord("1"), ord("2")]
    assert cut[ord("e"), ord(" ")]
    assert not cut[ord("t"), ord("h")]
    assert not cut[0xC3, 0xA4]


# ---------------------------------------------------------------------------------------------- Hugging Face

GPT2, LLAMA3, QWEN2, O200K, TEKKEN = boundaries.PATTERNS


def by_pattern(pattern: str, *before: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([*before, split, byte_level(use_regex=False)])


def byte_level(**settings: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(**({"add_prefix_space": False} | settings))


HF_BY_UNITS = {
    "gpt2": {"pre_tokenizer": byte_level()},
    "gpt2 pattern": {"pre_tokenizer": by_pattern(GPT2)},
    "llama3": {"pre_tokenizer": by_pattern(LLAMA3)},
    "qwen2": {"pre_tokenizer": by_pattern(QWEN2), "normalizer": normalizers.NFC()},
    "o200k": {"pre_tokenizer": by_pattern(O200K)},
    "tekken": {"pre_tokenizer": by_pattern(TEKKEN)},
    "starcoder": {
        "pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])
    },
    "added": {
        "pre_tokenizer": by_pattern(LLAMA3),
        "added": [
            *(AddedToken(name, special=False) for name in ("    ", "a b", "q7", "<sep>", "e\u0301")),
            AddedToken("<|im end|>", special=True),
            AddedToken("x", special=False, lstrip=True),
        ],
        "normalizer": normalizers.NFC(),
    },
}
HF_AS_IT_IS = {
    "space in front": {"pre_tokenizer": byte_level(add_prefix_space=True)},
    "other pattern": {"pre_tokenizer": by_pattern(r"\p{L}+ ?|[^\p{L}]")},
    "lower case": {"pre_tokenizer": byte_level(), "normalizer": normalizers.Lowercase()},
    "metaspace": {"pre_tokenizer": pre_tokenizers.Metaspace()},
    "added with what follows": {"pre_tokenizer": byte_level(), "added": [AddedToken("x", special=False, rstrip=True)]},
    "added as words": {"pre_tokenizer": byte_level(), "added": [AddedToken("ab", special=False, single_word=True)]},
}


@pytest.fixture(scope="module")
def hugging_face_pairs(tmp_path_factory, documents) -> dict[str, tuple[Encode, Encode]]:
    folder, pairs = tmp_path_factory.mktemp("hugging_face"), {}
    for name, parts in (HF_BY_UNITS | HF_AS_IT_IS).items():
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = parts["pre_tokenizer"]
        if "normalizer" in parts:
            made.normalizer = parts["normalizer"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator(
            documents,
            tokenizers.trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False),
        )
        made.add_special_tokens(["<|endoftext|>"])
        for token in parts.get("added", []):
            (made.add_special_tokens if token.special else made.add_tokens)([token])
        (folder / name).mkdir()
        made.save(str(folder / name / "tokenizer.json"))
        made.encode_special_tokens = True
        cut = boundaries.of_hugging_face(json.loads((folder / name / "tokenizer.json").read_text()))
        assert (cut is None) == (name in HF_AS_IT_IS), name
        ours = load_tokenizer(folder / name)
        pairs[name] = (
            lambda text, ours=ours: ours.encode([text])[0].tolist(),
            lambda text, made=made: made.encode(text, add_special_tokens=False).ids,
        )
    return pairs


@given(text=texts)
@settings(max_examples=300, deadline=None)
def test_a_hugging_face_tokenizer_gives_the_ids_of_the_whole_text(hugging_face_pairs, text):
    check(text, hugging_face_pairs)


def test_a_hugging_face_tokenizer_gives_the_ids_of_whole_documents(hugging_face_pairs, documents):
    for text in documents:
        check(text, hugging_face_pairs)


def test_every_pattern_ends_a_match_at_every_boundary_between_any_two_characters():
    sample = [chr(code) for code in range(0x20, 0x250)] + [*"\t\n\r\u0301\u1680\u2000\u2028\u3000\u4e00\u0661🙂"]
    ends = boundaries.of_hugging_face({"pre_tokenizer": json.loads(byte_level().__getstate__()), "model": {}})
    assert ends is not None
    for pattern in boundaries.PATTERNS:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        for before in sample:
            text = "".join(f"{before}{after}" for after in sample)
            starts = {start for _, (start, _) in split.pre_tokenize_str(text)}
            for index in range(0, len(text), 2):
                first, second = before.encode()[-1], text[index + 1].encode()[0]
                if ends[first << 8 | second]:
                    assert index + 1 in starts, (pattern, before, text[index + 1])


def test_no_character_becomes_white_space_by_composition():
    for code in range(0x110000):
        composed = unicodedata.normalize("NFC", chr(code))
        assert composed[-1].isspace() == chr(code).isspace()


def test_white_space_ends_at_u3000():
    assert not any(chr(code).isspace() for code in range(0x3001, 0x110000))
