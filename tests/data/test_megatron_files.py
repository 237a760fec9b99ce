"""Megatron's .bin and .idx files: read as its own builder wrote them, written as it writes them, damage named."""

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
from fixtures.make_megatron import DOCUMENTS
from hypothesis import given
from hypothesis import strategies as st

from megacl.data.documents import cut_blocks, read_documents, read_segment
from megacl.data.forms.reading import Reading
from megacl.data.inputs import find_inputs
from megacl.data.megatron import open_megatron, write_megatron
from megacl.errors import DataError

FIXTURES = Path(__file__).parent / "fixtures"
WHOLE = [list(itertools.chain.from_iterable(document)) for document in DOCUMENTS]
EOS = 2


class Vocabulary:
    vocab_size, eos_id = 65536, EOS


def copy(folder: Path, name: str = "megatron") -> Path:
    """The files of a fixture as PREFIX.bin and PREFIX.idx in a folder; returns the prefix."""
    for suffix in (".bin", ".idx"):
        (folder / f"copy{suffix}").write_bytes((FIXTURES / f"{name}{suffix}").read_bytes())
    return folder / "copy"


def read(name: Path, block_bytes: int = 1000, vocabulary: type = Vocabulary) -> list[list[int]]:
    blocks = cut_blocks(find_inputs([str(name)], Reading()).files, Reading(), block_bytes)
    return [
        ids.tolist()
        for block in blocks
        for segment in block
        for ids in read_segment(segment, Reading(), vocabulary=vocabulary)
    ]


@pytest.mark.parametrize("name", ["megatron", "megatron-single"])
def test_what_megatrons_builder_wrote_is_read_document_by_document(name):
    dataset = open_megatron(str(FIXTURES / name))
    assert [dataset.tokens(index).tolist() for index in range(len(dataset))] == WHOLE


@pytest.mark.parametrize(("name", "dtype"), [("megatron-single", "int32")])
def test_what_is_written_is_to_the_byte_what_megatrons_builder_writes(tmp_path, name, dtype):
    assert write_megatron(tmp_path / "out", (np.array(ids, np.uint16) for ids in WHOLE), dtype) == len(WHOLE)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"out{suffix}").read_bytes() == (FIXTURES / f"{name}{suffix}").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.bin", "out.idx"]


@given(
    documents=st.lists(st.lists(st.integers(0, 300), max_size=5), max_size=8),
    dtype=st.sampled_from(["uint16", "int32", "int64"]),
)
def test_what_is_written_is_read_back(tmp_path_factory, documents, dtype):
    prefix = tmp_path_factory.mktemp("megatron") / "out"
    write_megatron(prefix, (np.array(ids, np.int64) for ids in documents), dtype)
    dataset = open_megatron(str(prefix))
    assert [dataset.tokens(index).tolist() for index in range(len(dataset))] == documents


def test_ids_that_do_not_fit_are_refused_and_nothing_is_left_behind(tmp_path):
    with pytest.raises(ValueError, match="ids from 1 to 70000 do not fit uint16"):
        write_megatron(tmp_path / "out", [np.array([1, 70_000])], "uint16")
    with pytest.raises(ValueError, match="no ids of type float32"):
        write_megatron(tmp_path / "out", [], "float32")
    assert list(tmp_path.iterdir()) == []


@given(block_bytes=st.integers(1, 120))
def test_an_eos_ends_a_document_wherever_it_stands_however_the_file_is_cut(block_bytes):
    expected = [[5, 6, 7], [8, 9, 10], [65535, 0, 1], [11, 12], [13], [], [14, 15, 16]]
    for name in ("megatron.bin", "megatron.idx", "megatron-single.bin"):
        assert read(FIXTURES / name, block_bytes) == expected


def test_a_document_without_tokens_and_one_of_two_eos_are_empty_documents(tmp_path):
    write_megatron(tmp_path / "out", map(np.array, ([3], [EOS], [4, EOS, EOS])), "uint16")
    assert read(tmp_path / "out.bin") == [[3], [], [4], []]


