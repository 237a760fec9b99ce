"""A run directory as its report sees it: config.yaml, lineage.json and metrics.jsonl, read once and checked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacl.configfile import load
from megacl.errors import CheckpointError, ConfigError
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
    """Of each of STEP_COLUMNS, float64 [steps]: one value an optimizer step, NaN for null."""
    evaluations: list[dict[str, Any]]
    """The records of kind "evaluation", in order; a loss that is not finite is NaN."""
    went_back: list[dict[str, Any]]
    """The records of kind "go_back", in order."""

    @property
    def sources(self) -> list[str]:
        """Names of the evaluated sources, in the order in which they first appear."""
        return list(dict.fromkeys(name for record in self.evaluations for name in record["sources"]))

    @property
    def first_tokens(self) -> float:
        """Where the run's curves begin on the axis of tokens."""
        starts = [self.steps["tokens"][0], *(record["tokens"] for record in self.evaluations[:1])]
        return float(min(starts))

    @property
    def tokens(self) -> float:
        """Tokens that the model had seen at the run's last step, earlier runs included."""
        return float(self.steps["tokens"][-1])

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

    Raises CheckpointError where one of them is no run directory, has taken no step yet, or holds a broken file.
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
    steps, evaluations, went_back = _read_metrics(folder / "metrics.jsonl")
    return RecordedRun(
        name=name,
        config_text=config.read_text(encoding="utf-8"),
        model=model,
        lineage=load_lineage(folder),
        steps={key: np.array([record[key] for record in steps], dtype=np.float64) for key in STEP_COLUMNS},
        evaluations=evaluations,
        went_back=went_back,
    )


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """The records of kinds "step", "evaluation" and "go_back" of a metrics.jsonl."""
    steps: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    went_back: list[dict[str, Any]] = []
    for line, record in enumerate(read_metrics(path), start=1):
        problem = _problem(record)
        if problem:
            raise CheckpointError(f"{path}: line {line} {problem}; take that line out to go on.")
        if record["kind"] == "step":
            steps.append(record)
        elif record["kind"] == "evaluation":
            sources = {name: {**result, "loss": _measure(result["loss"])} for name, result in record["sources"].items()}
            evaluations.append({**record, "sources": sources})
        elif record["kind"] == "go_back":
            went_back.append(record)
    if not steps:
        raise CheckpointError(f"{path}: it holds no step; wait until the run has taken its first one.")
    return steps, evaluations, went_back


def _measure(value: float | None) -> float:
    """What a record holds for a number that is not finite is null."""
    return math.nan if value is None else value


def _problem(record: Any) -> str | None:
    """What is wrong with a record, or None; records of other kinds are none of a report's business."""
    if not isinstance(record, dict) or "kind" not in record:
        return "is not a record of a run"
    if record["kind"] not in ("step", "evaluation", "go_back"):
        return None
    for key in ("step",) if record["kind"] == "go_back" else ("step", "tokens"):
        if not isinstance(record.get(key), int):
            return f"is a record without a whole number {key!r}"
    if record["kind"] == "step":
        missing = next((key for key in STEP_COLUMNS if not _is_measure(record.get(key, ""))), None)
        return f"is a step without a number {missing!r}" if missing else None
    if record["kind"] == "go_back":
        passed_over = record.get("passed_over")
        whole = isinstance(passed_over, list) and [type(edge) for edge in passed_over] == [int, int]
        return None if whole and "phase" in record else "is a way back without 'phase' and two numbers 'passed_over'"
    if not isinstance(record.get("phase"), str) or not isinstance(record.get("at"), str):
        return "is an evaluation without 'phase' and 'at'"
    sources = record.get("sources")
    measured = isinstance(sources, dict) and all(
        isinstance(result, dict) and _is_measure(result.get("loss", "")) for result in sources.values()
    )
    return None if measured else "is an evaluation without a number 'loss' for each source"


def _is_measure(value: Any) -> bool:
    return value is None or isinstance(value, int | float)
