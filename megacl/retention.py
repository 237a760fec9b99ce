"""Retention: which checkpoints of a run stay, why, and deleting the others.

    kept = reasons_to_keep(facts, config.checkpoint, newest=1200, back_to=1100)     # by step; () means that it goes
    prune_checkpoints(run_dir, newest, config.checkpoint, warn)                     # carries it out

Of the checkpoints inside phases the last `keep_last` stay, those at multiples of `keep_every`, and the best by held-out
loss. Ends of phases stay, and what has a name: release candidates are those that somebody gave one. So does what the
run itself may need: the newest, and the one that it would go back to. What cannot be read is damaged, was passed over,
and is left to its owner.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megacl.checkpoint import (
    checkpoint_path,
    find_checkpoint,
    list_checkpoints,
    newest_checkpoint,
    read_state,
    step_of,
)
from megacl.checkpoint_files import read_manifest
from megacl.checkpoint_names import changing_names, give_name, read_names
from megacl.config_checkpoint import CheckpointConfig
from megacl.configfile import load
from megacl.errors import CheckpointError, ConfigError, DataError
from megacl.heldout import read_own_evaluations
from megacl.lineage import MergeRecord, PhaseRecord, read_lineage
from megacl.publish import alone_in, name_beside, sweep_unfinished


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the rules look at in a checkpoint."""

    step: int
    phase_end: bool | None
    """None: it cannot be read."""
    names: tuple[str, ...] = ()
    loss: float | None = None
    """The held-out loss by which the best are chosen; None: it was not evaluated."""


def reasons_to_keep(
    found: Sequence[Facts], settings: CheckpointConfig, *, newest: int, back_to: int | None
) -> dict[int, tuple[str, ...]]:
    """Why each checkpoint of a run stays, in words, by step; one that has no reason goes.

    found: all of them, in any order. newest: the step of the newest good one. back_to: that of the one to which a run
    that goes on there may go back.
    """
    inside = sorted(each.step for each in found if each.phase_end is False and each.step <= newest)
    last = set(inside[-settings.keep_last :] if settings.keep_last else ())
    best = _best([each for each in found if each.phase_end is not None and each.step <= newest], settings)
    best_by = f"best by {(settings.keep_best and settings.keep_best.source) or 'mean loss'}"
    kept = {}
    for each in found:
        step = each.step
        reasons = {
            "cannot be read": each.phase_end is None,
            "beyond the newest good one": step > newest,
            "newest": step == newest,
            "phase end": each.phase_end is True,
            f"named {', '.join(each.names)}": bool(each.names),
            "everything is kept": settings.keep_last is None,
            f"last {settings.keep_last}": step in last,
            f"every {settings.keep_every}": bool(settings.keep_every) and step % (settings.keep_every or 1) == 0,
            best_by: step in best,
            "to go back to": step == back_to,
        }
        kept[step] = tuple(reason for reason, holds in reasons.items() if holds)
    return kept


def _best(found: Sequence[Facts], settings: CheckpointConfig) -> set[int]:
    """The steps with the lowest losses, of two that are equal the earlier one; NaN is never among them."""
    if settings.keep_best is None:
        return set()
    measured = sorted((each.loss, each.step) for each in found if each.loss is not None and each.loss == each.loss)
    return {step for _, step in measured[: settings.keep_best.keep]}


def losses_by_step(run_dir: Path, source: str | None) -> dict[int, float]:
    """The held-out loss in nats a token at each step at which a run was evaluated, on a source, or the mean over all.

    The mean is known where all sources of the run's last evaluation were evaluated. Raises CheckpointError where
    metrics.jsonl is broken.
    """
    by_step: dict[int, dict[str, float]] = {}
    for each in read_own_evaluations(run_dir):  # one step may have two records, of different sources
        losses = by_step.setdefault(each.step, {})
        losses |= {name: result.loss for name, result in each.sources.items()}
    if source is not None:
        return {step: losses[source] for step, losses in by_step.items() if source in losses}
    last = set(by_step[max(by_step)]) if by_step else set()
    return {
        step: sum(losses[name] for name in last) / len(last)
        for step, losses in by_step.items()
        if last and last <= set(losses)
    }


