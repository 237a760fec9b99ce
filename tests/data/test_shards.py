"""Shards and sources: what is written is what plain Arrow, `datasets` and the memory map read; damage is named."""

import hashlib
import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacl.data.manifest import Generation, Manifest, TokenizerRecord, publish_manifest
from megacl.data.shard_list import ShardList, ShardRow
from megacl.data.shards import join_documents, token_dtype, write_shard
from megacl.data.source import TokenStream, open_source
from megacl.data.verify import verify_source
from megacl.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
EOS = 2
VOCABULARY = 2000


def make_documents(seed: int, count: int, dtype: str = "uint16") -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    high = VOCABULARY if dtype == "uint16" else 100_000
    return [np.append(rng.integers(3, high, rng.integers(0, 40)), EOS).astype(dtype) for _ in range(count)]


def write(
    path: Path, documents: list[np.ndarray], dtype: str, *, split: str = "train", text_bytes: int = 1
) -> ShardRow:
    """A shard whose first document has all of the text, and whose hashes fit its split where a quarter is held out."""
    lengths = [text_bytes, *[0] * (len(documents) - 1)]
    hashes = [index + (2**62 if split == "train" else 0) for index in range(len(documents))]
    return write_shard(path, join_documents(documents, dtype, text_bytes=lengths, hashes=hashes), split=split)


def make_source(folder: Path, dtype: str = "uint16", vocab_size: int = VOCABULARY) -> dict[str, np.ndarray]:
    """A folder of 3 train shards and 1 validation shard in two generations; returns each split's flat tokens."""
    folder.mkdir(exist_ok=True)
    rows, flat = [], {"train": [], "validation": []}
    for seed, name in enumerate(["train-00000", "validation-00000", "train-00001", "train-00002"]):
        documents, split = make_documents(seed, 30, dtype), name.split("-")[0]
        row = write(folder / f"{name}.arrow", documents, dtype, split=split, text_bytes=1000 + seed)
        rows.append(replace(row, added=2 if seed == 3 else 1))
        flat[split] += documents
    (folder / "tokenizer.model").write_bytes(b"stands for a tokenizer")
    tokenizer = hashlib.sha256(b"stands for a tokenizer").hexdigest()
    shards = ShardList.of_rows(rows)
    generations = [
        Generation(
            generation=number,
            shards=len(shards.at(number)),
            train=shards.at(number).totals("train"),
            validation=shards.at(number).totals("validation"),
            fingerprint=shards.at(number).fingerprint(tokenizer, dtype),
            made_by="prepare",
            settings={},
        )
        for number in (1, 2)
    ]
    record = TokenizerRecord(file="tokenizer.model", fingerprint=tokenizer, vocab_size=vocab_size, eos_id=EOS)
    manifest = Manifest("megacl-data", 2, "tiny", dtype, record, 0.25, tuple(generations))
    publish_manifest(folder, manifest, shards, [])
    return {split: np.concatenate(documents) for split, documents in flat.items()}


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_datasets_and_plain_pyarrow_read_the_documents_of_a_shard(tmp_path, dtype):
    documents = make_documents(0, 50, dtype)
    row = write(tmp_path / "train-00000.arrow", documents, dtype, split="train", text_bytes=7)
    expected = [document.tolist() for document in documents]
    assert datasets.Dataset.from_file(str(tmp_path / row.path))["tokens"][:] == expected
    with pa.OSFile(str(tmp_path / row.path)) as file:
        table = pa.ipc.open_stream(file).read_all()
    kinds = [("tokens", pa.list_(pa.from_numpy_dtype(dtype))), ("text_bytes", pa.int64()), ("hash", pa.uint64())]
    assert table.schema == pa.schema(kinds)
    assert table.column("tokens").to_pylist() == expected
    assert table.column("text_bytes").to_pylist() == [7] + [0] * 49
    assert table.column("hash").to_pylist() == [2**62 + index for index in range(50)]
    assert table.column("tokens").num_chunks == 1


