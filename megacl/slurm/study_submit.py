"""Submitting a study: a job that plans it, an array of its runs for each depth of its tree, a job for its results.

    asked = read_study("studies/claims.yaml", Path("studies/claims"), cluster="h100x8")
    queue_all(asked.folder, asked.left, asked.record)

What arms have in common is one run, and so one task: a run goes on from one of the array before. Runs that are done are
left out, so that submitting again repeats what failed.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megacl.config_cluster import ClusterConfig
from megacl.configfile import dump_tree, load_cluster
from megacl.slurm.graph import AskedJobs, Part, Record
from megacl.study import as_begun
from megacl.study_config import load_study, study_tree
from megacl.study_results import is_done
from megacl.study_tree import Node, before_it, build_tree

_FROZEN = "study.yaml"


def read_study(
    path: str, out: Path, *, cluster: str, at_once: int | None = None, overrides: Sequence[str] = ()
) -> AskedJobs:
    """A study's jobs on a cluster, for its folder `out`. A run has one process, on one GPU where nodes have some.

    at_once: how many runs train at a time; None: as many as there are. overrides: key=value of the cluster file. Raises
    ConfigError where the study or the cluster file is wrong, or `out` holds another study.
    """
    study = as_begun(load_study(path), out)
    folder = Path(os.path.abspath(out))
    settings = load_cluster(cluster, overrides)
    tree = build_tree(study, folder)
    text = dump_tree(study_tree(study))
    common: dict[str, Any] = {"cluster": settings, "folder": folder, "text": text}
    parts = [_part("plan", "plan", **common)]
    left = [node for node in tree.nodes if not is_done(node)]
    for depth, nodes in enumerate(_by_depth(tree.nodes)):
        wanted = [node for node in nodes if node in left]
        array = f"1-{len(wanted)}" + (f"%{at_once}" if at_once else "") if wanted else None
        runs = tuple(node.name for node in wanted)
        part = _part(f"runs-{depth + 1}", None, after=(parts[-1].name,), **common)
        parts.append(dataclasses.replace(part, array=array, runs=runs, gpus=True))
    parts.append(_part("results", "results", after=(parts[-1].name,), **common))
    to_do = [part for part in parts if part.runs or (part.name == "plan" and left) or part.name == "results"]
    queued = [
        dataclasses.replace(part, after=(before.name,) if before else ())
        for before, part in zip([None, *to_do], to_do, strict=False)
    ]
    file = Path(os.path.abspath(path))
    return AskedJobs(folder, tuple(queued), Record(kind="study", file=file, cluster=cluster, parts=parts))


def _part(
    name: str, only: str | None, *, cluster: ClusterConfig, folder: Path, text: str, after: tuple[str, ...] = ()
) -> Part:
    """One job; only: the part of the study that it does, None: the run that the task of an array stands for."""
    return Part(
        name=name,
        kind="study",
        command=("study", "--out", str(folder), "--only", *((only,) if only else ())),
        after=after,
        cluster=cluster,
        home=folder,
        frozen=_FROZEN,
        files={_FROZEN: text},
        alone=True,
        gpus=False,
    )


def _by_depth(nodes: Sequence[Node]) -> list[list[Node]]:
    """The runs, those first that go on from none, then those that go on from one of them, and so on."""
    found: list[list[Node]] = []
    for node in nodes:
        depth = len(before_it(node))
        found += [[] for _ in range(depth + 1 - len(found))]
        found[depth].append(node)
    return found
