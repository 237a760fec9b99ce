"""Tasks: what N of them make together and a merge publishes is, to the byte, what one prepare makes alone."""

import gzip
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from folders import contents, environment, small_tokenizer, write_lines
from hypothesis import given
from hypothesis import strategies as st

from megacl.data import generations
from megacl.data.forms import RawFile
from megacl.data.portions import cut_portions, portions_of_task
from megacl.data.prepare import merge, prepare
from megacl.data.tokenizer import Tokenizer
from megacl.data.verify import verify_source
from megacl.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 8_000


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(80)]
    return [" ".join(draw.choices(words, k=draw.randint(5, 60))) for _ in range(500)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, texts) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), texts)


@pytest.fixture(scope="module")
def raw(tmp_path_factory, texts) -> Path:
    """Eleven files of very different sizes, one of them compressed, two of them larger than a block."""
    folder = tmp_path_factory.mktemp("raw")
    ends = [0, 3, 5, 120, 128, 131, 140, 290, 300, 380, 400, 500]
    for number, (begin, end) in enumerate(itertools.pairwise(ends)):
        file = write_lines(folder / f"{number:02d}.jsonl", texts[begin:end])
        if number == 6:
            (folder / f"{number:02d}.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory, raw, tokenizer) -> dict[str, bytes]:
    """The folder that one prepare makes."""
    out = tmp_path_factory.mktemp("alone") / "out"
    prepare([str(raw)], tokenizer=tokenizer, out=out, validation=0.2, workers=1, block_bytes=BLOCK)
    assert len(list(out.glob("train-*"))) > 10
    return contents(out)


def arguments(raw: Path, tokenizer: Tokenizer, out: Path, **more) -> dict:
    return {
        "inputs": [str(raw)], "tokenizer": tokenizer, "out": out, "validation": 0.2, "workers": 1,
        "block_bytes": BLOCK, **more,
    }  # fmt: skip


@pytest.mark.parametrize(("tasks", "workers"), [(1, 1), (2, 1), (3, 2), (7, 3), (40, 1)])
def test_any_number_of_tasks_and_workers_makes_the_folder_of_one_prepare(
    tmp_path, raw, tokenizer, alone, tasks, workers
):
    out = tmp_path / "out"
    numbers = list(range(1, tasks + 1))
    random.Random(tasks).shuffle(numbers)
    reports = [
        prepare(**arguments(raw, tokenizer, out, task=(number, tasks), workers=workers)) for number in numbers
    ]  # fmt: skip
    assert not (out / "manifest.json").exists()
    assert {report.generation for report in reports} == {None}
    merged = merge(out)
    assert contents(out) == alone
    assert (merged.generation, merged.documents) == (1, sum(report.documents for report in reports))
    assert (merged.tokens, merged.held_out) == (
        sum(report.tokens for report in reports),
        sum(report.held_out for report in reports),
    )
    assert verify_source(out) == []


def test_merging_twice_and_a_task_that_comes_late_do_nothing(tmp_path, raw, tokenizer, alone):
    out = tmp_path / "out"
    for number in (1, 2):
        prepare(**arguments(raw, tokenizer, out, task=(number, 2)))
    first = merge(out)
    assert merge(out).generation == first.generation == 1
    assert prepare(**arguments(raw, tokenizer, out, task=(2, 2))).generation == 1
    assert contents(out) == alone


def test_a_task_that_is_not_done_is_named(tmp_path, raw, tokenizer):
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"no manifest\.json there, so it is not a prepared data folder"):
        merge(out)
    assert not out.exists()
    prepare(**arguments(raw, tokenizer, out, task=(1, 8)))
    with pytest.raises(DataError, match=r"out: task 2/8, 3/8, 4/8, 5/8, 6/8 and 2 more are not done") as caught:
        merge(out)
    assert "\n" not in str(caught.value)
    for number in (2, 4, 5, 6, 7, 8):
        prepare(**arguments(raw, tokenizer, out, task=(number, 8)))
    with pytest.raises(DataError, match=r"task 3/8 is not done\. Run the same prepare with --task 3/8, then merge"):
        merge(out)
    assert not (out / "manifest.json").exists()


def test_tasks_of_two_commands_are_not_mixed(tmp_path, raw, tokenizer, alone):
    out = tmp_path / "out"
    prepare(**arguments(raw, tokenizer, out, task=(1, 2)))
    prepare(**arguments(raw, tokenizer, out, task=(2, 2), validation=0.3))
    with pytest.raises(DataError, match="task 1/2 is not done"):
        merge(out)
    prepare(**arguments(raw, tokenizer, out, task=(2, 2)))
    merge(out)
    assert contents(out) == alone


