"""Removing documents: generations without them, however they are named and whatever was killed on the way."""

import hashlib
import os
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from folders import contents, documents_of, small_tokenizer, write_lines

from megacl.data import generations
from megacl.data.dedup import dedup_documents
from megacl.data.generations import changing
from megacl.data.manifest import read_manifest
from megacl.data.prepare import merge, prepare
from megacl.data.remove import (
    Matches,
    RemoveReport,
    Wanted,
    find_documents,
    hashes_of_texts,
    read_hashes,
    remove_documents,
)
from megacl.data.source import open_source
from megacl.data.tokenizer import Tokenizer
from megacl.data.verify import verify_source
from megacl.errors import ConfigError, DataError

BLOCK = 6_000


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(80)]
    return [f"{number} " + " ".join(draw.choices(words, k=draw.randint(5, 60))) for number in range(240)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, texts) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), texts)


@pytest.fixture
def folder(tmp_path, texts, tokenizer) -> Path:
    """Two generations: documents 0 to 159, then 160 to 239."""
    for name, some in (("1", texts[:160]), ("2", texts[160:])):
        write_lines(tmp_path / f"{name}.jsonl", some)
        prepare([str(tmp_path / f"{name}.jsonl")], **common(tokenizer), out=tmp_path / "out")
    return tmp_path / "out"


def common(tokenizer: Tokenizer) -> dict:
    return {"tokenizer": tokenizer, "validation": 0.3, "workers": 1, "block_bytes": BLOCK}


def hash_of(text: str) -> int:
    return int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16)


def by_split(texts: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"train": [], "validation": []}
    for text in texts:
        found["validation" if hash_of(text) / 2**64 < 0.3 else "train"].append(text)
    return found


def in_any_order(found: dict[str, list[str]]) -> dict[str, list[str]]:
    return {split: sorted(texts) for split, texts in found.items()}


def hashes(texts: list[str]) -> np.ndarray:
    return np.array([hash_of(text) for text in texts], np.uint64)


def remove(folder: Path, wanted: Wanted, *, purge: bool = False, workers: int = 1) -> tuple[Matches, RemoveReport]:
    with changing(folder) as state:
        matches = find_documents(state, wanted, workers)
        return matches, remove_documents(state, matches, purge=purge, workers=workers)


def test_a_generation_without_the_documents_and_the_earlier_ones_as_they_were(folder, texts):
    before = {number: documents_of(folder, number) for number in (1, 2)}
    gone = texts[::7]
    matches, report = remove(folder, Wanted(hashes([*gone, "not there"])))
    assert (report.generation, report.files, report.unreadable) == (3, 0, ())
    left = [text for text in texts if text not in gone]
    assert in_any_order(documents_of(folder)) == in_any_order(by_split(left))
    assert {number: documents_of(folder, number) for number in (1, 2)} == before
    assert (matches.documents, matches.held_out) == (len(gone), len(by_split(gone)["validation"]))
    assert matches.text_bytes == sum(len(text.encode()) for text in gone)
    before_it, state = read_manifest(folder).generations[1:]
    assert (state.made_by, state.removed_documents) == ("remove", len(gone))
    assert state.train.tokens + state.validation.tokens + matches.tokens == (
        before_it.train.tokens + before_it.validation.tokens
    )
    assert verify_source(folder) == verify_source(folder, 2) == []
    assert not (folder / ".change").exists()


def test_shards_that_held_none_of_them_are_the_same_files(folder, texts):
    files = {file.name: file.stat().st_ino for file in folder.glob("*.arrow")}
    remove(folder, Wanted(hashes(texts[:1])))
    after = {file.name: file.stat().st_ino for file in folder.glob("*.arrow")}
    assert len(after.keys() - files.keys() - {"removed.arrow"}) == 1
    assert {name for name in files if after[name] != files[name]} <= {"shards.arrow", "inputs.arrow"}


