"""What is looked at before a run's first step: bad nodes are named, and what every node lacks is nobody's fault."""

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megacl.errors import UnhealthyError
from megacl.health import Measured, Needs, check_health, judge
from megacl.node import Gpus, available_memory, code_versions, free_bytes, gpu_problems, parse_gpus
from megacl.parallel.ranks import Ranks

ROOT = Path(__file__).parents[1]
HEALTHY = Measured(
    rank=0,
    node="n1",
    clock=1000.0,
    cuda=False,
    facts=("run has 5.0 GB free",),
    unknown=("GPUs (no nvidia-smi)",),
    code={"megacl": "abc", "torch": "2.13"},
    data={"english": "123"},
    product=0.01,
    sent=1e9,
)


def four(**of_node: dict[str, object]) -> list[Measured]:
    """Four ranks on the nodes n1 and n2, two on each; what differs on a node."""
    found = []
    for rank in range(4):
        node, first = f"n{1 + rank // 2}", rank % 2 == 0
        changes = of_node.get(node, {}) if first else {}
        found.append(dataclasses.replace(HEALTHY, rank=rank, node=node, first=first, **changes))  # type: ignore[arg-type]
    return found


def refused(measured: list[Measured]) -> UnhealthyError:
    with pytest.raises(UnhealthyError) as error:
        judge(measured)
    assert "\n" not in str(error.value)
    assert error.value.exit_status == 2
    return error.value


def test_healthy_nodes_are_said_to_be_in_one_line_with_what_was_not_measured() -> None:
    measured = four()
    measured[3] = dataclasses.replace(measured[3], product=0.025, sent=5e8, clock=1000.25)
    assert judge(measured) == (
        "healthy: 2 node(s), run has 5.0 GB free, clocks within 0.25 s, all-reduce of 4 MB at 0.50 GB/s, "
        "slowest rank 3 (n2), 2.5 x the median; not measured: GPUs (no nvidia-smi)"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"run_dir": ("the disk of run has 0.10 GB free, and a checkpoint takes 4.00",)}, "n2: the disk of run has 0"),
        ({"problems": ("1.00 GB of memory are available, and its ranks take 2.00",)}, "n2: 1.00 GB of memory are"),
        ({"code": {"megacl": "abc", "torch": "2.12"}}, "n2: has torch 2.12, and others 2.13. Leave out"),
        ({"data": {"english": "999"}}, "n2: sees source english as 999, and others 123. "),
        ({"clock": 1090.0}, "n2: its clock is off by +90 s. "),
    ],
)
def test_a_node_with_a_problem_is_named_to_be_left_out(change: dict[str, object], words: str) -> None:
    error = refused(four(n2=change))
    assert str(error).startswith(words)
    assert str(error).endswith("sbatch --exclude=n2")
    assert error.nodes == ("n2",)


def test_the_node_that_is_unlike_most_is_the_bad_one_though_it_be_that_of_rank_0() -> None:
    measured = [dataclasses.replace(HEALTHY, rank=rank, node=f"n{rank}") for rank in range(3)]
    measured[0] = dataclasses.replace(measured[0], code={"megacl": "old", "torch": "2.13"})
    assert refused(measured).nodes == ("n0",)
    assert str(refused(measured)).startswith("n0: has megacl old, and others abc.")


def test_a_rank_without_a_gpu_among_ranks_that_have_one_is_named() -> None:
    measured = [dataclasses.replace(each, cuda=each.rank != 3) for each in four()]
    assert str(refused(measured)).startswith("n2: rank 3 finds no GPU, and others have one.")


def test_what_every_node_lacks_is_no_reason_to_leave_one_out() -> None:
    full: dict[str, object] = {"run_dir": ("the disk of run has 0.10 GB free, and a checkpoint takes 4.00",)}
    error = refused(four(n1=full, n2=full))
    assert str(error) == (
        "on every node: the disk of run has 0.10 GB free, and a checkpoint takes 4.00. Put that right and run again."
    )
    assert error.nodes == ()
    assert refused(four(n1=full, n2=full)[:2]).nodes == ()  # one node alone may be as good as the others
    taken: dict[str, object] = {"problems": ("1.00 GB of memory are available, and its ranks take 2.00",)}
    error = refused(four(n1=taken, n2=taken))
    assert str(error).startswith("every node has a problem: n1: 1.00 GB of memory are available, and")
    assert error.nodes == ()
    assert refused(four(n1=taken)[:2]).nodes == ("n1",)


def test_one_rank_finds_its_own_machine_healthy_or_not(tmp_path: Path) -> None:
    little = Needs(checkpoint=1, host=1)
    found = check_health(Ranks(), little, run_dir=tmp_path / "not" / "there", cache=None, sources=())
    assert found.startswith("healthy: 1 node(s), ")
    much = Needs(checkpoint=10**18, host=1)
    with pytest.raises(UnhealthyError, match=r"the disk of .*run has \d+\.\d\d GB free, and a checkpoint takes 10{9}"):
        check_health(Ranks(), much, run_dir=tmp_path / "run", cache=None, sources=())


def test_free_space_is_that_of_the_disk_that_a_folder_would_be_on(tmp_path: Path) -> None:
    at_least = shutil.disk_usage(tmp_path).free // 2
    assert free_bytes(tmp_path / "a" / "b") > at_least


# ---------------------------------------------------------------------------------------------- memory


