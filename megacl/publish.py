"""Publishing files: write beside, flush to disk, rename. A reader sees the old file or the new, never half."""

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from megacl.errors import DataError
from megacl.holders import Holder, dump_holder, parse_holder

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
_LONGEST_HOLDER = 4096
"""Bytes of a lock's content, at most."""


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


def sweep_unfinished(folder: Path, of: str = "*") -> None:
    """Deletes what publishers that were killed left in a folder, if it is there. Only for who is alone in it.

    of: the name that they were to publish. What cannot be deleted stays: nobody reads it. A folder goes by another name
    first: a publisher that is not dead at all, but given up, then finds nothing to publish, and not a part.
    """
    for left in folder.glob(f".{of}.{'[0-9a-f]' * 2 * _RANDOM_BYTES}.tmp"):
        if left.is_dir():
            try:
                delete_folder(left)
            except OSError:
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


def publish_bytes(path: Path, content: bytes, what: str, permit: Callable[[], None] = lambda: None) -> None:
    """Writes `content` to `path` so that `path` is at any moment absent, the old file, or the whole new one.

    permit: called when it is written, and before it has its name; what it raises leaves `path` as it was.
    """
    beside = name_beside(path)
    with disk_errors(path, what):
        try:
            with open(beside, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            permit()
            try:
                os.replace(beside, path)
            except FileNotFoundError:  # somebody has taken it away, who may have a right to
                permit()
                raise
            flush_folder(path.parent)
        finally:
            beside.unlink(missing_ok=True)


def publish_text(path: Path, text: str, what: str, permit: Callable[[], None] = lambda: None) -> None:
    """`publish_bytes` of the UTF-8 form of `text`."""
    publish_bytes(path, text.encode(), what, permit)


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
def alone_in(folder: Path, who: str, has_lost: Callable[[Holder], bool] = lambda holder: False) -> Iterator[bool]:
    """Makes the folder, and keeps others who call this out of it; DataError where one is there, naming it as `who`.

    The lock is the kernel's, on a file .lock inside (flock; over NFS a byte-range lock): it ends with the process. It
    gives False where the file system has no locks, and nobody is kept out. The file says who holds it.
    has_lost: whether who holds the lock has lost its right to it, though it may still run; then its file is taken out
    of the folder, and another one locked.
    """
    with _locked(folder, fcntl.LOCK_EX, who, has_lost) as locked:
        yield locked


@contextlib.contextmanager
def among_others_in(folder: Path, who: str) -> Iterator[None]:
    """The same lock, shared: many may hold it like this at once, but nobody while one is alone there."""
    with _locked(folder, fcntl.LOCK_SH, who, lambda holder: False):
        yield


@contextlib.contextmanager
def _locked(folder: Path, kind: int, who: str, has_lost: Callable[[Holder], bool]) -> Iterator[bool]:
    path = folder / ".lock"
    while True:
        with disk_errors(path, "a lock"):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise DataError(f"{folder}: not a folder; name another place.") from None
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        locked = False
        try:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                locked = True
            except BlockingIOError:
                holder = parse_holder(os.pread(descriptor, _LONGEST_HOLDER, 0))
                if holder is None or not has_lost(holder):
                    named = f" ({holder})" if holder else ""
                    raise DataError(f"{folder}: {who} is at work there{named}; wait for it, or stop it.") from None
                if _is_at(path, descriptor):
                    path.unlink(missing_ok=True)
                continue
            except OSError:
                pass  # a file system without locks
            if _is_at(path, descriptor):  # else whoever had it has deleted the folder, and it locks nothing
                _sign(descriptor, Holder.here() if kind == fcntl.LOCK_EX and locked else None)
                try:
                    yield locked
                finally:
                    _sign(descriptor, None)
                return
        finally:
            os.close(descriptor)


def _sign(lock: int, holder: Holder | None) -> None:
    """Writes into a lock who holds it; a disk that is full keeps the lock, too."""
    with contextlib.suppress(OSError):
        os.ftruncate(lock, 0)
        if holder is not None:
            os.pwrite(lock, dump_holder(holder), 0)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is the one that a path names now."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
