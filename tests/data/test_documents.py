"""Every form of input gives the documents that were put into it, however it is cut; what is damaged is one line."""

import bz2
import codecs
import encodings.aliases
import gzip
import itertools
import json
import lzma
import os
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megacl.data.documents import cut_blocks, cut_portions_ahead, read_documents, read_segment
from megacl.data.forms import BadDocumentError
from megacl.data.forms.reading import Reading
from megacl.data.inputs import find_inputs
from megacl.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_content_size=False).compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
SOME_TEXTS = ["eins\n\nzwei", "ä\r\nb\r", "", "\U0001f600 x\u2028", "  ", "last"]

texts_drawn = st.lists(st.text(st.sampled_from("aä\n\r\u2028\U0001f600 {\x00"), max_size=20), max_size=12)


def json_lines(texts: Sequence[str], encoding: str = "utf-8") -> bytes:
    lines = (json.dumps({"text": text, "id": 1}, ensure_ascii=False) + "\n" for text in texts)
    return "".join(lines).encode(encoding)


def packed(content: bytes, suffix: str) -> bytes:
    """Two members, frames or streams behind one another, as parallel compressors write them."""
    half = len(content) // 2
    return COMPRESS[suffix](content[:half]) + COMPRESS[suffix](content[half:])


def write_ipc(path: Path, table: pa.Table, rows: int, kind: str = "stream", compression: str | None = None) -> None:
    new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with new(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=rows)


def write_form(path: Path, form: str, texts: Sequence[str], rows: int = 5) -> Path:
    """A file of the texts in a form, named by its ending; rows: in a row group or record batch."""
    table = pa.table({"id": pa.array(range(len(texts)), pa.int64()), "text": pa.array(texts, pa.string())})
    match form.split(" "):
        case [".parquet", *_]:
            pq.write_table(table, path, row_group_size=rows)
        case [".arrow", kind, *compression]:
            write_ipc(path, table, rows, kind, *compression)
        case [suffix] if suffix == ".jsonl":
            path.write_bytes(json_lines(texts))
        case [suffix]:
            path.write_bytes(packed(json_lines(texts), suffix.removeprefix(".jsonl")))
    return path


FORMS = [".jsonl", *(f".jsonl{suffix}" for suffix in COMPRESS)]
FORMS += [".parquet", ".arrow stream", ".arrow file", ".arrow stream lz4", ".arrow file zstd"]


def read(*names: Path | str, reading: Reading | None = None, block_bytes: int = 100, skip_bad: bool = False) -> list:
    """The documents of some inputs; each file's segments stand for all of its bytes."""
    reading = reading or Reading()
    found = find_inputs([str(name) for name in names], reading).files
    segments = list(itertools.chain.from_iterable(cut_blocks(found, reading, block_bytes)))
    for file in found:
        assert sum(each.cost for each in segments if each.file == file) == (file.size if segments else 0)
    return [text for each in segments for text in read_segment(each, reading, skip_bad)]