@pytest.fixture
def kernel(tmp_path: Path) -> Callable[..., Path]:
    """A root with proc and sys, of a machine with 64 GB of which 32 are available."""

    def made(cgroup: str = "", **limits: str) -> Path:
        (tmp_path / "proc" / "self").mkdir(parents=True)
        (tmp_path / "proc" / "meminfo").write_text(
            "MemTotal:       64000000 kB\nMemFree:  1000 kB\nMemAvailable:   32000000 kB\nHugePages_Total:  0\n"
        )
        (tmp_path / "proc" / "self" / "cgroup").write_text(f"0::/{cgroup}\n")
        for folder, limit in limits.items():
            path = tmp_path / "sys" / "fs" / "cgroup" / folder.replace("_", "/")
            path.mkdir(parents=True, exist_ok=True)
            (path / "memory.max").write_text(limit + "\n")
            (path / "memory.current").write_text("3000000000\n")
            (path / "memory.stat").write_text("anon 1\nfile 1000000000\nkernel 5\n")
        return tmp_path

    return made


def test_available_memory_is_what_the_kernel_says(kernel: Callable[..., Path]) -> None:
    found = available_memory(kernel())
    assert found is not None
    assert (found.available, found.total) == (32_000_000 * 1024, 64_000_000 * 1024)


def test_a_job_has_no_more_memory_than_its_control_groups_leave_it(kernel: Callable[..., Path]) -> None:
    found = available_memory(kernel("job/step", job_step="max", job="9000000000"))
    assert found is not None
    assert (found.available, found.total) == (7_000_000_000, 9_000_000_000)  # files' pages are given up


def test_where_there_is_no_proc_memory_is_not_known(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None


# ---------------------------------------------------------------------------------------------- GPUs

H100 = (
    "0, NVIDIA H100 80GB HBM3, 0, No, No, [N/A], Not Active\n1, NVIDIA H100 80GB HBM3, 0, No, No, [N/A], Not Active\n"
)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("0, NVIDIA A100-SXM4-40GB, 2, No, No, [N/A], Not Active", "has had 2 memory error(s) that ECC could not"),
        ("0, NVIDIA A100-SXM4-40GB, 0, Yes, No, [N/A], Not Active", "has bad memory that a reset would replace"),
        ("0, NVIDIA A100-SXM4-40GB, 0, No, Yes, [N/A], Not Active", "has no spare rows left for bad memory"),
        ("0, Tesla V100-SXM2-16GB, 0, [N/A], [N/A], Yes, Not Active", "has bad memory that a reset would replace"),
        ("0, NVIDIA H100 80GB HBM3, 0, No, No, [N/A], Active", "is slowed down by its hardware"),
        ("0, NVIDIA A100-SXM4-40GB, [GPU requires reset], No, No, [N/A], Not Active", "must be reset"),
    ],
)
def test_a_gpu_in_a_bad_state_is_named_with_what_ails_it(line: str, problem: str) -> None:
    found = parse_gpus(line + "\n", "", 0)
    assert len(found.problems) == 1
    name = line.split(", ")[1]
    assert found.problems[0].startswith(f"GPU 0 ({name}) {problem}")


def test_gpus_in_a_good_state_are_counted() -> None:
    assert parse_gpus(H100, "", 0) == Gpus(facts=("2 GPUs",))


def test_a_gpu_without_ecc_is_no_bad_one() -> None:
    found = parse_gpus("0, NVIDIA GeForce RTX 4090, [N/A], [N/A], [N/A], [N/A], Not Active\n", "", 0)
    assert found == Gpus(unknown=("ECC errors of GPUs",), facts=("1 GPUs",))


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("Unable to determine the device handle for GPU0000:41:00.0: GPU is lost. Reboot the system.\n", 15),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", 9),
    ],
)
def test_a_lost_gpu_or_driver_is_said_in_the_words_of_nvidia_smi(text: str, status: int) -> None:
    assert parse_gpus(text, "", status).problems == (f"nvidia-smi fails with status {status}: {text.strip()}",)


def test_what_nvidia_smi_does_not_know_is_not_measured() -> None:
    assert parse_gpus('Field "remapped_rows.pending" is not a valid field to query.\n', "", 2).problems == ()
    assert parse_gpus("No devices were found\n", "", 6).problems == ()
    assert gpu_problems({"PATH": "/nowhere"}) == Gpus(unknown=("GPUs (no nvidia-smi)",))


def test_nvidia_smi_is_asked_for_the_gpus_of_this_job_alone(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ncase "$*" in *--id=2,3) ;; *) exit 3;; esac\nprintf "%s" "' + H100 + '"\n')
    program.chmod(0o755)
    assert gpu_problems({"PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "2,3"}) == Gpus(facts=("2 GPUs",))
    assert gpu_problems({"PATH": str(tmp_path)}).problems == ("nvidia-smi fails with status 3: ",)


# ---------------------------------------------------------------------------------------------- code


def test_another_tree_of_code_has_another_hash(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "megacl", tmp_path / "megacl", ignore=shutil.ignore_patterns("__pycache__"))
    program = "from megacl.node import code_versions; print(code_versions()['megacl'])"

    def asked() -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert asked().strip() == code_versions()["megacl"]
    with open(tmp_path / "megacl" / "schedules.py", "a") as file:
        file.write("# changed\n")
    assert asked().strip() != code_versions()["megacl"]
