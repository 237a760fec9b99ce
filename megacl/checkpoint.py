"""Checkpoints: every tensor whole, under its name, in a folder that appears at once or not at all.

    RUN/checkpoints/step-00000300/
        weights.safetensors      each parameter in fp32, under its name in the model
        optimizer.safetensors    exp_avg.NAME and exp_avg_sq.NAME, fp32; absent before the first update
        state.json               where the run stands: phase, samples, steps, loss scale, its watch over the losses
        lineage.json config.yaml and the tokenizer's file
        manifest.json            size and SHA-256 of each of these files

A checkpoint knows no ranks: it loads into any engine, on any number of them. It is found by its manifest, never by its
name alone; one that is damaged is named and passed over for the newest good one.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import ConfigDict, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megacl.config import RunConfig
from megacl.configfile import dump, load
from megacl.data.tokenizer import Tokenizer, load_tokenizer
from megacl.engine import Engine
from megacl.errors import CheckpointError, DivergedError
from megacl.lineage import Lineage, load_lineage
from megacl.model.config import STRICT
from megacl.parallel.ranks import Ranks
from megacl.publish import publish_folder, sha256_of
from megacl.stability import Watch

_FORMAT, _VERSION = "megacl-checkpoint", 1
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stands. Tokens and phases of earlier runs are in the lineage."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    step: int = 0
    """Optimizer steps of this run: batches taken, whether or not the update was applied."""
    phase: int = 0
    """Index in the configuration's phases."""
    samples: int = 0
    """Samples of that phase seen."""
    optimizer_step: int = 0
    """Adam's own count, which starts again where the optimizer's state is reset."""
    loss_scale: tuple[float, int] | None = None
    """fp16's factor on the loss, and the updates since it last overflowed."""
    phase_end: bool = False
    watch: Watch = field(default_factory=Watch)
    back_to: int | None = None
    """The step of the checkpoint that the run goes back to where too many updates are skipped: itself, unless it was
    saved out of turn (the run was told to stop) or amid skipped updates. Null: none was saved in turn yet."""
    parent: str | None = None
    """The checkpoint that the run started from, if any: it goes back there where none was saved in turn yet."""


_RUN_STATE = TypeAdapter(RunState)


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint, opened: small files read, tensors on demand."""

    path: Path
    state: RunState
    lineage: Lineage
    config: RunConfig

    def load_into(self, engine: Engine) -> None:
        """Sets an engine's weights, moments and loss scale. Every rank calls it."""
        state = self.state
        engine.import_state(self.load_state(), optimizer_step=state.optimizer_step, loss_scale=state.loss_scale)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with."""
        return load_tokenizer(self.path)

    def load_weights(self) -> Callable[[str], torch.Tensor]:
        """A function from a parameter's name to its whole fp32 tensor on the CPU."""
        weights = _Tensors(self.path / "weights.safetensors")
        return weights.read

    def load_state(self) -> Callable[[str], dict[str, torch.Tensor]]:
        """A function from a parameter's name to its "weight", and its "exp_avg" and "exp_avg_sq" if there are any."""
        weights = _Tensors(self.path / "weights.safetensors")
        if not self.state.optimizer_step:
            return lambda name: {"weight": weights.read(name)}
        moments = _Tensors(self.path / "optimizer.safetensors")
        return lambda name: {
            "weight": weights.read(name),
            **{key: moments.read(f"{key}.{name}") for key in ("exp_avg", "exp_avg_sq")},
        }


class _Tensors:
    """One safetensors file, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}.") from None

    def read(self, name: str) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self._file.get_tensor(name)  # type: ignore[no-untyped-call]
        except SafetensorError:
            raise CheckpointError(f"{self._path}: holds no tensor {name!r}; the model has another shape.") from None
        return tensor


# ---------------------------------------------------------------------------------------------- saving


def save_checkpoint(
    engine: Engine,
    ranks: Ranks,
    run_dir: Path,
    state: RunState,
    *,
    lineage: Lineage,
    config: RunConfig,
    tokenizer: Tokenizer,
) -> Path:
    """Publishes RUN/checkpoints/step-N. Every rank calls it; rank 0 writes. Returns the checkpoint's folder.

    Raises DataError where the disk refuses, DivergedError where a weight is not finite; what was there before stays
    untouched.
    """
    path = checkpoint_path(run_dir, state.step)
    state = dataclasses.replace(state, optimizer_step=engine.optimizer_step, loss_scale=engine.loss_scale)
    writes = ranks.rank == 0
    weights: dict[str, torch.Tensor] = {}
    moments: dict[str, torch.Tensor] = {}
    for name, tensors in engine.export_state():
        if writes:
            weights[name] = tensors["weight"].contiguous()
            if state.optimizer_step:
                for key in ("exp_avg", "exp_avg_sq"):
                    moments[f"{key}.{name}"] = tensors[key].contiguous()
    with ranks.together():
        if writes:
            _publish(path, weights, moments, state, lineage, config, tokenizer)
    return path


def _publish(
    path: Path,
    weights: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    state: RunState,
    lineage: Lineage,
    config: RunConfig,
    tokenizer: Tokenizer,
) -> None:
    broken = next((name for name, values in (weights | moments).items() if not values.isfinite().all()), None)
    if broken is not None:
        known = list_checkpoints(path.parent.parent)
        good = f"the last good one is {known[-1]}" if known else "there is none yet"
        raise DivergedError(
            f"step {state.step}: {broken} is not finite, and no checkpoint was made of it; {good}. "
            "Lower max_lr in a new run_dir."
        )
    if path.exists():  # a damaged one that resume passed over
        shutil.rmtree(path)
    with publish_folder(path, "a checkpoint") as folder:
        _save_tensors(weights, folder / "weights.safetensors")
        if moments:
            _save_tensors(moments, folder / "optimizer.safetensors")
        (folder / "state.json").write_text(json.dumps(dataclasses.asdict(state), indent=1) + "\n")
        (folder / "lineage.json").write_text(lineage.dump(), encoding="utf-8")
        (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
        tokenizer.save(folder)
        files = {
            file.name: {"size": file.stat().st_size, "sha256": sha256_of(file)} for file in sorted(folder.iterdir())
        }
        manifest = {"format": _FORMAT, "version": _VERSION, "files": files}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None  # what it was underneath


def prune_checkpoints(run_dir: Path, newest: Path, keep_last: int | None, back_to: int | None) -> None:
    """Deletes all but `newest` and the keep_last - 1 before it of the checkpoints inside phases; ends of phases stay.

    So does the one at step `back_to`, to which the run may go back.
    What lies beyond `newest` or cannot be read is damaged, was passed over, and is left to its owner. None for
    keep_last keeps everything.
    """
    if keep_last is None:
        return
    so_far = [path for path in list_checkpoints(run_dir) if _step_of(path) <= _step_of(newest)]
    inside = [path for path in so_far if _ends_phase(path) is False]
    for path in inside[:-keep_last]:
        if _step_of(path) == back_to:
            continue
        # Without its manifest it is no checkpoint any more, whatever stays of it: a reader may hold a file on NFS.
        with contextlib.suppress(OSError):
            (path / "manifest.json").unlink()
            shutil.rmtree(path)


def _ends_phase(path: Path) -> bool | None:
    """Whether a checkpoint stands at a phase's end; None where it cannot be read."""
    try:
        return _read_state(path).phase_end
    except CheckpointError:
        return None