def refusal(*names: Path | str, reading: Reading | None = None, block_bytes: int = 100) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        read(*names, reading=reading, block_bytes=block_bytes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- the same documents


@given(
    texts=texts_drawn,
    form=st.sampled_from(FORMS),
    block_bytes=st.integers(1, 200) | st.just(10**9),
    rows=st.integers(1, 20),
)
def test_every_form_gives_the_same_documents_however_it_is_cut(tmp_path_factory, texts, form, block_bytes, rows):
    texts = [*texts, "last"]
    path = tmp_path_factory.mktemp("forms") / f"raw{form.split(' ')[0]}"
    assert read(write_form(path, form, texts, rows), block_bytes=block_bytes) == texts


def test_one_command_may_mix_all_forms(tmp_path):
    names = [
        write_form(tmp_path / f"{index:02d}{form.split(' ')[0]}", form, [form, *SOME_TEXTS])
        for index, form in enumerate(FORMS)
    ]
    (tmp_path / "99.txt").write_text("plain\n")
    expected = [text for form in FORMS for text in (form, *SOME_TEXTS)]
    assert read(*names) == expected
    assert read(tmp_path, block_bytes=10**6) == [*expected, "plain\n"]


@pytest.mark.parametrize("ending", [".ndjson", ".json", ".json.gz"])
def test_json_lines_may_be_called_otherwise(tmp_path, ending):
    content = json_lines(SOME_TEXTS)
    (tmp_path / f"raw{ending}").write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    assert read(tmp_path / f"raw{ending}") == SOME_TEXTS


def test_a_json_array_is_refused_with_what_takes_it_apart(tmp_path):
    (tmp_path / "raw.json").write_text('[\n  {"text": "a"},\n  {"text": "b"}\n]\n')
    assert "raw.json:1: the line begins a JSON array" in refusal(tmp_path / "raw.json")
    (tmp_path / "raw.json").write_text('[{"text": "a"}]')
    assert "raw.json:1: the line is not a JSON object" in refusal(tmp_path / "raw.json")


def json_says(line: bytes) -> str | None:
    """The text of a line by Python's own json, None if it has none that is UTF-8."""
    try:
        text = json.loads(line.decode())["text"]
        return text if isinstance(text, str) and text.encode() is not None else None
    except (ValueError, KeyError, TypeError):
        return None


@given(data=st.data())
def test_a_line_is_what_pythons_own_json_makes_of_it(data):
    whole = r'{"text": "aä\n\u00e9\ud83d\ude00", "x": [1, 2.5e9, null, "\ud83d"], "": {"text": NaN}}'
    line = bytearray(whole.encode())
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(line) - 1))
        replacement = data.draw(
            st.sampled_from([b"", b'"', b"\\", b"{", b"]", b",", b"0", b"\xff", b"\xc3", b"\0", b"ud800"])
        )
        line[place : place + data.draw(st.integers(0, 1))] = replacement
    try:
        found: str | None = Reading().text_of_line(bytes(line))
    except BadDocumentError:
        found = None
    assert found == json_says(bytes(line))


def test_what_datasets_saved_is_its_data_files_alone(tmp_path):
    import datasets

    made = datasets.Dataset.from_dict({"id": range(40), "text": [f"{number}\n" for number in range(40)]})
    made.select(range(10, 40)).save_to_disk(tmp_path / "one", num_shards=3)
    (tmp_path / "one" / "cache-0123.arrow").write_bytes((tmp_path / "one" / "data-00000-of-00003.arrow").read_bytes())
    assert read(tmp_path / "one") == [f"{number}\n" for number in range(10, 40)]
    assert [Path(name).name for name in find_inputs([str(tmp_path)], Reading()).passed_over] == [
        "cache-0123.arrow", "dataset_info.json", "state.json",
    ]  # fmt: skip
    splits = datasets.DatasetDict({"test": made.select(range(3)), "train": made.select(range(3, 9))})
    splits.save_to_disk(tmp_path / "several")
    assert read(tmp_path / "several") == [f"{number}\n" for number in range(9)]
    assert read(tmp_path / "several" / "test") == ["0\n", "1\n", "2\n"]
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    assert "one/state.json: it lists data-00001-of-00003.arrow, which is not there" in refusal(tmp_path / "one")


# ---------------------------------------------------------------------------------------------- plain text


def test_a_text_file_is_one_document_byte_for_byte(tmp_path):
    content = "\ufeff\n\n eins\r\n\r\nzwei\x00\u2028\n\n"
    (tmp_path / "a.txt").write_bytes(content.encode())
    (tmp_path / "empty.txt").touch()
    for suffix in COMPRESS:
        (tmp_path / f"z.txt{suffix}").write_bytes(packed(content.encode(), suffix))
    assert read(tmp_path, block_bytes=3) == [content, "", *[content] * 4]
    assert read(tmp_path / "a.txt", reading=Reading(encoding="utf-8-sig")) == [content[1:]]


