"""The wheel, installed where no checkout is in reach, in an empty folder: what it holds, and that it trains."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

CHECKOUT = Path(__file__).resolve().parents[1]
DATA_FOLDERS = ("configs", "examples", "slurm")

# Small enough for seconds, and with a phase of each kind: plain, and with replay.
FEW_STEPS = [
    "phases[0].tokens=null",
    "phases[0].steps=3",
    "phases[1].tokens=null",
    "phases[1].steps=3",
    "evaluation.sequences=4",
    "model.hidden_size=32",
    "model.num_layers=1",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, CHECKOUT], folder)
    (built,) = folder.glob("megacl-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """An environment of its own that has the wheel, and this environment's packages without the checkout.

    A folder named in a .pth file is put on the path, but the .pth files inside it are not read: an editable
    installation of the checkout stays out of reach.
    """
    venv = tmp_path_factory.mktemp("venv")
    run([sys.executable, "-m", "venv", "--without-pip", venv], venv)
    python = venv / "bin" / "python"
    where = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], venv).strip()
    Path(where, "outer.pth").write_text(sysconfig.get_path("purelib"))
    run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel], venv)
    return python


def run(command: list[object], folder: Path) -> str:
    """What a command prints in a folder; fails with all that it said."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout[-4000:]}"
    return done.stdout


def test_the_wheel_holds_the_data_that_a_run_needs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    here = [file.relative_to(CHECKOUT) for folder in DATA_FOLDERS for file in (CHECKOUT / folder).rglob("*")]
    files = {f"megacl/{file.as_posix()}" for file in here if (CHECKOUT / file).is_file()}
    assert {Path(name).parts[1] for name in files} == set(DATA_FOLDERS)
    assert files <= names
    assert {"megacl/report.css", "megacl/report.js"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_holds_nothing_but_the_package(wheel):
    parts = {Path(name).parts[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {part.split("-")[0] for part in parts} == {"megacl"}


def test_the_checkout_is_out_of_reach(python, tmp_path):
    where = run([python, "-c", "import megacl, sys; print(megacl.__file__, *sys.path, sep='\\n')"], tmp_path)
    assert where.startswith(str(python.parents[1]))
    assert str(CHECKOUT) not in where.replace(sysconfig.get_path("purelib"), "")


def test_the_installed_command_answers(python, tmp_path):
    assert "train" in run([python.with_name("megacl"), "--help"], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_in_an_empty_folder_writes_nothing(python, tmp_path):
    said = run([python, "-m", "megacl", "train", "recipe/demo.yaml", "--dry-run"], tmp_path)
    assert "german" in said
    assert list(tmp_path.iterdir()) == []


def test_the_demo_recipe_trains_in_an_empty_folder(python, tmp_path):
    run([python, "-m", "megacl", "train", "recipe/demo.yaml", *FEW_STEPS], tmp_path)
    (metrics,) = tmp_path.rglob("metrics.jsonl")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [(record["step"], record["phase"]) for record in records if record["kind"] == "step"]
    assert steps == [(1, "english"), (2, "english"), (3, "english"), (4, "german"), (5, "german"), (6, "german")]
    run([python, "-m", "megacl", "report", metrics.parent, "--out", "report.html"], tmp_path)
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
