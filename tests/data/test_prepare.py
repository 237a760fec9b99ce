"""Preparing: the folder is what a few lines of plain Python make of the inputs, whatever the cut, workers and kills."""

import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megacl.data.documents import block_bytes_of, cut_blocks, read_documents, read_segment
from megacl.data.forms import RawFile
from megacl.data.forms.reading import Reading
from megacl.data.inputs import find_inputs, identify
from megacl.data.manifest import InputFile, read_inputs, read_manifest
from megacl.data.prepare import merge, prepare
from megacl.data.source import Source, open_source
from megacl.data.tokenizer import Tokenizer, load_tokenizer
from megacl.data.tokenizer_training import train_tokenizer
from megacl.data.verify import verify_source
from megacl.errors import ConfigError, DataError, LaunchError, MegaclError

ROOT = Path(__file__).resolve().parents[2]
GERMAN = str(ROOT / "examples/data/german.jsonl.zst")
BLOCK = 100_000


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """German documents with an odd one among them, about 0.4 MB."""
    found = list(read_documents([GERMAN]))[:120]
    return [*found[:5], "eins\nzwei\r\n\u2028 drei\x00</s>", *found[5:]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, texts) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_lines(folder / "all.jsonl", texts)
    return train_tokenizer([str(folder / "all.jsonl")], folder / "small.model", 600)


@pytest.fixture(scope="module")
def raw(tmp_path_factory, texts) -> Path:
    """The texts as one plain file."""
    return write_lines(tmp_path_factory.mktemp("raw") / "raw.jsonl", texts)


def lines_of(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts)


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_bytes(lines_of(texts))
    return path


def compress(path: Path, content: bytes) -> Path:
    """Two members or frames behind one another, as parallel compressors write them."""
    half = len(content) // 2
    one = gzip.compress if path.suffix == ".gz" else zstandard.ZstdCompressor(write_content_size=False).compress
    path.write_bytes(one(content[:half]) + one(content[half:]))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file, but for the one that prepare locks."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != ".lock"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def tokens_of(source: Source) -> tuple[list[int], list[int]]:
    return source.train.read(0, source.train.tokens).tolist(), source.validation.read(
        0, source.validation.tokens
    ).tolist()  # fmt: skip


def expected_tokens(texts: list[str], tokenizer: Tokenizer, validation: float) -> tuple[list[int], list[int]]:
    train: list[int] = []
    held_out: list[int] = []
    for text in texts:
        fraction = int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) / 2**64
        (held_out if fraction < validation else train).extend([*tokenizer.encode([text])[0], tokenizer.eos_id])
    return train, held_out


# ---------------------------------------------------------------------------------------------- what comes out


def test_the_streams_are_the_documents_in_order_each_ended_by_eos(tmp_path, raw, texts, tokenizer):
    report = prepare(
        [str(raw)], tokenizer=tokenizer, out=tmp_path / "out", validation=0.3, workers=1, block_bytes=BLOCK
    )
    source = open_source(tmp_path / "out")
    train, held_out = expected_tokens(texts, tokenizer, 0.3)
    assert tokens_of(source) == (train, held_out)
    assert (report.documents, report.tokens) == (len(texts), len(train) + len(held_out))
    assert report.text_bytes == sum(len(text.encode()) for text in texts)
    assert report.text_bytes == source.train.text_bytes + source.validation.text_bytes
    assert report.held_out == source.validation.documents == held_out.count(tokenizer.eos_id)
    assert (source.name, source.eos_id, source.vocab_size) == ("out", tokenizer.eos_id, tokenizer.vocab_size)
    assert len(source.train.shards) > 3
    assert verify_source(tmp_path / "out") == []
    assert load_tokenizer(source.tokenizer_file).fingerprint == source.tokenizer_fingerprint == tokenizer.fingerprint


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path, raw, texts, tokenizer):
    packed = compress(tmp_path / "more.jsonl.gz", lines_of([text + "!" for text in texts]))
    for workers in (1, 2, 3):
        prepare(
            [str(raw), str(packed)], tokenizer=tokenizer, out=tmp_path / str(workers) / "out", validation=0.3,
            workers=workers, block_bytes=BLOCK,
        )  # fmt: skip
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")


