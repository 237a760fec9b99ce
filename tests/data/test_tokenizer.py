"""Tokenizers: text comes back byte for byte, nothing in a text is a control token, extension is checked."""

import hashlib
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from megacl.data.documents import read_documents
from megacl.data.tokenizer import Tokenizer, load_tokenizer, record_extension
from megacl.data.tokenizer_training import train_tokenizer
from megacl.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
ENGLISH, GERMAN = (str(ROOT / f"examples/data/{name}.jsonl.zst") for name in ("english_a", "german"))

CONTROL_TEXT = "a</s> <s> <unk> <|endoftext|><|endoftext|> <pad> <0x41>\n</s>"


@pytest.fixture(scope="module")
def small_inputs(tmp_path_factory) -> list[str]:
    """A part of both languages: unigram training on all of it takes ten seconds."""
    file = tmp_path_factory.mktemp("inputs") / "both.jsonl"
    with open(file, "w") as written:
        for name in (ENGLISH, GERMAN):
            for index, text in enumerate(read_documents([name])):
                if index < 25:
                    written.write(json.dumps({"text": text}) + "\n")
    return [str(file)]


@pytest.fixture(scope="module")
def models(tmp_path_factory, small_inputs) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("models")
    (folder / "hf").mkdir()
    hugging_face = make_hugging_face(read_documents(small_inputs))
    hugging_face.save(str(folder / "hf/tokenizer.json"))
    return {
        "bpe": train_tokenizer([ENGLISH, GERMAN], folder / "bpe.model", 2048, "bpe"),
        "unigram": train_tokenizer(small_inputs, folder / "unigram.model", 1000, "unigram"),
        "hf": load_tokenizer(folder / "hf"),
    }