def paragraphs_of(content: str) -> list[str]:
    """What stands between blank lines, in plain Python."""
    lines = content.split("\n")
    ends = ["\n"] * (len(lines) - 1) + [""]
    found: list[list[str]] = [[]]
    for line, end in zip(lines, ends, strict=True):
        if line.strip(" \t\r\x0b\x0c"):
            found[-1].append(line + end)
        else:
            found.append([])
    joined = ["".join(each) for each in found if each]
    return [text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n") for text in joined]


@given(
    content=st.text(st.sampled_from("ab\n\n\n\r \tä\u2028\xa0"), max_size=60),
    block_bytes=st.integers(1, 60),
    form=st.sampled_from([".txt", ".txt.gz", ".txt.xz"]),
    encoding=st.sampled_from(["utf-8", "utf-16", "utf-32-be"]),
)
def test_paragraphs_are_what_stands_between_blank_lines_however_the_file_is_cut(
    tmp_path_factory, content, block_bytes, form, encoding
):
    path = tmp_path_factory.mktemp("text") / f"raw{form}"
    raw = ("x\n" + content).encode(encoding)
    path.write_bytes(raw if form == ".txt" else packed(raw, form.removeprefix(".txt")))
    reading = Reading(encoding=encoding, text="paragraphs")
    assert read(path, reading=reading, block_bytes=block_bytes) == paragraphs_of("x\n" + content)


def test_text_files_may_be_equal_but_not_given_twice(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("the same")
    assert list(read_documents([str(tmp_path)])) == ["the same"] * 2
    with pytest.raises(DataError, match=r"a\.txt: its content is given twice"):
        list(read_documents([str(tmp_path), str(tmp_path / "a.txt")]))


# ---------------------------------------------------------------------------------------------- encodings, normal forms

ENCODED = [
    ("latin-1", "süß\n\nñ\r\n"), ("cp1252", "„süß“ €"), ("utf-16", "ä\U0001f600\n\nb"), ("utf-16-le", "\ufeffä\n"),
    ("utf-32", "ä\U0001f600\n"), ("utf-8-sig", "\ufeffä\n\n"), ("shift_jis", "日本語\nソ能"), ("gb18030", "中文€"),
    ("iso2022_jp", "日本\n\n語"), ("cp037", "plain\n\ntext"), ("koi8_r", "привет\n"), ("big5", "中文\n"),
]  # fmt: skip


@pytest.mark.parametrize(("encoding", "text"), ENCODED, ids=[each[0] for each in ENCODED])
def test_text_in_a_declared_encoding_is_the_text(tmp_path, encoding, text):
    texts = [text, "x", text * 3]
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts, encoding))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(texts, encoding)))
    (tmp_path / "b.txt").write_bytes(text.encode(encoding))
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(text.encode(encoding)))
    reading = Reading(encoding=encoding)
    for block_bytes in (1, 7, 10**6):
        assert read(tmp_path, reading=reading, block_bytes=block_bytes) == [*texts, *texts, text, text]
        reading_paragraphs = Reading(encoding=encoding, text="paragraphs")
        assert read(tmp_path / "b.txt", reading=reading_paragraphs, block_bytes=block_bytes) == paragraphs_of(text)


def test_where_files_are_cut_at_newlines_no_other_character_has_such_a_byte():
    everything = "".join(map(chr, [*range(10), *range(11, 0xD800), *range(0xE000, 0x10000)]))
    cuttable = set()
    for name in sorted({"utf_8_sig", *encodings.aliases.aliases.values()}):
        try:
            reading = Reading(encoding=name)
        except ConfigError:
            continue
        if reading.cuts_at_newlines:
            cuttable.add(reading.encoding)
            assert b"\n" not in everything.encode(name, "ignore"), name
            assert b"\n".decode(name) == "\n"
    assert {"utf-8", "utf-8-sig", "iso8859-1", "cp1252", "koi8-r", "ascii"} <= cuttable
    assert not any(name.startswith(("utf-16", "utf-32", "utf-7", "cp037", "iso2022")) for name in cuttable)


