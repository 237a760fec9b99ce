"""Data folders on object stores, read through a bounded cache of whole shards on a local disk.

    cache = ShardCache(Path("/local/cache"), size=100 * 10**9)
    folder = RemoteFolder("s3://bucket/english", cache)
    folder.read("manifest.json")             # bytes, or None where there is no such object
    mapped = folder.open_shard(row)          # the shard's bytes, fetched first where the cache has not got them

A folder is any URL that pyarrow opens: s3://, gs://, hdfs://. S3 takes its keys from the usual places (such as
AWS_ACCESS_KEY_ID), the region from AWS_DEFAULT_REGION or `?region=`, and another server than Amazon's from
AWS_ENDPOINT_URL or `?endpoint_override=http://host:port`.

A cache may also stage folders of this machine's file systems (StagedFolder): then their shards too are copied to its
disk, a node's own, and checked, before they are read.

The cache holds shards under their SHA-256, so folders and generations that share shards share their files, and nothing
in it is ever out of date. All processes of a machine may use one: each shard is fetched by one of them, checked in size
and hash, and published by rename. Where the files would exceed `size`, the least recently used go first, those that no
process has open before those that one has. A process keeps at most OPEN_FETCHED shards of stores open; one that was
deleted meanwhile takes up disk until then.

What fails for a while (no connection, a server that answers 5xx or not at all) is tried again for `patience` seconds
and ends in an UnreachableError; what will not get better (refused keys, a missing object, a shard of another size or
hash) in a DataError at once. Inside `wanted_until(told)` all this is broken off by a StoppedError soon after told() has
become true.
"""

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import parse_qsl, urlsplit

from megacl.data.shard_list import ShardRow
from megacl.errors import ConfigError, DataError, StoppedError, UnreachableError
from megacl.publish import disk_errors, publish_bytes

OPEN_FETCHED = 64
"""Shards of stores that a process keeps open."""

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")
_CHUNK = 2**23
_CONNECT, _SILENCE = 5.0, 20.0
"""Seconds that a connection to S3 may take, and that one may be silent, before the next try."""
_FIRST_DELAY, _LONGEST_DELAY = 0.1, 5.0
_SPARE = 64
"""Where room is made, this part of the cache is freed beyond what is needed."""
_LOOK = 0.1
"""Seconds between two looks at whether what is waited for is still wanted."""
_REFUSED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|INVALID_SIGNATURE|SIGNATURE_DOES_NOT_MATCH|"
    r"MISSING_AUTHENTICATION_TOKEN|UNRECOGNIZED_CLIENT|EXPIRED_TOKEN|HTTP status 40[13]"
)
_T = TypeVar("_T")


def is_url(path: str | Path) -> bool:
    """Whether a data folder's path names a store and not a local folder."""
    return isinstance(path, str) and _URL.match(path) is not None


# Who wants to stop stands at the loop that reads, and what is read lies many calls below it.
_told_to_stop: ContextVar[Callable[[], bool]] = ContextVar("_told_to_stop", default=lambda: False)

_arrives: ContextVar[Callable[[], None]] = ContextVar("_arrives", default=lambda: None)


@contextlib.contextmanager
def wanted_until(told: Callable[[], bool], arrives: Callable[[], None] = lambda: None) -> Iterator[None]:
    """A block in which whatever is read from a store is broken off once told() is true. It counts for its thread.

    arrives: called whenever a piece of a shard has come.
    """
    token, other = _told_to_stop.set(told), _arrives.set(arrives)
    try:
        yield
    finally:
        _told_to_stop.reset(token)
        _arrives.reset(other)


def _check_wanted() -> None:
    if _told_to_stop.get()():
        raise StoppedError("told to stop; the same command goes on.")