def test_how_inputs_are_cut_follows_from_their_size_so_that_small_ones_keep_many_workers_busy(
    tmp_path, large, tokenizer
):
    for workers in (1, 2):
        prepare([str(large)], tokenizer=tokenizer, out=tmp_path / str(workers), validation=0, workers=workers)
    for task in (1, 2):
        prepare([str(large)], tokenizer=tokenizer, out=tmp_path / "tasks", validation=0, workers=1, task=(task, 2))
    merge(tmp_path / "tasks", workers=1)
    shards = len(open_source(tmp_path / "1").train.shards)
    assert shards == -(-large.stat().st_size // 2**20)
    folders = [{**contents(tmp_path / name), "manifest.json": b""} for name in ("1", "2", "tasks")]
    assert folders[0] == folders[1] == folders[2]

    def block_bytes(*sizes: int) -> int:
        return block_bytes_of([RawFile("x", "jsonl", "", ("x",), size, 0) for size in sizes])

    assert [block_bytes(0), block_bytes(2**26), block_bytes(2**30, 2**28), block_bytes(2**40)] == [
        2**20, 2**20, 5 * 2**22, 2**25,
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_compressed_file_gives_the_same_streams(tmp_path, texts, tokenizer, suffix):
    packed = compress(tmp_path / f"raw.jsonl.{suffix}", lines_of(texts))
    prepare([str(packed)], tokenizer=tokenizer, out=tmp_path / "out", validation=0.3, workers=1, block_bytes=BLOCK)
    source = open_source(tmp_path / "out")
    assert tokens_of(source) == expected_tokens(texts, tokenizer, 0.3)
    assert len(source.train.shards) > 3


def test_a_folder_is_its_files_in_the_order_of_their_names(tmp_path, texts, tokenizer):
    (tmp_path / "raw" / "b").mkdir(parents=True)
    write_lines(tmp_path / "raw" / "c.jsonl", texts[60:])
    compress(tmp_path / "raw" / "b" / "2.jsonl.zst", lines_of(texts[30:60]))
    write_lines(tmp_path / "raw" / "a.jsonl", texts[:30])
    (tmp_path / "raw" / "README.md").write_text("no input")
    report = prepare([str(tmp_path / "raw")], tokenizer=tokenizer, out=tmp_path / "out", validation=0, workers=1)
    source = open_source(tmp_path / "out")
    assert tokens_of(source)[0] == expected_tokens(texts, tokenizer, 0)[0]
    assert len(source.train.shards) == 1  # small files share a block
    assert report.passed_over == (str(tmp_path / "raw" / "README.md"),)
    assert source.validation.tokens == 0


def test_a_folder_is_searched_behind_links_and_every_folder_once(tmp_path):
    raw, elsewhere = tmp_path / "raw", tmp_path / "elsewhere"
    (raw / "b").mkdir(parents=True)
    (elsewhere / "deep").mkdir(parents=True)
    write_lines(raw / "a.jsonl", ["a"])
    write_lines(raw / "b" / "x.jsonl", ["b"])
    write_lines(elsewhere / "deep" / "x.jsonl", ["c"])
    write_lines(elsewhere / "d.jsonl", ["d"])
    (raw / "c").symlink_to(elsewhere)
    (raw / "z").symlink_to(elsewhere)
    (raw / "b" / "circle").symlink_to(raw)
    (raw / "e.jsonl").symlink_to(write_lines(tmp_path / "e.jsonl", ["e"]))
    for name in ("UP.JSONL", "c/notes.md"):
        (raw / name).touch()
    found = find_inputs([str(raw)], Reading())
    names = ["a.jsonl", "b/x.jsonl", "c/d.jsonl", "c/deep/x.jsonl", "e.jsonl"]
    assert [file.name for file in found.files] == [str(raw / name) for name in names]
    assert found.passed_over == (str(raw / "UP.JSONL"), str(raw / "c/notes.md"))


def test_what_is_hidden_in_a_folder_is_not_looked_at_unless_it_is_named(tmp_path):
    (tmp_path / "raw" / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("a.jsonl", ".b.jsonl", ".ipynb_checkpoints/a.jsonl", ".notes"):
        write_lines(tmp_path / "raw" / name, [name])
    found = find_inputs([str(tmp_path / "raw")], Reading())
    assert ([file.name for file in found.files], found.passed_over) == ([str(tmp_path / "raw/a.jsonl")], ())
    for name in (".ipynb_checkpoints", ".b.jsonl"):
        assert len(find_inputs([str(tmp_path / "raw" / name)], Reading()).files) == 1


@pytest.mark.parametrize("inputs", ["", pytest.param("*", marks=pytest.mark.long), "**/*"])
def test_out_may_lie_in_an_input_folder(tmp_path, large, texts, tokenizer, inputs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    write_lines(tmp_path / "deep" / "a.jsonl", texts)
    (tmp_path / "b.jsonl").symlink_to(large)
    for out in ("data", "."):
        given = {"inputs": [inputs or "."], "tokenizer": tokenizer, "out": out, "validation": 0.3, "block_bytes": BLOCK}

        class Killed(BaseException):
            pass

        def stop(done: int, total: int) -> None:
            if done > total / 4:
                raise Killed

        with pytest.raises(Killed):
            prepare(**given, workers=1, progress=stop)
        prepare(**given, workers=1)
        assert prepare(**given, workers=1).generation == 1
        assert len(read_inputs(Path(out), 1)) == 2


def test_a_folder_with_something_that_cannot_be_read_in_it_is_refused(tmp_path):
    write_lines(tmp_path / "a.jsonl", ["a"])
    link = tmp_path / "b"
    for target, reason in (("absent", "No such file or directory"), ("b", "Too many levels of symbolic links")):
        link.symlink_to(target)
        with pytest.raises(DataError, match=rf"/b: a link that leads nowhere \({reason}\)\. Mend or remove the link"):
            find_inputs([str(tmp_path)], Reading())
        link.unlink()
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=r"pipe\.jsonl: not a file but a pipe"):
        find_inputs([str(tmp_path)], Reading())


def test_a_folder_that_may_not_be_read_is_named():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        closed = Path(folder) / "sub" / "closed"
        closed.mkdir(parents=True)
        write_lines(Path(folder) / "a.jsonl", ["a"])
        user = os.geteuid()
        closed.chmod(0)
        try:
            if user == 0:
                os.seteuid(65534)  # to root nothing is closed
            with pytest.raises(DataError, match="sub/closed: the folder cannot be read: Permission denied"):
                find_inputs([folder], Reading())
            with pytest.raises(DataError, match=r"closed/x\.jsonl: cannot be read: Permission denied"):
                find_inputs([str(closed / "x.jsonl")], Reading())
        finally:
            os.seteuid(user)
            closed.chmod(0o755)


def test_every_tokenizer_holds_out_the_same_documents(tmp_path, raw, texts, tokenizer):
    other = train_tokenizer([str(raw)], tmp_path / "other.model", 700, "bpe")
    held_out = []
    for name, each in (("one", tokenizer), ("two", other)):
        prepare([str(raw)], tokenizer=each, out=tmp_path / name, validation=0.3, workers=1)
        source = open_source(tmp_path / name)
        held_out.append(each.decode(source.validation.read(0, source.validation.tokens)))
    assert held_out[0] == held_out[1]


def test_a_vocabulary_beyond_65536_gives_four_byte_tokens(tmp_path, raw, texts, tokenizer):
    large = json.loads(make_byte_tokenizer())
    large["added_tokens"] += [
        {**large["added_tokens"][0], "id": 257 + index, "content": f"[{index}]", "special": True}
        for index in range(65_400)
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(large))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    prepare([str(raw)], tokenizer=loaded, out=tmp_path / "out", validation=0, workers=1)
    source = open_source(tmp_path / "out")
    assert source.dtype == "uint32"
    assert tokens_of(source)[0] == expected_tokens(texts, loaded, 0)[0]


def make_byte_tokenizer() -> str:
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({name: index for index, name in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    return made.to_str()


def test_empty_documents_and_blank_lines_are_passed_over_and_counted(tmp_path, tokenizer):
    (tmp_path / "in.jsonl").write_text(
        '{"text": "eins"}\n\n  \n{"text": ""}\n{"text": "zwei"}'
    )  # no newline at the end
    report = prepare([str(tmp_path / "in.jsonl")], tokenizer=tokenizer, out=tmp_path / "out", validation=0)
    assert (report.documents, report.empty_documents, report.bad_lines) == (2, 1, 0)
    assert tokens_of(open_source(tmp_path / "out"))[0] == expected_tokens(["eins", "zwei"], tokenizer, 0)[0]


def test_control_tokens_are_parsed_where_that_is_asked_for_and_it_is_recorded(tmp_path, tokenizer):
    raw = write_lines(tmp_path / "raw.jsonl", ["<s>eins</s>"])
    for name, reading in (("text", Reading()), ("control", Reading(control=True))):
        prepare([str(raw)], tokenizer=tokenizer, out=tmp_path / name, validation=0, reading=reading)
    (text,), (control,) = (tokenizer.encode(["<s>eins</s>"], control=control) for control in (False, True))
    assert tokens_of(open_source(tmp_path / "text"))[0] == [*text, tokenizer.eos_id]
    assert tokens_of(open_source(tmp_path / "control"))[0] == [*control, tokenizer.eos_id]
    settings = [read_manifest(tmp_path / name).generations[0].settings for name in ("text", "control")]
    assert [each.get("control") for each in settings] == [None, True]


def test_progress_reaches_the_size_of_the_inputs(tmp_path, raw, tokenizer):
    packed = compress(tmp_path / "raw.jsonl.gz", raw.read_bytes())
    steps: list[tuple[int, int]] = []
    prepare(
        [str(raw), str(packed)], tokenizer=tokenizer, out=tmp_path / "out", validation=0, workers=1, block_bytes=BLOCK,
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    total = raw.stat().st_size + packed.stat().st_size
    assert [step[1] for step in steps] == [total] * len(steps)
    assert len(steps) > 4
    assert steps == sorted(steps)
    assert steps[-1] == (total, total)


documents = st.lists(st.text(st.sampled_from("aä\n\r\u2028 {"), max_size=30), max_size=12)
some_files = st.lists(
    st.tuples(documents, st.sampled_from([".jsonl", ".jsonl.gz", ".jsonl.zst"])), min_size=1, max_size=4
)


@given(files=some_files, block_bytes=st.integers(1, 200), final_newline=st.booleans())
def test_however_the_inputs_are_cut_every_line_is_read_once_in_order(
    tmp_path_factory, files, block_bytes, final_newline
):
    folder = tmp_path_factory.mktemp("cut")
    expected = []
    for index, (found, suffix) in enumerate(files):
        content = lines_of([*found, f"last of {index}"])[: None if final_newline else -1]
        file = folder / f"{index}{suffix}"
        if suffix == ".jsonl":
            file.write_bytes(content)
        else:
            compress(file, content)
        expected += [*found, f"last of {index}"]
    blocks = list(cut_blocks(find_inputs([str(folder)], Reading()).files, Reading(), block_bytes))
    assert [text for block in blocks for segment in block for text in read_segment(segment, Reading())] == expected
    assert sum(segment.cost for block in blocks for segment in block) == sum(
        file.stat().st_size for file in folder.iterdir()
    )


# ---------------------------------------------------------------------------------------------- generations


def test_more_files_make_a_generation_and_leave_the_earlier_one_as_it_was(tmp_path, texts, tokenizer):
    first, second = write_lines(tmp_path / "1.jsonl", texts[:60]), write_lines(tmp_path / "2.jsonl", texts[60:])
    out = tmp_path / "out"
    prepare([str(first)], tokenizer=tokenizer, out=out, validation=0.4, workers=1, block_bytes=BLOCK, source="deutsch")
    before, early = contents(out), open_source(out)
    report = prepare([str(second)], tokenizer=tokenizer, out=out, validation=0.4, workers=1, block_bytes=BLOCK)
    assert (report.generation, report.documents) == (2, len(texts) - 60)
    assert tokens_of(open_source(out)) == expected_tokens(texts, tokenizer, 0.4)
    assert tokens_of(open_source(out, 1)) == tokens_of(early) == expected_tokens(texts[:60], tokenizer, 0.4)
    assert open_source(out, 1).fingerprint == early.fingerprint != open_source(out).fingerprint
    assert open_source(out).name == "deutsch"
    after = contents(out)
    assert {name for name in before if after[name] != before[name]} == {"manifest.json", "shards.arrow", "inputs.arrow"}
    assert verify_source(out, 1) == verify_source(out, 2) == []


def test_a_command_that_was_carried_out_does_nothing_and_reports_the_same(tmp_path, raw, tokenizer):
    reports = [prepare([str(raw)], tokenizer=tokenizer, out=tmp_path / "out", validation=0.3, workers=1)]
    before = contents(tmp_path / "out")
    reports += [prepare([str(raw)], tokenizer=tokenizer, out=tmp_path / "out", validation=0.3, workers=1)]
    assert contents(tmp_path / "out") == before
    assert {(each.generation, each.documents, each.tokens, each.held_out) for each in reports} == {
        (1, reports[0].documents, reports[0].tokens, reports[0].held_out)
    }


def test_a_file_is_known_by_its_content_whatever_its_name_and_date(tmp_path, monkeypatch, raw, tokenizer):
    monkeypatch.chdir(tmp_path)
    large = Path("large.jsonl")
    large.write_bytes(raw.read_bytes())
    arguments = {"tokenizer": tokenizer, "out": "out", "validation": 0, "workers": 1}
    report = prepare(["large.jsonl"], **arguments)
    before = contents(Path("out"))
    shutil.copy(large, "copy.jsonl")
    Path("link.jsonl").symlink_to(large)
    os.utime(large)
    for name in ("large.jsonl", "./large.jsonl", f"{tmp_path}/large.jsonl", "link.jsonl", "copy.jsonl"):
        again = prepare([name], **arguments)
        assert (again.generation, again.tokens) == (1, report.tokens)
    Path("more.jsonl").write_text('{"text": "mehr"}\n')
    with pytest.raises(DataError, match=r"out: generation 1 holds copy\.jsonl already, as /.*/large\.jsonl\."):
        prepare(["more.jsonl", "copy.jsonl"], **arguments)
    assert contents(Path("out")) == before
    assert prepare(["more.jsonl"], **arguments).generation == 2
    assert prepare(["copy.jsonl"], **arguments).tokens == report.tokens  # the first command once more
    assert open_source("out").generation == 2


def test_an_input_is_recorded_with_the_sha256_of_the_file_on_disk(tmp_path, raw, tokenizer):
    packed = compress(tmp_path / "packed.jsonl.gz", raw.read_bytes())
    prepare([str(raw), str(packed)], tokenizer=tokenizer, out=tmp_path / "out", validation=0, workers=2)
    for file, record in zip((raw, packed), read_inputs(tmp_path / "out", 1), strict=True):
        content = file.read_bytes()
        assert record == InputFile(str(file), len(content), hashlib.sha256(content).hexdigest(), generation=1)


@given(data=st.data())
@settings(max_examples=20)
def test_a_byte_that_changed_anywhere_makes_another_file_of_the_same_size_and_date(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("edit") / "file.jsonl"
    content = bytearray(3 * 2**20)
    file.write_bytes(content)
    before, facts = identify(find_inputs([str(file)], Reading()).files, 1), file.stat()
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    after = identify(find_inputs([str(file)], Reading()).files, 1)
    assert (before[0].name, before[0].size) == (after[0].name, after[0].size)
    assert before[0].sha256 != after[0].sha256


@pytest.mark.parametrize("change", ["grew", "was mended"])
def test_a_file_that_changed_since_an_earlier_generation_is_refused(tmp_path, monkeypatch, texts, tokenizer, change):
    monkeypatch.chdir(tmp_path)
    write_lines(Path("first.jsonl"), texts[:40])
    write_lines(Path("second.jsonl"), texts[40:80])
    arguments = {"tokenizer": tokenizer, "out": "out", "validation": 0, "workers": 1}
    prepare(["first.jsonl"], **arguments)
    prepare(["second.jsonl"], **arguments)
    before = contents(Path("out"))
    mended = [texts[40], texts[42], texts[41], *texts[43:80]]
    write_lines(Path("second.jsonl"), texts[40:90] if change == "grew" else mended)
    for inputs in (
        ["second.jsonl"],
        ["./second.jsonl"],
        [str(tmp_path / "second.jsonl")],
        ["first.jsonl", "second.jsonl"],
    ):
        with pytest.raises(
            DataError, match=r"generation 2 of out holds a file of this name with other content"
        ) as caught:
            prepare(inputs, **arguments)
        assert str(caught.value).startswith(f"{inputs[-1]}: ")
        assert "\n" not in str(caught.value)
    assert contents(Path("out")) == before
    write_lines(Path("new.jsonl"), texts[80:90])
    assert prepare(["new.jsonl"], **arguments).generation == 3


def test_what_an_interrupted_command_has_done_is_found_under_another_name_and_date(tmp_path, raw, tokenizer):
    bad, first = tmp_path / "bad.jsonl", tmp_path / "first.jsonl"
    bad.write_bytes(b"{broken\n")
    shutil.copy2(raw, first)
    arguments = {"tokenizer": tokenizer, "out": tmp_path / "out", "validation": 0, "workers": 1, "block_bytes": BLOCK}
    with pytest.raises(DataError, match=r"bad\.jsonl:1"):
        prepare([str(first), str(bad)], **arguments)
    kept = {file.stat().st_ino for file in (tmp_path / "out/.prepare").glob("*.arrow")}
    first.rename(tmp_path / "renamed.jsonl")
    os.utime(tmp_path / "renamed.jsonl", (1, 1))
    prepare([str(tmp_path / "renamed.jsonl")], **arguments)
    assert len(kept & {file.stat().st_ino for file in (tmp_path / "out").glob("train-*")}) == len(kept) >= 3


def test_what_cannot_join_a_folder_is_named(tmp_path, raw, texts, tokenizer):
    out = tmp_path / "out"
    more = write_lines(tmp_path / "more.jsonl", texts[:50])
    other = train_tokenizer([str(raw)], tmp_path / "other.model", 700)
    common = {"tokenizer": tokenizer, "out": out, "validation": 0.3, "workers": 1}
    prepare([str(raw)], **common, source="deutsch")
    before = contents(out)
    for changed, message in (
        ({"tokenizer": other}, "made with another tokenizer than .*other.model"),
        ({"validation": 0.2}, "prepared with --validation 0.3, not 0.2"),
        ({"source": "english"}, "its source is called 'deutsch', not 'english'"),
        ({}, r"generation 1 holds .*raw\.jsonl already"),
    ):
        inputs = [str(more)] if changed else [str(more), str(raw)]
        with pytest.raises(DataError, match=message):
            prepare(inputs, **{**common, **changed})
    assert contents(out) == before


def test_the_tokenizer_copied_into_the_folder_prepares_more_files(tmp_path, texts, tokenizer):
    first, second = write_lines(tmp_path / "1.jsonl", texts[:60]), write_lines(tmp_path / "2.jsonl", texts[60:])
    out = tmp_path / "out"
    prepare([str(first)], tokenizer=tokenizer, out=out, validation=0, workers=1)
    prepare([str(second)], tokenizer=load_tokenizer(out), out=out, validation=0, workers=1)
    assert tokens_of(open_source(out))[0] == expected_tokens(texts, tokenizer, 0)[0]


def test_a_folder_that_lost_its_manifest_is_not_written_over(tmp_path, raw, texts, tokenizer):
    prepare([str(raw)], tokenizer=tokenizer, out=tmp_path / "out", validation=0.3, workers=1)
    (tmp_path / "out" / "manifest.json").unlink()
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=r"it holds shards such as .* but no manifest\.json"):
        prepare([str(raw)], tokenizer=tokenizer, out=tmp_path / "out", validation=0.3, workers=1)
    assert contents(tmp_path / "out") == before


# ---------------------------------------------------------------------------------------------- interruptions

SCRIPT = """
import sys
from megacl.data.prepare import prepare
from megacl.data.tokenizer import load_tokenizer
if __name__ == "__main__":
    model, out, workers, block, *inputs = sys.argv[1:]
    prepare(
        inputs, tokenizer=load_tokenizer(model), out=out, validation=0.3, workers=int(workers), block_bytes=int(block)
    )
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory, texts) -> Path:
    """About 13 MB: long enough to be interrupted."""
    shuffler = random.Random(0)
    return write_lines(tmp_path_factory.mktemp("large") / "large.jsonl", shuffler.choices(texts, k=4000))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, large, tokenizer) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    prepare([str(large)], tokenizer=tokenizer, out=out, validation=0.3, workers=1, block_bytes=BLOCK)
    return contents(out)


def start(tmp_path: Path, large: Path, tokenizer: Tokenizer, workers: int = 2) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    arguments = [str(tokenizer.file), str(tmp_path / "out"), str(workers), str(BLOCK), str(large)]
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def children_of(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def finished_blocks(out: Path) -> set[str]:
    return {file.stem for file in (out / ".prepare").glob("*.json")}


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.long), 2])
def test_killed_at_any_moment_the_same_command_goes_on_to_the_same_bytes(
    tmp_path, large, tokenizer, undisturbed, workers
):
    out = tmp_path / "out"
    for kills in (3, 8):
        process = start(tmp_path, large, tokenizer, workers)
        wait_until(lambda wanted=kills: len(finished_blocks(out)) >= wanted)
        workers_alive = children_of(process)
        process.kill()
        process.wait()
        wait_until(lambda pids=workers_alive: not any(map(is_running, pids)), seconds=10)
        assert not (out / "manifest.json").exists()
    (out / ".prepare" / ".half-train.arrow.0123456789abcdef.tmp").write_bytes(b"half a shard")
    (out / ".prepare" / ".next.0123456789abcdef.tmp").mkdir()
    kept = {(out / ".prepare" / f"{key}-train.arrow").stat().st_ino for key in finished_blocks(out)}
    assert len(kept) >= 8
    prepare([str(large)], tokenizer=tokenizer, out=out, validation=0.3, workers=1, block_bytes=BLOCK)
    assert contents(out) == undisturbed
    assert kept <= {file.stat().st_ino for file in out.glob("train-*")}  # not done again
    assert not (out / ".prepare").exists()


def test_a_script_that_does_not_keep_its_work_from_its_workers_is_told_so(tmp_path, large, tokenizer):
    (tmp_path / "script.py").write_text(
        "import sys\nfrom megacl.data.prepare import prepare\nfrom megacl.data.tokenizer import load_tokenizer\n"
        f"prepare([sys.argv[1]], tokenizer=load_tokenizer(sys.argv[2]), out='out', workers=2, block_bytes={BLOCK})\n"
    )
    process = subprocess.run(
        [sys.executable, "script.py", str(large), str(tokenizer.file)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    last = process.stderr.splitlines()[-1]
    assert "LaunchError: a worker process could not start" in last
    assert 'under `if __name__ == "__main__":`' in last


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_interrupting_the_command_ends_its_workers(tmp_path, large, tokenizer, number):
    process = start(tmp_path, large, tokenizer)
    wait_until(lambda: len(finished_blocks(tmp_path / "out")) >= 2)
    workers = children_of(process)
    assert len(workers) >= 2
    process.send_signal(number)
    process.wait(timeout=10)
    assert process.returncode != 0
    wait_until(lambda: not any(map(is_running, workers)), seconds=10)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_worker_that_is_killed_is_reported_in_one_line(tmp_path, large, tokenizer):
    killed = []

    def kill_a_worker(done: int, total: int) -> None:
        if not killed:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            killed.append(int(workers[-1]))
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(LaunchError, match=r"a worker process was killed by SIGKILL.*fewer --workers") as caught:
        prepare(
            [str(large)], tokenizer=tokenizer, out=tmp_path / "out", validation=0.3, workers=2, block_bytes=BLOCK,
            progress=kill_a_worker,
        )  # fmt: skip
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_shards_that_moved_before_a_kill_but_have_no_manifest_are_made_again(tmp_path, large, tokenizer, undisturbed):
    out = tmp_path / "out"
    (out / ".prepare").mkdir(parents=True)
    for number in (0, 1, 99):
        (out / f"train-{number:05d}.arrow").write_bytes(b"left behind")
    prepare([str(large)], tokenizer=tokenizer, out=out, validation=0.3, workers=1, block_bytes=BLOCK)
    assert contents(out) == undisturbed


def test_after_a_bad_line_is_mended_the_other_files_are_not_done_again(tmp_path, raw, texts, tokenizer):
    bad = write_lines(tmp_path / "bad.jsonl", texts[:50])
    good = bad.read_bytes()
    bad.write_bytes(good + b"{broken\n")
    arguments = {"tokenizer": tokenizer, "out": tmp_path / "out", "validation": 0.3, "workers": 1, "block_bytes": BLOCK}
    with pytest.raises(DataError, match=r"bad\.jsonl:51: the line is not JSON"):
        prepare([str(raw), str(bad)], **arguments)
    kept = finished_blocks(tmp_path / "out")
    inodes = {(tmp_path / "out/.prepare" / f"{key}-train.arrow").stat().st_ino for key in kept}
    bad.write_bytes(good)
    prepare([str(raw), str(bad)], **arguments)
    unmended_blocks = raw.stat().st_size // BLOCK
    assert len(inodes & {file.stat().st_ino for file in (tmp_path / "out").glob("train-*")}) >= unmended_blocks >= 3
    assert tokens_of(open_source(tmp_path / "out")) == expected_tokens(texts + texts[:50], tokenizer, 0.3)


def test_what_was_done_with_skip_bad_is_not_taken_for_an_answer_without_it(tmp_path, raw, texts, tokenizer):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(lines_of(texts[:50]) + b"{broken\n")
    with pytest.raises(DataError, match="0 of 50 documents are held out"):
        prepare([str(bad)], tokenizer=tokenizer, out=tmp_path / "out", validation=1e-9, workers=1, skip_bad=True)
    assert len(finished_blocks(tmp_path / "out")) == 1
    with pytest.raises(DataError, match=r"bad\.jsonl:51"):
        prepare([str(bad)], tokenizer=tokenizer, out=tmp_path / "out", validation=1e-9, workers=1)


def test_two_at_once_in_one_folder_are_refused(tmp_path, large, raw, tokenizer):
    process = start(tmp_path, large, tokenizer, workers=1)
    wait_until(lambda: len(finished_blocks(tmp_path / "out")) >= 1)
    with pytest.raises(DataError, match="another prepare is at work there"):
        prepare([str(raw)], tokenizer=tokenizer, out=tmp_path / "out", validation=0.3, workers=1)
    process.kill()
    process.wait()


# ---------------------------------------------------------------------------------------------- bad input

BAD_LINES = [
    (b'{"text": "broken', r"the line is not JSON \(.* at character 10\); mend or delete it"),
    (b"plain text", "the line is not JSON"),
    (b"[" * 100_000, "the line is JSON that cannot be parsed"),
    (b'["text"]', "the line is not a JSON object with a field 'text'"),
    (b'{"content": "x", "id": 3}', "no field 'text', only 'content', 'id'; name the one .* with --field"),
    (b"{}", "no field 'text', only no field"),
    (b'{"text": null}', "field 'text' is not a string but null"),
    (
        b'{"text": "latin \xe4"}',
        r"the line is not UTF-8 \(byte 17 of it is 0xe4\); name the file's encoding with --encoding",
    ),
    (b'{"text": "half \\ud83d a pair"}', r"field 'text' holds \\ud83d, half of a surrogate pair"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=range(len(BAD_LINES)))
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst"])
def test_a_line_without_a_document_is_named_by_file_and_number(tmp_path, texts, tokenizer, line, message, suffix):
    content = lines_of(texts[:40]) + b"\n" + line + b"\n" + lines_of(texts[40:60])
    bad = tmp_path / f"bad{suffix}"
    bad.write_bytes(content) if suffix == ".jsonl" else compress(bad, content)
    arguments = {"tokenizer": tokenizer, "out": tmp_path / "out", "validation": 0, "workers": 1, "block_bytes": 20_000}
    with pytest.raises(DataError, match=message) as caught:
        prepare([str(bad)], **arguments)
    assert str(caught.value).startswith(f"{bad}:42: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()
    report = prepare([str(bad)], **arguments, skip_bad=True)
    assert (report.documents, report.bad_lines) == (60, 1)
    assert tokens_of(open_source(tmp_path / "out"))[0] == expected_tokens(texts[:60], tokenizer, 0)[0]


def test_a_bad_line_found_by_a_worker_is_the_same_one_line(tmp_path, texts, tokenizer):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(lines_of(texts[:80]) + b"{broken\n" + lines_of(texts[80:]))
    with pytest.raises(DataError) as caught:
        prepare([str(bad)], tokenizer=tokenizer, out=tmp_path / "out", validation=0, workers=2, block_bytes=BLOCK)
    assert str(caught.value).startswith(f"{bad}:81: the line is not JSON")
    assert "\n" not in str(caught.value)


def test_text_is_read_from_the_field_that_is_named(tmp_path, tokenizer):
    (tmp_path / "in.jsonl").write_text('{"content": "eins", "text": 1}\n{"content": "zwei"}\n')
    prepare(
        [str(tmp_path / "in.jsonl")],
        tokenizer=tokenizer,
        out=tmp_path / "out",
        validation=0,
        reading=Reading("content"),
    )
    assert tokens_of(open_source(tmp_path / "out"))[0] == expected_tokens(["eins", "zwei"], tokenizer, 0)[0]


BAD_INPUTS = [
    (["absent.jsonl"], "no such file or folder"),
    (["empty.jsonl"], "the file is empty"),
    (["empty.jsonl.gz"], "the file is empty"),
    (["hollow.jsonl.gz"], "nothing is in it but compression"),
    (["hollow.jsonl.zst"], "nothing is in it but compression"),
    (["folder"], r"the folder holds no file of documents; their names end with \.jsonl"),
    (["notes.md"], "not a form that can be read"),
    (["good.jsonl", "./good.jsonl"], "given twice, the first time as good.jsonl"),
    (["good.jsonl", "copy.jsonl"], "its content is given twice, the first time as good.jsonl"),
    (["cut.jsonl.gz"], r"cannot be decompressed \(it ends in the middle\)"),
    (["cut.jsonl.zst"], r"cannot be decompressed \(it ends in the middle\)"),
    (["false.jsonl.gz"], "cannot be decompressed"),
    (["false.jsonl.zst"], "cannot be decompressed"),
    (["blank.jsonl"], r"no documents in there \(0 bad lines, 2 documents without text\)"),
]


@pytest.mark.parametrize(("inputs", "message"), BAD_INPUTS, ids=[" ".join(each[0]) for each in BAD_INPUTS])
def test_an_input_that_cannot_be_read_is_named_in_one_line(tmp_path, monkeypatch, texts, tokenizer, inputs, message):
    monkeypatch.chdir(tmp_path)
    good = lines_of(texts[:30])
    for name in ("empty.jsonl", "empty.jsonl.gz", "notes.md"):
        Path(name).touch()
    Path("folder").mkdir()
    Path("good.jsonl").write_bytes(good)
    Path("copy.jsonl").write_bytes(good)
    Path("blank.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    for suffix in ("gz", "zst"):
        whole = compress(Path(f"cut.jsonl.{suffix}"), good).read_bytes()
        Path(f"cut.jsonl.{suffix}").write_bytes(whole[:-50])
        Path(f"false.jsonl.{suffix}").write_bytes(good)
        compress(Path(f"hollow.jsonl.{suffix}"), b"")
    with pytest.raises(DataError, match=message) as caught:
        prepare(inputs, tokenizer=tokenizer, out="out", validation=0, workers=1)
    assert str(caught.value).startswith(f"{inputs[-1]}: ")
    assert "\n" not in str(caught.value)
    assert not Path("out/manifest.json").exists()


def test_too_few_held_out_documents_is_an_error_that_counts_them(tmp_path, raw, texts, tokenizer):
    arguments = {"tokenizer": tokenizer, "out": tmp_path / "out", "workers": 1}
    found = sum(expected_tokens([text], tokenizer, 0.01)[1] != [] for text in texts)
    with pytest.raises(
        DataError, match=rf"{found} of {len(texts)} documents are held out at --validation 0.01, .* 20 "
    ):
        prepare([str(raw)], **arguments)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert prepare([str(raw)], **arguments, validation=0).held_out == 0


@pytest.mark.parametrize("wrong", [{"validation": 1.0}, {"validation": -0.1}, {"workers": 0}])
def test_a_setting_out_of_range_is_named(tmp_path, raw, tokenizer, wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))}; it must"):
        prepare([str(raw)], tokenizer=tokenizer, out=tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_named(tmp_path, raw, tokenizer):
    (tmp_path / "out").touch()
    with pytest.raises(DataError, match="out: not a folder"):
        prepare([str(raw)], tokenizer=tokenizer, out=tmp_path / "out")


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, raw, tokenizer):
    growing = tmp_path / "growing.jsonl"
    shutil.copy(raw, growing)

    def grow(done: int, total: int) -> None:
        with open(growing, "a") as file:
            file.write('{"text": "mehr"}\n')

    with pytest.raises(DataError, match=r"growing\.jsonl: the file changed while it was read"):
        prepare(
            [str(growing)], tokenizer=tokenizer, out=tmp_path / "out", validation=0, workers=1, block_bytes=BLOCK,
            progress=grow,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("happens", "message"),
    [
        (lambda file: file.unlink(), "cannot be read: No such file or directory"),
        (lambda file: compress(file, lines_of(["neu"] * 99)), "the file changed while it was read"),
        (lambda file: file.with_name("new").replace(file), "the file changed while it was read"),
    ],
    ids=["removed", "written again", "replaced"],
)
@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_compressed_file_that_is_not_the_one_that_was_found_is_named(
    tmp_path, raw, tokenizer, happens, message, suffix
):
    late = compress(tmp_path / f"late.jsonl.{suffix}", lines_of(["eins", "zwei"]))
    shutil.copy(late, tmp_path / "new")
    os.utime(tmp_path / "new", (1, 1))
    steps = []

    def progress(done: int, total: int) -> None:
        if not steps:
            happens(late)
        steps.append(done)

    with pytest.raises(DataError, match=message) as caught:
        prepare(
            [str(raw), str(late)], tokenizer=tokenizer, out=tmp_path / "out", validation=0, workers=1,
            block_bytes=BLOCK, progress=progress,
        )  # fmt: skip
    assert str(caught.value).startswith(f"{late}: ")
    assert "\n" not in str(caught.value)


def test_a_compressed_file_that_changes_while_it_is_read_is_named(tmp_path, texts, tokenizer):
    file = compress(tmp_path / "file.jsonl.zst", lines_of(texts))
    with pytest.raises(DataError, match=r"file\.jsonl\.zst: the file changed while it was read"):
        prepare(
            [str(file)], tokenizer=tokenizer, out=tmp_path / "out", validation=0, workers=1, block_bytes=BLOCK,
            progress=lambda done, total: os.utime(file),
        )  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst"])
def test_what_was_read_of_a_file_after_it_changed_is_not_kept_for_its_old_content(tmp_path, texts, tokenizer, suffix):
    # Texts that do not compress, or the whole file would be read before it changes.
    old = lines_of([random.Random(index).randbytes(500).hex() for index in range(2000)])
    file = tmp_path / f"file{suffix}"

    def write(content: bytes) -> None:
        file.write_bytes(content) if suffix == ".jsonl" else compress(file, content)

    write(old)
    changed = []

    def change(done: int, total: int) -> None:
        if not changed:
            changed.append(done)
            write(old.translate(bytes.maketrans(b"0", b"1")))

    arguments = {"tokenizer": tokenizer, "validation": 0, "workers": 1, "block_bytes": 2 * BLOCK}
    with pytest.raises(DataError, match="the file changed while it was read"):
        prepare([str(file)], **arguments, out=tmp_path / "out", progress=change)
    assert len(finished_blocks(tmp_path / "out")) >= 1
    write(old)
    prepare([str(file)], **arguments, out=tmp_path / "out")
    prepare([str(file)], **arguments, out=tmp_path / "undisturbed" / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed" / "out")


def test_a_file_that_changed_since_it_was_found_is_named_when_it_is_hashed(tmp_path, raw):
    late = tmp_path / "late.jsonl"
    shutil.copy(raw, late)
    found = find_inputs([str(raw), str(late)], Reading()).files
    with open(late, "a") as file:
        file.write('{"text": "mehr"}\n')
    with pytest.raises(DataError, match=r"late\.jsonl: the file changed while it was read"):
        identify(found, 2)
    late.unlink()
    with pytest.raises(DataError, match=r"late\.jsonl: cannot be read: No such file"):
        identify(found, 2)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_wherever_a_compressed_file_was_cut_off_it_is_named(tmp_path, suffix):
    lines = lines_of([f"document {index}" for index in range(20)])
    whole = compress(tmp_path / f"whole.jsonl.{suffix}", lines).read_bytes()
    one = gzip.compress if suffix == "gz" else zstandard.ZstdCompressor(write_content_size=False).compress
    between = len(one(lines[: len(lines) // 2]))  # two files behind one another; the first one alone is whole
    cut = tmp_path / f"cut.jsonl.{suffix}"
    for size in set(range(1, len(whole))) - {between}:
        cut.write_bytes(whole[:size])
        found = find_inputs([str(cut)], Reading()).files
        with pytest.raises(DataError, match=rf"cut\.jsonl\.{suffix}: cannot be decompressed"):
            list(cut_blocks(found, Reading(), 30))  # blocks of a line each


def test_a_name_that_is_not_utf8_is_refused_before_anything_is_done(tmp_path, raw, tokenizer):
    folder = tmp_path / "raw"
    folder.mkdir()
    name = os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jsonl")
    shutil.copy(raw, name)
    arguments = {"tokenizer": tokenizer, "validation": 0, "workers": 1}
    with pytest.raises(DataError, match=r"caf\\xe9\.jsonl: the file's name is not UTF-8") as caught:
        prepare([str(folder)], **arguments, out=tmp_path / "out")
    str(caught.value).encode()
    with pytest.raises(ConfigError, match=r"source is '.*dce9', which is not UTF-8"):
        prepare([str(raw)], **arguments, out=os.fsdecode(os.fsencode(tmp_path) + b"/out\xe9"))
    with pytest.raises(ConfigError, match=r"field is '.*dce9', which is not UTF-8"):
        prepare([str(raw)], **arguments, out=tmp_path / "out", reading=Reading("\udce9"))
    assert not (tmp_path / "out" / ".prepare").exists()
    os.rename(name, os.fsdecode(os.fsencode(folder) + b"/notes\xe9"))
    shutil.copy(raw, folder)
    assert find_inputs([str(folder)], Reading()).passed_over == (f"{folder}/notes\\xe9",)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_with_room_the_same_command_goes_on(
    tmp_path, large, tokenizer, undisturbed, workers
):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mount.returncode != 0:
        pytest.skip("this test needs the right to mount a small tmpfs")
    try:
        arguments = {"tokenizer": tokenizer, "out": disk / "out", "validation": 0.3, "workers": workers}
        with pytest.raises(MegaclError, match="no space left on the device") as caught:
            prepare([str(large)], **arguments, block_bytes=BLOCK)
        assert isinstance(caught.value, DataError)
        assert "\n" not in str(caught.value)
        assert not (disk / "out" / "manifest.json").exists()
        subprocess.run(["mount", "-o", "remount,size=60m", str(disk)], check=True)
        prepare([str(large)], **arguments, block_bytes=BLOCK)
        assert contents(disk / "out") == undisturbed
    finally:
        subprocess.run(["umount", str(disk)], check=True)
