"""Writing a plan's files so that a conversion that was killed goes on, and nobody sees half of one.

    with Staging(destination, identity) as staging:
        facts = staging.write(plan, progress)       # files that are there already, and whole, are kept
        ...
        staging.publish(folder)

Everything stands in a hidden folder beside the destination, .NAME.converting, until it is renamed. In it: what is being
converted (conversion.json), the files that are done with their hashes, the files. Another conversion to the same
destination, or of a source that has changed, begins anew. One process at a time, held by a lock.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megacl.convert.plan import Plan, WrittenFile, bytes_of
from megacl.errors import ConversionError, DataError
from megacl.publish import alone_in, disk_errors, flush_folder, publish_text
from megacl.tensorfile import TensorWriter

_IDENTITY = "conversion.json"


class Staging:
    """The hidden folder of one conversion, while its lock is held."""

    def __init__(self, destination: Path, identity: Mapping[str, Any]) -> None:
        """identity: what makes this conversion itself, as JSON. ConversionError where there is a destination."""
        check_free(destination)
        self.destination = destination
        self.folder = _hidden(destination)
        self.files = self.folder / "files"
        self._identity = json.loads(json.dumps(identity))
        self._done: dict[str, WrittenFile] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(alone_in(self.folder, "another conversion"))
        try:
            if self.destination.exists():  # another conversion has ended since this one looked
                shutil.rmtree(self.folder, ignore_errors=True)
                raise _is_there(self.destination)
            with disk_errors(self.folder, "the conversion"):
                self._begin()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _begin(self) -> None:
        """Takes over what an earlier try of the same conversion has left, or clears it away."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            tree = json.loads((self.folder / _IDENTITY).read_bytes())
            if tree["conversion"] == self._identity:
                self._done = {name: WrittenFile(**facts) for name, facts in tree["done"].items()}
        for left in self.folder.iterdir():
            if left.name == ".lock" or (self._done and left == self.files):
                continue
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        self.files.mkdir(exist_ok=True)
        self._note()

    def _note(self) -> None:
        tree = {"conversion": self._identity, "done": {name: asdict(facts) for name, facts in self._done.items()}}
        publish_text(self.folder / _IDENTITY, json.dumps(tree, indent=1) + "\n", "what is done of the conversion")

    def write(self, plan: Plan, progress: Callable[[int], None]) -> dict[str, WrittenFile]:
        """Writes the files of a plan that are not there yet; progress: bytes of tensors that are written, or kept.

        Files of an earlier try are hashed, and written again where they have changed; what it has put beside them is
        cleared away, since this one may have another tokenizer. DataError where the disk refuses.
        """
        with disk_errors(self.files, "the converted model"):
            for left in self.files.iterdir():
                if left.name not in plan.files:
                    left.unlink()
        for name, entries in plan.files.items():
            path = self.files / name
            if name in self._done and _as_noted(path, self._done[name], plan):
                progress(bytes_of(entries))
                continue
            self._done.pop(name, None)
            path.unlink(missing_ok=True)
            with (
                disk_errors(path, "the converted model"),
                TensorWriter(path, entries, {"format": "pt"}, hashes=plan.tensor_hashes, digest=plan.digest) as file,
            ):
                for tensor in file.names:
                    made = plan.make(tensor)
                    file.write(tensor, made)
                    progress(made.nbytes)
                facts, hashes = file.close(), file.hashes()
                _forget(path)
            self._done[name] = WrittenFile(facts.size, facts.digest, hashes)
            self._note()
        return {name: self._done[name] for name in plan.files}

    def publish(self, folder: Path) -> None:
        """Renames a folder inside to the destination, flushed to the disk. DataError where the disk refuses."""
        with disk_errors(self.destination, "the converted model"):
            if folder != self.files:
                shutil.rmtree(self.files)  # they are in the other one too
            for file in folder.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as opened:
                        os.fsync(opened.fileno())
            flush_folder(folder)
            if self.destination.exists():
                raise ConversionError(
                    f"{self.destination}: has come to be there meanwhile; move it away and run again."
                )
            os.rename(folder, self.destination)
            flush_folder(self.destination.parent)
        shutil.rmtree(self.folder, ignore_errors=True)


def check_free(destination: Path) -> None:
    """Raises ConversionError where there is a destination; sweeps what a kill left behind its publishing."""
    if not destination.exists():
        return
    hidden = _hidden(destination) if destination.name else None  # "." and "/" have none
    if hidden is not None and hidden.is_dir():
        with contextlib.suppress(DataError), alone_in(hidden, "another conversion"):
            shutil.rmtree(hidden, ignore_errors=True)
    raise _is_there(destination)


def _is_there(destination: Path) -> ConversionError:
    return ConversionError(f"{destination}: is there already; name another place, or move it away.")


def _hidden(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.converting")


def _forget(path: Path) -> None:
    """Has the system let go of a file's pages, so that what is read of it next comes from the disk."""
    with open(path, "rb") as file, contextlib.suppress(AttributeError, OSError):  # where it cannot
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _as_noted(path: Path, facts: WrittenFile, plan: Plan) -> bool:
    if not path.is_file() or path.stat().st_size != facts.size:
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, plan.digest).hexdigest() == facts.digest
