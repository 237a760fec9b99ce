"""Vocabularies that grow for a new language: which rows new tokens begin with, and runs that go on with them."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tokenizers
import torch
from conftest import Prepared
from hypothesis import given
from hypothesis import strategies as st
from runs import command_line, losses, metrics
from sentencepiece import sentencepiece_model_pb2

from megacl.checkpoint import list_checkpoints, open_checkpoint
from megacl.config import EngineConfig
from megacl.configfile import from_tree
from megacl.convert.hf_tokenizer import as_tokenizer_json
from megacl.data.documents import read_documents
from megacl.data.prepare import prepare
from megacl.data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer, record_extension
from megacl.data.tokenizer_training import extend_tokenizer, train_tokenizer
from megacl.engine import build_engine
from megacl.errors import ConfigError, DataError
from megacl.lineage import BranchRecord, ConversionRecord, VocabularyRecord, load_lineage
from megacl.model.gpt import build_model
from megacl.parallel.ranks import Ranks
from megacl.starting import begin_with, completed, open_start
from megacl.trainer import train
from megacl.vocabulary import Extension, plan_extension, text_of
from tests.ranks import arranged, run_on_ranks
from tests.test_starting import pythia, tree  # noqa: F401  # a fixture

pytestmark = pytest.mark.usefixtures("one_thread")
Capture = pytest.CaptureFixture[str]

WORDS = ["▁und", "▁Lizenz", "ß", "▁Grundlage", "▁Straße", "ungen"]


def extended_model(base: Path, out: Path, pieces: list[str]) -> Tokenizer:
    """A SentencePiece model with more pieces behind its own, which says that it extends it."""
    model = sentencepiece_model_pb2.ModelProto.FromString(base.read_bytes())
    for piece in pieces:
        model.pieces.add(piece=piece, score=1.0)
    out.write_bytes(model.SerializeToString())
    return record_extension(base, out)


@pytest.fixture(scope="module")
def larger(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the tokenizer with 100 German pieces more, the German documents prepared with it)."""
    folder = tmp_path_factory.mktemp("larger")
    german = [str(prepared.documents["german"])]
    tokenizer = extend_tokenizer(prepared.tokenizer, german, folder / "larger.model", 100)
    prepare([str(prepared.documents["german"])], tokenizer=tokenizer, out=folder / "german", validation=0.2)
    return folder / "larger.model", folder / "german"


# ---------------------------------------------------------------------------------------------- more pieces


def test_an_extended_tokenizer_cuts_the_new_language_less_and_the_old_ids_stay(
    larger: tuple[Path, Path], prepared: Prepared
) -> None:
    base, extended = load_tokenizer(prepared.tokenizer), load_tokenizer(larger[0])
    assert extended.pieces()[:600] == base.pieces()
    assert extended.matches(base.fingerprint)
    german, english = ([*read_documents([str(prepared.documents[name])])] for name in ("german", "english"))
    before, after = (sum(map(len, tokenizer.encode(german))) for tokenizer in (base, extended))
    assert after < 0.95 * before
    for text, ids in zip([*german, *english], extended.encode([*german, *english]), strict=True):
        assert extended.decode(ids) == text
    used = {int(token) for ids in extended.encode(german) for token in ids if token >= 600}
    assert len(used) > 90


def test_a_tokenizer_json_is_extended_by_merges_behind_its_own(prepared: Prepared, tmp_path: Path) -> None:
    base = tokenizers.Tokenizer(tokenizers.models.BPE())
    base.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    german, english = ([*read_documents([str(prepared.documents[name])])] for name in ("german", "english"))
    base.train_from_iterator(english, trainer)
    base.add_tokens(["   "])  # as Pythia's, whose ids stand behind the vocabulary's
    base.save(str(tmp_path / "tokenizer.json"))
    old = load_tokenizer(tmp_path / "tokenizer.json")
    new = extend_tokenizer(old.file, [str(prepared.documents["german"])], tmp_path / "larger.json", 150)
    assert new.vocab_size == old.vocab_size + 150
    assert new.matches(old.fingerprint)
    before, after = (sum(map(len, tokenizer.encode(german))) for tokenizer in (old, new))
    assert after < 0.9 * before
    for text, ids in zip([*german, *english], new.encode([*german, *english]), strict=True):
        assert new.decode(ids) == text
    used = {int(token) for ids in new.encode(german) for token in ids if token >= old.vocab_size}
    assert len(used) > 120