def test_a_row_says_what_the_file_holds_and_where_its_tokens_lie(tmp_path):
    documents = make_documents(0, 50)
    row = write(tmp_path / "train-00000.arrow", documents, "uint16", split="train", text_bytes=7)
    content = (tmp_path / "train-00000.arrow").read_bytes()
    flat = np.concatenate(documents)
    assert (row.path, row.split, row.documents, row.text_bytes) == ("train-00000.arrow", "train", 50, 7)
    assert (row.tokens, row.size, row.sha256) == (len(flat), len(content), hashlib.sha256(content).hexdigest())
    assert content[row.offset : row.offset + flat.nbytes] == flat.astype("<u2").tobytes()


def test_a_shard_without_documents_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one document"):
        write(tmp_path / "train-00000.arrow", [], "uint16", split="train", text_bytes=0)


def test_tokens_take_two_bytes_up_to_65536_pieces_and_four_beyond():
    assert [token_dtype(size) for size in (2, 65_536, 65_537)] == ["uint16", "uint16", "uint32"]


@pytest.fixture(scope="module")
def ragged(tmp_path_factory) -> tuple[TokenStream, np.ndarray]:
    """A stream over shards of 1, 2, 3, 50 and 1 tokens, and the same tokens as one array."""
    folder = tmp_path_factory.mktemp("ragged")
    parts = [np.arange(count, dtype=np.uint16) + 100 * index for index, count in enumerate([1, 2, 3, 50, 1])]
    rows = [
        write(folder / f"train-{index:05d}.arrow", [part], "uint16", split="train", text_bytes=3)
        for index, part in enumerate(parts)
    ]
    return TokenStream(folder, ShardList.of_rows(rows), "uint16"), np.concatenate(parts)


@given(data=st.data(), length=st.integers(0, 57))
def test_reading_is_slicing_the_documents_laid_end_to_end(ragged, data, length):
    stream, flat = ragged
    start = data.draw(st.integers(0, len(flat) - length))
    found = stream.read(start, length)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, flat[start : start + length])


@given(data=st.data(), length=st.integers(0, 57))
def test_gathering_is_slicing_at_every_start(ragged, data, length):
    stream, flat = ragged
    starts = np.array(data.draw(st.lists(st.integers(0, len(flat) - length), max_size=20)), np.int64)
    found = stream.gather(starts, length)
    assert (found.dtype, found.shape) == (np.int64, (len(starts), length))
    for row, start in zip(found, starts, strict=True):
        np.testing.assert_array_equal(row, flat[start : start + length])


@pytest.mark.parametrize(("start", "length"), [(-1, 3), (55, 3), (57, 1), (0, 58), (3, -1)])
def test_reading_beyond_the_stream_is_an_error(ragged, start, length):
    stream, _ = ragged
    with pytest.raises(ValueError, match=r"\[0, 57\)"):
        stream.read(start, length)
    if length >= 0:
        with pytest.raises(ValueError, match=r"\[0, 57\)"):
            stream.gather(np.array([2, start]), length)


def test_reading_inside_a_shard_copies_nothing_and_cannot_write(ragged):
    stream, _ = ragged
    first, second = stream.read(10, 20), stream.read(15, 20)
    assert np.shares_memory(first, second)
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1


def test_a_stream_travels_to_another_process_without_its_data(tmp_path):
    flat = make_source(tmp_path)["train"]
    stream = open_source(tmp_path).train
    stream.read(0, stream.tokens)
    packed = pickle.dumps(stream)
    assert len(packed) < 8000
    np.testing.assert_array_equal(pickle.loads(packed).read(0, len(flat)), flat)


def test_a_source_has_the_shards_of_its_generation(tmp_path):
    flat = make_source(tmp_path)
    first, last = open_source(tmp_path, 1), open_source(tmp_path)
    assert (first.generation, last.generation, last.name, last.path) == (1, 2, "tiny", str(tmp_path))
    assert (last.vocab_size, last.eos_id, last.dtype) == (VOCABULARY, EOS, "uint16")
    assert last.tokenizer_file == tmp_path / "tokenizer.model"
    assert (first.train.documents, last.train.documents, last.validation.documents) == (60, 90, 30)
    assert (first.train.text_bytes, last.train.text_bytes, last.validation.text_bytes) == (2002, 3005, 1001)
    assert first.fingerprint != last.fingerprint
    np.testing.assert_array_equal(last.train.read(0, last.train.tokens), flat["train"])
    np.testing.assert_array_equal(first.train.read(0, first.train.tokens), flat["train"][: first.train.tokens])
    np.testing.assert_array_equal(last.validation.read(0, last.validation.tokens), flat["validation"])