def test_the_result_does_not_depend_on_workers(folder, texts, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    remove(folder, Wanted(hashes(texts[::5])), workers=1)
    remove(tmp_path / "other", Wanted(hashes(texts[::5])), workers=3)
    assert contents(folder) == contents(tmp_path / "other")


def test_what_was_removed_does_not_come_back_by_a_later_prepare(folder, texts, tokenizer):
    remove(folder, Wanted(hashes(texts[10:20])))
    file = write_lines(folder.parent / "again.jsonl", [*texts[5:25], "new one", texts[12]])
    report = prepare([str(file)], **common(tokenizer), out=folder)
    assert (report.generation, report.documents, report.removed_documents) == (4, 11, 11)
    held = [text for split in documents_of(folder).values() for text in split]
    assert not set(held) & set(texts[10:20])
    assert (held.count(texts[5]), held.count("new one")) == (2, 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_pattern_finds_what_re_finds_in_the_texts(folder, texts, workers):
    pattern = r"^\d*7 .*\bb?[a-e]{3}\b"
    gone = [text for text in texts if re.search(pattern, text)]
    assert 3 < len(gone) < 40
    matches, _ = remove(folder, Wanted(pattern=pattern), workers=workers)
    assert matches.hashes.tolist() == sorted(map(hash_of, gone))
    assert in_any_order(documents_of(folder)) == in_any_order(by_split([text for text in texts if text not in gone]))
    with pytest.raises(ConfigError, match=r"matching '\(' is not a regular expression: missing \)"):
        Wanted(pattern="(")


def test_documents_are_named_by_their_texts_or_a_file_of_hashes(folder, texts, tmp_path):
    raw = write_lines(tmp_path / "gone.jsonl", texts[3:6])
    assert hashes_of_texts([str(raw)]).tolist() == sorted(map(hash_of, texts[3:6]))
    file = tmp_path / "hashes.txt"
    file.write_text("".join(f"{hash_of(text):016X}\n" for text in texts[3:6]))
    assert read_hashes(file).tolist() == hashes_of_texts([str(raw)]).tolist()
    file.write_text("0123456789abcdef\nnot one\n")
    with pytest.raises(DataError, match=r"hashes\.txt:2: not a hash of 16 hexadecimal digits"):
        read_hashes(file)
    with pytest.raises(DataError, match=r"absent: cannot be read: No such file"):
        read_hashes(tmp_path / "absent")


def test_where_nothing_is_found_or_asked_for_anew_nothing_changes(folder):
    before = contents(folder)
    matches, report = remove(folder, Wanted(pattern="not there"), purge=True)
    assert (matches.documents, report.generation) == (0, None)
    assert contents(folder) == before
    assert remove(folder, Wanted(hashes(["not there"])))[1].generation == 3
    before = contents(folder)
    matches, report = remove(folder, Wanted(hashes(["not there"])), purge=True)
    assert (matches.documents, report.generation) == (0, None)
    assert contents(folder) == before


def test_a_document_that_is_not_there_when_its_removal_is_asked_for_does_not_come_in_later(folder, texts, tokenizer):
    more = write_lines(folder.parent / "more.jsonl", ["wanted", "not wanted"])
    prepare([str(more)], **common(tokenizer), out=folder, task=(1, 1))
    matches, report = remove(folder, Wanted(hashes(["not wanted", "never wanted"])))
    assert (matches.documents, len(matches.absent), report.generation, report.recorded) == (0, 2, 3, 2)
    assert documents_of(folder) == documents_of(folder, 2)
    assert verify_source(folder) == []
    assert merge(folder).removed_documents == 1
    again = write_lines(folder.parent / "again.jsonl", ["never wanted", "wanted too"])
    prepare([str(again)], **common(tokenizer), out=folder)
    held = [text for split in documents_of(folder).values() for text in split]
    assert sorted(held) == sorted([*texts, "wanted", "wanted too"])


def test_a_document_that_dedup_took_out_does_not_come_back_once_its_removal_was_asked_for(folder, texts, tokenizer):
    copy = next(f"{text} as it was" for text in texts if hash_of(f"{text} as it was") / 2**64 >= 0.3)
    other = write_lines(folder.parent / "other" / "other.jsonl", [copy, *texts[:60]])
    prepare([str(other)], **common(tokenizer) | {"validation": 0.999}, out=folder.parent / "held")
    prepare([str(write_lines(folder.parent / "copy.jsonl", [copy]))], **common(tokenizer), out=folder)
    with changing(folder) as state:
        assert dedup_documents(state, exact=True, against=[folder.parent / "held"]).train > 0
    assert copy not in documents_of(folder)["train"]
    matches, report = remove(folder, Wanted(hashes([copy])))
    assert (matches.documents, matches.absent.tolist(), report.recorded) == (0, [], 1)
    prepare([str(write_lines(folder.parent / "back.jsonl", [copy, "new"]))], **common(tokenizer), out=folder)
    assert copy not in documents_of(folder)["train"]


def test_verify_looks_at_earlier_generations_and_at_the_lists_too(folder, texts):
    pinned = {row.path for row in open_source(folder).train.shards}
    remove(folder, Wanted(hashes(texts[:200])))
    assert verify_source(folder) == []
    damaged = folder / min(pinned - {row.path for row in open_source(folder).train.shards})
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    (folder / "inputs.arrow").unlink()
    (folder / "removed.arrow").unlink()
    assert [line.split(": ", 1)[0] for line in verify_source(folder)] == [
        str(folder / name) for name in ("inputs.arrow", "removed.arrow", damaged.name)
    ]
    assert [line.split(": ", 1)[0] for line in verify_source(folder, 3)] == [
        str(folder / name) for name in ("inputs.arrow", "removed.arrow")
    ]


def test_prepare_stops_where_the_list_of_removed_documents_is_lost(folder, texts, tokenizer):
    remove(folder, Wanted(hashes(texts[10:20])))
    (folder / "removed.arrow").unlink()
    again = write_lines(folder.parent / "again.jsonl", texts[5:25])
    with pytest.raises(DataError, match=r"removed\.arrow: the list of removed documents is missing\. Restore it"):
        prepare([str(again)], **common(tokenizer), out=folder)


def test_a_purge_leaves_no_byte_of_the_documents_and_says_why_a_generation_is_gone(folder, texts):
    gone = [texts[200], next(text for text in texts[160:] if text in by_split(texts)["validation"])]
    remove(folder, Wanted(hashes(gone)))
    first = documents_of(folder, 1)
    left = documents_of(folder)
    matches, report = remove(folder, Wanted(hashes(gone)), purge=True)
    assert (matches.documents, report.generation, report.unreadable) == (0, 4, (2,))
    assert report.files == 2
    assert documents_of(folder) == documents_of(folder, 3) == left
    assert documents_of(folder, 1) == first
    with pytest.raises(
        DataError, match=r"out: generation 2 cannot be read any more: .* purged .* by generation 4\. Name"
    ) as caught:
        open_source(folder, 2)
    assert "\n" not in str(caught.value)
    for number in (1, 3, 4):
        assert verify_source(folder, number) == []
    with changing(folder) as state:
        assert find_documents(state, Wanted(hashes(gone)), 1).places == {}
        assert state.generations[1].purged_by == 4
    _, again = remove(folder, Wanted(hashes(gone)), purge=True)
    assert again.generation is None


@pytest.mark.long
def test_a_removal_that_is_killed_anywhere_ends_with_the_same_bytes(folder, texts, tmp_path, monkeypatch):
    class KilledError(BaseException):
        """Stands for a kill: nothing catches it."""

    wanted, start = Wanted(hashes(texts[::3])), tmp_path / "start"
    shutil.copytree(folder, start)
    remove(folder, wanted, purge=True)
    expected, kill, killed = contents(folder), 0, True
    while killed:
        kill += 1
        out, calls = tmp_path / f"kill {kill}", 0
        shutil.copytree(start, out)

        def count(function, kill=kill):
            def counted(*arguments, **named):
                nonlocal calls
                calls += 1
                if calls == kill:
                    raise KilledError
                return function(*arguments, **named)

            return counted

        monkeypatch.setattr(generations, "os", SimpleNamespace(**{**vars(os), "replace": count(os.replace)}))
        monkeypatch.setattr(Path, "unlink", count(Path.unlink))
        monkeypatch.setattr(shutil, "rmtree", count(shutil.rmtree))
        try:
            remove(out, wanted, purge=True)
            killed = False
        except KilledError:
            pass
        monkeypatch.undo()
        open_source(out)  # readers see the old state or the new
        remove(out, wanted, purge=True)
        assert contents(out) == expected, kill
    assert kill > 20


def test_a_purge_beside_unpublished_work_is_refused(folder, texts, tokenizer):
    more = write_lines(folder.parent / "more.jsonl", ["one more", *texts[:3]])
    prepare([str(more)], **common(tokenizer), out=folder, task=(1, 1))
    with pytest.raises(DataError, match=r"\.prepare: work of a prepare that is not published may hold the documents"):
        remove(folder, Wanted(hashes(texts[:1])), purge=True)
    assert remove(folder, Wanted(hashes(texts[:1])))[1].generation == 3


def test_a_folder_is_not_emptied(folder, texts):
    before = contents(folder)
    with pytest.raises(DataError, match=r"no document would be left\. Delete the folder instead"):
        remove(folder, Wanted(hashes(texts)))
    assert {name: content for name, content in contents(folder).items() if ".change" not in name} == before
    with pytest.raises(DataError, match=r"no manifest\.json there"), changing(folder.parent / "absent"):
        pass
    assert not (folder.parent / "absent").exists()