def test_the_tokenizer_json_of_a_sentencepiece_model_is_extended_too(prepared: Prepared, tmp_path: Path) -> None:
    english, german = ([str(prepared.documents[name])] for name in ("english", "german"))
    model = train_tokenizer(english, tmp_path / "english.model", 400)
    assert isinstance(model, SentencePieceTokenizer)
    assert "ü" not in {piece for piece, _ in model.pieces()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(as_tokenizer_json(model)))
    config = {"eos_token": model.pieces()[model.eos_id][0]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    old = load_tokenizer(tmp_path / "tokenizer.json")
    new = extend_tokenizer(old.file, german, tmp_path / "larger.json", 150)
    added = [piece for piece, _ in new.pieces()[400:]]
    assert (len(added), "ü" in added) == (150, True)
    assert not [piece for piece in added if "\n" in piece or "\u2581" in piece[1:].lstrip("\u2581")]
    texts = [*read_documents(english), *read_documents(german)]
    for text, ids in zip(texts, new.encode(texts), strict=True):
        assert new.decode(ids) == text
    before, after = (sum(map(len, each.encode([*read_documents(german)]))) for each in (old, new))
    assert after < 0.9 * before
    larger_model = extend_tokenizer(model.file, german, tmp_path / "larger.model", 150)
    assert isinstance(larger_model, SentencePieceTokenizer)
    assert "ü" in {piece for piece, _ in larger_model.pieces()}
    assert as_tokenizer_json(larger_model) is not None, "it has none of the same ids, so that transformers has others"


def test_what_cannot_be_extended_is_one_line(prepared: Prepared, tmp_path: Path) -> None:
    german = [str(prepared.documents["german"])]
    with pytest.raises(DataError, match=r"SentencePiece cannot train|give .* pieces that"):
        extend_tokenizer(prepared.tokenizer, german, tmp_path / "more.model", 100_000)
    unigram = train_tokenizer(german, tmp_path / "unigram.model", 500, "unigram")
    with pytest.raises(DataError, match="pieces are added to BPE alone"):
        extend_tokenizer(unigram.file, german, tmp_path / "more.model", 10)
    assert not (tmp_path / "more.model").exists()


# ---------------------------------------------------------------------------------------------- which rows


@pytest.mark.parametrize("space_in_front", [False, True], ids=["as it is", "a space in front"])
def test_new_pieces_are_spelled_by_the_old_ones_without_a_space_that_they_have_not(
    prepared: Prepared, space_in_front: bool, tmp_path: Path
) -> None:
    model = sentencepiece_model_pb2.ModelProto.FromString(prepared.tokenizer.read_bytes())
    model.normalizer_spec.add_dummy_prefix = space_in_front
    (tmp_path / "base.model").write_bytes(model.SerializeToString())
    base = load_tokenizer(tmp_path / "base.model")
    known = {piece for piece, _ in base.pieces()}
    pieces = [word for word in WORDS if word not in known]
    extended = extended_model(base.file, tmp_path / "more.model", pieces)
    extension = plan_extension(base, extended, rows_before=640, rows=640, new_rows="pieces", after=0)
    assert len(extension.pieces) == len(pieces) == extension.record.from_pieces
    front = base.encode(["das"])[0].tolist()
    for piece, spelled in zip(pieces, extension.pieces, strict=True):
        assert base.decode([*front, *spelled]) == "das" + piece.replace("▁", " ")


def test_tokens_of_hugging_face_are_spelled_too_those_of_broken_letters_are_not(tmp_path: Path) -> None:
    base = tokenizers.Tokenizer(tokenizers.models.BPE())
    base.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    base.train_from_iterator(["die Straße und das Haus und die Grundlage"] * 20, trainer)
    (tmp_path / "base").mkdir()
    base.save(str(tmp_path / "base" / "tokenizer.json"))
    half = "ÃĹ"[:1]  # the first byte of many letters, in the alphabet of bytes
    base.add_tokens([" Straßenhaus", "haus"])
    base.add_special_tokens(["<|new|>"])
    assert half in base.get_vocab()
    base.save(str(tmp_path / "tokenizer.json"))
    extended = record_extension(tmp_path / "base" / "tokenizer.json", tmp_path / "tokenizer.json")
    before = load_tokenizer(tmp_path / "base")
    extension = plan_extension(before, extended, rows_before=384, rows=384, new_rows="pieces", after=0)
    whole, part, special = extension.pieces
    assert before.decode(whole) == " Straßenhaus"
    assert before.decode(part) == "haus"
    assert special == ()
    assert extension.record.from_pieces == 2
    assert "\ufffd" in text_of(before, before.encode(["ß"])[0].tolist()[0]) or len(before.encode(["ß"])[0]) == 1


@given(
    tokens=st.integers(1, 6),
    padding=st.integers(0, 3),
    new=st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=5),
    more=st.integers(0, 3),
)
def test_rows_are_means_of_tokens_alone_and_the_others_stay(
    tokens: int, padding: int, new: list[list[int]], more: int
) -> None:
    pieces = tuple(tuple(piece % tokens for piece in each) for each in new)
    rows_before = tokens + padding
    rows = max(rows_before, tokens + len(pieces)) + more
    record = VocabularyRecord(
        after=0, tokenizer_before="a", tokenizer="b", tokens_before=tokens, tokens=tokens + len(pieces),
        rows_before=rows_before, rows=rows, new_rows="pieces", from_pieces=sum(map(bool, pieces)),
    )  # fmt: skip
    old = torch.randn(rows_before, 3, generator=torch.Generator().manual_seed(tokens + 10 * padding))
    found = Extension(record, pieces).rows_of(old)
    moments = Extension(record, pieces).moments_of(old)
    assert found.shape == moments.shape == (rows, 3)
    mean = sum(old[index] for index in range(tokens)) / tokens
    for row in range(rows):
        if row < tokens:
            expected, moment = old[row], old[row]
        elif row < tokens + len(pieces):
            mine = pieces[row - tokens]
            expected = sum(old[piece] for piece in mine) / len(mine) if mine else mean
            moment = torch.zeros(3)
        elif row < rows_before:
            expected, moment = old[row], old[row]
        else:
            expected, moment = mean, torch.zeros(3)
        torch.testing.assert_close(found[row], expected)
        torch.testing.assert_close(moments[row], moment)


