"""How ranks meet: who is missing is named, other jobs at the port are told apart. Ranks are threads here."""

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from megacl.errors import RendezvousError
from megacl.parallel.place import Place, described_ranks, find_place, node_of_ranks
from megacl.parallel.rendezvous import Met, meet


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SLURM that knows the nodes n1 and n2."""
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def place(rank: int, port: int, *, ranks: int = 4, job: str = "7", identified: bool = True) -> Place:
    """A rank of a job whose ranks lie two on each of the nodes n1 and n2."""
    return Place(
        rank=rank,
        world_size=ranks,
        local_rank=rank % 2,
        address="127.0.0.1",
        port=port,
        identity=f"job {job}",
        identified=identified,
        node=f"n{1 + rank // 2}",
        nodes="n[1-2]",
        tasks="2(x2)" if ranks == 4 else "1(x2)",
        distribution="block",
    )


def start(
    threads: ThreadPoolExecutor,
    places: Sequence[Place],
    *,
    timeout: float = 60.0,
    problems: dict[int, str] | None = None,
) -> "list[Future[Met]]":
    return [threads.submit(meet, each, timeout=timeout, problem=(problems or {}).get(each.rank)) for each in places]


def failure(future: "Future[Met]") -> RendezvousError:
    error = future.exception(timeout=60)
    assert isinstance(error, RendezvousError), error
    return error


def test_all_ranks_find_one_another_and_learn_where_each_is(threads: ThreadPoolExecutor) -> None:
    port = free_port()
    met = [each.result(timeout=60) for each in start(threads, [place(rank, port) for rank in range(4)])]
    assert {each.nodes for each in met} == {("n1", "n1", "n2", "n2")}
    met[3].store.set("word", "heard")
    assert met[0].store.get("word") == b"heard"


def test_the_ranks_that_do_not_come_are_named_with_their_nodes_on_all_that_came(
    threads: ThreadPoolExecutor, scontrol: None
) -> None:
    port = free_port()
    for error in map(failure, start(threads, [place(0, port), place(1, port)], timeout=1)):
        assert str(error).startswith(
            f"ranks 2-3 (n2) of 4 did not come to rank 0 at 127.0.0.1:{port} within 1 s; see whether they started"
        )
        assert (error.ranks, error.nodes, error.on_every_rank) == ((2, 3), ("n2",), True)


def test_without_rank_0_the_others_say_so_once_a_node(threads: ThreadPoolExecutor, scontrol: None) -> None:
    port = free_port()
    second, third = map(failure, start(threads, [place(1, port), place(2, port)], timeout=1))
    assert str(third).startswith(f"rank 2 (n2) found no rank 0 (n1) at 127.0.0.1:{port} within 1 s; see whether")
    assert (third.ranks, third.nodes) == ((0,), ("n1",))
    assert (second.on_every_rank, third.on_every_rank) == (True, False)


def test_two_jobs_at_one_port_meet_each_among_its_own(threads: ThreadPoolExecutor) -> None:
    port = free_port()
    first = start(threads, [place(rank, port, job="7") for rank in (0, 1)])
    second = start(threads, [place(rank, port, job="8") for rank in (3, 2, 1, 0)])
    assert {each.result(timeout=60).nodes for each in second} == {("n1", "n1", "n2", "n2")}
    first += start(threads, [place(rank, port, job="7") for rank in (2, 3)])
    met = [each.result(timeout=60) for each in (*first, *second)]
    met[0].store.set("whose", "of 7")
    assert not met[4].store.check(["whose"])


def test_a_rank_that_finds_only_another_job_says_so_and_leaves_it_alone(threads: ThreadPoolExecutor) -> None:
    port = free_port()
    others = start(threads, [place(rank, port, job="7") for rank in (0, 1, 2)])
    lost = failure(start(threads, [place(1, port, job="8")], timeout=1)[0])
    assert f"at 127.0.0.1:{port} (job 7 is there, which is not this run's job 8) within 1 s" in str(lost)
    others += start(threads, [place(3, port, job="7")])
    assert [len(each.result(timeout=60).nodes) for each in others] == [4, 4, 4, 4]


def test_a_port_that_something_else_listens_at_is_left_to_it(threads: ThreadPoolExecutor) -> None:
    with socket.create_server(("", 0)) as taken:
        taken.settimeout(60)
        port = taken.getsockname()[1]

        def answer() -> None:
            while True:
                try:
                    connection, _ = taken.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        server = threading.Thread(target=answer, daemon=True)
        server.start()
        met = [each.result(timeout=60) for each in start(threads, [place(rank, port, ranks=2) for rank in (0, 1)])]
        assert [len(each.nodes) for each in met] == [2, 2]
        alone = failure(start(threads, [place(0, port, ranks=2, identified=False)])[0])
        assert str(alone).startswith(f"rank 0 cannot listen at 127.0.0.1:{port}: Address already in use")


def test_a_rank_that_dies_while_others_are_awaited_is_named_at_once(threads: ThreadPoolExecutor) -> None:
    port = free_port()
    waiting = start(threads, [place(0, port), place(1, port)])
    with connected(port) as dying:
        dying.sendall(b'{"identity": "job 7", "rank": 3, "node": "n2", "problem": null}\n')
        assert b"left" in dying.recv(1000)
        dying.sendall(b'"here"\n')
    waiting += start(threads, [place(2, port)])  # which may come when rank 0 knows of it already
    for error in map(failure, waiting):
        assert str(error).startswith("rank 3 (n2) left before all had come")
        assert (error.ranks, error.nodes) == ((3,), ("n2",))


def connected(port: int) -> socket.socket:
    """A connection to rank 0, which may not listen yet."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=60)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_what_is_wrong_with_one_rank_ends_all_at_once(threads: ThreadPoolExecutor) -> None:
    port = free_port()
    started = start(threads, [place(rank, port) for rank in range(4)], problems={2: "there is no GPU."})
    for error in map(failure, started):
        assert str(error) == "rank 2 (n2): there is no GPU."
        assert (error.ranks, error.nodes) == ((2,), ("n2",))


