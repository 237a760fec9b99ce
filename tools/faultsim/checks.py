"""What must hold after a fault, each a function from folders to lines that say what does not."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megacl.checkpoint import list_checkpoints, step_of, verify_checkpoint
from megacl.log import read_metrics
from megacl.publish import sha256_of

_TIMES = {"time", "seconds", "waited", "tokens_per_second", "flops_per_second"}
"""What a record says of the clock."""


def half_published(run_dir: Path) -> list[str]:
    """What is wrong with the checkpoints that are found: each must be whole."""
    return [problem for path in list_checkpoints(run_dir) for problem in verify_checkpoint(path)]


def published(run_dir: Path) -> dict[int, str]:
    """The manifest of each checkpoint, by step. One that goes meanwhile is left out."""
    found = {}
    for path in list_checkpoints(run_dir):
        try:
            found[step_of(path)] = (path / "manifest.json").read_text()
        except FileNotFoundError:
            continue
    return found


def lost(run_dir: Path, before: Collection[int], saves: Collection[int], reached: int) -> list[str]:
    """Whether more is lost than what a kill may cost: the steps since the last save that was done.

    before: steps of checkpoints that were there before it. saves: the steps behind which the run saves. reached: its
    last step. A save is written while training goes on, at the longest until the next one is due, so that one may be
    under way; the one before it was published.
    """
    newest = max(published(run_dir), default=0)
    problems = []
    if newest < max(before, default=0):
        problems.append(f"the newest checkpoint is of step {newest}, and there was one of step {max(before)}")
    due = [step for step in saves if newest < step < reached]
    if len(due) > 1:
        problems.append(f"the newest checkpoint is of step {newest}, and step {reached} was made: {due} were due")
    return problems


def changed(run_dir: Path, before: Mapping[int, str], keep: int) -> list[str]:
    """Whether checkpoints that were there before a failed save are gone without need, or changed.

    before: as `published` gave them. keep: so many of the newest stay.
    """
    after = published(run_dir)
    problems = [
        f"the checkpoint of step {step} has changed" for step in before if after.get(step, before[step]) != before[step]
    ]
    gone = [step for step in sorted({*before, *after})[-keep:] if step not in after]
    return problems + [f"the checkpoint of step {step} is gone, and it was one of the newest {keep}" for step in gone]


def left_over(folder: Path) -> list[str]:
    """Hidden folders and files that nobody will read: what publishers begin with, and pruning ends with."""
    found = [*folder.glob(".*.tmp"), *folder.glob(".*.converting")] if folder.is_dir() else []
    return [f"{path} was left over" for path in found]


def end_of(run_dir: Path) -> dict[str, Any]:
    """All that a run comes to, without times and its own place: equal iff bitwise equal.

    The newest checkpoint's files by their hashes (weights, moments, state, lineage, tokenizer), the run's lineage, and
    its records. Raises OSError, ValueError or KeyError where there is no such thing.
    """
    checkpoint = list_checkpoints(run_dir)[-1]
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    end: dict[str, Any] = {f"{checkpoint.name}/{name}": facts["xxh3_128"] for name, facts in files.items()}
    del end[f"{checkpoint.name}/config.yaml"]  # it holds the run's place
    end["lineage.json"] = sha256_of(run_dir / "lineage.json")
    for record in read_metrics(run_dir / "metrics.jsonl"):
        if record["kind"] == "step":
            key = f"record of step {record['step']}"
            assert key not in end, f"{run_dir}: two of them, {key}"
            end[key] = {name: value for name, value in record.items() if name not in _TIMES}
        elif record["kind"] == "evaluation":  # one that was interrupted makes two records of it
            end.update({f"{name} at step {record['step']}": value for name, value in record["sources"].items()})
    return end


def differences(run_dir: Path, end: Mapping[str, Any]) -> list[str]:
    """Where a run's end is another one."""
    found = end_of(run_dir)
    unlike = [name for name in {**end, **found} if end.get(name) != found.get(name)]
    return [f"{name}: {found.get(name)}, undisturbed {end.get(name)}" for name in unlike]


def contents_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in a folder, by its path there."""
    return {str(file.relative_to(folder)): sha256_of(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def steps_recorded(run_dir: Path) -> int:
    """How many steps a run has recorded; it may be going on."""
    try:
        return (run_dir / "metrics.jsonl").read_bytes().count(b'"kind": "step"')
    except FileNotFoundError:
        return 0