def test_a_byte_order_mark_before_json_lines_is_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + json_lines(SOME_TEXTS))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(codecs.BOM_UTF8 + b"\n" + json_lines(SOME_TEXTS)))
    for block_bytes in (1, 10**6):
        assert read(tmp_path, block_bytes=block_bytes) == SOME_TEXTS * 2


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("encoding", "wrong", "where"),
    [
        ("utf-8", b"\xff", r"the line is not UTF-8 \(byte 11 of it is 0xff\)"),
        ("ascii", b"\xc3\xa4", r"the line is not ASCII \(byte 11 of it is 0xc3\)"),
        ("cp1252", b"\x81", r"the line is not CP1252 \(byte 11 of it is 0x81\)"),
        ("utf-16-le", b"\x00\xdc", r"the line is not UTF-16-LE \(behind 10 characters of it\)"),
        ("shift_jis", b"\xff", r"the line is not SHIFT_JIS \(behind 10 characters of it\)"),
    ],
)
def test_a_byte_that_is_not_of_the_encoding_is_one_bad_line(tmp_path, suffix, encoding, wrong, where):
    good = json_lines(["eins", "zwei"], encoding)
    bad = '{"text": "'.encode(encoding) + wrong + '"}\n'.encode(encoding)
    content = good + "\n".encode(encoding) + bad + good
    path = tmp_path / f"raw.jsonl{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    reading = Reading(encoding=encoding)
    for block_bytes in (1, 30, 10**6):
        with pytest.raises(DataError, match=rf"^{path}:4: {where}; name the file's encoding with --encoding, or leave"):
            read(path, reading=reading, block_bytes=block_bytes)
        found = read(path, reading=reading, block_bytes=block_bytes, skip_bad=True)
        assert found == ["eins", "zwei", None, "eins", "zwei"]


def test_text_that_is_not_of_the_encoding_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"gut\n\nsch\xf6n\n\nfein\n")
    assert "a.txt:1: the text is not UTF-8 (byte 9 of it is 0xf6)" in refusal(tmp_path / "a.txt")
    assert "a.txt:3: the text is not UTF-8 (byte 4 of it is 0xf6)" in refusal(
        tmp_path / "a.txt", reading=Reading(text="paragraphs")
    )
    found = read(tmp_path / "a.txt", reading=Reading(text="paragraphs"), skip_bad=True)
    assert found == ["gut", None, "fein"]


def test_an_encoding_has_one_name_and_one_that_does_not_exist_is_named():
    assert Reading(encoding="UTF8") == Reading(encoding="utf-8") == Reading()
    assert Reading(encoding="latin1") == Reading(encoding="ISO-8859-1")
    for name, words in (("utf9", "did you mean utf"), ("latn-1", "did you mean latin-?1"), ("hex", "Give one such as")):
        with pytest.raises(ConfigError, match=f"encoding is '{name}', which Python does not know; .*{words}"):
            Reading(encoding=name)


@pytest.mark.parametrize("form", [".jsonl", ".parquet", ".arrow stream", ".txt"])
@pytest.mark.parametrize("normalize", ["none", "nfc", "nfkc"])
def test_text_is_normalised_only_if_that_is_asked_for(tmp_path, form, normalize):
    text = "e\u0301 \ufb01 \uac00 \u1100\u1161 x\u00b2\r\n"
    path = tmp_path / f"raw{form.split(' ')[0]}"
    path.write_bytes(text.encode()) if form == ".txt" else write_form(path, form, [text])
    expected = text if normalize == "none" else unicodedata.normalize(normalize.upper(), text)
    assert read(path, reading=Reading(normalize=normalize)) == [expected]


# ---------------------------------------------------------------------------------------------- fields

NESTED = {
    "text": "top", "meta.text": "dotted", "meta": {"text": "deep", "a.b": "odd", "more": {"x": "deepest"}},
    "pages": [{"text": "p0"}, {"text": "p1"}], "lines": ["l0", "l1"],
}  # fmt: skip
PATHS = [
    ("text", "top"), ("meta.text", "dotted"), ("meta.a.b", "odd"), ("meta.more.x", "deepest"),
    ("pages.1.text", "p1"), ("pages.0.text", "p0"), ("lines.1", "l1"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "expected"), PATHS)
