"""What a job runs is what was there when it was submitted: code, configuration, cluster file, versions of packages.

RUN/jobs/0001/  config.yaml  cluster.yaml  code/megacl/...  code.json  code.diff  packages.txt
"""

import contextlib
import functools
import importlib.metadata
import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import megacl
from megacl.config import RunConfig
from megacl.config_cluster import ClusterConfig
from megacl.configfile import dump, dump_tree, to_tree
from megacl.publish import alone_in, disk_errors
from megacl.slurm.render import job_folder

_BESIDE = ("configs", "examples", "slurm")
"""What lies beside the package in a checkout, and inside it where it is installed."""


@contextlib.contextmanager
def alone_with_jobs(run_dirs: Sequence[Path]) -> Iterator[list[Path]]:
    """Keeps other submissions out of run directories. It gives a list for the folders of new jobs.

    Where the block fails these folders go, and of the folders around them those that were not there before, as far as
    they hold nothing else: others may have begun something there meanwhile. Raises DataError where another submission
    is at work.
    """
    missing = {folder for run_dir in run_dirs for folder in (run_dir, *run_dir.parents) if not folder.exists()}
    made: list[Path] = []
    held: list[Path] = []
    with contextlib.ExitStack() as locks:
        try:
            for run_dir in run_dirs:
                locks.enter_context(alone_in(run_dir / "jobs", "another megacl submit"))
                held.append(run_dir)
            yield made
        except BaseException:
            for folder in made:
                shutil.rmtree(folder, ignore_errors=True)
            for run_dir in held:
                if next_number(run_dir) == 1:
                    shutil.rmtree(run_dir / "jobs", ignore_errors=True)
                    missing.add(run_dir / "logs")
            for folder in sorted(missing, key=lambda each: len(each.parts), reverse=True):
                with contextlib.suppress(OSError):  # what holds something stays
                    folder.rmdir()
            raise


def new_job_folder(run_dir: Path) -> int:
    """Makes the next folder run_dir/jobs/NUMBER, and run_dir/logs, and returns the number; for who is alone there."""
    with disk_errors(run_dir, "a job's folder"):
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        (run_dir / "jobs").mkdir(exist_ok=True)
        number = next_number(run_dir)
        job_folder(run_dir, number).mkdir()
    return number


def next_number(run_dir: Path) -> int:
    """One more than the highest number of a job's folder there, 1 where there is none."""
    numbers = [int(folder.name) for folder in (run_dir / "jobs").glob("[0-9]*") if folder.name.isdecimal()]
    return max(numbers, default=0) + 1


def freeze(folder: Path, config: RunConfig | None, cluster: ClusterConfig) -> None:
    """Writes all that a job needs into its new folder. Raises DataError where the disk refuses."""
    with disk_errors(folder, "what a job runs"):
        if config is not None:
            (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
        (folder / "cluster.yaml").write_text(dump_tree(to_tree(cluster, defaults=False)), encoding="utf-8")
        _copy_code(folder / "code")
        _describe_code(folder)
        (folder / "packages.txt").write_text(_packages(), encoding="utf-8")


@functools.cache
def _packages() -> str:
    """What is installed, NAME==VERSION a line; asked once, for the jobs of a chain all together."""
    found = {f"{package.name}=={package.version}" for package in importlib.metadata.distributions()}
    return "".join(f"{line}\n" for line in sorted(found))


def _copy_code(code: Path) -> None:
    package = Path(megacl.__file__).parent
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(package, code / "megacl", ignore=ignore)
    for name in _BESIDE:
        beside = package.parent / name
        if beside.is_dir() and (package.parent / "pyproject.toml").is_file():
            shutil.copytree(beside, code / name, ignore=ignore)


def _describe_code(folder: Path) -> None:
    """code.json: the version, and of a git checkout its commit and whether it differs; code.diff says how."""
    source = Path(megacl.__file__).parents[1]
    commit = _git(source, "rev-parse", "HEAD")
    name = commit.decode().strip() if commit is not None else None
    found: dict[str, object] = {"version": megacl.__version__, "commit": name, "dirty": None}
    if commit is not None:
        difference = _git(source, "diff", "HEAD", "--binary", "--no-color", "--no-ext-diff") or b""
        found["dirty"] = bool(difference)
        (folder / "code.diff").write_bytes(difference)
    (folder / "code.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _git(folder: Path, *arguments: str) -> bytes | None:
    """What git prints, or None where the folder is no checkout's root, or there is no git."""
    if not (folder / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout
