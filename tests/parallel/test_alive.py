"""Signs of life between ranks, over real sockets and by a clock that only the tests move."""

import socket
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from megacl.parallel.alive import SignsOfLife
from megacl.parallel.ranks import Ranks


@dataclass(frozen=True)
class InOneProcess(Ranks):
    """Ranks that are constructed one after the other, rank 0 first."""

    told: list[Any] = field(default_factory=list)

    def broadcast(self, obj: Any) -> Any:
        if self.rank == 0:
            self.told.append(obj)
        return self.told[0]


class Run:
    """Three ranks that give a sign of life every 10 seconds, when they are asked to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, address: str = "127.0.0.1") -> None:
        self.now = 100.0
        monkeypatch.setattr("megacl.parallel.alive.time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setenv("MASTER_ADDR", address)
        self.told: list[Any] = []
        self.ranks = [SignsOfLife(InOneProcess(rank, 3, told=self.told), every=10) for rank in range(3)]

    def looks(self, *ranks: int, seconds: int) -> dict[int, float]:
        """These ranks look each second, for so long; what each of them is told at its last look."""
        said = {}
        for _ in range(seconds):
            self.now += 1
            # Rank 0 in between, so that its answers are there.
            for rank in (*ranks, *ranks):
                said[rank] = self.ranks[rank].exchange()
        return said


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(monkeypatch)


def test_nobody_is_missed_where_all_give_signs(run: Run) -> None:
    assert max(run.looks(0, 1, 2, seconds=100).values()) <= 10


def test_rank_0_misses_one_that_is_silent_and_the_others_go_on(run: Run) -> None:
    run.looks(0, 1, 2, seconds=30)
    said = run.looks(0, 2, seconds=100)
    assert 100 <= said[0] <= 110
    assert said[2] <= 10
    assert run.looks(0, 1, 2, seconds=30)[0] <= 10  # it was only slow


def test_all_miss_rank_0_where_it_is_silent(run: Run) -> None:
    run.looks(0, 1, 2, seconds=30)
    assert all(100 <= seconds <= 110 for seconds in run.looks(1, 2, seconds=100).values())


def test_where_no_datagram_comes_through_nobody_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, address="192.0.2.1")  # which is nobody's
    assert run.looks(0, 1, 2, seconds=100) == {0: 0, 1: 0, 2: 0}


def test_a_rank_is_missed_that_has_given_only_its_first_sign(run: Run) -> None:
    assert run.looks(0, 2, seconds=100)[0] >= 90


def test_a_rank_that_has_left_is_not_missed(run: Run) -> None:
    run.looks(0, 1, 2, seconds=30)
    run.ranks[1].close()
    assert run.looks(0, 2, seconds=100)[0] <= 10
    run.ranks[0].close()
    assert run.looks(2, seconds=100)[2] == 0


def test_a_process_that_stood_still_itself_blames_nobody(run: Run) -> None:
    run.looks(0, 1, 2, seconds=30)
    run.now += 5000
    assert run.looks(0, 1, 2, seconds=1) == {0: 0, 1: 0, 2: 0}


def test_what_others_send_to_the_port_is_no_sign(run: Run) -> None:
    run.looks(0, 1, 2, seconds=30)
    port, token = run.told[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        for content in (b"", b"hello", token, token[:-1] + b"x" + b"\0\0\0\1\0", token + b"\0"):
            stranger.sendto(content, ("127.0.0.1", port))
    assert 100 <= run.looks(0, 2, seconds=100)[0] <= 110


def test_a_rank_alone_and_ranks_without_a_socket_know_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SignsOfLife(Ranks(), every=10).exchange() == 0

    def refuse(*arguments: Any) -> None:
        raise OSError("no sockets here")

    monkeypatch.setattr("megacl.parallel.alive.socket.socket", refuse)
    run = Run(monkeypatch)
    assert run.looks(0, 1, 2, seconds=100) == {0: 0, 1: 0, 2: 0}