def test_opening_a_source_touches_no_shard(tmp_path):
    make_source(tmp_path)
    for shard in tmp_path.glob("*-*.arrow"):
        shard.unlink()
    source = open_source(tmp_path)
    with pytest.raises(DataError, match=r"train-00000\.arrow: the shard is missing\. Restore"):
        source.train.read(0, 1)


def test_a_source_may_have_more_shards_than_the_process_may_open_files(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    rows = [
        write(tmp_path / name / f"{index}", [np.array([index, EOS], np.uint32)], "uint32")
        for name in ("one", "two")
        for index in range(150)
    ]
    lists = ShardList.of_rows(rows[:150]), ShardList.of_rows(rows[150:])
    (tmp_path / "rows.pickle").write_bytes(pickle.dumps(lists))
    script = """
import pickle, resource, sys, threading
from pathlib import Path
import numpy as np
from megacl.data.source import TokenStream
from megacl.errors import DataError

folder = Path(sys.argv[1])
one, two = pickle.loads((folder / "rows.pickle").read_bytes())
streams = [TokenStream(folder / "one", one, "uint32"), TokenStream(folder / "two", two, "uint32")]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
right = []
def read(stream):
    found = stream.gather(np.arange(0, 300, 2), 2)
    right.append(found[:, 0].tolist() == list(range(150)) and stream.read(0, 300)[::2].tolist() == list(range(150)))
threads = [threading.Thread(target=read, args=(stream,)) for stream in streams * 2]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert right == [True] * 4, right
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 64))  # standard input, output and error
try:
    TokenStream(folder / "one", one, "uint32").read(0, 1)
except DataError as error:
    print(error)
"""
    found = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout == (
        f"{tmp_path}/one/0: the shard cannot be opened: Too many open files. "
        "Look at its permissions and at the process's limits (ulimit -a).\n"
    )


def test_what_an_earlier_generation_held_can_be_left_out(tmp_path):
    flat = make_source(tmp_path)
    early, late = open_source(tmp_path, 1), open_source(tmp_path, 2, since=1)
    assert (late.generation, late.since, late.train.documents, late.validation.documents) == (2, 1, 30, 0)
    np.testing.assert_array_equal(late.train.read(0, late.train.tokens), flat["train"][early.train.tokens :])
    assert len({early.fingerprint, late.fingerprint, open_source(tmp_path).fingerprint}) == 3
    with pytest.raises(DataError, match="generation 2 has no shard that generation 2 had not"):
        open_source(tmp_path, 2, since=2)


def test_a_generation_is_the_rows_that_had_come_and_not_gone_by_then():
    row = ShardRow("a", "train", 1, 5, 9, 100, 64, "0" * 64)
    facts = {"a": (1, 0), "b": (1, 3), "c": (2, 0), "d": (2, 4), "e": (3, 0)}
    rows = [replace(row, path=name, added=added, removed=removed) for name, (added, removed) in facts.items()]
    shards = ShardList.of_rows(rows)

    def names(chosen: ShardList) -> str:
        return "".join(each.path for each in chosen)

    assert [names(shards.at(generation)) for generation in (1, 2, 3, 4)] == ["ab", "abcd", "acde", "ace"]
    assert [names(shards.at(4, since)) for since in (1, 2, 3)] == ["ce", "e", ""]
    held = shards.until(3)  # as it was before generation 4 was begun
    assert [(each.path, each.removed) for each in held] == [("a", 0), ("b", 3), ("c", 0), ("d", 0), ("e", 0)]


def test_a_generation_that_does_not_exist_is_named(tmp_path):
    make_source(tmp_path)
    with pytest.raises(DataError, match="generation 3 is asked for, but the folder has 1 to 2"):
        open_source(tmp_path, 3)


def test_a_truncated_shard_is_named_on_opening(tmp_path):
    make_source(tmp_path)
    file = tmp_path / "train-00001.arrow"
    file.write_bytes(file.read_bytes()[:-8])
    stream = open_source(tmp_path).train
    stream.read(0, 5)
    with pytest.raises(DataError, match=r"train-00001\.arrow: the shard has \d+ bytes, but shards.arrow says \d+"):
        stream.read(0, stream.tokens)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda size: bytes(size), "not readable as an Arrow stream"),
        (lambda size: np.random.default_rng(0).bytes(size), "not readable as an Arrow stream"),
    ],
)
def test_a_shard_whose_header_is_garbled_is_named_on_opening(tmp_path, damage, problem):
    make_source(tmp_path)
    file = tmp_path / "train-00000.arrow"
    file.write_bytes(damage(file.stat().st_size))
    with pytest.raises(DataError, match=rf"train-00000\.arrow: .*{problem}"):
        open_source(tmp_path).train.read(0, 1)


