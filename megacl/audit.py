"""Whether a model's lineage holds, down to the bytes: `megacl lineage MODEL --verify`.

    for finding in audit("runs/x@english"):
        print(finding)              # ok        phase 'english' of run x, id 0f3a...

Checked, each by itself, so that every part that does not hold is named: the checkpoint's files against its manifest;
each entry of its lineage against its id; that replays are of phases before them; every source where it was recorded, or
where the configuration has it now, with its fingerprint and the SHA-256 of every shard, held-out ones included; and the
checkpoints that branches, merges and conversions name, where they are still there: the id of their lineage, and all of
their files.

They are looked for in what `start_from` names, from run to run, and beside these run directories under their own names.
Of a source on a store the list of shards is checked; a shard is when it is fetched, by whoever reads it.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megacl.checkpoint import checkpoint_path, mark_of, named_checkpoint, open_checkpoint
from megacl.checkpoint_files import TensorFiles, damaged_files
from megacl.config import RunConfig
from megacl.configfile import load
from megacl.data.manifest import MANIFEST, read_manifest
from megacl.data.source import Source
from megacl.data.store import is_url
from megacl.data.stream import open_recorded
from megacl.data.verify import shard_problem
from megacl.errors import CheckpointError, ConfigError, DataError, UnreachableError
from megacl.history import configured_sources
from megacl.lineage import (
    CheckpointMark,
    Lineage,
    SourceRecord,
    changed_entries,
    entry_name,
    marks_of,
    read_lineage,
)
from megacl.resume import shard_cache


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    state: Literal["ok", "missing", "changed", "unchecked"]
    what: str

    def __str__(self) -> str:
        return f"{self.state:9} {self.what}"


def audit(reference: str) -> Iterator[Finding]:
    """Checks the lineage of a checkpoint, thing by thing: RUN (its newest), RUN@PHASE, RUN@STEP, RUN@NAME or a folder.

    Raises CheckpointError where there is no such checkpoint.
    """
    path = named_checkpoint(reference)
    yield from _files(path, f"checkpoint {path}")
    try:
        lineage, stored = read_lineage(path)
    except CheckpointError as error:
        yield _bad(path / "lineage.json", str(error))
        return
    changed = changed_entries(lineage, stored)
    for index, own in enumerate(stored):
        name = f"{entry_name(lineage, index)}, id {own[:12]}"
        yield Finding("changed", f"{name}: it does not match") if index in changed else Finding("ok", name)
    yield from _beside(path, stored)
    yield from _replays(lineage)
    yield from _Sources(_config_of(path)).findings(lineage)
    yield from _marks(path, lineage)


def _bad(file: Path, line: str) -> Finding:
    """What is wrong with a file."""
    return Finding("changed" if file.is_file() else "missing", line)


def _files(path: Path, name: str) -> Iterator[Finding]:
    """What a checkpoint's manifest says of its files."""
    damaged = damaged_files(path)
    for file, problem in damaged:
        yield _bad(file, f"{name}: {problem}")
    if not damaged:
        yield Finding("ok", f"{name}: its files are as in its manifest")


def _beside(path: Path, ids: Sequence[str]) -> Iterator[Finding]:
    """The run directory's own lineage.json: readers of runs take that one."""
    run_dir = path.parent.parent
    if path.parent.name != "checkpoints" or not (run_dir / "config.yaml").is_file():
        return
    file = run_dir / "lineage.json"
    try:
        lineage, stored = read_lineage(run_dir)
    except CheckpointError as error:
        yield _bad(file, str(error))
        return
    changed = changed_entries(lineage, stored)
    for index in changed:
        yield Finding("changed", f"{file}: {entry_name(lineage, index)} does not match its id")
    over = len(ids) - 1  # the last entry may have gone on since
    if not changed and stored[:over] != ids[:over]:
        yield Finding("changed", f"{file}: it tells another history than {path}")
    elif not changed:
        yield Finding("ok", str(file))


def _replays(lineage: Lineage) -> Iterator[Finding]:
    """Whether what was replayed had been seen by then."""
    for index, phase in enumerate(lineage.phases):
        before = [earlier.name for earlier in lineage.phases[:index]]
        for entry in phase.replay.from_ if phase.replay else ():
            name = f"phase {phase.name!r} replays phase {entry.phase!r}"
            if before.count(entry.phase) == 1:
                yield Finding("ok", name)
            else:
                yield Finding("missing", f"{name}, and {before.count(entry.phase)} phases before it have that name")


# ---------------------------------------------------------------------------------------------- sources


