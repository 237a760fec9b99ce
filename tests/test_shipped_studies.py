"""The studies that come with megacl: they are read, laid out in runs, and the smallest one finds what it must."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megacl.configfile import shipped
from megacl.study_config import load_study, study_tree
from megacl.study_tree import build_tree

STUDIES = sorted((shipped("configs") / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_is_read_and_laid_out_in_runs(path: Path, tmp_path: Path):
    study = load_study(f"studies/{path.name}")
    assert study.name == path.stem
    tree = build_tree(study, tmp_path)
    arms = {(arm, seed) for arm in study.arms for seed in study.seeds_of(arm)}
    assert set(tree.paths) == arms


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_stated_budget_is_what_the_runs_train_on(path: Path, tmp_path: Path):
    study = load_study(f"studies/{path.name}")
    assert study.budget is not None
    stated = float(study.budget.split("M tokens")[0])
    assert sum(node.tokens for node in build_tree(study, tmp_path).nodes) / 1e6 == pytest.approx(stated, rel=0.05)


def test_the_full_study_of_the_claims_differs_in_its_lengths_alone():
    small, full = (study_tree(load_study(f"studies/{name}.yaml")) for name in ("claims", "claims-full"))
    ratios = {full["phases"][name]["steps"] / phase["steps"] for name, phase in small["phases"].items()}
    assert ratios == {3.25}

    def without_lengths(tree: dict[str, Any]) -> dict[str, Any]:
        for phase in tree["phases"].values():
            del phase["steps"]
        del tree["base"]["evaluation"]["every_steps"]
        return {key: value for key, value in tree.items() if key not in ("name", "budget")}

    assert without_lengths(small) == without_lengths(full)


@pytest.mark.long
def test_the_small_study_finds_every_claims_sign(tmp_path: Path):
    command = [sys.executable, "-m", "megacl", "study", "studies/small.yaml", "--out", "small/study"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    bars = json.loads((tmp_path / "small/study/results.json").read_text())["bars"]
    assert [bar["claim"] for bar in bars if not bar["as_meant"]] == []
    assert {bar["state"] for bar in bars if bar["control"]} == {"not held"}