def test_a_prepare_does_not_clear_away_the_tasks_of_another(tmp_path, raw, texts, tokenizer, alone):
    out = tmp_path / "out"
    for number in (1, 2):
        prepare(**arguments(raw, tokenizer, out, task=(number, 3)))
    before = contents(out)
    more = write_lines(tmp_path / "more.jsonl", [f"{text} more" for text in texts[:100]])
    with pytest.raises(DataError, match=r"out: tasks of another prepare wait there for `megacl data merge .*out`"):
        prepare(**arguments(more, tokenizer, out))
    assert contents(out) == before
    kept = {file.stat().st_ino for file in (out / ".prepare").glob("*.arrow")}
    prepare(**arguments(raw, tokenizer, out))  # the same, without tasks, goes on with what they did
    assert contents(out) == alone
    assert kept <= {file.stat().st_ino for file in out.glob("*.arrow")}


def test_tasks_of_a_command_without_what_others_have_done_are_refused_and_of_a_mended_one_go_on(
    tmp_path, raw, texts, tokenizer
):
    out, more = tmp_path / "out", tmp_path / "more"
    prepare(**arguments(raw, tokenizer, out, task=(1, 2)))
    for number in range(4):
        write_lines(more / f"{number}.jsonl", [f"{text} {number}" for text in texts[:50]])
    before = contents(out)
    with pytest.raises(DataError, match=r"tasks of another prepare wait there .* and they did .*\.jsonl") as caught:
        prepare(**arguments(more, tokenizer, out, task=(1, 2)))
    assert "\n" not in str(caught.value)
    assert contents(out) == before
    inputs = [str(raw), str(more)]  # the first command and more
    for number in (1, 2, 3):
        prepare(**{**arguments(raw, tokenizer, out, task=(number, 3)), "inputs": inputs})
    assert merge(out).documents == 700


def test_a_file_of_another_kind_that_comes_between_two_tasks_is_only_passed_over(tmp_path, texts, tokenizer):
    for number in range(4):
        write_lines(tmp_path / "raw" / f"{number}.jsonl", texts[number * 50 : number * 50 + 50])
    out = tmp_path / "out"
    prepare(**arguments(tmp_path / "raw", tokenizer, out, task=(1, 2)))
    (tmp_path / "raw" / "slurm-1.out").write_text("a log")
    prepare(**arguments(tmp_path / "raw", tokenizer, out, task=(2, 2)))
    merged = merge(out)
    assert (merged.documents, merged.passed_over) == (200, (f"{tmp_path}/raw/slurm-1.out",))


def test_a_task_whose_files_are_part_of_an_earlier_generation_says_what_a_prepare_says(tmp_path, texts, tokenizer):
    a = str(write_lines(tmp_path / "a.jsonl", texts[:300]))
    b = str(write_lines(tmp_path / "b.jsonl", texts[300:]))
    out = tmp_path / "out"
    prepare(**{**arguments(tmp_path, tokenizer, out), "inputs": [a]})
    both = {**arguments(tmp_path, tokenizer, out), "inputs": [a, b]}
    for task in ((1, 2), None):  # the larger file is the first task's
        with pytest.raises(DataError, match=r"generation 1 holds .*a\.jsonl already\. Leave it out"):
            prepare(**both, task=task)
    prepare(**both, task=(2, 2))
    with pytest.raises(DataError, match="task 1/2 is not done"):
        merge(out)


def test_files_of_one_name_in_two_folders_are_two_files_wherever_a_command_runs(
    tmp_path, texts, tokenizer, monkeypatch
):
    out = tmp_path / "out"
    for month, some in (("1", texts[:200]), ("2", texts[200:400])):
        write_lines(tmp_path / month / "docs.jsonl", some)
        monkeypatch.chdir(tmp_path / month)
        report = prepare(**{**arguments(tmp_path, tokenizer, out), "inputs": ["docs.jsonl"]})
        assert report.generation == int(month)
    write_lines(tmp_path / "1" / "docs.jsonl", texts[:210])
    with pytest.raises(DataError, match=r"^\.\./1/docs\.jsonl: generation 1 of .* holds a file of this name"):
        prepare(**{**arguments(tmp_path, tokenizer, out), "inputs": ["../1/docs.jsonl"]})


def test_a_merge_after_an_interrupted_prepare_says_to_run_it_again(tmp_path, raw, texts, tokenizer):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\nbad\n')
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"bad\.jsonl:2"):
        prepare(**arguments(bad, tokenizer, out))
    with pytest.raises(DataError, match=r"out: a prepare there was interrupted, .* Run the same command again\.$"):
        merge(out)