# ---------------------------------------------------------------------------------------------- runs


def bits(run_dir: Path, at: int) -> float:
    return metrics(run_dir, "evaluation")[at]["sources"]["german"]["bits_per_byte"]


@pytest.mark.parametrize("new_rows", [pytest.param("mean", marks=pytest.mark.long), "pieces"])
def test_somebody_elses_model_learns_german_with_more_tokens(
    new_rows: Literal["mean", "pieces"],
    larger: tuple[Path, Path],
    pythia: Path,  # noqa: F811
    prepared: Prepared,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    tokenizer, data = larger
    before = tree(prepared, tmp_path / "before", pythia)
    before["phases"][0] |= {"steps": 1, "schedule": {"kind": "constant", "max_lr": 1e-9}}
    train(from_tree(completed(before)))
    settings = tree(
        prepared,
        tmp_path / "run",
        pythia,
        tokenizer={"path": str(tokenizer), "new_rows": new_rows},
        sources={"german": {"path": str(data)}},
    )
    config = from_tree(completed(settings))
    assert config.model.vocab_size == 768, "rows for 700 tokens, a multiple of 128"
    assert train(config) == "done"
    assert bits(tmp_path / "run", -1) < bits(tmp_path / "before", 0) - 0.3
    lineage = load_lineage(tmp_path / "run")
    conversion, vocabulary = lineage.events
    assert isinstance(conversion, ConversionRecord)
    assert isinstance(vocabulary, VocabularyRecord)
    assert (vocabulary.tokens_before, vocabulary.tokens) == (600, 700)
    assert (vocabulary.rows_before, vocabulary.rows, vocabulary.new_rows) == (640, 768, new_rows)
    assert vocabulary.from_pieces == (100 if new_rows == "pieces" else 0)
    status, out, _ = command_line(capsys, "lineage", str(tmp_path / "run"), "--verify")
    assert status == 0, out
    status, out, _ = command_line(capsys, "lineage", str(tmp_path / "run"))
    assert "vocabulary  600 tokens and 100 new ones, in 768 rows of which there were 640" in out
    saved = open_checkpoint(list_checkpoints(tmp_path / "run")[-1]).tokenizer()
    assert saved.matches(load_tokenizer(prepared.tokenizer).fingerprint)


@pytest.fixture(scope="module")
def english(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of English with a constant rate, 8 steps."""
    run_dir = tmp_path_factory.mktemp("runs") / "english"
    phase = {"name": "english", "mixture": {"english": 1}, "steps": 8}
    train(from_tree(prepared.tree(run_dir, phases=[{**phase, "schedule": {"kind": "constant", "max_lr": 5e-3}}])))
    return run_dir


def going_on(prepared: Prepared, english: Path, larger: tuple[Path, Path], run_dir: Path, **changes: Any) -> Any:
    """A run of German at the same rate, with moments kept, with more tokens."""
    settings = prepared.tree(run_dir, start_from=str(english), **changes)
    settings["sources"] = {"german": {"path": str(larger[1])}, "english": settings["sources"]["english"]}
    settings.setdefault("tokenizer", {"path": str(larger[0]), "new_rows": "pieces"})
    phase = {"name": "german", "mixture": {"german": 1}, "steps": 6, "replay": {"share": 0.25}}
    settings["phases"] = [{**phase, "schedule": {"kind": "constant", "max_lr": "last"}}]
    if "model" not in changes:
        settings["model"]["vocab_size"] = 704
    return settings


def test_a_run_of_megacls_goes_on_with_more_tokens_and_what_it_replays_still_counts(
    english: Path, larger: tuple[Path, Path], prepared: Prepared, tmp_path: Path, capsys: Capture
) -> None:
    settings = going_on(prepared, english, larger, tmp_path / "run")
    assert train(from_tree(settings)) == "done"
    lineage = load_lineage(tmp_path / "run")
    assert [type(event) for event in lineage.events] == [BranchRecord, VocabularyRecord]
    assert lineage.phases[-1].optimizer_state == "kept"
    assert losses(tmp_path / "run")[-1] < 6.0
    status, out, _ = command_line(capsys, "evaluate", str(tmp_path / "run"))
    assert status == 0
    assert out.count("english") >= 2, "the run that it came from is read"
    status, out, _ = command_line(capsys, "lineage", str(tmp_path / "run"), "--verify")
    assert status == 0, out
    again = going_on(prepared, english, larger, tmp_path / "run")
    assert train(from_tree(again)) == "done", "what is done is done"


def test_old_rows_and_moments_stay_and_new_ones_begin_as_said(
    english: Path, larger: tuple[Path, Path], prepared: Prepared, tmp_path: Path
) -> None:
    config = from_tree(going_on(prepared, english, larger, tmp_path / "run"))
    parent = open_start(str(english), pytest.fail)
    tokenizer = load_tokenizer(larger[0])
    begun = begin_with(parent, config, tokenizer)
    old, new = parent.load_state(), begun.load_state()
    base, names = load_tokenizer(prepared.tokenizer), [piece for piece, _ in tokenizer.pieces()]
    for name in ("embed.weight", "head.weight"):
        was, now = old(name), new(name)
        assert set(now) == {"weight", "exp_avg", "exp_avg_sq"}
        for key, value in now.items():
            assert value.shape == (704, 32)
            assert torch.equal(value[:600], was[key][:600])
            assert key == "weight" or not value[600:].any()
        token, piece = next(each for each in enumerate(names[600:], start=600) if each[1].startswith("▁"))
        front = base.encode(["das"])[0].tolist()
        spelled = base.encode([f"das {piece.removeprefix('▁')}"])[0].tolist()[len(front) :]
        torch.testing.assert_close(now["weight"][token], was["weight"][spelled].mean(0))
        torch.testing.assert_close(now["weight"][703], was["weight"][:600].mean(0))
    assert torch.equal(new("final_norm.weight")["weight"], old("final_norm.weight")["weight"])


def loaded_weights(ranks: Ranks, tree: dict[str, Any], zero_stage: int, tensor_parallel: int) -> dict[str, np.ndarray]:
    """What an engine on these ranks holds of the model that a run begins with."""
    config = from_tree(tree)
    assert config.start_from is not None
    assert config.tokenizer is not None
    parent = begin_with(open_start(config.start_from, print), config, load_tokenizer(config.tokenizer.path))
    engine = build_engine(
        build_model(config.model, seed=0, device="meta"),
        engine=EngineConfig(kind="deepspeed", zero_stage=zero_stage, tensor_parallel=tensor_parallel),
        optimizer=config.optimizer,
        ranks=arranged(ranks, tensor_parallel, 1),
    )
    parent.load_into(engine)
    return {name: state["weight"].numpy() for name, state in engine.export_state() if state}  # rank 0 has them


@pytest.mark.parametrize(("zero_stage", "tensor_parallel"), [pytest.param(3, 1, marks=pytest.mark.long), (1, 2)])
def test_ranks_hold_the_same_rows_as_one_process(
    zero_stage: int,
    tensor_parallel: int,
    larger: tuple[Path, Path],
    pythia: Path,  # noqa: F811
    prepared: Prepared,
    tmp_path: Path,
) -> None:
    tokenizer = {"path": str(larger[0]), "new_rows": "pieces"}
    settings = completed(tree(prepared, tmp_path / "run", pythia, tokenizer=tokenizer))
    config = from_tree(settings)
    parent = begin_with(open_start(str(pythia), pytest.fail), config, load_tokenizer(larger[0]))
    expected = parent.load_weights()
    found = run_on_ranks(2, loaded_weights, settings, zero_stage, tensor_parallel)[0]
    assert found["embed.weight"].shape == (768, 32)
    for name, weight in found.items():
        np.testing.assert_array_equal(weight, expected(name).numpy(), err_msg=name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer": {"path": "{larger}"}}, r"model.vocab_size is 704, and in .* it is 640"),
        (
            {"model": {"vocab_size": 640}},
            r"it must be at least the tokenizer's, 700: give it, and say in tokenizer.new_",
        ),
        ({"model": {"vocab_size": 512}}, r"model.vocab_size is 512, and in .* it is 640"),
        ({"tokenizer": {"path": "{base}", "new_rows": "mean"}}, r"has no tokens that the model of .* has not"),
        ({"start_from": None}, r"tokenizer.new_rows is set without start_from"),
    ],
    ids=str,
)
def test_an_extension_that_cannot_be_is_one_line(
    changes: dict[str, Any], said: str, english: Path, larger: tuple[Path, Path], prepared: Prepared, tmp_path: Path
) -> None:
    settings = going_on(prepared, english, larger, tmp_path / "run")
    for key, value in changes.items():
        settings[key] = {**settings[key], **value} if key == "model" else value
    path = settings["tokenizer"]["path"].format(larger=larger[0], base=prepared.tokenizer)
    settings["tokenizer"] = {**settings["tokenizer"], "path": path}
    if "{base}" in str(changes):
        settings["sources"]["german"] = {"path": str(prepared.sources["german"])}
    with pytest.raises(ConfigError, match=said):
        train(from_tree(settings))
    assert not (tmp_path / "run").exists()
