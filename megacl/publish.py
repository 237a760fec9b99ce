"""Publishing files: write beside, flush to disk, rename. A reader sees the old file or the new, never half."""

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from megacl.errors import DataError

_DISK = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EIO: "the disk reported an input/output error",
    errno.EFBIG: "the file would exceed the size limit",
}
_RANDOM_BYTES = 8


@contextlib.contextmanager
def disk_errors(path: Path, what: str) -> Iterator[None]:
    """Turns what a disk refuses while `what` is written at `path` into a DataError that names both."""
    try:
        yield
    except OSError as error:
        reason = _DISK.get(error.errno or 0) or (error.strerror or str(error)).lower()
        raise DataError(
            f"{path}: cannot write {what}: {reason}. Nothing was published; put that right and run again."
        ) from None


def flush_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power cut (POSIX keeps a folder's entries in the folder's own data)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def name_beside(path: Path) -> Path:
    """A name in the folder of `path` to write under until it is whole, which no other call gives, on any machine."""
    return path.with_name(f".{path.name}.{secrets.token_hex(_RANDOM_BYTES)}.tmp")


def sweep_unfinished(folder: Path) -> None:
    """Deletes what publishers that were killed left in a folder, if it is there. Only for who is alone in it.

    What cannot be deleted stays: nobody reads it.
    """
    for left in folder.glob(f".*.{'[0-9a-f]' * 2 * _RANDOM_BYTES}.tmp"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                left.unlink()


def delete_folder(folder: Path) -> None:
    """Deletes a folder, if it is there; killed meanwhile, it leaves none of that name, and the rest to be swept."""
    beside = name_beside(folder)
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, beside)
        shutil.rmtree(beside)


def publish_bytes(path: Path, content: bytes, what: str) -> None:
    """Writes `content` to `path` so that `path` is at any moment absent, the old file, or the whole new one."""
    beside = name_beside(path)
    with disk_errors(path, what):
        try:
            with open(beside, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
            flush_folder(path.parent)
        finally:
            beside.unlink(missing_ok=True)


def publish_text(path: Path, text: str, what: str) -> None:
    """`publish_bytes` of the UTF-8 form of `text`."""
    publish_bytes(path, text.encode(), what)


@contextlib.contextmanager
def publish_folder(path: Path, what: str) -> Iterator[Path]:
    """Gives a folder to write into, and renames it to `path` at the end; nothing stays behind when that fails."""
    beside = name_beside(path)
    with disk_errors(path, what):
        try:
            beside.mkdir(parents=True)
            yield beside
            for file in beside.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as opened:
                        os.fsync(opened.fileno())
            flush_folder(beside)
            os.rename(beside, path)
            flush_folder(path.parent)
        finally:
            if beside.exists():
                shutil.rmtree(beside)


@contextlib.contextmanager
def alone_in(folder: Path, who: str) -> Iterator[None]:
    """Makes the folder, and keeps others who call this out of it; DataError where one is there, naming it as `who`.

    The lock is the kernel's, on a file .lock inside (flock; over NFS a byte-range lock): it ends with the process. A
    file system that has no locks keeps nobody out.
    """
    with _locked(folder, fcntl.LOCK_EX, who):
        yield


@contextlib.contextmanager
def among_others_in(folder: Path, who: str) -> Iterator[None]:
    """The same lock, shared: many may hold it like this at once, but nobody while one is alone there."""
    with _locked(folder, fcntl.LOCK_SH, who):
        yield


@contextlib.contextmanager
def _locked(folder: Path, kind: int, who: str) -> Iterator[None]:
    with disk_errors(folder / ".lock", "a lock"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise DataError(f"{folder}: not a folder; name another place.") from None
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: {who} is at work there; wait for it, or stop it.") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