class ShardCache:
    """Whole shards on a local disk, `size` bytes of them at most."""

    def __init__(self, path: Path | str, size: int, patience: float = 120.0, *, stage: bool = False) -> None:
        """path: may name variables of the environment, "$SCRATCH/shards", which each machine resolves for itself.

        patience: seconds for which what may get better is tried again. stage: whether folders are read through it too.
        """
        self.size, self.patience, self.stage = size, patience, stage
        self._named = str(path)

    @property
    def path(self) -> Path:
        """The folder on this machine. Raises ConfigError where it names a variable that is not set here."""
        found = os.path.expandvars(self._named)
        if missing := _VARIABLE.search(found):
            raise ConfigError(
                f"cache.path is {self._named!r}, and {missing[0]} is not set on {socket.gethostname()}; set it there, "
                "or name a folder."
            )
        return Path(found)

    def holds(self, row: ShardRow) -> bool:
        """Whether the shard is there; it then counts as just used."""
        try:
            os.utime(self._file(row))
        except FileNotFoundError:
            return False
        return True

    def held(self) -> int:
        """Bytes of the shards that are there."""
        with contextlib.suppress(OSError):
            return sum(file.stat().st_size for file in self.path.glob("*.arrow"))
        return 0

    def open(self, row: ShardRow, fetch: Callable[[BinaryIO], None]) -> BinaryIO:
        """The shard's file, opened; `fetch` writes its content into a file where it is not there.

        While it, or a map of it, is open in any process, it is deleted after all others.
        """
        with contextlib.suppress(FileNotFoundError):
            return self._opened(row)
        with disk_errors(self._file(row), "a fetched shard"):
            self.path.mkdir(parents=True, exist_ok=True)
            with _locked(self.path / f".lock-{row.sha256[:2]}"):  # others who want this shard wait for it here
                with contextlib.suppress(FileNotFoundError):
                    return self._opened(row)
                return self._fetched(row, fetch)

    def _file(self, row: ShardRow) -> Path:
        return self.path / f"{row.sha256}.arrow"

    def _opened(self, row: ShardRow) -> BinaryIO:
        opened = open(self._file(row), "rb")  # noqa: SIM115 (the caller's)
        fcntl.flock(opened, fcntl.LOCK_SH)
        os.utime(opened.fileno())
        return opened

    def _fetched(self, row: ShardRow, fetch: Callable[[BinaryIO], None]) -> BinaryIO:
        part = self.path / f"{row.sha256}.part"
        with _locked(self.path / ".lock"):
            self._make_room(row)
            opened = open(part, "w+b")  # noqa: SIM115 (the caller's)
            fcntl.flock(opened, fcntl.LOCK_SH)
            opened.truncate(row.size)  # so that others count it
        try:
            fetch(opened)
            opened.flush()
            os.fsync(opened.fileno())
            os.replace(part, self._file(row))
        except BaseException:
            opened.close()
            part.unlink(missing_ok=True)
            raise
        return opened

    def _make_room(self, row: ShardRow) -> None:
        """Deletes least recently used shards where one more would not fit. The caller holds the lock.

        Looking at every file takes 0.1 s for 5,000 of them, so their bytes are counted in a file: each fetch adds its
        own, and where they come to more than the cache holds, the files are looked at and counted anew.
        """
        if row.size > self.size:
            raise DataError(
                f"{self.path}: a shard of {row.size:,} bytes does not fit into a cache of {self.size:,}; "
                "raise cache.size."
            )
        count = self.path / ".used"
        try:
            used = int(count.read_text())
        except (FileNotFoundError, ValueError):  # never counted, or a kill came in between
            used = self.size
        if used + row.size > self.size:
            used = self._delete_down_to(self.size - row.size)
        count.write_text(str(used + row.size))

    def _delete_down_to(self, size: int) -> int:
        """Deletes the least recently used shards until at most `size` bytes stay; returns how many do.

        Of those that nobody has open a part of the cache goes beyond that, so that the next fetches need not look.
        """
        found = []
        for file in (*self.path.glob("*.arrow"), *self.path.glob("*.part")):
            with contextlib.suppress(FileNotFoundError):
                status = file.stat()
                found.append((status.st_mtime_ns, status.st_size, file))
        left = sum(bytes_ for _, bytes_, _ in found)
        if left <= size:
            return left
        in_use = []
        for _, bytes_, file in sorted(found):
            if left <= size - self.size // _SPARE:
                return left
            if _is_open(file):
                if file.suffix != ".part":
                    in_use.append((bytes_, file))
            else:
                file.unlink(missing_ok=True)
                left -= bytes_
        for bytes_, file in in_use:
            if left <= size:
                break
            file.unlink(missing_ok=True)  # whoever has it open goes on reading it
            left -= bytes_
        return left


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Holds the kernel's lock on a file, which it makes; a process that dies lets go of it."""
    with open(file, "wb") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def _is_open(file: Path) -> bool:
    """Whether some process holds the file by `ShardCache.open`."""
    try:
        with open(file, "rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


class RemoteFolder:
    """A data folder on a store. It pickles; each process makes its own connection."""

    _what, _remedy = "the store", "Upload it again."
    _access = (
        "Look at the keys in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for S3) and at what they may "
        "read."
    )

    def __init__(self, url: str, cache: ShardCache) -> None:
        self.url, self.cache = url, cache
        self._connection: tuple[Any, str] | None = None

    def __reduce__(self) -> tuple[type["RemoteFolder"], tuple[str, ShardCache]]:
        return type(self), (self.url, self.cache)

    def __str__(self) -> str:
        return self.url.split("?")[0].rstrip("/")

    def read(self, name: str) -> bytes | None:
        """A small file's content, None where there is none; UnreachableError where the store cannot be read."""

        def attempt() -> bytes:
            store, root = self._store()
            with store.open_input_file(f"{root}/{name}") as opened:
                content: bytes = opened.read()
            return content

        try:
            return self._patiently(name, attempt)
        except FileNotFoundError:
            return None

    def why_missing(self) -> str:
        """What is missing where the manifest is: the bucket, or just the manifest."""
        store, root = self._store()
        bucket = root.split("/")[0]
        found = self._patiently("", lambda: store.get_file_info(bucket))
        return f"there is no bucket {bucket!r}" if found.type.name == "NotFound" else "no manifest.json there"

    def copy_tokenizer(self, name: str, sha256: str) -> Path:
        """A local copy of a tokenizer, with the record of what it extends; DataError where it is missing or another."""
        folder = self.cache.path / "tokenizers" / sha256
        if not (folder / name).exists():
            content = self.read(name)
            if content is None or hashlib.sha256(content).hexdigest() != sha256:
                what = "is missing" if content is None else "is not the one that the manifest names"
                raise DataError(f"{self}/{name}: it {what}. Upload the whole folder again.")
            folder.mkdir(parents=True, exist_ok=True)
            record = f"{name}.extends.json"
            if (extends := self.read(record)) is not None:
                publish_bytes(folder / record, extends, "a fetched tokenizer")
            publish_bytes(folder / name, content, "a fetched tokenizer")
        return folder / name

    def open_shard(self, row: ShardRow) -> mmap.mmap:
        """A shard's bytes, mapped, fetched first where the cache has not got them. DataError where that fails."""
        with self.cache.open(row, lambda file: self._fetch(row, file)) as opened:
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)

    def fetch_ahead(self, row: ShardRow) -> None:
        """Sees to it that the cache has a shard. DataError where that fails."""
        if not self.cache.holds(row):
            self.cache.open(row, lambda file: self._fetch(row, file)).close()

    def _fetch(self, row: ShardRow, file: BinaryIO) -> None:
        where = f"{self}/{row.path}"

        def attempt() -> str:
            store, root = self._store()
            digest = hashlib.sha256()
            with store.open_input_file(f"{root}/{row.path}") as opened:
                if opened.size() != row.size:
                    raise DataError(
                        f"{where}: the shard has {opened.size()} bytes, but shards.arrow says {row.size}; it is "
                        f"truncated or not the same file. {self._remedy}"
                    )
                file.seek(0)
                while file.tell() < row.size:
                    _check_wanted()
                    chunk = opened.read(_CHUNK)
                    if not chunk:
                        raise OSError("the connection ended too early")
                    _arrives.get()()
                    digest.update(chunk)
                    with disk_errors(self.cache.path, "a fetched shard"):
                        file.write(chunk)
            return digest.hexdigest()

        try:
            found = self._patiently(row.path, attempt)
        except FileNotFoundError:
            raise DataError(f"{where}: the shard is missing. {self._remedy}") from None
        if found != row.sha256:
            raise DataError(f"{where}: its hash is not the one in shards.arrow; it was changed. {self._remedy}")

    def _store(self) -> tuple[Any, str]:
        """pyarrow's file system, and the folder's path in it."""
        if self._connection is None:
            self._connection = _connect(self.url)
        return self._connection

    def _patiently(self, name: str, attempt: Callable[[], _T]) -> _T:
        """What `attempt` returns, tried again while the store fails in a way that may pass and it is wanted."""
        where = f"{self}/{name}".rstrip("/")
        end, delay = time.monotonic() + self.cache.patience, _FIRST_DELAY
        while True:
            try:
                return attempt()
            except FileNotFoundError:
                raise
            except NotADirectoryError as error:  # what lies where a folder should be has nothing in it either
                raise FileNotFoundError(*error.args) from None
            except OSError as error:
                reason = str(error).splitlines()[0]
                if _REFUSED.search(reason) or error.errno in (errno.EACCES, errno.EPERM):
                    raise DataError(f"{where}: {self._what} refuses access ({reason}). {self._access}") from None
                if time.monotonic() + delay > end:
                    raise UnreachableError(
                        f"{where}: {self._what} cannot be read from {socket.gethostname()}, tried for "
                        f"{self.cache.patience:g} s ({reason}). Run the same command again once it can, or raise "
                        "cache.patience."
                    ) from None
            again = time.monotonic() + delay
            while (left := again - time.monotonic()) > 0:
                _check_wanted()
                time.sleep(min(left, _LOOK))
            delay = min(2 * delay, _LONGEST_DELAY)