def test_an_input_that_changed_after_its_task_is_named(tmp_path, texts, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [write_lines(Path(f"{number}.jsonl"), texts[number * 200 : number * 200 + 200]) for number in (0, 1)]
    out = tmp_path / "out"
    for number in (1, 2):
        prepare(**{**arguments(files[0], tokenizer, out, task=(number, 2)), "inputs": list(map(str, files))})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")  # where the names lead nowhere
    os.utime(tmp_path / "1.jsonl", (1, 1))
    with pytest.raises(DataError, match=r"^1\.jsonl: the file changed or went since task ./2 read it"):
        merge(out)
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        prepare(**{**arguments(files[0], tokenizer, out, task=(number, 2)), "inputs": list(map(str, files))})
    assert merge(out).documents == 400


def test_a_content_given_to_two_tasks_is_refused_by_the_merge(tmp_path, texts, tokenizer):
    for name in ("a", "b"):
        write_lines(tmp_path / "raw" / f"{name}.jsonl", texts[:100])
    out = tmp_path / "out"
    for number in (1, 2):
        prepare(**arguments(tmp_path / "raw", tokenizer, out, task=(number, 2)))
    with pytest.raises(DataError, match=r"b\.jsonl: its content is given twice, the first time as .*a\.jsonl"):
        merge(out)
    assert not (out / "manifest.json").exists()


def test_tasks_add_a_generation_to_a_folder(tmp_path, raw, texts, tokenizer, alone):
    out = tmp_path / "out"
    prepare(**arguments(raw, tokenizer, out))
    more = tmp_path / "more"
    for number in range(4):
        write_lines(more / f"{number}.jsonl", [f"{text} {number}" for text in texts[:50]])
    with pytest.raises(DataError, match=r"prepared with --validation 0\.2, not 0\.1"):
        prepare(**arguments(more, tokenizer, out, task=(1, 3), validation=0.1))
    for number in (3, 1, 2):
        prepare(**arguments(more, tokenizer, out, task=(number, 3)))
    with pytest.raises(DataError, match=r"generation 1 holds .*00\.jsonl already"):
        prepare(**{**arguments(more, tokenizer, out, task=(1, 1)), "inputs": [str(more), str(raw)]})
    assert merge(out).generation == 2
    whole = tmp_path / "whole" / "out"
    prepare(**arguments(raw, tokenizer, whole))
    prepare(**arguments(more, tokenizer, whole))
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("task", [(0, 2), (3, 2), (1, 0)])
def test_a_share_that_does_not_exist_is_named(tmp_path, raw, tokenizer, task):
    with pytest.raises(ConfigError, match=rf"task is {task[0]}/{task[1]}; it must be I/N"):
        prepare(**arguments(raw, tokenizer, tmp_path / "out", task=task))


# ---------------------------------------------------------------------------------------------- who does what


@given(sizes=st.lists(st.integers(1, 100), max_size=30), block_bytes=st.integers(1, 120), tasks=st.integers(1, 9))
def test_every_file_is_in_one_portion_and_every_portion_in_one_task(sizes, block_bytes, tasks):
    files = [RawFile(str(index), "jsonl", "", (str(index),), size, 0) for index, size in enumerate(sizes)]
    portions = cut_portions(files, block_bytes)
    assert [file for portion in portions for file in portion] == files
    for portion, after in itertools.zip_longest(portions, portions[1:]):
        size = sum(file.size for file in portion)
        assert size <= block_bytes or len(portion) == 1
        assert after is None or size + after[0].size > block_bytes  # none is smaller than it must be
    shares = [portions_of_task(portions, task, tasks) for task in range(1, tasks + 1)]
    assert sorted(index for share in shares for index in share) == list(range(len(portions)))
    loads = [sum(file.size for index in share for file in portions[index]) for share in shares]
    largest = max((sum(file.size for file in portion) for portion in portions), default=0)
    assert max(loads) - min(loads) <= largest


def test_shares_beyond_the_portions_cost_nothing():
    files = [RawFile(str(index), "jsonl", "", (str(index),), 10, 0) for index in range(3)]
    portions = cut_portions(files, 10)
    assert [portions_of_task(portions, task, 10**15) for task in (1, 2, 3, 4, 10**15)] == [[0], [1], [2], [], []]


# ---------------------------------------------------------------------------------------------- interruptions

SCRIPT = """
import os, signal, sys
from pathlib import Path
from megacl.data import generations
from megacl.data.prepare import merge, prepare
from megacl.data.tokenizer import load_tokenizer
if __name__ == "__main__":
    raw, model, out, task, block, kill = sys.argv[1:]
    if kill != "0":
        move, left = os.replace, int(kill)
        def replace(before, after):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            move(before, after)
        generations.os.replace = replace
    if task == "merge":
        merge(out)
    else:
        number, tasks = map(int, task.split("/"))
        prepare([raw], tokenizer=load_tokenizer(model), out=out, validation=0.2, workers=1, block_bytes=int(block),
                task=(number, tasks))
"""


def start(folder: Path, raw: Path, tokenizer: Tokenizer, task: str, kill: int = 0) -> "subprocess.Popen[str]":
    """A task or a merge in a process of its own, which kills itself before its rename of that number."""
    script = folder / "script.py"
    if not script.exists():  # written once: a process that has just started may be about to read it
        script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(raw), str(tokenizer.file), str(folder / "out"), task, str(BLOCK)]
    return subprocess.Popen([*command, str(kill)], env=environment(ROOT), stderr=subprocess.PIPE, text=True)