def facts_of(run_dir: Path, settings: CheckpointConfig) -> list[Facts]:
    """What the rules look at, of all checkpoints of a run, oldest first.

    Raises CheckpointError where its names, or the losses that are asked for, cannot be read.
    """
    names = read_names(run_dir)
    best = settings.keep_best
    losses = losses_by_step(run_dir, best.source) if best else {}
    return [
        Facts(
            step=step,
            phase_end=_ends_phase(path),
            names=tuple(name for name, named in names.items() if named == step),
            loss=losses.get(step),
        )
        for path in list_checkpoints(run_dir)
        for step in [step_of(path)]
    ]


def _ends_phase(path: Path) -> bool | None:
    """Whether a checkpoint stands at a phase's end; None where it cannot be read."""
    try:
        read_manifest(path)
        return read_state(path).phase_end
    except CheckpointError:
        return None


def prune_checkpoints(
    run_dir: Path,
    newest: Path,
    settings: CheckpointConfig,
    warn: Callable[[str], None],
    permit: Callable[[], None] = lambda: None,
) -> list[Path]:
    """Deletes the checkpoints of a run that no rule keeps, and returns them; newest: its newest good one.

    permit: called before anything is deleted; it may raise. Where names or losses cannot be read, or somebody is
    giving a name, nothing is deleted and `warn` is told.
    """
    if settings.keep_last is None:
        return []
    try:
        with changing_names(run_dir):
            going = checkpoints_to_prune(run_dir, newest, settings)
            permit()
            gone = _take_out(going, warn)
    except (CheckpointError, DataError) as error:
        warn(f"no checkpoint is pruned: {error}")
        return []
    _delete(gone.values())
    return [*gone]


def _take_out(paths: Iterable[Path], warn: Callable[[str], None]) -> dict[Path, Path]:
    """Renames what goes, so that it is whole or no checkpoint at any moment: where it was, and where it is."""
    gone = {}
    for path in paths:
        beside = name_beside(path)
        try:
            os.rename(path, beside)
        except OSError as error:
            warn(f"{path}: cannot be deleted: {error.strerror}")
        else:
            gone[path] = beside
    return gone


def _delete(folders: Iterable[Path]) -> None:
    """Deletes what was taken out; what stays of it is swept by the next run."""
    for folder in folders:
        with contextlib.suppress(OSError):
            (folder / "manifest.json").unlink()
            shutil.rmtree(folder)


def checkpoints_to_prune(run_dir: Path, newest: Path, settings: CheckpointConfig) -> list[Path]:
    """The checkpoints of a run that no rule keeps, oldest first; newest: its newest good one.

    Raises CheckpointError where names or losses cannot be read.
    """
    kept = reasons_to_keep(
        facts_of(run_dir, settings), settings, newest=step_of(newest), back_to=read_state(newest).back_to
    )
    return [path for path in list_checkpoints(run_dir) if not kept.get(step_of(path), ("new",))]


# ---------------------------------------------------------------------------------------------- by hand


def name_checkpoint(reference: str, name: str, warn: Callable[[str], None]) -> tuple[Path, int]:
    """Verifies a run's checkpoint and names it, so that it stays; its run directory and step.

    Raises CheckpointError where there is none, it is damaged, or it stands in no run directory, ConfigError where the
    name means something else.
    """
    path = find_checkpoint(reference, warn)
    run_dir = path.parent.parent
    step = read_state(path).step
    if path != checkpoint_path(run_dir, step):
        raise CheckpointError(f"{path}: stands in no run directory, where names are kept; nothing prunes it there.")
    lineage, _ = read_lineage(path)
    phases = {phase.name for phase in load([str(path / "config.yaml")]).phases} | lineage.names
    if name in phases:
        raise ConfigError(
            f"{name!r} is the name of a phase of {run_dir}, whose end {run_dir}@{name} means; take another."
        )
    give_name(run_dir, step, name)
    return run_dir, step


