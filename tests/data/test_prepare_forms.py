"""Preparing each form of input end to end: the folder is the one that JSON lines of the same texts make."""

import gzip
import io
import json
import random
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from folders import contents, documents_of, small_tokenizer, write_lines

from megacl.data.forms.reading import Reading
from megacl.data.manifest import read_inputs, read_manifest
from megacl.data.megatron import write_megatron
from megacl.data.prepare import prepare
from megacl.data.source import open_source
from megacl.data.tokenizer import Tokenizer
from megacl.data.verify import verify_source
from megacl.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(80)]
    return [" ".join(draw.choices(words, k=draw.randint(5, 60))) for _ in range(150)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, texts) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), texts)


def prepared(folder: Path, *inputs: Path | str, tokenizer: Tokenizer, **more) -> dict[str, bytes]:
    """The bytes of the shards that are made of the inputs, and none of what only records where they came from."""
    settings = {"validation": 0.2, "workers": 1, "source": "made", **more}
    prepare([str(name) for name in inputs], tokenizer=tokenizer, out=folder, **settings)
    assert verify_source(folder) == []
    assert not (folder / ".prepare").exists()
    return {name: content for name, content in contents(folder).items() if name.startswith(("train", "validation"))}


@pytest.fixture(scope="module")
def expected(tmp_path_factory, texts, tokenizer) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("expected")
    return prepared(folder / "out", write_lines(folder / "raw.jsonl", texts), tokenizer=tokenizer)


def write_parquet(folder: Path, texts: list[str]) -> Path:
    pq.write_table(pa.table({"meta": [{"text": text} for text in texts]}), folder / "raw.parquet", row_group_size=40)
    return folder / "raw.parquet"