def test_a_shard_that_holds_other_documents_in_as_many_bytes_is_named_on_opening(tmp_path):
    three, two = [np.array(tokens, np.uint16) for tokens in ([5, EOS], [EOS])], [np.array([5, EOS], np.uint16)] * 2
    write(tmp_path / "other", three, "uint16")
    row = write(tmp_path / "shard", two, "uint16")
    assert (tmp_path / "other").stat().st_size == row.size
    (tmp_path / "other").replace(tmp_path / "shard")
    with pytest.raises(DataError, match=r"holds 2 documents and 3 tokens at byte .* says 2 and 4"):
        TokenStream(tmp_path, ShardList.of_rows([row]), "uint16").read(0, 1)


def test_a_shard_of_another_type_is_named_on_opening(tmp_path):
    row = write(tmp_path / "a", [np.array([5, EOS], np.uint16)], "uint16")
    with pytest.raises(DataError, match=r"columns are tokens list<.*uint16>, .*, not tokens list<.*uint32>"):
        TokenStream(tmp_path, ShardList.of_rows([row]), "uint32").read(0, 1)


def test_an_undamaged_source_has_no_problems(tmp_path):
    make_source(tmp_path)
    steps = []
    assert verify_source(tmp_path, progress=lambda done, total: steps.append((done, total))) == []
    sizes = [file.stat().st_size for file in tmp_path.glob("*-*.arrow")]
    assert [step[1] for step in steps] == [sum(sizes)] * 4
    assert steps[-1][0] == sum(sizes)


def test_verify_names_every_damaged_file(tmp_path):
    make_source(tmp_path)
    flipped = tmp_path / "train-00001.arrow"
    content = bytearray(flipped.read_bytes())
    content[open_source(tmp_path).train.shards.row(1).offset + 3] ^= 1
    flipped.write_bytes(content)
    (tmp_path / "validation-00000.arrow").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"another")
    problems = verify_source(tmp_path)
    assert len(problems) == 3
    assert "tokenizer.model: it is not the tokenizer" in problems[0]
    assert "validation-00000.arrow: the shard is missing" in problems[1]
    assert "train-00001.arrow: its hash is not the one" in problems[2]
    open_source(tmp_path).train.read(0, 5)  # a flipped token is below what opening looks at


def test_verify_notices_a_missing_tokenizer_and_looks_at_one_generation_only(tmp_path):
    make_source(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "train-00002.arrow").unlink()
    assert [line.split(": ")[1] for line in verify_source(tmp_path, 1)] == ["the tokenizer's file is missing"]
    assert len(verify_source(tmp_path, 2)) == 2


def test_verify_notices_a_token_beyond_the_vocabulary(tmp_path):
    make_source(tmp_path, vocab_size=1000)
    assert all("but the vocabulary has 1000 tokens" in line for line in verify_source(tmp_path))
    assert len(verify_source(tmp_path)) == 4