class _Sources:
    """The sources of a history, each shard looked at once, however many generations have it."""

    def __init__(self, config: RunConfig | None) -> None:
        self._config, self._cache = config, shard_cache(config) if config else None
        self._problems: dict[Path, str | None] = {}

    def findings(self, lineage: Lineage) -> Iterator[Finding]:
        """One for each source that holds, one for each shard that does not."""
        for record in lineage.sources.values():
            name = f"source {record.name!r}, fingerprint {record.fingerprint[:12]}"
            if is_url(record.path) and self._cache is None:
                yield Finding("unchecked", f"{name}: {record.path} lies on a store, and the run has no cache.path")
                continue
            try:
                source = self._open(record)
            except UnreachableError as error:
                yield Finding("unchecked", str(error))
                continue
            except DataError as error:
                there = not is_url(record.path) and (Path(record.path) / MANIFEST).is_file()
                yield Finding("changed" if there else "missing", str(error))
                continue
            yield from self._shards(source, name)

    def _open(self, record: SourceRecord) -> Source:
        try:
            return open_recorded(record, cache=self._cache)
        except UnreachableError:
            raise
        except DataError:
            known = configured_sources(self._config, record.name, self._cache) if self._config else ()
            return open_recorded(record, known, self._cache)

    def _shards(self, source: Source, name: str) -> Iterator[Finding]:
        rows = [*source.train.shards, *source.validation.shards]
        place = f"generation {source.generation} of {source.path}"
        if not isinstance(source.folder, Path):
            yield Finding("ok", f"{name}: {place}, its list of {len(rows)} shards; each is checked when it is fetched")
            return
        manifest = read_manifest(source.folder)
        bad = False
        for row in rows:
            file = source.folder / row.path
            if file not in self._problems:
                self._problems[file] = shard_problem(source.folder, row, manifest)
            if problem := self._problems[file]:
                bad = True
                yield _bad(file, f"{name}: {problem}")
        if not bad:
            size = sum(row.size for row in rows)
            yield Finding("ok", f"{name}: {place}, {len(rows)} shards of {size:,} bytes")


# ---------------------------------------------------------------------------------------------- other checkpoints


def _marks(path: Path, lineage: Lineage) -> Iterator[Finding]:
    """The checkpoints that branches, merges and conversions name."""
    runs = _runs_from(path)
    for index, entry in enumerate(lineage.entries):
        for mark in marks_of(entry):
            name = f"checkpoint {mark.run}@{mark.step} of {entry_name(lineage, index)}"
            found = [folder for folder in _places(mark, runs) if folder.is_dir()]
            if not found:
                yield Finding("unchecked", f"{name}: it is not found here, so it cannot be checked")
                continue
            # Two runs may have one name: the one with the right history is meant.
            meant = next((folder for folder in found if _id_of(folder) == mark.id), found[0])
            yield from _mark(mark, meant, f"{name}: {meant}")


def _mark(mark: CheckpointMark, path: Path, name: str) -> Iterator[Finding]:
    """What a checkpoint is, and what a lineage says that it was."""
    damaged = damaged_files(path)
    for file, problem in damaged:
        yield _bad(file, f"{name}: {problem}")
    try:
        own = mark_of(open_checkpoint(path))
        if not damaged:  # the manifest may have been made anew for other weights, and the index left as it was
            own = dataclasses.replace(own, weights=TensorFiles(path).hash_weights())
    except (CheckpointError, ConfigError) as error:
        if not damaged:
            yield Finding("changed", f"{name}: {error}")
        return
    for what, was, now in (("lineage has id", mark.id, own.id), ("weights have SHA-256", mark.weights, own.weights)):
        if was != now:
            yield Finding("changed", f"{name}: its {what} {now[:12]}, and {was[:12]} is recorded")
    if not damaged and (own.id, own.weights) == (mark.id, mark.weights):
        yield Finding("ok", f"{name}, lineage {mark.id[:12]}, weights {mark.weights[:12]}")


def _id_of(path: Path) -> str | None:
    try:
        return read_lineage(path)[0].id
    except CheckpointError:
        return None


def _places(mark: CheckpointMark, runs: Mapping[Path, RunConfig | None]) -> Iterator[Path]:
    """Where a checkpoint may lie."""
    for run, config in runs.items():
        if mark.run in (run.name, Path(config.run_dir).name if config else None):
            yield run if (run / "manifest.json").is_file() else checkpoint_path(run, mark.step)
    for run in runs:
        yield checkpoint_path(run.absolute().parent / mark.run, mark.step)


def _runs_from(path: Path) -> dict[Path, RunConfig | None]:
    """The run directory of a checkpoint, that of the one that it started from, and so on, as far as they are there.

    In the place of a run directory, a checkpoint that lies by itself.
    """
    found: dict[Path, RunConfig | None] = {}
    run: Path | None = _run_of(path)
    while run is not None and run not in found:
        config = found[run] = _config_of(run)
        reference = config.start_from if config else None
        run = None
        if reference is not None:
            run = _run_of(Path(reference)) if Path(reference).is_dir() else Path(reference.rpartition("@")[0])
    return found


def _run_of(path: Path) -> Path:
    return path.parent.parent if path.parent.name == "checkpoints" else path


def _config_of(folder: Path) -> RunConfig | None:
    try:
        return load([str(folder / "config.yaml")])
    except ConfigError:  # of a checkpoint it is one of the files
        return None
