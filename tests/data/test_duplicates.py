"""Exact duplicates: what --dedup publishes is what plain Python makes of the texts, whatever the tasks and workers."""

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest
from folders import contents, documents_of, small_tokenizer, write_lines
from hypothesis import given
from hypothesis import strategies as st

from megacl.data.duplicates import is_known, is_repeated
from megacl.data.manifest import read_manifest
from megacl.data.prepare import merge, prepare
from megacl.data.tokenizer import Tokenizer
from megacl.data.verify import verify_source
from megacl.errors import DataError

BLOCK = 6_000


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(80)]
    return [" ".join(draw.choices(words, k=draw.randint(5, 60))) for _ in range(300)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, texts) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), texts)


@pytest.fixture(scope="module")
def raw(tmp_path_factory, texts) -> tuple[Path, list[str]]:
    """Seven files full of copies, inside a file and across files, one of them of copies only; and all their texts."""
    folder, draw = tmp_path_factory.mktemp("raw"), random.Random(1)
    files = [draw.choices(texts, k=draw.randint(20, 120)) for _ in range(6)]
    files.append([*files[0][:30], *files[3][:30]])
    for number, each in enumerate(files):
        write_lines(folder / f"{number}.jsonl", each)
    return folder, [text for each in files for text in each]


def common(tokenizer: Tokenizer, **more) -> dict:
    return {"tokenizer": tokenizer, "validation": 0.3, "workers": 1, "block_bytes": BLOCK, **more}


def is_held_out(text: str, validation: float = 0.3) -> bool:
    return int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) / 2**64 < validation


def by_split(texts: list[str], validation: float = 0.3) -> dict[str, list[str]]:
    return {
        "train": [text for text in texts if not is_held_out(text, validation)],
        "validation": [text for text in texts if is_held_out(text, validation)],
    }


hash_lists = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5) | st.integers(2**64 - 3, 2**64 - 1))


@given(hashes=hash_lists, known=st.lists(hash_lists, max_size=3))
def test_the_first_of_each_hash_that_nothing_else_holds_stays(hashes, known):
    arrays = [np.array(each, np.uint64) for each in known]
    held = {value for each in known for value in each}
    assert is_known(np.array(hashes, np.uint64), arrays).tolist() == [value in held for value in hashes]
    expected = [value in held or value in hashes[:index] for index, value in enumerate(hashes)]
    assert is_repeated(np.array(hashes, np.uint64), arrays).tolist() == expected


def test_of_copies_the_first_stays_in_the_order_of_the_inputs(tmp_path, raw, tokenizer):
    folder, texts = raw
    report = prepare([str(folder)], **common(tokenizer), out=tmp_path / "out", dedup=True)
    unique = list(dict.fromkeys(texts))
    assert documents_of(tmp_path / "out") == by_split(unique)
    assert (report.documents, report.removed_documents) == (len(unique), len(texts) - len(unique))
    state = read_manifest(tmp_path / "out").generations[0]
    assert (state.removed_documents, state.settings["dedup"]) == (report.removed_documents, True)
    assert verify_source(tmp_path / "out") == []


def test_duplicates_do_not_depend_on_workers_or_tasks(tmp_path, raw, tokenizer):
    folder, _ = raw
    for workers in (1, 3):
        out = tmp_path / f"workers {workers}" / "out"
        prepare([str(folder)], **common(tokenizer, workers=workers), out=out, dedup=True)
    for tasks in (2, 5):
        out = tmp_path / f"tasks {tasks}" / "out"
        for task in range(tasks, 0, -1):
            prepare([str(folder)], **common(tokenizer), out=out, dedup=True, task=(task, tasks))
        merge(out, workers=2)
    first, *others = [contents(each) for each in sorted(tmp_path.iterdir())]
    assert all(each == first for each in others)


def test_a_later_generation_holds_nothing_of_an_earlier_one(tmp_path, texts, tokenizer):
    out = tmp_path / "out"
    for number, (begin, end) in enumerate([(0, 150), (100, 250), (150, 160), (50, 300)]):
        write_lines(tmp_path / f"{number}.jsonl", [*texts[begin:end], f"new {number}"])
        prepare([str(tmp_path / f"{number}.jsonl")], **common(tokenizer), out=out, dedup=True)
    expected = [*texts[:150], "new 0", *texts[150:250], "new 1", "new 2", *texts[250:300], "new 3"]
    assert documents_of(out) == by_split(expected)
    assert documents_of(out, 1) == by_split([*texts[:150], "new 0"])
    before = contents(out)
    again = prepare([str(tmp_path / "1.jsonl")], **common(tokenizer), out=out, dedup=True)
    assert (again.generation, again.documents, again.removed_documents) == (2, 101, 50)
    write_lines(tmp_path / "all.jsonl", texts)
    with pytest.raises(DataError, match=r"all 300 documents of .*all\.jsonl and the other inputs are duplicates"):
        prepare([str(tmp_path / "all.jsonl")], **common(tokenizer), out=out, dedup=True)
    assert {name: content for name, content in contents(out).items() if ".prepare" not in name} == before


def test_what_another_folder_holds_out_is_never_trained_on_also_not_as_a_copy(tmp_path, texts, tokenizer):
    tests, web = tmp_path / "tests", tmp_path / "web"
    write_lines(tmp_path / "tests.jsonl", texts[:100])
    write_lines(tmp_path / "web.jsonl", [*texts[50:150], *texts[50:200]])
    prepare([str(tmp_path / "tests.jsonl")], **common(tokenizer, validation=0.9), out=tests)
    report = prepare(
        [str(tmp_path / "web.jsonl")], **common(tokenizer), out=web, dedup_against=[tests], source="web"
    )  # fmt: skip
    assert documents_of(web) == by_split(texts[100:200])
    assert not set(documents_of(web)["train"]) & set(documents_of(tests)["validation"])
    assert report.removed_documents == 250 - 100
    settings = read_manifest(web).generations[0].settings
    assert settings["dedup"] is True
    assert (settings["dedup_against"], settings["dedup_against_generations"]) == (str(tests), "1")
    with pytest.raises(DataError, match=r"absent: no manifest\.json there"):
        prepare([str(tmp_path / "web.jsonl")], **common(tokenizer), out=web, dedup_against=[tmp_path / "absent"])
