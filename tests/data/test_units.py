"""Very long texts go through a tokenizer in parts, in bounded memory; units come from memory as they went into it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from megacl.data import units
from megacl.data.tokenizer import load_tokenizer
from megacl.data.tokenizer_training import train_tokenizer
from megacl.data.units import LONGEST, UnitEncoder, WholeEncoder

ROOT = Path(__file__).resolve().parents[2]


def before_spaces() -> np.ndarray:
    cut = np.zeros((256, 256), bool)
    cut[:, ord(" ")] = True
    return cut.ravel()


class Recorder:
    """A tokenizer whose ids are code points, which notes what it is given."""

    def __init__(self) -> None:
        self.given: list[list[bytes | str]] = []

    def __call__(self, texts):
        self.given.append(list(texts))
        return [[ord(each) for each in (str(text, "utf-8") if isinstance(text, bytes) else text)] for text in texts]

    def lengths(self) -> list[int]:
        return [len(text) for texts in self.given for text in texts]


def as_text(ids: np.ndarray) -> str:
    return "".join(map(chr, ids.tolist()))


def test_each_distinct_unit_is_encoded_once():
    tokenizer = Recorder()
    encoder = UnitEncoder(before_spaces(), tokenizer)
    texts = ["to be or not to be", "", "to be", "be or"]
    assert [as_text(ids) for ids in encoder(texts)] == texts
    assert [as_text(ids) for ids in encoder(texts)] == texts
    given = [unit for group in tokenizer.given for unit in group]
    assert sorted(given) == sorted({b"to", b" be", b" or", b" not", b" to", b"be"})


def test_units_that_were_forgotten_are_encoded_again(monkeypatch):
    monkeypatch.setattr(units, "REMEMBERED", 100)
    tokenizer = Recorder()
    encoder = UnitEncoder(before_spaces(), tokenizer)
    texts = [" ".join(f"{number}" for number in range(start, start + 40)) for start in (0, 40, 80, 0, 120, 160, 40)]
    for text in texts:
        assert as_text(encoder([text, "often"])[0]) == text
    given = [unit for group in tokenizer.given for unit in group]
    assert given.count(b"often") == 1
    assert given.count(b" 50") == 2


def test_long_units_are_not_kept():
    tokenizer = Recorder()
    encoder = UnitEncoder(before_spaces(), tokenizer)
    for _ in range(2):
        assert as_text(encoder(["x" * 1000])[0]) == "x" * 1000
    assert tokenizer.lengths() == [1000, 1000]


@pytest.mark.parametrize("text", ["wörter " * (LONGEST // 2), "ß" * (2 * LONGEST + 7), "", "z" + " " * (LONGEST + 1)])
def test_no_text_that_is_given_to_the_tokenizer_is_longer_than_the_longest(text):
    later = Recorder()
    for encoder, tokenizers in (
        (UnitEncoder(before_spaces(), first := Recorder()), [first]),
        (WholeEncoder(first_whole := Recorder(), later), [first_whole, later]),
    ):
        before, ids, after = encoder(["before", text, "after"])
        assert (as_text(before), as_text(ids), as_text(after)) == ("before", text, "after")
        for tokenizer in tokenizers:
            for group in tokenizer.given:
                assert all(len(str(each, "utf-8") if isinstance(each, bytes) else each) <= LONGEST for each in group)
    assert all(part.startswith(" ") for group in later.given for part in group if " " in text)


# ---------------------------------------------------------------------------------------------- real tokenizers


@pytest.fixture(scope="module")
def sentencepiece_models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    data = [str(ROOT / "examples/data/english_b.jsonl.zst")]
    train_tokenizer(data, folder / "bpe.model", 1000)
    model = _proto(folder / "bpe.model")
    model.normalizer_spec.add_dummy_prefix = True
    (folder / "space_in_front.model").write_bytes(model.SerializeToString())
    # Where spaces are removed, every text is encoded as it is.
    model.normalizer_spec.remove_extra_whitespaces = True
    (folder / "as_it_is.model").write_bytes(model.SerializeToString())
    return {file.stem: file for file in folder.glob("*.model")}


def _proto(file: Path):
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(file.read_bytes())
    return model


@pytest.mark.parametrize("name", ["bpe", "space_in_front", "as_it_is"])
def test_a_long_text_has_the_ids_of_the_whole(sentencepiece_models, monkeypatch, name):
    monkeypatch.setattr(units, "LONGEST", 1000)
    text = ("It was the 2nd of May 1845, and nobody\tknew why. 🙂 " * 400).strip()
    whole = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_models[name]))
    assert load_tokenizer(sentencepiece_models[name]).encode([text])[0].tolist() == whole.encode(text)


@pytest.mark.parametrize("name", ["bpe", "space_in_front", "as_it_is"])
def test_a_long_text_without_spaces_comes_back(sentencepiece_models, monkeypatch, name):
    monkeypatch.setattr(units, "LONGEST", 1000)
    tokenizer = load_tokenizer(sentencepiece_models[name])
    text = "thequickbrownfox" * 500
    assert tokenizer.decode(tokenizer.encode([text])[0]) == text


def test_a_model_with_unused_pieces_is_given_whole_texts(sentencepiece_models, tmp_path):
    model = _proto(sentencepiece_models["bpe"])
    for piece in model.pieces[300:600:3]:
        piece.type = type(piece).UNUSED
    (tmp_path / "unused.model").write_bytes(model.SerializeToString())
    text = "It was the best of times, it was the worst of times. " * 20
    whole = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "unused.model"))
    assert load_tokenizer(tmp_path / "unused.model").encode([text])[0].tolist() == whole.encode(text)


_MEASURE = """
import resource, sys
from megacl.data.tokenizer import load_tokenizer
tokenizer = load_tokenizer(sys.argv[1])
tokenizer.encode(["warm up"])
text = sys.argv[2] * (20_000_000 // len(sys.argv[2]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(ids,) = tokenizer.encode([text])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - 2 * ids.nbytes)
"""


@pytest.mark.parametrize("name", ["bpe", pytest.param("as_it_is", marks=pytest.mark.long)])
@pytest.mark.parametrize("text", ["x", "It was the 2nd of May 1845. "])
def test_twenty_megabytes_of_one_text_take_little_memory_beside_the_ids(sentencepiece_models, name, text):
    # Whole, they take 50 to 100 bytes a character: 1 to 2 GB.
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(sentencepiece_models[name]), text],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert int(done.stdout) < 300e6
