"""Signs of life between ranks, over real sockets and by a clock that only the tests move."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from megacl.errors import DataError
from megacl.parallel.alive import Missed, SignsOfLife
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
    """Ranks that give a sign of life every 10 seconds, when they are asked to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, address: str = "127.0.0.1", ranks: int = 3) -> None:
        self.now = 100.0
        monkeypatch.setattr("megacl.parallel.alive.time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setenv("MASTER_ADDR", address)
        self.told: list[Any] = []
        self.ranks = [SignsOfLife(InOneProcess(rank, ranks, told=self.told), every=10) for rank in range(ranks)]

    def close(self) -> None:
        for rank in self.ranks:
            if rank._socket is not None:
                rank._socket.close()

    def goes_on(self, *ranks: int, seconds: int) -> None:
        """These ranks look each second, for so long."""
        for _ in range(seconds):
            self.now += 1
            for rank in (*ranks, *ranks):  # twice, so that rank 0's answers are there
                self.ranks[rank].exchange()

    def missed(self, rank: int, seconds: float = 30) -> tuple[int, ...]:
        found = self.ranks[rank].missed(seconds)
        return () if found is None else found.ranks


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    run = Run(monkeypatch)
    yield run
    run.close()


def test_nobody_is_missed_where_all_give_signs(run: Run) -> None:
    run.goes_on(0, 1, 2, seconds=100)
    assert [run.missed(rank, 21) for rank in range(3)] == [(), (), ()]


def test_one_that_is_silent_is_missed_by_rank_0_which_tells_the_others_who_it_is(run: Run) -> None:
    run.goes_on(0, 1, 2, seconds=30)
    run.goes_on(0, 2, seconds=100)
    assert run.missed(2) == ()
    found = run.ranks[0].missed(30)
    assert found is not None
    assert found.ranks == (1,)
    assert 100 <= found.seconds <= 120
    run.goes_on(2, seconds=1)
    assert run.ranks[2].missed(30) == Missed((1,), 30)


def test_one_that_was_only_slow_is_not_missed_any_more(run: Run) -> None:
    run.goes_on(0, 1, 2, seconds=30)
    run.goes_on(0, 2, seconds=15)
    run.goes_on(0, 1, 2, seconds=20)
    assert [run.missed(rank) for rank in range(3)] == [(), (), ()]


def test_all_miss_rank_0_where_it_is_silent(run: Run) -> None:
    run.goes_on(0, 1, 2, seconds=30)
    run.goes_on(1, 2, seconds=100)
    assert [run.missed(rank) for rank in (1, 2)] == [(0,), (0,)]


def test_where_no_datagram_comes_through_nobody_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, address="192.0.2.1")  # which is nobody's
    run.goes_on(0, 1, 2, seconds=100)
    assert [run.missed(rank) for rank in range(3)] == [(), (), ()]
    run.close()


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_ranks_that_meet_by_ipv6_hear_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, address="::1")
    run.goes_on(0, 1, 2, seconds=30)
    run.goes_on(0, 2, seconds=100)
    assert run.missed(0) == (1,)
    run.close()


def test_a_rank_is_missed_that_has_given_only_its_first_sign(run: Run) -> None:
    run.goes_on(0, 2, seconds=100)
    assert run.missed(0) == (1,)


def test_a_rank_that_has_left_is_not_missed(run: Run) -> None:
    run.goes_on(0, 1, 2, seconds=30)
    with run.ranks[1].given():
        pass
    run.goes_on(0, 2, seconds=100)
    assert run.missed(0) == ()
    with run.ranks[0].given():
        pass
    run.goes_on(2, seconds=100)
    assert run.missed(2) == ()


def test_one_that_ends_by_an_error_has_not_left(run: Run) -> None:
    run.goes_on(0, 1, 2, seconds=30)
    with pytest.raises(ValueError, match="a bug"), run.ranks[1].given():
        raise ValueError("a bug")
    run.goes_on(0, 2, seconds=100)
    assert run.missed(0) == (1,)


def test_one_that_ends_by_an_error_of_all_ranks_has_left(run: Run) -> None:
    run.goes_on(0, 1, 2, seconds=30)
    with pytest.raises(DataError), run.ranks[1].given():
        raise DataError("the disk is full")
    run.goes_on(0, 2, seconds=100)
    assert run.missed(0) == ()


def test_of_many_addresses_of_rank_0_the_one_that_answers_is_found_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found = socket.getaddrinfo

    def several(host: str, port: int, **how: Any) -> list[Any]:
        nobody = [found(f"192.0.2.{last}", port, **how)[0] for last in range(1, 5)]
        return [*nobody, *found(host, port, **how)]

    monkeypatch.setattr("megacl.parallel.alive.socket.getaddrinfo", several)
    run = Run(monkeypatch)
    run.goes_on(0, 1, 2, seconds=120)
    assert [run.missed(rank, 21) for rank in range(3)] == [(), (), ()]
    run.goes_on(0, 2, seconds=40)
    assert run.missed(0) == (1,)
    run.close()


def test_a_process_that_stood_still_itself_blames_nobody(run: Run) -> None:
    run.goes_on(0, 1, 2, seconds=30)
    run.now += 5000
    assert [run.missed(rank) for rank in range(3)] == [(), (), ()]
    run.goes_on(0, 1, 2, seconds=1)
    assert [run.missed(rank) for rank in range(3)] == [(), (), ()]


def test_what_others_send_to_the_port_is_no_sign(run: Run) -> None:
    run.goes_on(0, 1, 2, seconds=30)
    port, token = run.told[0]
    sign = b"\0\0\0\1" + b"\0" + b"\0\0\0\0"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        for _ in range(10):
            for content in (b"", b"hello", token, token[:-1] + bytes([token[-1] ^ 1]) + sign, token + sign[:-1]):
                stranger.sendto(content, ("127.0.0.1", port))
            run.goes_on(0, 2, seconds=10)
    assert run.missed(0) == (1,)


def test_rank_0_hears_hundreds_of_ranks_that_begin_at_one_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a socket keeps of datagrams that nobody has read yet."""
    run = Run(monkeypatch, ranks=400)
    run.goes_on(*range(1, 400), 0, seconds=40)
    assert run.missed(0, 25) == ()
    run.goes_on(*range(2, 400), 0, seconds=40)
    assert run.missed(0) == (1,)
    run.close()


def test_a_rank_without_an_answer_tries_another_way(run: Run) -> None:
    run.goes_on(0, 1, 2, seconds=30)
    lost = run.ranks[1]._socket
    assert lost is not None
    before = lost.getsockname()
    lost.close()  # what it sends now comes nowhere
    run.goes_on(0, 1, 2, seconds=60)
    assert run.ranks[1]._socket is not None
    assert run.ranks[1]._socket.getsockname() != before
    assert [run.missed(rank, 21) for rank in range(3)] == [(), (), ()]


def test_a_rank_alone_and_ranks_without_a_socket_know_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with SignsOfLife(Ranks(), every=10).given():
        pass

    def refuse(*arguments: Any) -> None:
        raise OSError("no sockets here")

    monkeypatch.setattr("megacl.parallel.alive.socket.socket", refuse)
    run = Run(monkeypatch)
    run.goes_on(0, 1, 2, seconds=100)
    assert [run.missed(rank) for rank in range(3)] == [(), (), ()]