def test_a_field_is_a_key_or_else_a_path_in_every_form(tmp_path, field, expected):
    (tmp_path / "a.jsonl").write_text(json.dumps(NESTED) + "\n")
    table = pa.Table.from_pylist([NESTED])
    pq.write_table(table, tmp_path / "b.parquet")
    write_ipc(tmp_path / "c.arrow", table, 5, "stream")
    write_ipc(tmp_path / "d.arrow", table, 5, "file")
    assert read(tmp_path, reading=Reading(field)) == [expected] * 4


@pytest.mark.parametrize(
    "field", ["nothing", "text.x", "meta.nothing", "pages.2.text", "pages.x", "pages.-1", "lines.1.x"]
)
def test_a_field_that_leads_nowhere_is_named_with_what_there_is(tmp_path, field):
    (tmp_path / "a.jsonl").write_text(json.dumps(NESTED) + "\n")
    assert f"a.jsonl:1: no field '{field}', only 'text', 'meta.text'" in refusal(
        tmp_path / "a.jsonl", reading=Reading(field)
    )


KINDS = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.dictionary(pa.int32(), pa.string()),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_columns_of_strings_and_of_utf8_bytes_are_text(tmp_path, kind):
    texts = ["eins", "ä\n", "", "eins"]
    table = pa.table(
        {
            "text": pa.array(texts).dictionary_encode()
            if pa.types.is_dictionary(kind)
            else pa.array([t.encode() for t in texts] if "binary" in str(kind) else texts, kind)
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    write_ipc(tmp_path / "b.arrow", table, 3, "stream")
    write_ipc(tmp_path / "c.arrow", table, 3, "file")
    assert read(tmp_path) == texts * 3


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pa.array(["a", "b", None, "c"]), "row 3: field 'text' is not a string but null"),
        (pa.array([1, 2, 3, 4]), "row 1: field 'text' is not a string but int"),
        (pa.array([b"a", b"\xff", b"b", b"c"]), "row 2: field 'text' is not UTF-8 (byte 1 of it is 0xff)"),
        (pa.array([b"a", b"\xff", b"b", b"c"]).view(pa.string()), "row 2: the text is not UTF-8 (byte 1 of it)"),
    ],
    ids=["null", "numbers", "bytes", "strings"],
)
def test_a_row_without_text_is_one_bad_document(tmp_path, ending, column, words):
    path = tmp_path / f"raw{ending}"
    table = pa.table({"text": column})
    pq.write_table(table, path) if ending == ".parquet" else write_ipc(path, table, 2)
    assert f"{path}: {words}" in refusal(path)
    assert len([text for text in read(path, skip_bad=True) if text is None]) in (1, 4)


@pytest.mark.parametrize("form", [".parquet", ".arrow stream", ".arrow file"])
def test_a_table_without_the_column_is_refused_with_the_columns_it_has(tmp_path, form):
    path = write_form(tmp_path / f"raw{form.split(' ')[0]}", form, ["a"])
    assert f"{path}: no column for field 'body', only 'id', 'text'; name the one with --field" in refusal(
        path, reading=Reading("body")
    )