class StagedFolder(RemoteFolder):
    """A data folder of this machine's file systems, such as a parallel one, whose shards are read from the cache."""

    _what, _remedy = "the file system", "Restore it from a copy, or prepare the folder again."
    _access = "Look at who may read the file."

    def __str__(self) -> str:
        return self.url

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return Path(self.url)

    def _store(self) -> tuple[Any, str]:
        if self._connection is None:
            from pyarrow import fs

            self._connection = (fs.LocalFileSystem(), str(self.folder.absolute()))
        return self._connection


def _connect(url: str) -> tuple[Any, str]:
    from pyarrow import ArrowException, fs

    parts = urlsplit(url)
    if parts.username or parts.password:
        raise DataError(
            f"{parts.scheme}://...@{parts.hostname}{parts.path}: a path must not hold keys, since every checkpoint "
            "records it; put them into the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY for S3)."
        )
    try:
        if parts.scheme != "s3":
            store, root = fs.FileSystem.from_uri(url)
            return store, root.rstrip("/")
        settings = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        if unknown := settings.keys() - {"region", "endpoint_override", "scheme"}:
            raise ValueError(f"unknown settings {', '.join(sorted(unknown))}")
        defaults = {  # which pyarrow takes from the environment for URLs, but then with time limits of its own
            "region": os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
            "endpoint_override": os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
        }
        store = fs.S3FileSystem(
            **{**defaults, **settings},
            connect_timeout=_CONNECT,
            request_timeout=_SILENCE,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),  # we try again ourselves
        )
        return store, f"{parts.netloc}{parts.path}".rstrip("/")
    except (ArrowException, ValueError, TypeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{url}: pyarrow cannot open it as a folder ({reason}); look at the URL.") from None