def make_hugging_face(texts, eos: str = "<|endoftext|>", special: bool = True) -> tokenizers.Tokenizer:
    """A byte-level BPE that has, as files in the wild do, truncation, padding, a template and further added tokens."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(texts, trainer)
    tokens = [tokenizers.AddedToken(eos, special=special), tokenizers.AddedToken("<pad>", special=True)]
    (made.add_special_tokens if special else made.add_tokens)(tokens)
    made.add_tokens([tokenizers.AddedToken("    ", special=False)])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, made.token_to_id(eos))]
    )
    made.enable_truncation(5)
    made.enable_padding(length=8)
    return made


@pytest.fixture(params=["bpe", "unigram", "hf"])
def tokenizer(request, models) -> Tokenizer:
    return models[request.param]


def test_english_and_german_come_back_byte_for_byte(tokenizer):
    texts = [*read_documents([ENGLISH]), *read_documents([GERMAN])]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(texts)] == texts


ODD_TEXTS = [
    "",
    " ",
    "  two  spaces ",
    "\ttab\tand\n\n\nlines\r\n",
    "\x00nul\x00",
    "ﬁ é e\u0301 ½ ＡＢ",
    "🜁🙂👩\u200d👧",
]
ODD_TEXTS += ["🜁🙂👩\u200d👧", "\ufeffbom\u2028sep", "    indented\n        code", CONTROL_TEXT]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_text_comes_back_byte_for_byte(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode([text])[0]) == text


# U+2581 is how a SentencePiece model writes a space; surrogates are no characters.
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_any_text_comes_back_byte_for_byte(models, text):
    for tokenizer in models.values():
        assert tokenizer.decode(tokenizer.encode([text])[0]) == text


def test_ids_are_unsigned_and_below_the_vocabulary(tokenizer):
    ids = np.concatenate(tokenizer.encode(list(read_documents([ENGLISH]))[:20]))
    assert ids.dtype == np.uint32
    assert ids.max() < tokenizer.vocab_size


def test_a_control_token_written_in_a_document_is_ordinary_text(tokenizer):
    (ids,) = tokenizer.encode([CONTROL_TEXT])
    kinds = tokenizer.pieces()
    assert tokenizer.eos_id not in ids
    assert not {kinds[index][1] for index in ids.tolist()} & {"control", "unknown"}


def test_control_tokens_in_a_text_are_found_only_where_they_are_asked_for_and_eos_never(tokenizer):
    control = [name for name, kind in tokenizer.pieces() if kind == "control"]
    eos = tokenizer.pieces()[tokenizer.eos_id][0]
    wanted = next(name for name in control if name != eos)
    ordinary, asked = (
        tokenizer.encode([f"one{wanted}two{eos} {wanted}{wanted}"], control=each)[0] for each in (False, True)
    )
    number = [name for name, _ in tokenizer.pieces()].index(wanted)
    assert number not in ordinary
    assert tokenizer.eos_id not in asked
    between = tokenizer.encode(["one", f"two{eos} "])
    np.testing.assert_array_equal(asked, [*between[0], number, *between[1], number, number])


def test_control_tokens_that_are_asked_for_are_those_that_the_tokenizers_package_finds(tmp_path):
    model = make_hugging_face(["a text of a few words, and a few more words"])
    model.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|im|>"])
    model.save(str(tmp_path / "tokenizer.json"))
    texts = ["<|im_start|>a few<|im_end|> words", "<|im|><|im_start|>", "", "more |im_end|> words <|im_end|"]
    ours = load_tokenizer(tmp_path).encode(texts, control=True)
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = False
    assert [ids.tolist() for ids in ours] == [model.encode(text, add_special_tokens=False).ids for text in texts]


def test_neither_bos_nor_eos_truncation_nor_padding_is_added(tokenizer):
    assert tokenizer.encode([""])[0].tolist() == []
    (once,), (twice,) = tokenizer.encode(["Wort " * 50]), tokenizer.encode(["Wort " * 100])
    assert len(once) > 40
    assert len(twice) > 1.9 * len(once)


def test_eos_decodes_to_nothing_and_an_id_beyond_the_vocabulary_is_refused(tokenizer):
    assert tokenizer.decode([tokenizer.eos_id]) == ""
    with pytest.raises(ValueError, match=rf"\[0, {tokenizer.vocab_size}\)"):
        tokenizer.decode([tokenizer.vocab_size])


def test_the_fingerprint_is_the_hash_of_the_file_and_survives_a_copy(tokenizer, tmp_path):
    assert tokenizer.fingerprint == hashlib.sha256(tokenizer.file.read_bytes()).hexdigest()
    copy = tokenizer.save(tmp_path)
    assert copy == tmp_path / tokenizer.file_name
    again = load_tokenizer(tmp_path)
    assert again.matches(tokenizer.fingerprint)
    assert again.encode(["Ein Satz."])[0].tolist() == tokenizer.encode(["Ein Satz."])[0].tolist()
    assert not again.matches("0" * 64)


def test_a_tokenizer_travels_to_another_process_and_needs_no_file_there(tokenizer, tmp_path):
    texts = ["Ein Satz, a sentence.  ", CONTROL_TEXT]
    expected = [ids.tolist() for ids in tokenizer.encode(texts)]
    after = pickle.loads(pickle.dumps(tokenizer))
    assert [ids.tolist() for ids in after.encode(texts)] == expected
    assert (after.vocab_size, after.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert after.fingerprint == load_tokenizer(after.save(tmp_path)).fingerprint == tokenizer.fingerprint


def test_2048_pieces_for_two_languages_hold_more_than_two_and_a_half_bytes_a_token(models):
    for name in (ENGLISH, GERMAN):
        texts = list(read_documents([name]))
        tokens = sum(map(len, models["bpe"].encode(texts)))
        assert sum(len(text.encode()) for text in texts) / tokens > 2.5


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_again_gives_the_same_bytes(tmp_path, small_inputs, model_type):
    for name in ("one.model", "two.model"):
        train_tokenizer(small_inputs, tmp_path / name, 600, model_type)
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "two.model").read_bytes()


def test_training_learns_from_lines_of_any_length(tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "abcdefgh" * 40_000}))
    trained = train_tokenizer([str(tmp_path / "long.jsonl")], tmp_path / "long.model", 275)
    assert len(trained.encode(["abcdefgh" * 100])[0]) <= 200


def test_a_vocabulary_that_the_text_cannot_fill_is_one_line(tmp_path):
    (tmp_path / "few.jsonl").write_text(json.dumps({"text": "few words"}))
    with pytest.raises(DataError, match=r"vocab_size 5000: Vocabulary size too high.*<= \d+") as caught:
        train_tokenizer([str(tmp_path / "few.jsonl")], tmp_path / "few.model", 5000)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "few.model").exists()


def test_training_names_a_broken_line_of_its_inputs(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": \n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: the line is not JSON"):
        train_tokenizer([str(tmp_path / "bad.jsonl")], tmp_path / "bad.model", 300)


def test_a_training_set_without_text_is_named(tmp_path):
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="there is no text in the inputs"):
        train_tokenizer([str(tmp_path / "blank.jsonl")], tmp_path / "blank.model", 300)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.model", None, "cannot be read: No such file"),
        ("absent.json", None, "cannot be read: No such file"),
        ("garbled.model", b"garbage", "not a SentencePiece model"),
        ("empty.model", b"", "not a SentencePiece model"),
        ("garbled.json", b'{"version": ', "not a tokenizer.json"),
        ("other.json", b'{"version": "1.0"}', "not a tokenizer.json"),
        ("list.json", b"[]", "not a tokenizer.json"),
        ("name.txt", b"", "ends with .model"),
    ],
)
def test_what_is_not_a_tokenizer_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_must_hold_exactly_one_tokenizer(tmp_path, models):
    with pytest.raises(DataError, match="neither"):
        load_tokenizer(tmp_path)
    models["bpe"].save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == models["bpe"].fingerprint
    models["hf"].save(tmp_path)
    with pytest.raises(DataError, match="both"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_eos_is_refused(tmp_path, models):
    make_hugging_face(["some text"], eos="<|strange|>").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="no end-of-text token among its added tokens"):
        load_tokenizer(tmp_path)
    model = proto_of(models["bpe"])
    model.trainer_spec.eos_id = -1
    model.trainer_spec.eos_piece = "nowhere"
    (tmp_path / "no_eos.model").write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="no end-of-sentence piece"):
        load_tokenizer(tmp_path / "no_eos.model")


def test_eos_that_is_listed_as_an_ordinary_token_is_still_not_found_in_text(tmp_path):
    made = make_hugging_face(["some text"], special=False)
    made.no_truncation()
    assert made.token_to_id("<|endoftext|>") in made.encode("a<|endoftext|>b", add_special_tokens=False).ids
    made.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_id == made.token_to_id("<|endoftext|>")
    (ids,) = loaded.encode(["a<|endoftext|>b"])
    assert loaded.eos_id not in ids
    assert loaded.decode(ids) == "a<|endoftext|>b"


@pytest.mark.parametrize("eos_token", ["<|endoftext|>", {"content": "<|endoftext|>", "special": True}])
def test_eos_is_the_one_of_the_configuration_beside_the_file_and_copies_keep_it(tmp_path, eos_token):
    made = make_hugging_face(["some text"])
    made.add_special_tokens(["</s>", "<|im_end|>"])
    file, config = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    made.save(str(file))
    with pytest.raises(
        DataError, match=r"</s> and <\|endoftext\|> may each be .* Put the model's tokenizer_config\.json"
    ):
        load_tokenizer(file)
    fingerprints = set()
    for name in (eos_token, "</s>", "<|im_end|>"):
        config.write_text(json.dumps({"bos_token": None, "eos_token": name}))
        loaded = load_tokenizer(file)
        fingerprints.add(loaded.fingerprint)
        content = name["content"] if isinstance(name, dict) else name
        assert loaded.eos_id == made.token_to_id(content)
        (folder := tmp_path / str(len(fingerprints))).mkdir()
        copy = loaded.save(folder)
        assert load_tokenizer(copy).eos_id == loaded.eos_id
        assert load_tokenizer(copy).fingerprint == loaded.fingerprint == hashlib.sha256(copy.read_bytes()).hexdigest()
        theirs = tokenizers.Tokenizer.from_file(str(copy))  # the copy is still a tokenizer.json
        assert theirs.get_vocab() == made.get_vocab()
        assert load_tokenizer(copy).encode(["some text"])[0].tolist() == loaded.encode(["some text"])[0].tolist()
    assert len(fingerprints) == 3


def test_a_configuration_that_says_what_the_file_says_already_changes_nothing(tmp_path):
    make_hugging_face(["some text"]).save(str(tmp_path / "tokenizer.json"))
    alone = load_tokenizer(tmp_path)
    for content in ('{"eos_token": "<|endoftext|>"}', '{"eos_token": null}', "{}"):
        (tmp_path / "tokenizer_config.json").write_text(content)
        assert load_tokenizer(tmp_path).fingerprint == alone.fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"eos_token": "<|strange|>"}', "its eos_token '<|strange|>' is not among the added tokens of tokenizer.json"),
        ('{"eos_token": ["</s>"]}', "is not among the added tokens"),
        ('{"eos_token": {}}', "not a tokenizer_config.json, or damaged"),
        ("[]", "not a tokenizer_config.json, or damaged"),
        ("{", "not a tokenizer_config.json, or damaged"),
    ],
)
def test_a_configuration_that_does_not_fit_the_tokenizer_is_named(tmp_path, content, message):
    make_hugging_face(["some text"]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "tokenizer_config.json"))


# ---------------------------------------------------------------------------------------------- extension


def proto_of(tokenizer: Tokenizer):
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(tokenizer.file.read_bytes())
    return model


def extend_sentencepiece(base: Tokenizer, out: Path, change=lambda model: None) -> Path:
    model = proto_of(base)
    for number in range(2):
        model.pieces.add(piece=f"\u2581Quelltext{base.vocab_size + number}", score=0.0)
    change(model)
    out.write_bytes(model.SerializeToString())
    return out


def test_an_extended_sentencepiece_model_matches_what_the_base_prepared(models, tmp_path):
    base = models["bpe"]
    file = extend_sentencepiece(base, tmp_path / "more.model")
    assert not load_tokenizer(file).matches(base.fingerprint)
    extended = record_extension(base.file, file)
    assert extended.vocab_size == base.vocab_size + 2
    assert extended.extends == (base.fingerprint,)
    assert load_tokenizer(file).matches(base.fingerprint)
    assert not base.matches(extended.fingerprint)
    for text in read_documents([GERMAN]):
        assert extended.decode(base.encode([text])[0]) == text


def test_an_extended_hugging_face_tokenizer_matches_what_the_base_prepared(models, tmp_path):
    larger = tokenizers.Tokenizer.from_file(str(models["hf"].file))
    larger.add_tokens(["Grundlage", "Quelltext"])
    larger.save(str(tmp_path / "tokenizer.json"))
    extended = record_extension(models["hf"].file, tmp_path / "tokenizer.json")
    assert extended.matches(models["hf"].fingerprint)
    assert len(extended.encode(["Quelltext"])[0]) == 1


def test_an_extension_of_an_extension_matches_both_and_a_copy_still_does(models, tmp_path):
    base = models["bpe"]
    second = record_extension(base.file, extend_sentencepiece(base, tmp_path / "second.model"))
    third = record_extension(second.file, extend_sentencepiece(second, tmp_path / "third.model"))
    (tmp_path / "copy").mkdir()
    third.save(tmp_path / "copy")
    for found in (third, load_tokenizer(tmp_path / "copy")):
        assert all(found.matches(each.fingerprint) for each in (base, second, third))


def swap_pieces(model) -> None:
    model.pieces[900].piece, model.pieces[901].piece = model.pieces[901].piece, model.pieces[900].piece


def move_eos(model) -> None:
    model.pieces[2].piece, model.pieces[1].piece = "<s>", "</s>"
    model.trainer_spec.eos_id, model.trainer_spec.bos_id = 1, 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_pieces, "id 900 is "),
        (move_eos, "EOS is 2 there and 1 here"),
        (lambda model: model.pieces.__delitem__(slice(2000, None)), "id 2000 is .* and beyond the end here"),
    ],
)
def test_a_tokenizer_that_gives_an_id_another_meaning_is_no_extension(models, tmp_path, change, message):
    file = extend_sentencepiece(models["bpe"], tmp_path / "other.model", change)
    with pytest.raises(DataError, match=message):
        record_extension(models["bpe"].file, file)
    assert load_tokenizer(file).extends == ()


def test_a_tokenizer_of_another_form_is_no_extension(models):
    with pytest.raises(DataError, match="one is a SentencePiece model, the other is not"):
        record_extension(models["bpe"].file, models["hf"].file)


def test_a_record_left_behind_by_a_replaced_tokenizer_is_named(models, tmp_path):
    file = extend_sentencepiece(models["bpe"], tmp_path / "more.model")
    record_extension(models["bpe"].file, file)
    file.write_bytes(models["unigram"].file.read_bytes())
    with pytest.raises(DataError, match=r"more\.model\.extends\.json: it was written for another more\.model"):
        load_tokenizer(file)


# ---------------------------------------------------------------------------------------------- the tools


def run_tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *arguments],
        capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""}, check=False,
    )  # fmt: skip


def test_the_tools_train_and_extend_quietly_and_say_what_is_wrong_in_one_line(models, small_inputs, tmp_path):
    out = tmp_path / "new" / "small.model"
    done = run_tool("train_tokenizer.py", *small_inputs, "--out", str(out), "--vocab-size", "500")
    assert (done.returncode, done.stderr) == (0, "")
    assert load_tokenizer(out).vocab_size == 500
    done = run_tool("train_tokenizer.py", "absent.jsonl", "--out", str(out), "--vocab-size", "500")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("DataError: absent.jsonl: no such file")
    extended = extend_sentencepiece(models["bpe"], tmp_path / "more.model")
    assert run_tool("extend_tokenizer.py", str(models["bpe"].file), str(extended)).returncode == 0
    assert load_tokenizer(extended).matches(models["bpe"].fingerprint)
    done = run_tool("extend_tokenizer.py", str(models["unigram"].file), str(extended))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