# ---------------------------------------------------------------------------------------------- finding


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where a run's checkpoint at a step stands, if there is one."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The published checkpoints of a run, oldest first. Their content is not verified."""
    folder = run_dir / "checkpoints"
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted((path for path in found if (path / "manifest.json").is_file()), key=_step_of)


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def verify_checkpoint(path: Path) -> list[str]:
    """What is wrong with a checkpoint, a line each: files that are missing, cut short, or changed."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        files = manifest["files"]
        if (manifest["format"], manifest["version"]) != (_FORMAT, _VERSION):
            return [f"{path}: made in format {manifest['format']} {manifest['version']}, which is not known here"]
        return [
            problem
            for name, facts in files.items()
            if (problem := _file_problem(path / name, facts["size"], facts["sha256"]))
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{path / 'manifest.json'}: cannot be read: {error}"]


def _file_problem(path: Path, size: int, sha256: str) -> str | None:
    if not path.is_file():
        return f"{path}: missing"
    if path.stat().st_size != size:
        return f"{path}: has {path.stat().st_size} bytes of {size}"
    return None if sha256_of(path) == sha256 else f"{path}: its content has changed (SHA-256)"


def newest_checkpoint(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies, or None where there is none; damaged ones are named through `warn`.

    Raises CheckpointError where there are some, and none of them verifies: to begin anew would destroy them.
    """
    known = list_checkpoints(run_dir)
    for path in reversed(known):
        problems = verify_checkpoint(path)
        if not problems:
            return path
        warn(f"passing over a damaged checkpoint: {problems[0]}")
    if known:
        raise CheckpointError(
            f"{run_dir}: has {len(known)} checkpoints, and every one is damaged; restore one, or name another run_dir."
        )
    return None


def find_checkpoint(reference: str, warn: Callable[[str], None]) -> Path:
    """The checkpoint that RUN (its newest good one), RUN@PHASE (that phase's end), RUN@STEP or a folder names.

    It is verified. Raises CheckpointError where there is none, or where it is damaged; where the newest of a run is, it
    is named through `warn`, and the newest good one is taken.
    """
    path = Path(reference)
    if not path.is_dir() and "@" in reference:
        run, _, place = reference.rpartition("@")
        path = _at_place(Path(run), place)
    elif not (path / "manifest.json").is_file():
        newest = newest_checkpoint(path, warn)
        if newest is None:
            why = "holds no checkpoint" if path.is_dir() else "no such run or checkpoint"
            raise CheckpointError(f"{reference}: {why}; name a run directory, RUN@PHASE, RUN@STEP or a checkpoint.")
        return newest
    problems = verify_checkpoint(path)
    if problems:
        raise CheckpointError(f"{problems[0]}; this checkpoint is damaged, use another one (RUN@STEP).")
    return path


def _at_place(run_dir: Path, place: str) -> Path:
    known = list_checkpoints(run_dir)
    if not known:
        raise CheckpointError(f"{run_dir}: holds no checkpoint, so there is none at {place!r}.")
    ends = {}
    for path in known:
        with contextlib.suppress(CheckpointError):  # a damaged one is no reason not to find another
            if _read_state(path).phase_end:
                ends[load_lineage(path).phases[-1].name] = path
    if place in ends:
        return ends[place]
    if place.isdigit():
        for path in known:
            if _step_of(path) == int(place):
                return path
        steps = ", ".join(str(_step_of(path)) for path in known)
        raise CheckpointError(f"{run_dir}: has no checkpoint at step {place}; it has {steps}.")
    raise CheckpointError(f"{run_dir}: no checkpoint ends a phase {place!r}; finished: {', '.join(ends) or 'none'}.")


def _read_state(path: Path) -> RunState:
    try:
        return _RUN_STATE.validate_json((path / "state.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / 'state.json'}: cannot be read: {error}.") from None


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a checkpoint's small files; tensors are read on demand."""
    return Checkpoint(
        path=path,
        state=_read_state(path),
        lineage=load_lineage(path),
        config=load([str(path / "config.yaml")]),
    )
