"""Which files a command's inputs are: files, folders, patterns such as raw/**/*.jsonl.gz, `-` for standard input.

A folder is searched for files of every form, links followed, in the order of their names; what is of another kind is
passed over and reported. So is, in a folder that datasets.save_to_disk wrote, all but the data files that its
state.json lists, and one of Megatron's two files without the other. A pattern is taken as a folder is: what it
matches is sorted, folders are searched, other kinds are passed over. What is hidden in a folder, its name beginning
with a dot, is not looked at, nor is what megacl wrote into a data folder, so that OUT may lie below an input.

A file is known by the SHA-256 of its whole content, taken before it is cut (of a Megatron dataset: of .bin and .idx,
behind one another). One that changes between that and the end of its reading, by its size or its time of change, is
refused, so that no hash stands for other documents than it saw.
"""

import functools
import glob
import hashlib
import json
import os
import re
import stat
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from megacl.data.forms import FORMS_TEXT, RawFile, check_unchanged, disk_named, form_of, measure
from megacl.data.forms.reading import Reading
from megacl.data.manifest import InputFile
from megacl.data.shard_list import SHARDS
from megacl.errors import DataError
from megacl.publish import disk_errors

STANDARD_INPUT = "-"

_READ_BYTES = 2**20
# What datasets writes beside its data.
_NO_DOCUMENTS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
# What megacl writes into a data folder, see docs/data.md.
_IN_DATA_FOLDERS = re.compile(
    r"manifest\.json|(shards|inputs|removed|(train|validation)-\d+)\.arrow|tokenizer\.(json|model)(\.extends\.json)?"
)


@dataclass(frozen=True)
class Inputs:
    """What the inputs of a command name: the files to read, in order, and those of other kinds in their folders."""

    files: tuple[RawFile, ...]
    passed_over: tuple[str, ...]


def find_inputs(inputs: Sequence[str], reading: Reading) -> Inputs:
    """The files that the inputs name; standard input without a place on disk, see keep_standard_input.

    DataError: one is missing, empty, unreadable, or of an unknown form; a pattern matches nothing; a folder has a link
    to nothing in it, or a folder that cannot be read; standard input is a terminal.
    """
    files: list[RawFile] = []
    passed_over: list[str] = []
    for name in inputs:
        if name == STANDARD_INPUT:
            files.append(_standard_input(reading))
            continue
        if glob.has_magic(name) and not os.path.lexists(name):
            matches = sorted(glob.glob(name, recursive=True))
            if not matches:
                raise DataError(f"{name}: no file matches this pattern. Check it, and quote it for the shell.")
            found, others = _search(matches)
        elif os.path.isdir(name):
            found, others = _search([name])
        else:
            found, others = [_named(name)], []
        if not found:
            kind = "the folder holds" if os.path.isdir(name) else "the pattern matches"
            raise DataError(f"{name}: {kind} no file of documents; their names end with {FORMS_TEXT}.")
        files += map(_describe, found)
        passed_over += others
    return Inputs(tuple(files), tuple(map(_printable, passed_over)))


def _named(name: str) -> str:
    """The file of documents that a single name stands for: of Megatron's two files the .bin."""
    form = form_of(name)
    if form is None:
        _stat(name)  # that it is not there matters more
        archive = name.endswith((".zip", ".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2", ".7z", ".rar"))
        raise DataError(
            f"{name}: an archive; unpack it, and give the folder."
            if archive
            else f"{name}: not a form that can be read; the name of a file of documents ends with {FORMS_TEXT}."
        )
    return f"{name.removesuffix('.idx')}.bin" if form[0] == "megatron" and name.endswith(".idx") else name


