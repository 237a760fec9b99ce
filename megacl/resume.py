"""What a run can go on from: its own newest checkpoint, a parent's, or nothing; and whether it still is the same run.

What makes a run itself must match what its directory holds: the model, the tokenizer, the data, order, boundaries,
packing, seed, optimizer, and for every phase that has begun its mixture, replay, batch, budget and schedule. How the
arithmetic is carried out (engine, ranks, micro batch) and how it is watched (logging, evaluation, checkpoints,
stability) may change; phases may be appended, and those that have not begun may be edited.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacl.checkpoint import Checkpoint, mark_of, open_checkpoint
from megacl.config import RunConfig
from megacl.config_data import SourceConfig
from megacl.config_phase import nearest
from megacl.configfile import load, to_tree
from megacl.data.source import Source, open_source
from megacl.data.store import ShardCache
from megacl.data.stream import open_recorded
from megacl.data.tokenizer import Tokenizer, load_tokenizer
from megacl.errors import CheckpointError, ConfigError, DataError
from megacl.lineage import BranchRecord, Lineage
from megacl.starting import ForeignModel, begin_with, open_start, tokenizer_of
from megacl.vocabulary import ExtendedModel


@dataclass(frozen=True)
class Inputs:
    """The data of a run, opened and found to fit."""

    tokenizer: Tokenizer
    sources: Mapping[str, Source]
    """Those that the configuration names, by their names."""
    history: tuple[Source, ...] = ()
    """Those that only the model's history names, as far as they are still there."""
    cache: ShardCache | None = None
    """Where shards of sources on a store are fetched to."""

    @property
    def opened(self) -> tuple[Source, ...]:
        """All of them."""
        return (*self.sources.values(), *self.history)


@dataclass(frozen=True)
class Origin:
    """What a run goes on from."""

    stored: RunConfig | None
    """The configuration that the run directory holds."""
    checkpoint: Checkpoint | None
    """The run's own newest one."""
    parent: Checkpoint | None
    """What start_from names, where the run is still at its beginning."""
    lineage: Lineage
    """What the model has seen so far; with the branch, where the run is still at its beginning."""

    @property
    def loaded(self) -> Checkpoint | None:
        """The checkpoint that the run loads before all else; None where it begins with weights of its own."""
        return self.checkpoint or self.parent

    @property
    def phase(self) -> int:
        """Index of the phase to go on with; the number of phases where none is left."""
        if self.checkpoint is None:
            return 0
        return self.checkpoint.state.phase + self.checkpoint.state.phase_end

    @property
    def samples(self) -> int:
        """Samples of that phase already seen."""
        return 0 if self.checkpoint is None or self.checkpoint.state.phase_end else self.checkpoint.state.samples


@dataclass(frozen=True)
class Found:
    """All that a run begins with."""

    config: RunConfig
    """With every source's generation pinned."""
    inputs: Inputs
    origin: Origin


def check_no_data(run_dir: Path) -> None:
    """Raises ConfigError where a run would be made in a data folder, or in a checkpoint."""
    if (run_dir / "manifest.json").is_file():
        raise ConfigError(f"{run_dir}: is a data folder or a checkpoint, by its manifest.json; name another run_dir.")


def find_origin(
    config: RunConfig, run_dir: Path, newest: Path | None, *, resume: bool, warn: Callable[[str], None]
) -> Origin:
    """What a run directory and `start_from` hold, checked against the configuration; no data is looked at.

    newest: the directory's newest good checkpoint. Raises ConfigError where the directory holds a run with other
    settings, or data, CheckpointError where there is nothing to start from.
    """
    check_no_data(run_dir)
    checkpoint = open_checkpoint(newest) if newest is not None else None
    stored = checkpoint.config if checkpoint else None
    if (run_dir / "config.yaml").is_file():
        stored = load([str(run_dir / "config.yaml")])
    if stored is not None and not resume:
        raise CheckpointError(f"{run_dir}: holds a run already; leave out --no-resume, or name another run_dir.")
    if stored is not None:
        started = (run_dir / "metrics.jsonl").is_file()
        begun = checkpoint.state.phase + 1 if checkpoint else int(started)
        _check_same_run(config, stored, begun, run_dir)
    parent = None
    if config.start_from is not None and checkpoint is None:
        parent = open_start(config.start_from, warn)
        for key in ("boundaries", "packing") if parent.config.phases else ():
            was, now = getattr(parent.config, key), getattr(config, key)
            if was != now:
                warn(f"{key} is {now}, and the model of {parent.path} was trained with {key} {was}; is that meant?")
        asked = config.phases[0].optimizer_state if config.phases else None
        if asked in ("keep", "reset_step") and not parent.has_moments:
            warn(f"optimizer_state of phases[0] is {asked}, and {parent.path} has no optimizer's state: it begins anew")
    history, lineage = checkpoint or parent, Lineage()
    if history is not None:
        _check_same_model(config, history, extends=parent is not None and _extends(config))
        lineage = history.lineage
    if parent is not None and not isinstance(parent, ForeignModel):
        lineage = lineage.with_event(BranchRecord(after=len(lineage.phases), checkpoint=mark_of(parent)))
    return Origin(stored, checkpoint, parent, lineage)


