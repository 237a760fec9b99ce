"""The scripts of three clusters, whole, as files under tests/golden/slurm, and what shellcheck says of them.

Where a change is meant to move them, write them anew and look at what `git diff` shows:

    python -m tests.test_slurm_golden
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megacl.configfile import load_cluster
from megacl.slurm.render import Job, render_script

GOLDEN = Path(__file__).parent / "golden" / "slurm"
CLUSTERS = ("cpu-test", "h100x8", "a100x4-container")
RUN = Path("/shared/runs/english-german")
WHERE = {"name": "english-german", "run_dir": RUN, "number": 1, "workdir": Path("/shared/home/me")}
JOBS = {
    "train": Job(
        kind="train",
        command=("train", f"{RUN}/jobs/0001/config.yaml"),
        python="/shared/venv/bin/python",
        **WHERE,  # type: ignore[arg-type]
    ),
    **{
        name: Job(
            kind=kind,
            name=f"october.{name}",
            run_dir=Path("/shared/runs/october"),
            number=1,
            workdir=Path("/shared/home/me"),
            python="/shared/venv/bin/python",
            command=tuple(command.split()),
            alone=kind not in ("evaluate", "release"),
            gpus=kind in ("evaluate", "release") or name == "study-runs",
            array={"prepare-array": "1-64%16", "study-runs": "1-2%2"}.get(name),
            tasks=64,
            runs=("seed-0/english-3fa9c1", "seed-0/german-25-9c13fa") if name == "study-runs" else (),
        )
        for name, kind, command in (
            ("prepare", "prepare", "prepare raw --tokenizer t.model --out data/web"),
            ("prepare-array", "prepare", "prepare raw --tokenizer t.model --out data/web"),
            ("merge", "merge", "data merge data/web"),
            ("evaluate", "evaluate", "evaluate runs/trunk@first --out /shared/runs/trunk/evaluations/first.json"),
            ("release", "release", "release runs/trunk --out runs/october --anneal 5%"),
            ("release-merged", "release", "release runs/trunk --out runs/october --merge last:10"),
            ("convert", "convert", "convert runs/october exports/october --to hf"),
            ("report", "report", "report runs/trunk runs/october --out report.html"),
            ("study", "study", "study study.yaml --out studies/mine --only results"),
            ("study-runs", "study", "study study.yaml --out studies/mine --only"),
        )
    },
}
"""By the name of the file."""
# What the three clusters do not have.
VARIANTS = {
    "torchrun": ("cpu-test", ["launcher=torchrun"]),
    "apptainer": ("a100x4-container", ["container.runtime=apptainer", "launcher=torchrun", "scratch=/s/$SLURM_JOB_ID"]),
    "prologue": ("h100x8", ["prologue=ulimit -l unlimited", "environment.GIVEN=a b", "sbatch=[--exclusive]"]),
}


def script(job: str, cluster: str, overrides: tuple[str, ...] = ()) -> str:
    return render_script(JOBS[job], load_cluster(cluster, overrides))


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("job", JOBS)
def test_the_script_is_the_golden_one(job: str, cluster: str) -> None:
    assert script(job, cluster) == (GOLDEN / cluster / f"{job}.sbatch").read_text()


def test_shellcheck_finds_nothing_in_any_script(tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        why = "no shellcheck here: apt-get install shellcheck"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    files = [str(file) for file in sorted(GOLDEN.rglob("*.sbatch"))]
    assert len(files) >= len(CLUSTERS) * len(JOBS)
    for name, (cluster, overrides) in VARIANTS.items():
        file = tmp_path / f"{name}.sbatch"
        file.write_text(script("train", cluster, tuple(overrides)))
        files.append(str(file))
    done = subprocess.run(["shellcheck", "--shell=bash", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


if __name__ == "__main__":
    for each in CLUSTERS:
        (GOLDEN / each).mkdir(parents=True, exist_ok=True)
        for kind in JOBS:
            (GOLDEN / each / f"{kind}.sbatch").write_text(script(kind, each))