def prune_run(
    run_dir: Path, settings: CheckpointConfig, warn: Callable[[str], None], *, dry_run: bool
) -> list[tuple[Path, int]]:
    """Prunes a run in which no process is at work: what went, or would go, and its bytes. Sweeps what a kill left.

    Raises CheckpointError where there is no good checkpoint or the rules cannot be applied, ConfigError where nothing
    was evaluated, DataError where the run is going on, somebody is giving a name, or something cannot be deleted, which
    `warn` is told.
    """
    best = settings.keep_best
    if best is not None and not losses_by_step(run_dir, best.source):
        raise ConfigError(
            f"{run_dir}: the best checkpoints cannot be chosen, for it has no evaluation"
            + (f" of {best.source!r}; name one of its sources." if best.source else "; leave that rule out.")
        )
    if dry_run:
        return [(path, size_of(path)) for path in checkpoints_to_prune(run_dir, _newest_good(run_dir, warn), settings)]
    with alone_in(run_dir, "a run, which prunes its checkpoints itself,"):
        newest = _newest_good(run_dir, warn)
        with changing_names(run_dir):
            sweep_unfinished(run_dir / "checkpoints")  # a name is published there too
            going = {path: size_of(path) for path in checkpoints_to_prune(run_dir, newest, settings)}
            gone = _take_out(going, warn)
        _delete(gone.values())
    if len(gone) < len(going):
        raise DataError(f"{run_dir}: {len(going) - len(gone)} checkpoint(s) cannot be deleted; each is named above.")
    return [*going.items()]


def _newest_good(run_dir: Path, warn: Callable[[str], None]) -> Path:
    newest = newest_checkpoint(run_dir, warn)
    if newest is None:
        raise CheckpointError(f"{run_dir}: holds no checkpoint; name a run directory that does.")
    return newest


# ---------------------------------------------------------------------------------------------- looking


def size_of(path: Path) -> int:
    """Bytes of a checkpoint's files; 0 where it is gone."""
    try:
        return sum(file.stat().st_size for file in path.iterdir())
    except FileNotFoundError:
        return 0


@dataclass(frozen=True)
class Standing:
    """A checkpoint in the list of a run's."""

    path: Path
    step: int
    phase: str
    """The phase, or merge, that it stands in; empty where that cannot be read."""
    tokens: int | None
    """Tokens that the model had learned from; None where that cannot be read."""
    size: int
    """Bytes of its files."""
    names: tuple[str, ...]
    loss: float | None
    """The held-out loss by which the best are chosen; None: it was not evaluated."""
    why: tuple[str, ...]
    """Why it stays; empty: it goes when the run saves the next time."""


def standing_checkpoints(run_dir: Path, settings: CheckpointConfig) -> list[Standing]:
    """All checkpoints of a run, oldest first, and why each stays. No content is verified.

    Raises CheckpointError where there is none, or where names or losses cannot be read.
    """
    known = list_checkpoints(run_dir)
    if not known:
        raise CheckpointError(f"{run_dir}: holds no checkpoint; name a run directory that does.")
    facts = {each.step: each for each in facts_of(run_dir, settings)}
    readable = [each.step for each in facts.values() if each.phase_end is not None]
    newest = max(readable, default=-1)
    back_to = next((read_state(path).back_to for path in known if step_of(path) == newest), None)
    kept = reasons_to_keep([*facts.values()], settings, newest=newest, back_to=back_to)
    losses = losses_by_step(run_dir, settings.keep_best.source if settings.keep_best else None)
    found = []
    for path in known:
        step = step_of(path)
        if step not in facts or not (size := size_of(path)):  # a run that is going on has pruned it meanwhile
            continue
        phase, tokens = _place_of(path)
        found.append(Standing(path, step, phase, tokens, size, facts[step].names, losses.get(step), kept[step]))
    return found


def _place_of(path: Path) -> tuple[str, int | None]:
    """The name of the phase or merge in which a checkpoint stands, and the tokens learned up to there."""
    try:
        lineage, _ = read_lineage(path)
    except CheckpointError:
        return "", None
    named = [entry.name for entry in lineage.entries if isinstance(entry, PhaseRecord | MergeRecord)]
    return named[-1] if named else "", lineage.tokens