def _search(places: Iterable[str]) -> tuple[list[str], list[str]]:
    """The files of documents among some files and folders and below those, each once, and the other files."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: the folder cannot be read: {error.strerror}. Mend it, or move it away.")

    found: dict[str, str] = {}
    others: dict[str, str] = {}

    @functools.cache
    def is_data_folder(folder: str) -> bool:
        return any(os.path.exists(os.path.join(folder, name)) for name in (SHARDS, ".prepare"))

    visited: set[tuple[int, int]] = set()

    def sort_out(names: Iterable[str]) -> None:
        listed: dict[str, set[str] | None] = {}
        for name in names:
            _stat(name)
            folder, base = os.path.split(name)
            if _IN_DATA_FOLDERS.fullmatch(base) and is_data_folder(folder):
                continue
            if name.endswith(".idx") and os.path.isfile(f"{name.removesuffix('.idx')}.bin"):
                continue  # part of what its .bin file names
            (found if _holds_documents(name, listed) else others).setdefault(os.path.normpath(name), name)

    alone: list[str] = []
    for place in places:
        if not stat.S_ISDIR(_stat(place).st_mode):
            alone.append(place)
            continue
        for folder, folders, names in os.walk(place, onerror=refuse, followlinks=True):
            facts = _stat(folder)
            if (facts.st_dev, facts.st_ino) in visited:  # a link leads here once more, perhaps in a circle
                folders.clear()
                continue
            visited.add((facts.st_dev, facts.st_ino))
            folders[:] = sorted(each for each in folders if not each.startswith("."))
            sort_out(os.path.join(folder, each) for each in names if not each.startswith("."))
    sort_out(alone)
    return sorted(found.values()), sorted(others.values())


def _holds_documents(name: str, listed: dict[str, set[str] | None]) -> bool:
    """Whether a file that was found is to be read. listed: the data files of the saved datasets seen so far."""
    form = form_of(name)
    folder, base = os.path.split(name)
    if form is None or base in _NO_DOCUMENTS:
        return False
    if form[0] == "megatron":
        return name.endswith(".bin") and os.path.isfile(f"{name.removesuffix('.bin')}.idx")
    if form[0] == "arrow" or base == "state.json":
        if folder not in listed:
            listed[folder] = _saved_dataset(folder)
        names = listed[folder]
        return names is None or base in names
    return True


def _saved_dataset(folder: str) -> set[str] | None:
    """The data files that datasets.save_to_disk wrote into a folder, None if it did not; DataError if one is gone."""
    state = os.path.join(folder, "state.json")
    try:
        with open(state, "rb") as file:
            names = {each["filename"] for each in json.load(file)["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for name in sorted(names):
        if not os.path.isfile(os.path.join(folder, name)):
            raise DataError(f"{state}: it lists {name}, which is not there. Copy the whole folder again.")
    return names


def _stat(name: str) -> os.stat_result:
    try:
        return os.stat(name)
    except OSError as error:
        if os.path.islink(name):
            raise DataError(f"{name}: a link that leads nowhere ({error.strerror}). Mend or remove the link.") from None
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{name}: no such file or folder. Check the name.") from None
        raise DataError(f"{name}: cannot be read: {error.strerror}.") from None


def _printable(name: str) -> str:
    """The name, with bytes of it that are not UTF-8 as \\xNN: neither JSON nor a terminal has a form for those."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _describe(name: str) -> RawFile:
    if _printable(name) != name:
        raise DataError(f"{_printable(name)}: the file's name is not UTF-8, so it cannot be recorded. Rename the file.")
    known = form_of(name)
    assert known is not None
    form, compression = known
    paths = (name, f"{name.removesuffix('.bin')}.idx") if form == "megatron" else (name,)
    for path in paths:
        if form == "megatron" and not os.path.exists(path):
            raise DataError(f"{path}: no such file, and a Megatron dataset is a .bin and an .idx file. Copy both.")
        if not stat.S_ISREG(_stat(path).st_mode):
            raise DataError(f"{path}: not a file but a pipe or a device. Write its content to a file and give that.")
        with disk_named(path), open(path, "rb"):
            pass
    size, modified_ns = measure(paths)
    if size == 0 and (form != "txt" or compression):  # a text file without a byte is an empty document
        raise DataError(f"{name}: the file is empty. Leave it out, or look at what should have written it.")
    return RawFile(name, form, compression, paths, size, modified_ns)


def _standard_input(reading: Reading) -> RawFile:
    if sys.stdin is None or sys.stdin.closed:
        raise DataError(f"{STANDARD_INPUT}: standard input is closed. Pipe the documents into the command.")
    if sys.stdin.isatty():
        raise DataError(
            f"{STANDARD_INPUT}: documents are expected on standard input, which is a terminal. Pipe them: "
            "zcat raw/*.gz | megacl prepare - ..."
        )
    return RawFile(STANDARD_INPUT, "txt" if reading.text else "jsonl", "", (), 0, 0)


def keep_standard_input(found: Inputs, folder: Path) -> Inputs:
    """The same inputs; standard input, if it is one of them, was read to its end and lies in a file in `folder`.

    DataError: it is given twice or empty, cannot be read, or the disk refuses.
    """
    places = [index for index, file in enumerate(found.files) if file.name == STANDARD_INPUT]
    if not places:
        return found
    if len(places) > 1:
        raise DataError(f"{STANDARD_INPUT}: standard input is given twice. Leave one out.")
    path = folder / "standard-input"
    with disk_errors(path, "standard input"):
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            while piece := _read_standard_input():
                file.write(piece)
    size, modified_ns = measure((str(path),))
    if size == 0:
        raise DataError(f"{STANDARD_INPUT}: standard input is empty. Look at the command that should write it.")
    files = list(found.files)
    files[places[0]] = replace(files[places[0]], paths=(str(path),), size=size, modified_ns=modified_ns)
    return replace(found, files=tuple(files))


def _read_standard_input() -> bytes:
    try:
        return sys.stdin.buffer.read(_READ_BYTES)
    except OSError as error:
        raise DataError(f"{STANDARD_INPUT}: standard input cannot be read: {error.strerror}.") from None


def identify(files: Sequence[RawFile], threads: int) -> tuple[InputFile, ...]:
    """What a manifest records of the files, in order: it reads all of them, as many at once as there are threads.

    DataError: a file has the content of another one, changed since it was found, or cannot be read.
    """
    stopped = threading.Event()

    def describe(file: RawFile) -> InputFile:
        digest = hashlib.sha256()
        for path in file.paths:
            with disk_named(path), open(path, "rb", buffering=0) as raw:
                while not stopped.is_set() and (piece := raw.read(_READ_BYTES)):
                    digest.update(piece)
        check_unchanged(file)
        return InputFile(name=file.name, size=file.size, sha256=digest.hexdigest())

    with ThreadPoolExecutor(threads) as pool:
        try:
            records = tuple(pool.map(describe, files))
        finally:
            stopped.set()  # the pool waits for what its threads have begun; not for long after an error or Ctrl-C
    refuse_twice(records)
    return records


def refuse_twice(files: Sequence[InputFile]) -> None:
    """DataError if two of the files have one content; two text files may, as two documents may."""
    first_of: dict[tuple[str, str], InputFile] = {}
    for file in files:
        form = form_of(file.name)
        place = os.path.realpath(file.name) if form and form[0] == "txt" else ""
        if (first := first_of.setdefault((file.sha256, place), file)) is not file:
            raise DataError(f"{file.name}: its content is given twice, the first time as {first.name}. Leave one out.")