def test_a_task_that_is_killed_goes_on_beside_others_to_the_same_bytes(tmp_path, raw, tokenizer, alone):
    work = tmp_path / "out" / ".prepare"
    process = start(tmp_path, raw, tokenizer, "1/2")
    end = time.monotonic() + 60
    while len(list(work.glob("*.json"))) < 3:
        assert time.monotonic() < end
        time.sleep(0.002)
    process.kill()
    process.communicate()
    kept = {file.stem for file in work.glob("*.json")}
    inodes = {file.stat().st_ino for key in kept for file in work.glob(f"{key}-*.arrow")}
    processes = [start(tmp_path, raw, tokenizer, task) for task in ("1/2", "2/2")]
    assert [(process.communicate()[1], process.returncode) for process in processes] == [("", 0), ("", 0)]
    merge(tmp_path / "out")
    assert contents(tmp_path / "out") == alone
    assert inodes <= {file.stat().st_ino for file in (tmp_path / "out").glob("*.arrow")}


class KilledError(BaseException):
    """Stands for a kill: nothing catches it."""


def test_a_merge_that_is_killed_between_any_two_renames_is_finished_by_the_next(
    tmp_path, raw, tokenizer, alone, monkeypatch
):
    moves = len([name for name in alone if name.endswith(".arrow")]) + 1
    shards = tmp_path / "shards" / "out"
    for number in (1, 2):
        prepare(**arguments(raw, tokenizer, shards, task=(number, 2)))
    for kill in (1, 2, moves // 2, moves - 3, moves - 2, moves - 1, moves):
        out = tmp_path / str(kill) / "out"
        subprocess.run(["cp", "-r", str(shards.parent), str(out.parent)], check=True)
        count = 0

        def replace(before: object, after: object, kill: int = kill) -> None:
            nonlocal count
            count += 1
            if count == kill:
                raise KilledError
            os.rename(before, after)  # type: ignore[arg-type]

        monkeypatch.setattr(generations, "os", SimpleNamespace(**{**vars(os), "replace": replace}))
        with pytest.raises(KilledError):
            merge(out)
        monkeypatch.undo()
        assert not (out / "manifest.json").exists()
        with pytest.raises(DataError, match=r"a merge was interrupted there. Run `megacl data merge .*` first"):
            prepare(**arguments(raw, tokenizer, out, task=(1, 2)))
        assert merge(out).generation == 1
        assert contents(out) == alone


@pytest.mark.parametrize("again", ["merge", "1/1"])
def test_a_merge_killed_by_sigkill_between_two_renames_is_finished_by_a_merge_or_a_prepare(
    tmp_path, raw, tokenizer, alone, again
):
    prepare(**arguments(raw, tokenizer, tmp_path / "out", task=(1, 1)))
    process = start(tmp_path, raw, tokenizer, "merge", kill=9)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 0 < len(list((tmp_path / "out").glob("*.arrow"))) < 12
    if again == "merge":
        merge(tmp_path / "out")
    else:
        prepare(**arguments(raw, tokenizer, tmp_path / "out"))
    assert contents(tmp_path / "out") == alone


def test_the_same_task_twice_at_once_is_refused(tmp_path, raw, tokenizer):
    process = start(tmp_path, raw, tokenizer, "1/1")
    work = tmp_path / "out" / ".prepare"
    try:
        while not list(work.glob("*.json")):  # a block is done, so it has the lock
            assert process.poll() is None
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(DataError, match=r"the same task is at work there \(.*\); wait for it, or stop it"):
            prepare(**arguments(raw, tokenizer, tmp_path / "out", task=(1, 1)))
        with pytest.raises(DataError, match=r"a prepare is at work there"):
            merge(tmp_path / "out")
    finally:
        process.kill()
        process.communicate()