def test_nonsense_at_the_port_disturbs_nobody(threads: ThreadPoolExecutor) -> None:
    port = free_port()
    waiting = start(threads, [place(0, port, ranks=2)])
    for said in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\xff\n",
        b"[1]\n",
        b'"here"\n',
        b'{"identity": "job 7", "rank": 9}\n',
    ):
        with connected(port) as stranger:
            stranger.sendall(said)
    waiting += start(threads, [place(1, port, ranks=2)])
    assert [each.result(timeout=60).nodes for each in waiting] == [("n1", "n1"), ("n1", "n1")]


@pytest.mark.parametrize(
    ("tasks", "distribution", "expected"),
    [
        ("2(x2)", "block", ["n1", "n1", "n2", "n2"]),
        ("3,1", "block:cyclic", ["n1", "n1", "n1", "n2"]),
        ("2(x2)", "cyclic", ["n1", "n2", "n1", "n2"]),
        ("1,3", "cyclic:block", ["n1", "n2", "n2", "n2"]),
        ("2(x2)", "arbitrary", [None] * 4),
        ("2(x3)", "block", [None] * 4),
    ],
)
def test_slurm_says_which_rank_is_on_which_node(
    scontrol: None, tasks: str, distribution: str, expected: list[str | None]
) -> None:
    found = find_place(
        {"SLURM_STEP_ID": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}
        | {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "5", "SLURMD_NODENAME": "n2"}
        | {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_DISTRIBUTION": distribution}
    )
    assert found is not None
    assert (found.rank, found.world_size, found.local_rank, found.node) == (3, 4, 1, "n2")
    assert (found.address, found.port, found.identity) == ("n1", 10049, "job 7, restart 5, step 2")
    assert node_of_ranks(found) == expected


def test_ranks_are_described_by_their_nodes_and_in_rows() -> None:
    nodes = ["n1"] * 2 + ["n2"] * 2 + ["n3"] * 2
    assert described_ranks([1, 2, 3, 5], nodes) == "rank 1 (n1), ranks 2-3 (n2), rank 5 (n3)"
    assert described_ranks([0, 1, 3], [None] * 4) == "ranks 0-1, rank 3"
    assert described_ranks(range(0, 40, 2), []).endswith("rank 14 and 12 more")
