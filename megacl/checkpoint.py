"""Checkpoints: every tensor whole, under its name, in a folder that appears at once or not at all.

    RUN/checkpoints/step-00000300/
        weights-00000-of-00002.safetensors     each parameter in fp32, under its name in the model
        optimizer-00000-of-00002.safetensors   exp_avg.NAME and exp_avg_sq.NAME, fp32; absent where there are none
        reptile-00000-of-00002.safetensors     anchor.NAME, fp32; only between two of Reptile's moves
        state.json               where the run stands: phase, samples, steps, loss scale, its watch over the losses
        lineage.json config.yaml and the tokenizer's file
        index.json               which file each tensor stands in, and the SHA-256 of each weight
        manifest.json            size and hash of each of these files

A checkpoint knows no ranks: as many of them as wrote it, it loads into any engine, on any number. It is found by its
manifest, never by its name alone; one that is damaged is named and passed over for the newest good one. How one is
made: saving.py.
"""

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import ConfigDict, TypeAdapter

from megacl.checkpoint_files import StoredTensor, TensorFiles, damaged_files, read_index, tensor_name
from megacl.checkpoint_names import read_names
from megacl.config import RunConfig
from megacl.configfile import load
from megacl.data.tokenizer import Tokenizer, load_tokenizer
from megacl.engine import Engine
from megacl.engine.gathering import Stored, whole_of
from megacl.errors import CheckpointError
from megacl.lineage import CheckpointMark, Lineage, load_lineage, read_lineage
from megacl.model.config import STRICT
from megacl.stability import Watch

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
    """Adam's own count, which starts again where it is reset, with its moments or alone."""
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
        """Sets an engine's weights, moments, loss scale, and Reptile's anchor. Every rank calls it."""
        state = self.state
        engine.import_state(self.stored_state(), optimizer_step=state.optimizer_step, loss_scale=state.loss_scale)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with."""
        return load_tokenizer(self.path)

    @property
    def has_moments(self) -> bool:
        """Whether there are Adam's moments; there are none of a merge, an export or a converted model."""
        return any(name.startswith("exp_avg.") for name in read_index(self.path).tensors)

    def load_weights(self) -> Callable[[str], torch.Tensor]:
        """A function from a parameter's name to its whole fp32 tensor on the CPU."""
        return TensorFiles(self.path).read

    def load_state(self) -> Callable[[str], dict[str, torch.Tensor]]:
        """A function from a parameter's name to its "weight", and its moments and Reptile's anchor if there are any."""
        stored = self.stored_state()
        return lambda name: {key: whole_of(tensor) for key, tensor in stored(name).items()}

    def stored_state(self) -> Callable[[str], Mapping[str, Stored | torch.Tensor]]:
        """The same, each tensor to be read when it is asked for, as far as it lies in a file as it is."""
        files = TensorFiles(self.path)
        return lambda name: {
            key: StoredTensor(files, tensor_name(name, key)) for key in files.keys_of(name) or ("weight",)
        }


# ---------------------------------------------------------------------------------------------- finding


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where a run's checkpoint at a step stands, if there is one."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The published checkpoints of a run, oldest first. Their content is not verified."""
    return [path for path in step_folders(run_dir) if (path / "manifest.json").is_file()]


def step_folders(run_dir: Path) -> list[Path]:
    """The folders named like checkpoints of a run, oldest first, those without a manifest too."""
    folder = run_dir / "checkpoints"
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step that the name of a run's checkpoint says."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def verify_checkpoint(path: Path, *, moments: bool = True) -> list[str]:
    """What is wrong with a checkpoint, a line each: files that are missing, cut short, or changed.

    moments: look at the optimizer's too, which are two thirds of it.
    """
    return [problem for _, problem in damaged_files(path, moments=moments)]


def newest_checkpoint(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies, or None where there is none; damaged ones are named through `warn`.

    So is a folder that has lost its manifest: a save that was cut off leaves none of that name. Raises CheckpointError
    where there are some, and none of them verifies: to begin anew would destroy them.
    """
    known = step_folders(run_dir)
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


def find_checkpoint(reference: str, warn: Callable[[str], None], *, moments: bool = True) -> Path:
    """The checkpoint that RUN (its newest good one), RUN@PHASE (its end), RUN@STEP, RUN@NAME or a folder means.

    It is verified, its optimizer's file too where `moments`. Raises CheckpointError where there is none, or where it
    is damaged; where the newest of a run is, it is named through `warn`, and the newest good one is taken.
    """
    path = named_checkpoint(reference)
    if Path(reference) in path.parents:
        return newest_checkpoint(Path(reference), warn) or path
    problems = verify_checkpoint(path, moments=moments)
    if problems:
        raise CheckpointError(f"{problems[0]}; this checkpoint is damaged, use another one (RUN@STEP).")
    return path


def named_checkpoint(reference: str) -> Path:
    """The checkpoint that RUN (its newest one), RUN@PHASE, RUN@STEP, RUN@NAME or a folder means, in whatever state.

    Raises CheckpointError where there is none.
    """
    path = Path(reference)
    if not path.is_dir() and "@" in reference:
        run, _, place = reference.rpartition("@")
        return _at_place(Path(run), place)
    if (path / "manifest.json").is_file():
        return path
    if known := list_checkpoints(path):
        return known[-1]
    why = "holds no checkpoint" if path.is_dir() else "no such run or checkpoint"
    raise CheckpointError(f"{reference}: {why}; name a run directory, RUN@PHASE, RUN@STEP, RUN@NAME or a checkpoint.")


def _at_place(run_dir: Path, place: str) -> Path:
    known = list_checkpoints(run_dir)
    if not known:
        raise CheckpointError(f"{run_dir}: holds no checkpoint, so there is none at {place!r}.")
    ends = {}
    for path in known:
        with contextlib.suppress(CheckpointError):  # a damaged one is no reason not to find another
            if read_state(path).phase_end:
                ends[read_lineage(path)[0].phases[-1].name] = path
    names = {} if place.isdigit() else read_names(run_dir)
    if place in ends:
        if place in names:
            raise CheckpointError(
                f"{run_dir}: {place!r} is a phase's end and a name of step {names[place]}; say which by RUN@STEP."
            )
        return ends[place]
    if place.isdigit() or place in names:
        place = str(names.get(place, place))
        for path in known:
            if step_of(path) == int(place):
                return path
        steps = ", ".join(str(step_of(path)) for path in known)
        raise CheckpointError(f"{run_dir}: has no checkpoint at step {place}; it has {steps}.")
    named = f"; named: {', '.join(names)}" if names else ""
    raise CheckpointError(
        f"{run_dir}: no checkpoint ends a phase {place!r}; finished: {', '.join(ends) or 'none'}{named}."
    )


def read_state(path: Path) -> RunState:
    """Where the run of a checkpoint stands. Raises CheckpointError where its state.json cannot be read."""
    try:
        return _RUN_STATE.validate_json((path / "state.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / 'state.json'}: cannot be read: {error}.") from None


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a checkpoint's small files; tensors are read on demand."""
    return Checkpoint(
        path=path,
        state=read_state(path),
        lineage=load_lineage(path),
        config=load([str(path / "config.yaml")]),
    )


def mark_of(checkpoint: Checkpoint) -> CheckpointMark:
    """How lineages name a checkpoint. Raises CheckpointError where its index cannot be read."""
    return CheckpointMark(
        run=Path(checkpoint.config.run_dir).name,
        step=checkpoint.state.step,
        tokens=checkpoint.lineage.tokens,
        id=checkpoint.lineage.id,
        weights=read_index(checkpoint.path).weights_hash,
    )
