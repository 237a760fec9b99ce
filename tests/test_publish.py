"""Publishing: a reader sees the old file, the new one, or none; what a disk refuses is one line that names it."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megacl.errors import DataError
from megacl.publish import (
    alone_in,
    disk_errors,
    name_beside,
    publish_bytes,
    publish_folder,
    publish_text,
    sha256_of,
    sweep_unfinished,
)


def test_a_file_is_replaced_as_a_whole_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    publish_text(path, "eins\n", "a file")
    publish_text(path, "zwei ü\n", "a file")
    assert path.read_text(encoding="utf-8") == "zwei ü\n"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert sha256_of(path) == subprocess.run(["sha256sum", path], capture_output=True, text=True).stdout.split()[0]


def test_a_folder_appears_at_the_end_or_not_at_all(tmp_path: Path) -> None:
    with publish_folder(tmp_path / "good", "a folder") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "good").exists()
    assert (tmp_path / "good" / "x").read_text() == "1"

    def fail_half_way() -> None:
        with publish_folder(tmp_path / "bad", "a folder") as folder:
            (folder / "x").write_text("1")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert [file.name for file in tmp_path.iterdir()] == ["good"]


def test_a_process_killed_while_it_publishes_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "big.bin"
    path.write_bytes(b"old")
    code = "import sys; from pathlib import Path; from megacl.publish import publish_bytes\n"
    code += "while True: publish_bytes(Path(sys.argv[1]), b'new' * 3_000_000, 'a file')"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    deadline = time.monotonic() + 30
    while path.read_bytes() == b"old" and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.read_bytes() == b"new" * 3_000_000


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "no space left on the device"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EDQUOT, "the disk quota is used up"),
    ],
)
def test_what_a_disk_refuses_names_the_file_and_the_reason(number: int, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught, disk_errors(tmp_path / "x", "a shard"):
        raise OSError(number, os.strerror(number))
    assert str(caught.value).startswith(f"{tmp_path / 'x'}: cannot write a shard: {reason}.")


def test_a_place_that_cannot_be_is_named_too(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write a folder: not a directory"):
        publish_text(tmp_path / "file" / "x", "text", "a folder")


def test_a_second_process_is_kept_out_of_a_folder_until_the_first_one_ends(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from megacl.publish import alone_in\n"
    code += "with alone_in(Path(sys.argv[1]), 'another run'): print('in', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        with pytest.raises(DataError, match="another run is at work there"), alone_in(tmp_path, "another run"):
            pass
        process.kill()
    with alone_in(tmp_path, "another run"):
        pass


def test_a_folder_that_is_deleted_before_it_is_locked_is_made_anew(tmp_path: Path, monkeypatch) -> None:
    folder, flock, calls = tmp_path / "folder", fcntl.flock, []

    def late(descriptor: int, kind: int) -> None:
        if not calls:
            shutil.rmtree(folder)  # as its owner does, who ended between the opening of the lock and this
        calls.append(descriptor)
        flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    with alone_in(folder, "another run"):
        (folder / "something").write_text("there is a folder")
        with pytest.raises(DataError, match="another run is at work there"), alone_in(folder, "another run"):
            pass
    assert len(calls) == 3


def test_processes_of_one_number_on_several_machines_publish_a_file_at_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 7)  # as containers have it
    path = tmp_path / "a.bin"
    whole = [bytes([number]) * 200_000 for number in range(8)]

    def publish_often(content: bytes) -> None:
        for _ in range(20):
            publish_bytes(path, content, "a file")
            assert path.read_bytes() in whole

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(publish_often, whole))
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_publishers_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    for name in (".mine.tmp", ".mine.12.tmp", "mine.0123456789abcdef.tmp"):
        (tmp_path / name).touch()
    mine = set(tmp_path.iterdir())
    name_beside(tmp_path / "a.arrow").touch()
    folder = name_beside(tmp_path / "next")
    folder.mkdir()
    (folder / "half").touch()
    sweep_unfinished(tmp_path)
    assert set(tmp_path.iterdir()) == mine
    sweep_unfinished(tmp_path / "nowhere")


def test_a_full_device_is_named(tmp_path: Path) -> None:
    link = tmp_path / "full"
    link.symlink_to("/dev/full")
    with pytest.raises(DataError, match="no space left"), disk_errors(link, "metrics"), open(link, "wb") as file:
        file.write(b"x" * 100_000)
    publish_bytes(tmp_path / "fine", b"x", "a file")
