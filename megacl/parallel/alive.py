"""Signs of life of a run's processes, apart from its collectives and its disks.

    life = SignsOfLife(ranks, every=60)     # all ranks
    life.exchange()                         # by each rank's watchdog, now and then: seconds of the longest silence

While one rank writes a checkpoint the others wait for it in a collective, for hours if need be, and from there a rank
that is at work looks like one that is stopped, or whose node is gone. So a thread of each rank sends rank 0 a datagram
now and then, and gets one back. A rank is expected to go on with that only once it was heard: where a network lets no
datagrams through, nothing is known and nobody is missed.
"""

import contextlib
import os
import secrets
import socket
import struct
import time

from megacl.parallel.ranks import Ranks

_RANK = struct.Struct("!I?")
"""Behind the run's token: whose sign it is, and whether it is the last one."""


class SignsOfLife:
    """Of one rank. Where there is no other rank, or no socket, it does nothing."""

    def __init__(self, ranks: Ranks, *, every: float) -> None:
        """every: seconds between two signs. All ranks construct it at the same place."""
        self._rank, self._every = ranks.rank, every
        self._heard: dict[int, float] = {}
        self._addresses: dict[int, tuple[object, ...]] = {}
        self._sent = self._looked = time.monotonic()
        self._socket: socket.socket | None = None
        self._token = b""
        if ranks.world_size == 1:
            return
        told = ranks.broadcast(self._listen() if ranks.rank == 0 else None)
        if told is not None:
            port, self._token = told
            if ranks.rank != 0:
                self._speak_to(os.environ.get("MASTER_ADDR", "localhost"), port)

    def _listen(self) -> tuple[int, bytes] | None:
        """Rank 0's port, and what every sign of this run begins with."""
        try:
            # Both kinds of addresses where the machine has both.
            family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
            self._socket = socket.socket(family, socket.SOCK_DGRAM)
            if family == socket.AF_INET6:
                self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            self._socket.bind(("", 0))
            self._socket.setblocking(False)
            return self._socket.getsockname()[1], secrets.token_bytes(16)
        except OSError:
            self.close()
            return None

    def _speak_to(self, host: str, port: int) -> None:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
            self._socket = socket.socket(family, kind, protocol)
            self._socket.setblocking(False)
            self._addresses[0] = address
            self._send(self._socket, 0)  # at once, so that rank 0 expects the next one, whatever becomes of this rank
        except OSError:
            self.close()

    def exchange(self) -> float:
        """Gives a sign where one is due. Returns seconds for which nothing was heard of the quietest other rank.

        0 where nobody was heard yet. Other ranks hear from rank 0 alone, which hears from all. It never waits.
        """
        ours = self._socket  # the main thread may close it meanwhile
        if ours is None:
            return 0.0
        now = time.monotonic()
        if now - self._looked > 2 * self._every:  # this process stood still itself, so it knows nothing of the others
            self._heard = dict.fromkeys(self._heard, now)
        self._looked = now
        self._receive(ours, now)
        if 0 in self._addresses and now - self._sent >= self._every:
            self._sent = now
            self._send(ours, 0)
        return max((now - moment for moment in self._heard.values()), default=0.0)

    def _receive(self, ours: socket.socket, now: float) -> None:
        with contextlib.suppress(OSError):  # BlockingIOError: there is no more
            while True:
                content, address = ours.recvfrom(64)
                token, said = content[: len(self._token)], content[len(self._token) :]
                if token != self._token or len(said) != _RANK.size:
                    continue  # somebody else's
                rank, last = _RANK.unpack(said)
                if last:
                    self._heard.pop(rank, None)
                    self._addresses.pop(rank, None)
                    continue
                self._heard[rank] = now
                if self._rank == 0:
                    self._addresses[rank] = address
                    self._send(ours, rank)

    def _send(self, ours: socket.socket, rank: int, *, last: bool = False) -> None:
        with contextlib.suppress(OSError):
            ours.sendto(self._token + _RANK.pack(self._rank, last), self._addresses[rank])

    def close(self) -> None:
        """The last sign: this rank is not to be missed."""
        ours, self._socket = self._socket, None
        if ours is not None:
            for rank in list(self._addresses):
                self._send(ours, rank, last=True)
            ours.close()
