"""How far a run is, from its files alone: configuration, lineage, the end of metrics.jsonl, checkpoints.

progress = read_progress(run_dir, since=attempt.started)
progress.step, progress.steps, progress.loss
"""

import contextlib
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacl.checkpoint import list_checkpoints, step_of
from megacl.config import RunConfig
from megacl.configfile import load
from megacl.errors import MegaclError
from megacl.lineage import load_lineage
from megacl.log import last_records

_RECENT = 100
"""Steps over which speed is measured."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is; None for what is not known."""

    step: int = 0
    """Optimizer steps that are recorded; after an interruption those past the last checkpoint are done again."""
    steps: int | None = None
    """Of all its phases."""
    phase: str | None = None
    loss: float | None = None
    """Of the last step, nats a token."""
    tokens: int | None = None
    """That the model has seen, earlier runs included."""
    tokens_per_second: float | None = None
    """Median of the last steps."""
    seconds_per_step: float | None = None
    """From step to step, so evaluations and saves are in it."""
    time: float | None = None
    """When the last step was recorded, seconds since 1970."""
    checkpoint: Path | None = None
    """The newest."""
    checkpoint_step: int | None = None

    @property
    def seconds_left(self) -> float | None:
        """How long what is left takes at the last steps' speed."""
        if self.steps is None or self.seconds_per_step is None:
            return None
        return max(0, self.steps - self.step) * self.seconds_per_step


def read_progress(run_dir: Path, *, since: float = 0.0) -> Progress:
    """How far a run is. since: when its last attempt began; steps before it do not count for its speed.

    Files that are missing or cannot be read leave out what they would say.
    """
    steps = [record for record in last_records(run_dir / "metrics.jsonl") if record.get("kind") == "step"]
    last = steps[-1] if steps else {}
    recent = [record for record in steps[-_RECENT:] if record.get("time", 0.0) >= since] or steps[-_RECENT:]
    saved = list_checkpoints(run_dir)
    done = step_of(saved[-1]) if saved else None
    speeds = [record["tokens_per_second"] for record in recent if record.get("tokens_per_second") is not None]
    return Progress(
        step=last.get("step", done or 0),
        steps=_planned_steps(run_dir),
        phase=last.get("phase"),
        loss=last.get("loss"),
        tokens=last.get("tokens"),
        tokens_per_second=statistics.median(speeds) if speeds else None,
        seconds_per_step=_pace(recent),
        time=last.get("time"),
        checkpoint=saved[-1] if saved else None,
        checkpoint_step=done,
    )


def _pace(records: list[dict[str, Any]]) -> float | None:
    """Mean seconds from one of these steps to the next; of a single one, what it took itself."""
    if not records:
        return None
    first, last = records[0], records[-1]
    if last["step"] > first["step"]:
        return float((last["time"] - first["time"]) / (last["step"] - first["step"]))
    seconds = last.get("seconds")
    return float(seconds) if seconds is not None and math.isfinite(seconds) else None


def _planned_steps(run_dir: Path) -> int | None:
    """Steps of all phases: as the lineage has them where they have begun, as the configuration has them else.

    A phase may turn out shorter than it is configured, where its source runs out.
    """
    config = read_config(run_dir)
    if config is None:
        return None
    begun: dict[str, int] = {}
    with contextlib.suppress(MegaclError):
        begun = {phase.name: phase.budget_steps for phase in load_lineage(run_dir).phases}
    return sum(begun.get(phase.name) or config.steps_of(phase) for phase in config.phases)


def read_config(run_dir: Path) -> RunConfig | None:
    """The run's configuration: its own, or that of the last submission where it has not begun; None without any."""
    for file in (run_dir / "config.yaml", *sorted((run_dir / "jobs").glob("*/config.yaml"), reverse=True)):
        if file.is_file():
            with contextlib.suppress(MegaclError):
                return load([str(file)])
    return None
