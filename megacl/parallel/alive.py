"""Signs of life of a run's processes, apart from its collectives and its disks.

    life = SignsOfLife(ranks, every=60)     # all ranks
    with life.given():                      # by a thread of its own
        ...
        life.missed(450)                    # Missed((3,), 451.2), or None

While one rank writes a checkpoint the others wait for it in a collective, for hours if need be, and from there a rank
that is at work looks like one that is stopped, or whose node is gone. So each rank sends rank 0 a datagram now and
then, and gets one back; and rank 0 tells the others whom it misses. A rank is expected to go on with that only once it
was heard: where a network lets no datagrams through, nothing is known and nobody is missed.
"""

import contextlib
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megacl.errors import MegaclError
from megacl.parallel.ranks import Ranks

_SIGN = struct.Struct("!IBI")
"""Behind the run's token: whose sign it is, its kind, and whom rank 0 misses."""
_ALIVE, _LAST, _MISSES = range(3)
_ROOM = 1 << 22
"""Bytes for what rank 0 has not read yet, of which the system may grant less."""
_LOOK = 0.2
"""Seconds between two looks, at most: so long may a run's end wait for the thread."""
_UNANSWERED = 3
"""Signs without an answer after which a rank tries another way."""


@dataclass(frozen=True)
class Missed:
    """Ranks that were heard once, and are not any more."""

    ranks: tuple[int, ...]
    seconds: float
    """For so long."""


class SignsOfLife:
    """Of one rank. Where there is no other rank, or no socket, it does nothing."""

    def __init__(self, ranks: Ranks, *, every: float) -> None:
        """every: seconds between two signs of a rank. All ranks construct it at the same place."""
        now = time.monotonic()
        self._rank, self._every = ranks.rank, every
        self._heard: dict[int, float] = {}
        self._addresses: dict[int, Any] = {}
        self._missed: set[int] = set()
        self._looked = now
        # Each rank has its own moment, or those of thousands would come at once, and be lost.
        self._due = now + every * ranks.rank / ranks.world_size
        self._answered = now
        self._socket: socket.socket | None = None
        self._ways: list[Any] = []
        self._token = b""
        if ranks.world_size == 1:
            return
        told = ranks.broadcast(self._listen() if ranks.rank == 0 else None)
        if told is not None and ranks.rank != 0:
            port, self._token = told
            with contextlib.suppress(OSError):
                host = os.environ.get("MASTER_ADDR", "localhost")
                self._ways = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
            self._find_way()
            # At once, so that rank 0 expects the next one, whatever becomes of this rank.
            self._send(self._socket, self._addresses.get(0))

    def _listen(self) -> tuple[int, bytes] | None:
        """Rank 0's port, and what every sign of this run begins with."""
        try:
            # Both kinds of addresses where the machine has both.
            family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
            self._socket = socket.socket(family, socket.SOCK_DGRAM)
            if family == socket.AF_INET6:
                self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _ROOM)
            self._socket.bind(("", 0))
            self._socket.setblocking(False)
            self._token = secrets.token_bytes(16)
            return self._socket.getsockname()[1], self._token
        except OSError:
            self._socket = None
            return None

    def _find_way(self) -> None:
        """To rank 0: the next of its addresses, from another port, where the last ones brought no answer."""
        old, self._socket = self._socket, None
        if old is not None:
            old.close()
        for _ in self._ways:
            family, kind, protocol, _, address = self._ways[0]
            self._ways.append(self._ways.pop(0))
            with contextlib.suppress(OSError):
                self._socket = socket.socket(family, kind, protocol)
                self._socket.setblocking(False)
                self._addresses[0] = address
                return

    @contextlib.contextmanager
    def given(self) -> Iterator[None]:
        """A block in which signs are given and heard. Its end is told, but for an error of this rank alone."""
        over = threading.Event()
        thread = threading.Thread(target=self._go_on, args=(over,), name="signs of life", daemon=True)
        if self._socket is not None:
            thread.start()
        leaves = False
        try:
            yield
            leaves = True
        except MegaclError as error:
            leaves = error.on_every_rank  # all leave alike, one of them later, perhaps, since it clears something away
            raise
        finally:
            over.set()
            if thread.ident is not None:
                thread.join()
            if leaves:  # behind the thread's last sign
                self._tell(_LAST)
            if self._socket is not None:
                self._socket.close()

    def _go_on(self, over: threading.Event) -> None:
        while not over.is_set():
            ours = self._socket
            if ours is not None:
                waiting = select.poll()
                waiting.register(ours, select.POLLIN)
                waiting.poll(1000 * min(_LOOK, self._every / 4))
            else:
                over.wait(_LOOK)
            self.exchange()

    def exchange(self) -> None:
        """Hears what has come, and gives a sign where one is due. It never waits."""
        now = time.monotonic()
        if now - self._looked > 2 * self._every:  # this process stood still itself, so it knows nothing of the others
            self._heard = dict.fromkeys(self._heard, now)
            self._answered = now
        self._looked = now
        if self._socket is not None:
            self._receive(self._socket, now)
        if self._rank != 0 and now >= self._due and self._ways:
            self._due = max(self._due + self._every, now)
            if now - max(self._answered, self._heard.get(0, 0.0)) > _UNANSWERED * self._every:
                self._find_way()
            self._send(self._socket, self._addresses.get(0))

    def _receive(self, ours: socket.socket, now: float) -> None:
        with contextlib.suppress(OSError):  # BlockingIOError: there is no more
            while True:
                content, address = ours.recvfrom(64)
                token, sign = content[: len(self._token)], content[len(self._token) :]
                if token != self._token or len(sign) != _SIGN.size:
                    continue  # somebody else's
                rank, kind, missed = _SIGN.unpack(sign)
                if kind == _LAST:
                    self._heard.pop(rank, None)
                    self._addresses.pop(rank, None)
                    continue
                self._heard[rank] = now
                if kind == _MISSES:
                    self._missed.add(missed)
                elif self._rank == 0:
                    self._addresses[rank] = address
                    self._send(ours, address)

    def _send(self, ours: socket.socket | None, address: Any, kind: int = _ALIVE, missed: int = 0) -> None:
        if ours is not None and address is not None:
            with contextlib.suppress(OSError):
                ours.sendto(self._token + _SIGN.pack(self._rank, kind, missed), address)

    def missed(self, seconds: float) -> Missed | None:
        """The ranks of which nothing was heard for so long, or that rank 0 says it misses; None where all is well.

        Ranks hear from rank 0 alone, which hears from all, and tells them whom it misses when this is called there.
        """
        now = time.monotonic()
        if now - self._looked > 2 * self._every:
            return None  # nobody has listened meanwhile
        silent = {rank: now - moment for rank, moment in dict(self._heard).items() if now - moment > seconds}
        if self._rank == 0:
            for rank in silent:
                self._tell(_MISSES, rank)
        found = {*silent, *self._missed}
        return Missed(tuple(sorted(found)), max(silent.values(), default=seconds)) if found else None

    def _tell(self, kind: int, missed: int = 0) -> None:
        """What is said once only, to all that this rank speaks with: three times, since datagrams get lost."""
        for _ in range(3):
            for address in list(self._addresses.values()):
                self._send(self._socket, address, kind, missed)
