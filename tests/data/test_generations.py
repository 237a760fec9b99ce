"""Publishing a generation: what a kill at any moment leaves is finished by whichever command comes next."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from folders import contents, documents_of, environment, small_tokenizer, write_lines

from megacl.data.forms.reading import Reading
from megacl.data.generations import changing
from megacl.data.prepare import merge, prepare
from megacl.data.remove import Wanted, find_documents, remove_documents
from megacl.data.shards import hash_of
from megacl.data.tokenizer import Tokenizer
from megacl.data.verify import verify_source

ROOT = Path(__file__).resolve().parents[2]

# For every call that changes the disk: `first` killed before it, in a folder of its own, then `then` to its end.
SCRIPT = """
import os, shutil, signal, sys
from pathlib import Path
from megacl.data.prepare import merge, prepare
from megacl.data.tokenizer import load_tokenizer

CHANGES = ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink")
raw, model, begun, folder, first, then = sys.argv[1:]

def run(command, out):
    if command == "merge":
        merge(out)
    else:
        prepare([raw], tokenizer=load_tokenizer(model), out=out, validation=0.4, workers=1, block_bytes=8000)

def killed_before(change, out):
    left = change
    def counted(real):
        def call(*arguments, **more):
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **more)
        return call
    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))
    run(first, out)

change = 0
killed = True
while killed:
    change += 1
    out = Path(folder) / str(change) / "out"
    shutil.copytree(begun, out)
    child = os.fork()
    if not child:
        killed_before(change, out)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    killed = os.WIFSIGNALED(status)
    assert killed or status == 0
    run(then, out)
"""


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(80)]
    return [" ".join(draw.choices(words, k=draw.randint(5, 60))) for _ in range(80)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, texts) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), texts)


def all_documents(folder: Path) -> list[str]:
    found = documents_of(folder)
    return sorted(found["train"] + found["validation"])


@pytest.mark.parametrize(("tasks", "workers"), [(1, 1), (1, 2), (2, 1)])
def test_equal_text_files_each_have_their_documents_also_after_a_removal(tmp_path, texts, tokenizer, tasks, workers):
    for name in ("a", "b", "c"):
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / "raw" / f"{name}.txt").write_text("\n\n".join(texts))
    out = tmp_path / "out"
    arguments = {"tokenizer": tokenizer, "validation": 0.4, "workers": workers, "block_bytes": 8000}
    for task in range(1, tasks + 1):
        share = None if tasks == 1 else (task, tasks)
        prepare([str(tmp_path / "raw")], out=out, reading=Reading(text="paragraphs"), task=share, **arguments)
    if tasks > 1:
        merge(out)
    assert all_documents(out) == sorted(texts * 3)
    assert verify_source(out) == []
    gone = hash_of(texts[0].encode())
    with changing(out) as state:
        remove_documents(state, find_documents(state, Wanted(np.array([gone], np.uint64)), 1))
    assert all_documents(out) == sorted(texts[1:] * 3)
    assert verify_source(out) == []


@pytest.mark.parametrize(
    ("first", "then"),
    [
        pytest.param("merge", "merge", marks=pytest.mark.long),
        pytest.param("merge", "prepare", marks=pytest.mark.long),
        ("prepare", "prepare"),
    ],
)
def test_killed_by_sigkill_before_any_change_of_the_disk_the_next_command_finishes(
    tmp_path, texts, tokenizer, first, then
):
    raw = write_lines(tmp_path / "raw.jsonl", texts)
    arguments = {"tokenizer": tokenizer, "validation": 0.4, "workers": 1, "block_bytes": 8000}
    prepare([str(raw)], out=tmp_path / "begun" / "out", task=(1, 1), **arguments)
    prepare([str(raw)], out=tmp_path / "whole" / "out", **arguments)
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", raw, tokenizer.file, tmp_path / "begun" / "out", tmp_path / "killed"]
    process = subprocess.run(
        [*command, first, then], cwd=tmp_path, env=environment(ROOT), capture_output=True, text=True
    )
    assert process.stderr == ""
    outs = [each / "out" for each in (tmp_path / "killed").iterdir()]
    assert len(outs) > 30
    whole = contents(tmp_path / "whole" / "out")
    assert all(contents(out) == whole for out in outs)
