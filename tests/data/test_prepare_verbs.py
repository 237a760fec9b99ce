"""Tasks, merging, duplicates and removal as a user types them: what is printed, and one line for what is wrong."""

import random
from pathlib import Path

import pytest
from folders import documents_of, small_tokenizer, write_lines
from runs import command_line


@pytest.fixture
def raw(tmp_path) -> Path:
    """Three files: 90 documents, among them 6 copies."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(80)]
    texts = [" ".join(draw.choices(words, k=draw.randint(20, 60))) for _ in range(84)]
    for number in range(3):
        write_lines(tmp_path / "raw" / f"{number}.jsonl", [*texts[number * 28 : number * 28 + 28], *texts[:2]])
    small_tokenizer(tmp_path, texts)
    return tmp_path / "raw"


def test_tasks_are_prepared_merged_and_cleared_of_duplicates(raw, tmp_path, capsys):
    out = tmp_path / "out"
    common = [
        "prepare",
        str(raw),
        "--tokenizer",
        str(tmp_path / "small.model"),
        "--out",
        str(out),
        "--validation",
        "0.4",
    ]
    status, said, _ = command_line(capsys, *common, "--workers", "1", "--task", "1/2")
    assert (status, "out: done, and waits for the other tasks and a merge, " in said) == (0, True)
    status, said, err = command_line(capsys, "data", "merge", str(out))
    assert (status, said) == (2, "")
    assert err == f"DataError: {out}: task 2/2 is not done. Run the same prepare with --task 2/2, then merge.\n"
    for task in ("1/2", "2/2"):
        assert command_line(capsys, *common, "--task", task)[0] == 0
    status, said, _ = command_line(capsys, "data", "merge", str(out))
    assert (status, said.startswith(f"{out}: generation 1, 90 documents (")) == (0, True)
    status, said, _ = command_line(capsys, "data", "dedup", str(out), "--exact", "--dry-run")
    assert (status, said.splitlines()[-1]) == (0, "nothing was changed")
    status, said, _ = command_line(capsys, "data", "dedup", str(out), "--near", "0.9", "--workers", "1")
    assert (status, "out: 6 duplicates (" in said, "generation 2 is without them" in said) == (0, True, True)
    assert len({*documents_of(out)["train"]}) == len(documents_of(out)["train"])
    status, _, err = command_line(capsys, "data", "dedup", str(out))
    assert (status, err) == (2, "ConfigError: say what a duplicate is: --exact, or --near SIMILARITY, such as 0.8.\n")


@pytest.mark.parametrize(
    ("others", "line"),
    [
        (1, "passed over: 1 file of another kind, {raw}/0.out"),
        (3, "passed over: 3 files of other kinds, {raw}/0.out, {raw}/1.out, {raw}/2.out"),
        (4, "passed over: 4 files of other kinds, {raw}/0.out, {raw}/1.out, {raw}/2.out, ..."),
    ],
)
def test_files_of_other_kinds_are_named_in_the_last_line(raw, tmp_path, capsys, others, line):
    for number in range(others):
        (raw / f"{number}.out").touch()
    common = ["prepare", str(raw), "--tokenizer", str(tmp_path / "small.model"), "--out", str(tmp_path / "out")]
    status, said, _ = command_line(capsys, *common, "--validation", "0", "--workers", "1")
    assert (status, said.splitlines()[-1]) == (0, line.format(raw=raw))


def test_what_prepare_leaves_out_is_printed(raw, tmp_path, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    common = ["prepare", "--tokenizer", str(tmp_path / "small.model"), "--workers", "1"]
    first = [*common, str(raw / "0.jsonl"), "--out", str(out), "--validation", "0"]
    assert "left out: 2 duplicates, or documents removed earlier" in command_line(capsys, *first, "--dedup")[1]
    second = [*common, str(raw / "1.jsonl"), "--out", str(other), "--validation", "0"]
    assert "left out: 2 duplicates" in command_line(capsys, *second, "--dedup-against", str(out))[1]


@pytest.mark.parametrize("task", ["3", "a/b", "3/2", "0/2"])
def test_a_task_that_is_not_a_share_is_one_line(raw, tmp_path, capsys, task):
    common = ["prepare", str(raw), "--tokenizer", str(tmp_path / "small.model"), "--out", str(tmp_path / "out")]
    status, _, err = command_line(capsys, *common, "--task", task)
    assert status == 2
    assert err.startswith("ConfigError: ")
    assert "it must be I/N" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("raw")  # which makes the tokenizer
def test_paragraphs_are_removed_as_they_were_prepared(tmp_path, capsys):
    words = [f"{number} of a few words" for number in range(40)]
    plain, gone, out = tmp_path / "plain.txt", tmp_path / "gone.txt", tmp_path / "out"
    plain.write_text("\n\n".join(words))
    gone.write_text("\n\n".join([words[3], "not there", words[9]]))
    common = ["prepare", str(plain), "--text", "paragraphs", "--tokenizer", str(tmp_path / "small.model")]
    assert command_line(capsys, *common, "--out", str(out), "--validation", "0")[0] == 0
    common = ["data", "remove", str(out), "--documents", str(gone), "--text", "paragraphs"]
    status, said, _ = command_line(capsys, *common)
    assert (status, "out: 2 documents of generation 1" in said, ", and 1 that are in none" in said) == (0, True, True)
    assert said.splitlines()[-1] == "generation 2 is without them; 3 hashes more that never come in again"
    assert documents_of(out)["train"] == [*words[:3], *words[4:9], *words[10:]]
    assert command_line(capsys, *common)[1].splitlines()[-1] == "nothing was changed"


def test_documents_are_removed_by_pattern_and_by_text(raw, tmp_path, capsys):
    out = tmp_path / "out"
    common = ["prepare", str(raw / "0.jsonl"), "--tokenizer", str(tmp_path / "small.model"), "--out", str(out)]
    assert command_line(capsys, *common, "--validation", "0")[0] == 0
    texts = documents_of(out)["train"]
    gone = write_lines(tmp_path / "gone.jsonl", texts[:2])
    status, said, _ = command_line(capsys, "data", "remove", str(out), "--documents", str(gone))
    assert (status, "out: 4 documents of generation 1 (0 held out)" in said) == (0, True)  # with their copies
    pattern = f"^{texts[5][:30]}"
    status, said, _ = command_line(capsys, "data", "remove", str(out), "--matching", pattern, "--purge")
    assert (status, "generation 3 is without them" in said) == (0, True)
    assert sorted(documents_of(out)["train"]) == sorted(t for t in texts if t not in texts[:2] and t != texts[5])
    status, _, err = command_line(capsys, "data", "verify", str(out))
    assert (status, err) == (0, "")