def test_other_columns_are_not_read(tmp_path):
    table = pa.table(
        {
            "blob": [os.urandom(3000) for _ in range(20)],
            "meta": [{"text": f"{n}", "blob": os.urandom(999)} for n in range(20)],
        }
    )
    path = tmp_path / "raw.parquet"
    pq.write_table(table, path, compression="gzip", row_group_size=7)
    content = bytearray(path.read_bytes())
    metadata = pq.ParquetFile(path).metadata
    for group, column in itertools.product(range(metadata.num_row_groups), range(metadata.num_columns)):
        chunk = metadata.row_group(group).column(column)
        if chunk.path_in_schema != "meta.text":
            begin = chunk.dictionary_page_offset or chunk.data_page_offset
            content[begin : begin + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(content)
    assert read(path, reading=Reading("meta.text")) == [f"{n}" for n in range(20)]
    with pytest.raises(DataError, match="not a whole parquet file"):
        read(path, reading=Reading("blob"))


# ---------------------------------------------------------------------------------------------- what inputs name


def test_a_pattern_is_what_it_matches_in_order_each_file_once(tmp_path):
    for name in ("b/x/1.jsonl", "a/2.jsonl", "a/3.jsonl.gz", "a/notes.md", "c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        content = json_lines([name])
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    everything = ["a/2.jsonl", "a/3.jsonl.gz", "b/x/1.jsonl", "c.jsonl"]
    assert read(f"{tmp_path}/**/*.jsonl") == ["a/2.jsonl", "b/x/1.jsonl", "c.jsonl"]
    assert read(f"{tmp_path}/a/[0-9].*") == ["a/2.jsonl", "a/3.jsonl.gz"]
    assert read(f"{tmp_path}/**") == everything
    assert read(f"{tmp_path}/*") == everything
    found = find_inputs([f"{tmp_path}/a/*"], Reading())
    assert found.passed_over == (f"{tmp_path}/a/notes.md",)
    assert "/x/*.jsonl: no file matches this pattern" in refusal(f"{tmp_path}/x/*.jsonl")
    assert "/a/*.md: the pattern matches no file of documents" in refusal(f"{tmp_path}/a/*.md")
    odd = tmp_path / "odd[1].jsonl"
    odd.write_bytes(json_lines(["odd"]))
    assert read(odd) == ["odd"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raw.zip", "an archive; unpack it, and give the folder"),
        ("raw.tar.gz", "an archive; unpack it"),
        ("raw.csv", "not a form that can be read; the name of a file of documents ends with .jsonl"),
        ("raw.parquet.gz", "not a form that can be read"),
        ("none.parquet", "no such file or folder"),
        ("none.idx", "none.bin: no such file, and a Megatron dataset is a .bin and an .idx file"),
    ],
)
def test_an_input_of_another_kind_is_named(tmp_path, name, words):
    if not name.startswith("none"):
        (tmp_path / name).write_bytes(b"PK\x03\x04")
    assert words in refusal(tmp_path / name)


# ---------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_file_that_is_cut_off_or_garbled_is_named(tmp_path, suffix):
    whole = packed(json_lines([f"{number}" for number in range(20)]), suffix)
    between = len(
        COMPRESS[suffix](
            json_lines([f"{number}" for number in range(20)])[
                : len(json_lines([f"{number}" for number in range(20)])) // 2
            ]
        )
    )
    path = tmp_path / f"raw.jsonl{suffix}"
    for size in sorted({*range(1, len(whole), 3), len(whole) - 1} - {between}):
        path.write_bytes(whole[:size])
        assert "raw.jsonl" in (line := refusal(path))
        assert "cannot be decompressed" in line
    for content in (json_lines(["a"]), whole[:-9] + b"\xff" * 9, whole + b"garbage", b"PK\x03\x04" + bytes(50)):
        path.write_bytes(content)
        assert "cannot be decompressed" in refusal(path)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_file_may_hold_a_thousand_times_its_size_in_bounded_memory(tmp_path, suffix):
    line = json_lines(["x"])[:-1] + b" " * 3_000_000 + b"\n"
    (tmp_path / f"raw.jsonl{suffix}").write_bytes(COMPRESS[suffix](line * 12))
    assert read(tmp_path / f"raw.jsonl{suffix}", block_bytes=10**6) == ["x"] * 12


@pytest.mark.parametrize("form", [".parquet", ".arrow stream", ".arrow file"])
def test_a_table_that_is_cut_off_anywhere_is_named(tmp_path, form):
    path = write_form(tmp_path / f"raw{form.split(' ')[0]}", form, [f"{number}" * 9 for number in range(40)], rows=10)
    whole = path.read_bytes()
    for size in sorted({*range(1, len(whole), 13), *range(len(whole) - 20, len(whole))}):
        path.write_bytes(whole[:size])
        assert f"{path}: not a whole {form.split(' ')[0][1:]} file (" in refusal(path)


def test_a_stream_with_another_one_behind_it_is_named(tmp_path):
    path = write_form(tmp_path / "raw.arrow", ".arrow stream", ["a"])
    path.write_bytes(path.read_bytes() * 2)
    assert "not a whole arrow file (something follows behind the stream's end)" in refusal(path)


def test_a_parquet_file_that_is_garbled_inside_is_named(tmp_path):
    path = write_form(tmp_path / "raw.parquet", ".parquet", [f"{number}" * 9 for number in range(40)], rows=10)
    content = bytearray(path.read_bytes())
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(1)
    content[chunk.data_page_offset : chunk.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(content)
    assert f"{path}: not a whole parquet file (" in refusal(path)


# ---------------------------------------------------------------------------------------------- ahead


@pytest.mark.parametrize("form", [".parquet", ".arrow stream", ".arrow file"])
def test_a_large_row_group_is_cut_into_few_ranges_since_each_is_decoded_from_its_beginning(tmp_path, form):
    path = write_form(
        tmp_path / f"raw{form.split()[0]}", form, [f"{index} of many rows" for index in range(1000)], 1000
    )
    segments = list(itertools.chain.from_iterable(cut_blocks(find_inputs([str(path)], Reading()).files, Reading(), 50)))
    assert 5 < len(segments) <= 8
    assert [each.end - each.start for each in segments] == [1000 // len(segments)] * len(segments)


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    at_once=st.integers(0, 4),
    block_bytes=st.integers(1, 400),
)
def test_decompressing_ahead_in_threads_gives_the_same_blocks(tmp_path_factory, sizes, at_once, block_bytes):
    folder = tmp_path_factory.mktemp("ahead")
    for index, size in enumerate(sizes):
        content = json_lines([f"{index} {number}" for number in range(size)])
        path = folder / f"{index}.jsonl{'.gz' if index % 3 else ''}"
        path.write_bytes(gzip.compress(content) if index % 3 else content)
    files = find_inputs([str(folder)], Reading()).files
    portions = {10 * index: files[index : index + 2] for index in range(0, len(files), 2)}
    found = list(cut_portions_ahead(portions, Reading(), block_bytes, at_once))
    assert found == [
        (number, block) for number, portion in portions.items() for block in cut_blocks(portion, Reading(), block_bytes)
    ]


@pytest.mark.parametrize("at_once", [0, 1, 3])
def test_what_goes_wrong_ahead_is_raised_in_its_turn_and_leaves_no_thread(tmp_path, at_once):
    for index in range(4):
        (tmp_path / f"{index}.jsonl.gz").write_bytes(gzip.compress(json_lines([f"{index}"] * 9)))
    whole = (tmp_path / "2.jsonl.gz").read_bytes()
    (tmp_path / "2.jsonl.gz").write_bytes(whole[:-3])
    files = find_inputs([str(tmp_path)], Reading()).files
    before = threading.active_count()
    numbers: list[int] = []
    cut = cut_portions_ahead(dict(enumerate(zip(files, strict=True))), Reading(), 30, at_once)
    with pytest.raises(DataError, match=r"2\.jsonl\.gz: cannot be decompressed"):
        numbers.extend(number for number, _ in cut)
    assert set(numbers) >= {0, 1}
    cut = cut_portions_ahead(dict(enumerate(zip(files, strict=True))), Reading(), 30, at_once)
    next(cut)
    cut.close()
    for thread in threading.enumerate():
        if thread.daemon and thread.name.startswith("cut "):
            thread.join(10)
    assert threading.active_count() <= before


# ---------------------------------------------------------------------------------------------- memory

MEASURE = """
import resource, sys
from megacl.data.documents import cut_blocks, read_segment
from megacl.data.forms.reading import Reading
from megacl.data.inputs import find_inputs
read = lambda name: [len(text) for block in cut_blocks(find_inputs([name], Reading()).files, Reading())
                     for segment in block for text in read_segment(segment, Reading())]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small, large = sys.argv[1:]
read(small)
before = peak()
read(large)
print(peak() - before)
"""


@pytest.mark.parametrize("letter", ["a", "\U0001f600"])
def test_a_very_long_line_takes_a_small_multiple_of_its_length(tmp_path, letter):
    text = letter * (30_000_000 // len(letter.encode()))
    (tmp_path / "small.jsonl").write_bytes(json_lines(["x"]))
    size = (tmp_path / "large.jsonl").write_bytes(json_lines([text]))
    names = [str(tmp_path / name) for name in ("small.jsonl", "large.jsonl")]
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, *names], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert int(found.stdout) < 6 * size