@dataclass(frozen=True)
class OpenedSources:
    """The sources of a run and of its model's history. It pickles: one rank reads the lists of shards for all."""

    named: Mapping[str, Source]
    history: tuple[Source, ...]


def shard_cache(config: RunConfig) -> ShardCache | None:
    """Where shards are fetched to before they are read, as the configuration says."""
    cache = config.cache
    return ShardCache(cache.path, cache.bytes, cache.patience, stage=cache.stage) if cache else None


def open_sources(config: RunConfig, origin: Origin) -> OpenedSources:
    """Opens what the configuration names, and what the lineage names beside that, where it is still there.

    Raises ConfigError where no source is named, DataError where one is not there or damaged.
    """
    if not config.sources:
        raise ConfigError("sources is empty; name at least one folder that `megacl prepare` wrote.")
    cache = shard_cache(config)
    named = {}
    for name, source in config.sources.items():
        opened = open_source(source.path, _generation(name, source, origin.stored), source.since, cache)
        named[name] = dataclasses.replace(opened, window=source.window)
    known = {source.fingerprint for source in named.values()}
    history = []
    for fingerprint, record in origin.lineage.sources.items():
        if fingerprint not in known:
            with contextlib.suppress(DataError):  # said by whoever needs it
                history.append(open_recorded(record, cache=cache))
    return OpenedSources(named, tuple(history))


def find_inputs(config: RunConfig, origin: Origin, opened: OpenedSources) -> Found:
    """The run with its data. Raises DataError where data or tokenizer are not what the run or its model had.

    ConfigError where a setting does not fit the data.
    """
    inputs = _check_inputs(config, origin, opened)
    if origin.parent is not None:
        begun = begin_with(origin.parent, config, inputs.tokenizer)
        if isinstance(begun, ExtendedModel):
            lineage = origin.lineage.with_event(begun.extension.record)
            origin = dataclasses.replace(origin, parent=begun, lineage=lineage)
    pinned = {
        name: dataclasses.replace(source, generation=inputs.sources[name].generation)
        for name, source in config.sources.items()
    }
    _check_same_data(config, inputs, origin.lineage)
    _check_best(config, inputs, origin.lineage)
    return Found(dataclasses.replace(config, sources=pinned), inputs, origin)


def _check_best(config: RunConfig, inputs: Inputs, lineage: Lineage) -> None:
    """Raises ConfigError where the best checkpoints are to be chosen by a source that is not evaluated."""
    name = config.checkpoint.keep_best.source if config.checkpoint.keep_best else None
    if name is None:
        return
    evaluated = {source.name for source in lineage.sources.values()}
    evaluated |= set(inputs.sources)
    if name not in evaluated:
        raise ConfigError(f"checkpoint.keep_best.source is {name!r}, which is no source here{nearest(name, evaluated)}")
    if name in inputs.sources and not inputs.sources[name].validation.tokens:
        raise ConfigError(
            f"checkpoint.keep_best.source is {name!r}, which has no held-out documents; name another source, "
            "or prepare it with --validation above 0."
        )


def _check_inputs(config: RunConfig, origin: Origin, opened: OpenedSources) -> Inputs:
    lineage, sources = origin.lineage, opened.named
    first = next(iter(sources.values()))
    tokenizer = load_tokenizer(config.tokenizer.path if config.tokenizer else first.tokenizer_file)
    for name, source in sources.items():
        if not tokenizer.matches(source.tokenizer_fingerprint):
            raise DataError(
                f"source {name!r} ({source.path}) was prepared with tokenizer {source.tokenizer_fingerprint[:12]}, and "
                f"the run's is {tokenizer.fingerprint[:12]} ({tokenizer.file}); prepare it again with that one."
            )
    if lineage.phases and not tokenizer.matches(lineage.phases[-1].tokenizer):
        raise DataError(
            f"the model was trained with tokenizer {lineage.phases[-1].tokenizer[:12]}, and the run's is "
            f"{tokenizer.fingerprint[:12]} ({tokenizer.file}); use the model's own, or one that extends it."
        )
    if origin.parent is not None and not lineage.phases:
        known = tokenizer_of(origin.parent, tokenizer)
        if known is not None and not tokenizer.matches(known.fingerprint):
            raise DataError(
                f"the model of {origin.parent.path} has tokenizer {known.fingerprint[:12]}, and the run's is "
                f"{tokenizer.fingerprint[:12]} ({tokenizer.file}); use the model's own, or one that extends it."
            )
    if tokenizer.vocab_size > config.model.vocab_size:
        remedy = ""
        if origin.parent is not None:
            remedy = ": give it, and say in tokenizer.new_rows how the rows of the new tokens begin"
        raise ConfigError(
            f"model.vocab_size is {config.model.vocab_size}; it must be at least the tokenizer's, "
            f"{tokenizer.vocab_size}{remedy}."
        )
    return Inputs(tokenizer, sources, opened.history, shard_cache(config))