def test_ids_beyond_the_tokenizers_are_one_line(tmp_path):
    class Small:
        vocab_size, eos_id = 1000, EOS

    with pytest.raises(DataError, match=r"copy\.bin: it has the token id 65535, .* below 1000, .* --tokenizer"):
        read(copy(tmp_path).with_suffix(".bin"), vocabulary=Small)
    write_megatron(tmp_path / "negative", [np.array([1, -1])], "int32")
    with pytest.raises(DataError, match=r"negative\.bin: it has the token id -1"):
        read(tmp_path / "negative.bin")


def test_token_ids_are_no_texts_to_train_a_tokenizer_on():
    with pytest.raises(DataError, match=r"megatron\.bin: it holds token ids, and here texts are needed"):
        list(read_documents([str(FIXTURES / "megatron.bin")]))


def test_one_of_the_two_files_without_the_other_is_named_and_in_a_folder_passed_over(tmp_path):
    prefix = copy(tmp_path)
    (tmp_path / "more.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "model.bin").write_bytes(b"weights")
    (tmp_path / "train.idx").write_bytes(b"images")
    found = find_inputs([str(tmp_path)], Reading())
    assert [file.name for file in found.files] == [f"{prefix}.bin", str(tmp_path / "more.jsonl")]
    assert found.passed_over == (str(tmp_path / "model.bin"), str(tmp_path / "train.idx"))
    for gone in (".bin", ".idx"):
        copy(tmp_path).with_suffix(gone).unlink()
        for given_name in (".bin", ".idx"):
            with pytest.raises(DataError, match=rf"copy\{gone}: no such file"):
                read(prefix.with_suffix(given_name))


def test_files_whose_sizes_do_not_add_up_are_named(tmp_path):
    for suffix, words in ((".bin", "its sequences take 42 bytes, but"), (".idx", "it is truncated or damaged")):
        for change in (-2, -1, 1, 2):
            file = copy(tmp_path).with_suffix(suffix)
            content = file.read_bytes()
            file.write_bytes(content[:change] if change < 0 else content + bytes(change))
            with pytest.raises(DataError, match=words) as caught:
                read(tmp_path / "copy.bin")
            assert "\n" not in str(caught.value)
    for size in (0, 1, 33):
        index = copy(tmp_path).with_suffix(".idx")
        index.write_bytes(index.read_bytes()[:size])
        with pytest.raises(DataError, match=r"copy\.idx: not a Megatron index"):
            read(tmp_path / "copy.bin")


@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [
        (0, b"X", "not a Megatron index"),
        (9, struct.pack("<Q", 2), "of version 2"),
        (17, b"\x06", "ids of type 6"),
        (34, struct.pack("<i", 5), "do not lie one behind the other"),
        (34, struct.pack("<i", -4), "do not lie one behind the other"),
        (34 + 36, struct.pack("<q", 2), "do not lie one behind the other"),
        (34 + 108, struct.pack("<q", 1), "do not hold every sequence once"),
        (34 + 108 + 8, struct.pack("<q", 9), "do not hold every sequence once"),
        (34 + 108 + 48, struct.pack("<q", 8), "do not hold every sequence once"),
    ],
)
def test_an_index_that_is_damaged_is_named(tmp_path, offset, value, words):
    index = copy(tmp_path).with_suffix(".idx")
    content = bytearray(index.read_bytes())
    content[offset : offset + len(value)] = value
    index.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read(tmp_path / "copy.bin")
    assert str(caught.value).startswith(str(index))


def test_a_multimodal_set_is_refused(tmp_path):
    index = copy(tmp_path).with_suffix(".idx")
    index.write_bytes(index.read_bytes() + bytes(9))
    with pytest.raises(DataError, match="of a multimodal set, which cannot be read"):
        read(tmp_path / "copy.bin")
