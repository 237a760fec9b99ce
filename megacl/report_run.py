"""A run directory as its report sees it: config.yaml, lineage.json and metrics.jsonl, read once and checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacl.configfile import load
from megacl.errors import CheckpointError, ConfigError
from megacl.heldout import Evaluation, read_evaluations
from megacl.lineage import Lineage, load_lineage
from megacl.log import read_metrics
from megacl.model.config import ModelConfig

STEP_COLUMNS = ("step", "tokens", "loss", "lr", "grad_norm", "seconds", "tokens_per_second")


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """What the files of one run say."""

    name: str
    config_text: str
    model: ModelConfig
    lineage: Lineage
    steps: dict[str, NDArray[np.float64]]
    """Of each of STEP_COLUMNS, float64 [steps]: one value an optimizer step, NaN for null. A merged model has none."""
    evaluations: list[Evaluation]
    """The run's own, in order."""
    way: list[Evaluation]
    """Those of the runs that it started from before them, without what was undone by going back."""
    unknown: list[str]
    """What of that is not known, a line each."""
    went_back: list[dict[str, Any]]
    """The records of kind "go_back", in order."""

    @property
    def sources(self) -> list[str]:
        """Names of the evaluated sources, in the order in which they first appear."""
        return list(dict.fromkeys(name for each in self.evaluations for name in each.sources))

    @property
    def first_tokens(self) -> float:
        """Where the run's curves begin on the axis of tokens."""
        starts = [*self.steps["tokens"][:1], *(each.tokens for each in self.evaluations[:1])]
        return float(min(starts))

    @property
    def tokens(self) -> float:
        """Tokens that the model had seen where the run stands, earlier runs included."""
        ends = [*self.steps["tokens"][-1:], *(each.tokens for each in self.evaluations[-1:])]
        return float(max(ends))

    def phase_spans(self) -> list[tuple[str, float, float]]:
        """(name, first, last) of each phase that lies on the run's axis of tokens."""
        spans, end = [], 0.0
        for phase in self.lineage.phases:
            start, end = end, end + phase.tokens
            if end > self.first_tokens:
                spans.append((phase.name, max(start, self.first_tokens), end))
        return spans


def read_runs(folders: Sequence[Path]) -> list[RecordedRun]:
    """Run directories, each under its folder's name, or its whole path where two folders are called the same.

    Raises CheckpointError where one of them is no run directory, has recorded nothing yet, or holds a broken file.
    """
    names = [folder.resolve().name for folder in folders]
    return [
        read_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def read_run(folder: Path, name: str) -> RecordedRun:
    """One run directory. Raises CheckpointError, in one line, at the first thing that is missing or broken."""
    config = folder / "config.yaml"
    if not config.is_file():
        raise CheckpointError(f"{folder}: no run directory, it has no config.yaml; give the run_dir of a training run.")
    try:
        model = load([str(config)]).model
    except ConfigError as error:
        raise CheckpointError(f"{config}: {error}") from None
    steps, evaluations, went_back = _read_metrics(folder)
    unknown: list[str] = []
    return RecordedRun(
        name=name,
        config_text=config.read_text(encoding="utf-8"),
        model=model,
        lineage=load_lineage(folder),
        steps={key: np.array([record[key] for record in steps], dtype=np.float64) for key in STEP_COLUMNS},
        evaluations=evaluations,
        way=read_evaluations(folder, warn=unknown.append),
        unknown=unknown,
        went_back=went_back,
    )


def _read_metrics(folder: Path) -> tuple[list[dict[str, Any]], list[Evaluation], list[dict[str, Any]]]:
    """The records of kinds "step", "evaluation" and "go_back" of a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    steps: list[dict[str, Any]] = []
    evaluations: list[Evaluation] = []
    went_back: list[dict[str, Any]] = []
    for line, record in enumerate(read_metrics(path), start=1):
        problem = _problem(record)
        if not problem and record["kind"] == "evaluation":
            try:
                evaluations.append(Evaluation.from_record(record, folder.resolve().name))
            except ValueError as error:
                problem = f"is {error}"
        if problem:
            raise CheckpointError(f"{path}: line {line} {problem}; take that line out to go on.")
        if record["kind"] == "step":
            steps.append(record)
        elif record["kind"] == "go_back":
            went_back.append(record)
    if not steps and not evaluations:
        raise CheckpointError(f"{path}: it holds no step and no evaluation; wait until the run has begun.")
    return steps, evaluations, went_back


def _problem(record: Any) -> str | None:
    """What is wrong with a record, or None; records of other kinds are none of a report's business."""
    if not isinstance(record, dict) or "kind" not in record:
        return "is not a record of a run"
    if record["kind"] not in ("step", "go_back"):
        return None
    for key in ("step",) if record["kind"] == "go_back" else ("step", "tokens"):
        if not isinstance(record.get(key), int):
            return f"is a record without a whole number {key!r}"
    if record["kind"] == "step":
        missing = next((key for key in STEP_COLUMNS if not _is_measure(record.get(key, ""))), None)
        return f"is a step without a number {missing!r}" if missing else None
    passed_over = record.get("passed_over")
    whole = isinstance(passed_over, list) and [type(edge) for edge in passed_over] == [int, int]
    return None if whole and "phase" in record else "is a way back without 'phase' and two numbers 'passed_over'"


def _is_measure(value: Any) -> bool:
    return value is None or isinstance(value, int | float)
