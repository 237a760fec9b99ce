"""Inspecting and exporting: what they say and write is what plain reading finds."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from folders import documents_of, small_tokenizer, write_lines
from runs import command_line

from megacl.data.export import export_megatron
from megacl.data.megatron import open_megatron
from megacl.data.overview import QUANTILES, look_into
from megacl.data.prepare import prepare
from megacl.data.source import open_source
from megacl.data.tokenizer import Tokenizer, load_tokenizer
from megacl.errors import DataError


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(80)]
    return [" ".join(draw.choices(words, k=draw.randint(1, 60))) for _ in range(200)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, texts) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), texts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, texts, tokenizer) -> Path:
    """Two generations, the first of 150 documents."""
    place = tmp_path_factory.mktemp("data")
    for name, some in (("1", texts[:150]), ("2", texts[150:])):
        file = write_lines(place / f"{name}.jsonl", some)
        prepare(
            [str(file)], tokenizer=tokenizer, out=place / "out", validation=0.3, workers=1, block_bytes=4000
        )  # fmt: skip
    return place / "out"


def test_an_overview_counts_what_is_there(folder, texts):
    found = look_into(folder, documents=1000)
    tokenizer = load_tokenizer(folder)
    lengths = sorted(len(ids) for ids in tokenizer.encode(texts))
    assert (found.lengths.documents, found.lengths.whole) == (len(texts), True)
    assert found.lengths.mean == pytest.approx(np.mean(lengths))
    assert [found.lengths.quantiles[0], found.lengths.quantiles[-1]] == [lengths[0], lengths[-1]]
    assert all(
        np.mean(np.array(lengths) <= value) >= q for q, value in zip(QUANTILES, found.lengths.quantiles, strict=True)
    )
    by_split = documents_of(folder)
    every = [*by_split["train"], *by_split["validation"]]
    assert len(found.starts) == len(every)
    for start in found.starts:
        assert any(text == start or text.startswith(start.removesuffix("...")) for text in every)
    assert found.bytes_on_disk == sum(f.stat().st_size for f in folder.glob("[tv]*-*.arrow"))
    assert found.bytes_of_others == 0
    assert [Path(each.name).name for each in found.inputs] == ["1.jsonl", "2.jsonl"]


def test_an_overview_of_an_earlier_generation_counts_that_one(folder):
    found = look_into(folder, 1, documents=0)
    assert (found.lengths.documents, found.starts, len(found.inputs)) == (150, (), 1)
    assert found.bytes_of_others > 0
    with pytest.raises(DataError, match="generation 3 is asked for"):
        look_into(folder, 3)


def test_the_command_prints_a_table_or_json(folder, capsys):
    status, out, _ = command_line(capsys, "data", "inspect", str(folder), "--documents", "2")
    assert status == 0
    assert "source 'out', generation 2 of 2" in out
    assert "0.3 of the documents held out" in out
    assert len([line for line in out.splitlines() if line.startswith("  '")]) == 2
    status, out, _ = command_line(capsys, "data", "inspect", str(folder), "--json")
    tree = json.loads(out)
    assert (status, tree["state"]["generation"], tree["lengths"]["documents"]) == (0, 2, 200)
    assert [each["made_by"] for each in tree["manifest"]["generations"]] == ["prepare", "prepare"]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_export_is_the_stream_document_by_document(folder, tmp_path, capsys, split):
    prefix = tmp_path / "sub" / "out"
    prefix.parent.mkdir()
    status, out, _ = command_line(capsys, "data", "export", str(folder), "--out", str(prefix), "--split", split)
    source = open_source(folder)
    stream = getattr(source, split)
    assert (status, out) == (
        0, f"{prefix}.bin, {prefix}.idx: {stream.documents:,} documents, {stream.tokens:,} tokens\n",
    )  # fmt: skip
    dataset = open_megatron(str(prefix))
    found = [dataset.tokens(index) for index in range(len(dataset))]
    assert np.concatenate(found).tolist() == stream.read(0, stream.tokens).tolist()
    assert all(tokens[-1] == source.eos_id and source.eos_id not in tokens[:-1] for tokens in found)
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.decode(tokens[:-1]) for tokens in found] == documents_of(folder)[split]


def test_an_export_prepares_to_the_same_documents(folder, tmp_path, tokenizer):
    export_megatron(folder, tmp_path / "all", generation=1)
    prepare([str(tmp_path / "all.bin")], tokenizer=tokenizer, out=tmp_path / "again", validation=0)
    assert documents_of(tmp_path / "again")["train"] == documents_of(folder, 1)["train"]


def test_an_empty_split_is_named(tmp_path, texts, tokenizer):
    file = write_lines(tmp_path / "raw.jsonl", texts[:5])
    prepare([str(file)], tokenizer=tokenizer, out=tmp_path / "out", validation=0)
    with pytest.raises(DataError, match=r"out: generation 1 has no validation documents\. Export the other split"):
        export_megatron(tmp_path / "out", tmp_path / "x", split="validation")
    assert not list(tmp_path.glob("x.*"))
