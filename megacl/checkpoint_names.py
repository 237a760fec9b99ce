"""Names of a run's checkpoints: what has one stays for ever, and RUN@NAME means it everywhere.

They stand in RUN/checkpoints/names.json, {"format", "version", "names": {NAME: STEP}}, which is published by rename.
Naming and pruning keep each other out, so that nothing is deleted while it gets its name.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from megacl.errors import CheckpointError, ConfigError
from megacl.fencing import is_lost
from megacl.publish import alone_in, publish_text

_FORMAT, _VERSION = "megacl-checkpoint-names", 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def read_names(run_dir: Path) -> dict[str, int]:
    """The step of each name that a run's checkpoints have. Raises CheckpointError where the file cannot be read."""
    path = _path(run_dir)
    try:
        tree = json.loads(path.read_bytes())
        if (tree["format"], tree["version"]) != (_FORMAT, _VERSION):
            raise ValueError(f"made in format {tree['format']} {tree['version']}, which is not known here")
        names = tree["names"]
        if not all(_NAME.fullmatch(name) and type(step) is int for name, step in names.items()):
            raise ValueError("it holds more than names and steps")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error}. No checkpoint is deleted while it is so; restore it, or delete it and "
            "give the names again."
        ) from None
    return dict(names)


def give_name(run_dir: Path, step: int, name: str) -> None:
    """Names a run's checkpoint, for ever. ConfigError where it is no name, or that of another checkpoint."""
    if not _NAME.fullmatch(name) or name.isdigit():
        raise ConfigError(
            f"{name!r} is no name for a checkpoint; take up to 64 letters, digits, '.', '_' and '-', not digits alone, "
            "the first one a letter or digit."
        )
    with changing_names(run_dir):
        names = read_names(run_dir)
        if names.get(name, step) != step:
            raise ConfigError(
                f"{run_dir}: {name!r} is step {names[name]} already; "
                f"`megacl checkpoint forget {run_dir}@{name}` frees the name."
            )
        if not (run_dir / "checkpoints" / f"step-{step:08d}" / "manifest.json").is_file():
            raise CheckpointError(f"{run_dir}: its checkpoint at step {step} was pruned meanwhile; name another one.")
        _publish(run_dir, {**names, name: step})


def take_name(run_dir: Path, name: str) -> int:
    """Takes a name back and returns its step; the checkpoint stays until the run prunes it. CheckpointError if none."""
    if not _path(run_dir).is_file():
        raise CheckpointError(f"{run_dir}: none of its checkpoints has a name.")
    with changing_names(run_dir):
        names = read_names(run_dir)
        if name not in names:
            raise CheckpointError(f"{run_dir}: no checkpoint is named {name!r}; named: {', '.join(names) or 'none'}.")
        step = names.pop(name)
        _publish(run_dir, names)
    return step


@contextlib.contextmanager
def changing_names(run_dir: Path) -> Iterator[None]:
    """A block in which nobody else names or deletes checkpoints of a run. DataError where somebody is doing so."""
    with alone_in(run_dir / "checkpoints", "a command that names or prunes checkpoints", is_lost):
        yield


def _publish(run_dir: Path, names: dict[str, int]) -> None:
    tree = {"format": _FORMAT, "version": _VERSION, "names": dict(sorted(names.items()))}
    publish_text(_path(run_dir), json.dumps(tree, indent=1) + "\n", "names of checkpoints")


def _path(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "names.json"