def test_verify_notices_a_document_that_does_not_end(tmp_path):
    make_source(tmp_path)
    tree = json.loads((tmp_path / "manifest.json").read_text())
    tree["tokenizer"]["eos_id"] = 1
    (tmp_path / "manifest.json").write_text(json.dumps(tree))
    assert {line.split(": ")[1] for line in verify_source(tmp_path)} == {"a document in it does not end with EOS"}


def edit(folder: Path, change) -> None:
    tree = json.loads((folder / "manifest.json").read_text())
    change(tree)
    (folder / "manifest.json").write_text(json.dumps(tree))


def test_verify_notices_a_document_on_the_wrong_side_of_the_held_out_split(tmp_path):
    make_source(tmp_path)
    edit(tmp_path, lambda tree: tree.update(validation=0.5))
    wrong = {line.split(": ")[1] for line in verify_source(tmp_path)}
    assert wrong == {"it holds a document that does not belong to the train split"}


def test_verify_notices_wrong_counts(tmp_path):
    make_source(tmp_path)
    edit(tmp_path, lambda tree: tree["generations"][1]["train"].update(tokens=5))
    assert verify_source(tmp_path) == [f"{tmp_path}: the counts of generation 2 are not those of its shards"]


def test_a_folder_without_a_manifest_is_named_with_the_command_that_makes_one(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match=r"no manifest\.json there.*megacl prepare"):
            open_source(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.update(format="other"), "format is 'other', but this megacl reads megacl-data version 2"),
        (lambda tree: tree.update(version=1), "version is 1, but this megacl reads megacl-data version 2"),
        (lambda tree: tree.update(dtype="int8"), "dtype: input should be 'uint16' or 'uint32'; it is damaged"),
        (lambda tree: tree.pop("tokenizer"), "tokenizer: field required; it is damaged"),
        (lambda tree: tree.update(generations=[]), "generations: tuple should have at least 1 item"),
        (
            lambda tree: tree["generations"][1].update(shards=9),
            r"shards.arrow: it lists 4 shards of generation 2, but .* counts 9",
        ),
        (
            lambda tree: tree["generations"][1].update(fingerprint="0" * 64),
            "the list of shards is not the one that generation 2",
        ),
    ],
)
def test_a_manifest_that_cannot_be_is_named(tmp_path, change, message):
    make_source(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(DataError, match=message) as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_is_not_json_is_named(tmp_path):
    make_source(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "megacl')
    with pytest.raises(DataError, match="not valid JSON; it is damaged"):
        open_source(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"garbage", "half"])
def test_a_damaged_list_of_shards_is_named(tmp_path, content):
    make_source(tmp_path)
    file = tmp_path / "shards.arrow"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:300] if content == "half" else content)
    with pytest.raises(DataError, match=r"shards\.arrow: the list of shards is (damaged|missing)"):
        open_source(tmp_path)


@settings(max_examples=20)
@given(split=st.integers(0, 3), field=st.sampled_from(["documents", "tokens", "sha256", "split"]))
def test_the_fingerprint_depends_on_every_fact_about_a_shards_content(tmp_path_factory, split, field):
    folder = tmp_path_factory.mktemp("facts")
    make_source(folder)
    rows = [*open_source(folder).train.shards, *open_source(folder).validation.shards]
    other = {"split": "validation" if rows[split].split == "train" else "train", "sha256": "0" * 64}
    changed = [*rows]
    changed[split] = replace(rows[split], **{field: other.get(field, 1)})
    fingerprints = [ShardList.of_rows(each).fingerprint("a", "uint16") for each in (rows, changed, rows)]
    assert fingerprints[0] != fingerprints[1]
    assert fingerprints[0] == fingerprints[2]


def test_the_documented_way_to_read_a_folder_without_megacl_works(tmp_path):
    flat = make_source(tmp_path)
    page = (ROOT / "docs" / "data.md").read_text()
    names = {"folder": str(tmp_path)}
    exec(page.split("```python\n")[1].split("```")[0], names)
    np.testing.assert_array_equal(np.concatenate(names["shards"]), flat["train"])
