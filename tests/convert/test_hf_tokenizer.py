"""Tokenizers beside converted models: AutoTokenizer gives the ids that megacl gives."""

import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers
from foreign import saved, transformers_model
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.pre_tokenizers import ByteLevel

from megacl.convert.conversion import convert
from megacl.convert.hf_tokenizer import as_tokenizer_json
from megacl.convert.opened import ReadOptions
from megacl.data.tokenizer import SentencePieceTokenizer, extension_record, load_tokenizer

TEXTS = [
    "",
    " ",
    "the quick  brown",
    " leading",
    "trailing ",
    "tabs\tand\nlines\r\n",
    "overall überall Straßen",
    "=" * 99,
]
TEXTS += ["12345 0", "\u2581raw\u2581", "naïve 🙂 漢字", "aaa" * 30, "\u200bzero", "  " * 20 + "x", "a\x00b"]


def trained(folder: Path, source: Path, **settings: object) -> SentencePieceTokenizer:
    sentencepiece.SentencePieceTrainer.train(
        input=str(source), model_prefix=str(folder / "tokenizer"), vocab_size=300, minloglevel=2, **settings
    )
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return tokenizer


def as_llama() -> dict[str, object]:
    """How Llama's tokenizer was trained: with a space before every text."""
    return {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": True,
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(transformers_model("llama", num_hidden_layers=1), tmp_path_factory.mktemp("model"))


def test_a_bpe_model_is_written_as_a_tokenizer_json_too_whether_or_not_it_adds_a_space(
    small_tokenizer: Path, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "llama").mkdir()
    trained(tmp_path / "llama", small_tokenizer.with_name("text.txt"), **as_llama())
    for number, file in enumerate((small_tokenizer, tmp_path / "llama" / "tokenizer.model")):
        out = tmp_path / str(number)
        report = convert(model, out, to="hf", options=ReadOptions(tokenizer=file))
        assert report.source.notes == ()
        assert (out / "tokenizer.model").read_bytes() == file.read_bytes()
        theirs, ours = transformers.AutoTokenizer.from_pretrained(out), load_tokenizer(file)
        for text in TEXTS:
            ids = ours.encode([text])[0].tolist()
            assert theirs(text).input_ids == ids, text
            assert theirs.decode(ids) == ours.decode(ids), text
        assert (theirs.eos_token_id, theirs.bos_token_id) == (ours.eos_id, ours.eos_id)


def test_a_model_without_an_exact_tokenizer_json_goes_alone_with_a_note(
    small_tokenizer: Path, model: Path, tmp_path: Path
) -> None:
    for number, settings in enumerate(
        [{**as_llama(), "model_type": "unigram"}, {**as_llama(), "normalization_rule_name": "nmt_nfkc"}]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        tokenizer = trained(folder, small_tokenizer.with_name("text.txt"), **settings)
        assert as_tokenizer_json(tokenizer) is None
        report = convert(model, folder / "out", to="hf", options=ReadOptions(tokenizer=tokenizer.file))
        assert "has no tokenizer.json of the same ids" in report.source.notes[-1]
        assert (folder / "out" / "tokenizer.model").is_file()
        assert not (folder / "out" / "tokenizer.json").exists()


def test_a_tokenizer_json_and_what_stands_beside_it_come_through_a_checkpoint_unchanged(
    model: Path, tmp_path: Path
) -> None:
    built = tokenizers.Tokenizer(tokenizers.models.BPE())
    built.pre_tokenizer, built.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<start>", "<stop>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    built.train_from_iterator(["the quick brown fox"] * 9, trainer)
    config = {"bos_token": "<start>", "eos_token": "<stop>", "tokenizer_class": "PreTrainedTokenizerFast"}
    source = tmp_path / "source"
    convert(model, source, to="hf")
    built.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7], "bos_token_id": 0, "top_k": 3}))
    convert(source, tmp_path / "ours", to="megacl")
    ours = load_tokenizer(tmp_path / "ours")
    assert ours.eos_id == 1
    convert(tmp_path / "ours", tmp_path / "again", to="hf")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes()
    tree, again = (json.loads((folder / "tokenizer.json").read_bytes()) for folder in (source, tmp_path / "again"))
    assert again == tree
    generation, config = (
        json.loads((tmp_path / "again" / f"{name}.json").read_bytes()) for name in ("generation_config", "config")
    )
    assert generation == {"eos_token_id": [1, 7], "bos_token_id": 0, "top_k": 3}
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, [1, 7])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    for text in TEXTS:
        assert theirs(text).input_ids == ours.encode([text])[0].tolist(), text
    convert(tmp_path / "again", tmp_path / "back", to="megacl")
    assert load_tokenizer(tmp_path / "back").fingerprint == ours.fingerprint


def test_what_a_tokenizer_extends_goes_along(small_tokenizer: Path, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(small_tokenizer.read_bytes())
    (tmp_path / "tokenizer.model.extends.json").write_text(extension_record(file.read_bytes(), ["a" * 64]))
    convert(model, tmp_path / "out", to="hf", options=ReadOptions(tokenizer=file))
    (tmp_path / "out" / "tokenizer.json").unlink()  # else that one is taken, as nothing says what data there is
    convert(tmp_path / "out", tmp_path / "ours", to="megacl")
    assert load_tokenizer(tmp_path / "ours").extends == ("a" * 64,)