def write_arrow(folder: Path, texts: list[str]) -> Path:
    table = pa.table({"meta": [{"text": text} for text in texts]})
    with pa.ipc.new_stream(str(folder / "raw.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=40)
    return folder / "raw.arrow"


def write_utf16(folder: Path, texts: list[str]) -> Path:
    lines = "".join(json.dumps({"meta": {"text": text}}) + "\n" for text in texts)
    (folder / "raw.jsonl.gz").write_bytes(gzip.compress(lines.encode("utf-16")))
    return folder / "raw.jsonl.gz"


def write_paragraphs(folder: Path, texts: list[str]) -> Path:
    (folder / "raw.txt").write_bytes("\n\n".join(texts).encode("utf-16"))
    return folder / "raw.txt"


@pytest.mark.parametrize("write", [write_parquet, write_arrow, write_utf16, write_paragraphs])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_shards_are_those_of_json_lines(tmp_path, texts, tokenizer, expected, write, workers):
    reading = Reading("meta.text", encoding="utf-16", text="paragraphs")
    found = prepared(tmp_path / "out", write(tmp_path, texts), tokenizer=tokenizer, reading=reading, workers=workers)
    assert found == expected
    assert read_manifest(tmp_path / "out").generations[0].settings == {
        "field": "meta.text", "encoding": "utf-16", "normalize": "none", "text": "paragraphs",
    }  # fmt: skip


def test_text_files_are_documents_in_the_order_of_their_names(tmp_path, texts, tokenizer, expected):
    (tmp_path / "raw").mkdir()
    for index, text in enumerate(texts):
        (tmp_path / "raw" / f"{index:04d}.txt").write_text(text)
    assert prepared(tmp_path / "out", tmp_path / "raw", tokenizer=tokenizer) == expected


def write_ids(prefix: Path, texts: list[str], tokenizer: Tokenizer, eos: bool) -> Path:
    end = [tokenizer.eos_id] if eos else []
    write_megatron(prefix, (np.append(ids, end).astype(np.int64) for ids in tokenizer.encode(texts)), "uint16")
    return prefix.with_suffix(".bin")


@pytest.mark.parametrize("eos", [True, False])
def test_token_ids_of_megatron_make_the_shards_of_their_texts(tmp_path, texts, tokenizer, expected, eos):
    name = write_ids(tmp_path / "raw", texts, tokenizer, eos)
    assert prepared(tmp_path / "out", name, tokenizer=tokenizer) == expected
    (record,) = read_inputs(tmp_path / "out", 1)
    assert (record.name, record.size) == (
        str(name), sum(path.stat().st_size for path in (name, name.with_suffix(".idx"))),
    )  # fmt: skip


def test_token_ids_stand_among_texts_in_the_order_of_the_inputs(tmp_path, texts, tokenizer):
    first, last = write_lines(tmp_path / "1.jsonl", texts[:50]), write_lines(tmp_path / "3.jsonl", texts[100:])
    write_ids(tmp_path / "2", texts[50:100], tokenizer, eos=True)
    report = prepare([str(tmp_path)], tokenizer=tokenizer, out=tmp_path / "out", validation=0, workers=2)
    assert documents_of(tmp_path / "out")["train"] == texts
    assert report.passed_over == ()
    with pytest.raises(DataError, match=r"generation 1 holds .*2\.bin already"):
        prepare([str(tmp_path / "2.idx")], tokenizer=tokenizer, out=tmp_path / "out", validation=0)
    assert first.exists()
    assert last.exists()


def test_token_ids_of_another_tokenizer_are_one_line(tmp_path, tokenizer):
    write_megatron(tmp_path / "raw", [np.array([5, 299, 300])], "uint16")
    with pytest.raises(DataError, match=r"raw\.bin: it has the token id 300, but the tokenizer's ids are below 300"):
        prepare([str(tmp_path / "raw.bin")], tokenizer=tokenizer, out=tmp_path / "out", validation=0)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_hashes_are_of_the_normalised_text(tmp_path, texts, tokenizer):
    raw = write_lines(tmp_path / "raw.jsonl", [unicodedata.normalize("NFD", f"é{text}ﬁ") for text in texts])
    done = write_lines(tmp_path / "done.jsonl", [f"é{text}fi" for text in texts])
    found = prepared(tmp_path / "a", raw, tokenizer=tokenizer, reading=Reading(normalize="nfkc"))
    assert found == prepared(tmp_path / "b", done, tokenizer=tokenizer)


def test_another_reading_of_the_same_file_is_not_the_same_command(tmp_path, texts, tokenizer):
    raw = write_lines(tmp_path / "raw.jsonl", texts)
    arguments = {"tokenizer": tokenizer, "out": tmp_path / "out", "validation": 0, "workers": 1}
    prepare([str(raw)], **arguments)
    assert prepare([str(raw)], **arguments, reading=Reading(encoding="UTF8")).generation == 1
    with pytest.raises(DataError, match=r"generation 1 holds .*raw\.jsonl already"):
        prepare([str(raw)], **arguments, reading=Reading(encoding="latin-1"))


# ---------------------------------------------------------------------------------------------- standard input


def pipe(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_standard_input_is_json_lines_known_by_their_content(tmp_path, monkeypatch, texts, tokenizer, expected):
    raw = write_lines(tmp_path / "raw.jsonl", texts).read_bytes()
    pipe(monkeypatch, raw)
    assert prepared(tmp_path / "out", "-", tokenizer=tokenizer, workers=2) == expected
    assert [each.name for each in read_inputs(tmp_path / "out", 1)] == ["-"]
    arguments = {"tokenizer": tokenizer, "out": tmp_path / "out", "validation": 0.2, "workers": 1}
    pipe(monkeypatch, raw)
    assert prepare(["-"], **arguments).generation == 1
    assert not (tmp_path / "out" / ".prepare").exists()
    extra = write_lines(tmp_path / "extra.jsonl", ["x"])
    with pytest.raises(DataError, match=r"generation 1 holds .*raw\.jsonl already, as -"):
        prepare([str(extra), str(tmp_path / "raw.jsonl")], **arguments)
    pipe(monkeypatch, b'{"text": "mehr"}\n')
    assert prepare(["-"], **arguments).generation == 2


def test_standard_input_is_plain_text_if_that_is_asked_for(tmp_path, monkeypatch, texts, tokenizer, expected):
    pipe(monkeypatch, "\n\n\n".join(texts).encode())
    assert prepared(tmp_path / "out", "-", tokenizer=tokenizer, reading=Reading(text="paragraphs")) == expected
    pipe(monkeypatch, b'{"text": "one"}\n')
    arguments = {"tokenizer": tokenizer, "out": tmp_path / "one", "validation": 0}
    prepare(["-"], **arguments, reading=Reading(text="document"))
    assert documents_of(tmp_path / "one")["train"] == ['{"text": "one"}\n']


def test_standard_input_of_a_command_that_failed_is_given_again(tmp_path, monkeypatch, texts, tokenizer, expected):
    raw = write_lines(tmp_path / "raw.jsonl", texts).read_bytes()
    bad = write_lines(tmp_path / "bad.jsonl", ["x"])
    bad.write_bytes(b"{broken")
    arguments = {"tokenizer": tokenizer, "out": tmp_path / "out", "validation": 0.2, "workers": 1, "source": "made"}
    pipe(monkeypatch, raw)
    with pytest.raises(DataError, match=r"bad\.jsonl:1"):
        prepare(["-", str(bad)], **arguments, block_bytes=10_000)
    pipe(monkeypatch, raw)
    assert prepared(tmp_path / "out", "-", tokenizer=tokenizer) == expected


def test_what_is_wrong_with_standard_input_is_one_line(tmp_path, monkeypatch, tokenizer):
    class Broken(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise OSError(5, "Input/output error")

    arguments = {"tokenizer": tokenizer, "out": tmp_path / "out", "validation": 0}
    for stdin, words in (
        (None, "standard input is closed"),
        (
            SimpleNamespace(closed=False, isatty=lambda: True),
            "documents are expected on standard input, which is a term",
        ),
        (io.TextIOWrapper(io.BytesIO(b"")), "standard input is empty"),
        (SimpleNamespace(closed=False, isatty=lambda: False, buffer=Broken()), "cannot be read: Input/output error"),
    ):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(DataError, match=f"^-: .*{words}") as caught:
            prepare(["-"], **arguments)
        assert "\n" not in str(caught.value)
    pipe(monkeypatch, b'{"text": "x"}\n')
    with pytest.raises(DataError, match="standard input is given twice"):
        prepare(["-", "-"], **arguments)
    with pytest.raises(ConfigError, match=r"standard input is not\. Write it to a file"):
        prepare(["-"], **arguments, task=(1, 2))
    pipe(monkeypatch, b"{broken\n")
    with pytest.raises(DataError, match=r"-:1: the line is not JSON"):
        prepare(["-"], **arguments)
    with pytest.raises(DataError, match="out: no manifest"):
        open_source(tmp_path / "out")