def _extends(config: RunConfig) -> bool:
    """Whether the vocabulary of the model to start from may be given more rows."""
    return config.tokenizer is not None and config.tokenizer.new_rows is not None


def _generation(name: str, source: SourceConfig, stored: RunConfig | None) -> int | None:
    """The generation given, the one that the run has had so far, or None: the newest."""
    before = stored.sources.get(name) if stored else None
    if source.generation is None and before is not None and before.path == source.path:
        return before.generation
    return source.generation


_IDENTITY = ("model", "seed", "order", "boundaries", "packing", "start_from", "optimizer")


def _check_same_run(config: RunConfig, stored: RunConfig, begun: int, run_dir: Path) -> None:
    """Raises ConfigError where what makes the run in `run_dir` itself differs; begun: how many phases have begun."""
    for key in _IDENTITY:
        _compare(to_tree(stored)[key], to_tree(config)[key], key, run_dir)
    if len(config.phases) < begun:
        raise ConfigError(
            f"run_dir {run_dir} holds a run that has begun {begun} phases, and this configuration has "
            f"{len(config.phases)}; put them back, or name another run_dir."
        )
    for index in range(begun):
        was, now = _phase_identity(stored, index), _phase_identity(config, index)
        _compare(was, now, f"phases[{index}]", run_dir)


def _phase_identity(config: RunConfig, index: int) -> dict[str, Any]:
    """What makes a phase itself, defaults resolved: its budget in steps, and the batch."""
    phase = config.phases[index]
    tree: dict[str, Any] = to_tree(phase)
    del tree["tokens"]
    return {
        **tree,
        "steps": config.steps_of(phase),
        "seq_length": config.seq_length_of(phase),
        "global_batch_size": config.batch_size_of(phase),
    }


def _compare(was: Any, now: Any, path: str, run_dir: Path) -> None:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in {**was, **now}:
            _compare(was.get(key), now.get(key), f"{path}.{key}", run_dir)
    elif was != now:
        raise ConfigError(
            f"run_dir {run_dir} holds a run with {path} {was!r}, and this configuration has {now!r}; "
            "put that back to go on with it, or name another run_dir."
        )


def _check_same_model(config: RunConfig, history: Checkpoint, *, extends: bool) -> None:
    was, now = to_tree(history.config.model.spelled_out), to_tree(config.model.spelled_out)
    for key in now:
        if extends and key == "vocab_size" and now[key] >= was[key]:
            continue
        if was[key] != now[key]:
            raise ConfigError(
                f"model.{key} is {now[key]!r}, and in {history.path} it is {was[key]!r}; "
                "a model goes on in its own shape, so use that value."
            )


def _check_same_data(config: RunConfig, inputs: Inputs, lineage: Lineage) -> None:
    """Raises DataError where a source of a phase that this run has begun is other data now."""
    names = {phase.name for phase in config.phases}
    for phase in lineage.phases:
        if phase.name not in names:
            continue  # a phase of an earlier run: its sources are opened by their record where they are replayed
        for record in phase.sources_read:
            source = inputs.sources.get(record.name)
            if source is not None and source.fingerprint != record.fingerprint:
                raise DataError(
                    f"source {record.name!r} ({source.path}, generation {source.generation}) has fingerprint "
                    f"{source.fingerprint[:12]}, and phase {phase.name!r} has begun with {record.fingerprint[:12]}; "
                    f"give sources.{record.name}.generation, or add the new data as a source of another name."
                )
            if source is not None and source.window != record.window:
                raise ConfigError(
                    f"sources.{record.name}.window is {source.window}, and phase {phase.name!r} has begun with "
                    f"{record.window}; put that back, or give the source another name for the phases to come."
                )
