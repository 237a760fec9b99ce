"""How the ranks of a run meet: each comes to rank 0, says who and where it is, and is told who did not come.

    place = find_place(os.environ)
    met = meet(place, timeout=180)      # met.store: for PyTorch's process group; met.nodes: each rank's node

Rank 0 listens at MASTER_PORT, or, where that is taken, at one of the ports behind it; the others try these in turn.
Whoever comes is asked for the identity of its start (job, restart and step of SLURM's; torchrun's run and attempt), so
that ranks of another job, which came to this port or listen at it, are told apart and nothing of theirs is touched.
PyTorch's store, which is opened once all are there, listens at a port that the kernel chooses. So jobs on one node
never clash. Under torchrun its own store says where rank 0 listens.

Lines of JSON travel: {"identity", "rank", "node", "problem"} to rank 0; {"left"} or {"other"} back; "here" to rank 0;
and at last, to all at once, {"port", "nodes"} or {"error", "ranks", "nodes"}.
"""

import contextlib
import datetime
import json
import selectors
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megacl.errors import RendezvousError
from megacl.parallel.place import Place, described_ranks, node_of_ranks, nodes_without

_PORTS = 16
"""How many ports behind one another rank 0 may listen at, where its job has an identity."""
_REACHED = 5.0
"""Seconds for a connection, and for the first answer on it: who listens there may be no rank of ours."""
_GRACE = 30.0
"""Seconds beyond rank 0's own time for its verdict to arrive."""
_PAUSE = 0.2
"""Seconds between two rounds over the ports."""
_LONGEST_LINE = 1 << 20


@dataclass(frozen=True)
class Met:
    """All ranks, found."""

    store: Any
    """A torch.distributed store that rank 0 serves."""
    nodes: tuple[str, ...]
    """Each rank's node, by rank."""


def meet(place: Place, *, timeout: float, problem: str | None = None) -> Met:
    """Waits for all ranks, `timeout` seconds at most. Every rank calls it.

    problem: what is wrong with this rank; all of them then end with it. Raises RendezvousError, the same on all that
    came, where some did not come, one left again, or one has a problem; on each where rank 0 did not come.
    """
    if place.rank == 0:
        return _receive(place, timeout, problem)
    return _come(place, timeout, problem)


# ---------------------------------------------------------------------------------------------- rank 0


def _receive(place: Place, timeout: float, problem: str | None) -> Met:
    with _listening(place) as (listening, port):
        desk = _Desk(place, listening, port, timeout, problem)
        try:
            desk.wait()
            store, store_port = _serve_store(place)
            nodes = tuple(desk.nodes[rank] for rank in range(place.world_size))
            desk.tell({"port": store_port, "nodes": nodes})
        except RendezvousError as error:
            desk.refuse({"error": str(error), "ranks": error.ranks, "nodes": error.nodes})
            raise
        finally:
            desk.close()
    return Met(store, nodes)


@contextlib.contextmanager
def _listening(place: Place) -> Iterator[tuple[socket.socket, int]]:
    """A listening socket where the others look for it, and its port."""
    refused: OSError | None = None
    for port in _ports(place) if place.agent is None else [0]:
        try:
            opened = _listen(port)
        except OSError as error:
            refused = error
            continue
        with opened:
            port = opened.getsockname()[1]
            if place.agent is not None:
                place.agent.announce(port)
            yield opened, port
            return
    assert refused is not None
    raise RendezvousError(
        f"rank 0 cannot listen at {place.address}:{place.port}"
        f"{f' or the {_PORTS - 1} ports behind it' if place.identified else ''}: {refused.strerror}; set MASTER_PORT "
        "to a free port, the same for all ranks.",
        ranks=[0],
    )


def _listen(port: int) -> socket.socket:
    """A socket that listens on all addresses of this machine."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=4096)


def _ports(place: Place) -> list[int]:
    return [place.port + each for each in range(_PORTS if place.identified else 1) if place.port + each < 1 << 16]


def _serve_store(place: Place) -> tuple[Any, int]:
    """PyTorch's store at a port of the kernel's choice."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    listening = _listen(0)
    port = listening.getsockname()[1]
    store = TCPStore(
        place.address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=60),
        master_listen_fd=listening.detach(),
    )
    return store, port


class _Visitor:
    """A connection to rank 0, and what was read of it so far."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.read = connection, b""
        self.rank: int | None = None
        self.here = False
        """Whether it said so behind our answer, so that it is not given up before the verdict."""


class _Desk:
    """Where rank 0 receives the others. Until the verdict they wait here, each with an open connection."""

    def __init__(self, place: Place, listening: socket.socket, port: int, timeout: float, problem: str | None) -> None:
        self.place, self.listening, self.port, self.timeout = place, listening, port, timeout
        self.end = time.monotonic() + timeout
        self.nodes = {0: place.node}
        self.problems = {0: problem} if problem else {}
        self.here: dict[int, _Visitor] = {}
        self.left: set[int] = set()
        """Ranks that were here, and died."""
        self.told: set[int] = set()
        self.refusal: dict[str, Any] | None = None
        self.selector = selectors.DefaultSelector()
        listening.setblocking(False)
        self.selector.register(listening, selectors.EVENT_READ)

    def wait(self) -> None:
        """Returns once all are here; RendezvousError where that will not be."""
        while len(self.here) + 1 < self.place.world_size:
            left = self.end - time.monotonic()
            if left <= 0:
                raise self._incomplete()
            self._serve(min(left, 1.0))
            if self.left:
                rank = min(self.left)
                raise RendezvousError(
                    f"rank {rank} ({self.nodes[rank]}) left before all had come; its own last lines in the log say "
                    "why.",
                    ranks=[rank],
                    nodes=[self.nodes[rank]],
                )
        if self.problems:
            rank, problem = min(self.problems.items())
            raise RendezvousError(
                f"rank {rank} ({self.nodes[rank]}): {problem}",
                ranks=sorted(self.problems),
                nodes=sorted({self.nodes[each] for each in self.problems}),
            )

    def _serve(self, seconds: float) -> None:
        """Hears whoever comes or says something within some seconds."""
        for key, _ in self.selector.select(seconds):
            if key.fileobj is self.listening:
                self._accept()
            else:
                self._hear(key.data)

    def _incomplete(self) -> RendezvousError:
        place = self.place
        missing = [rank for rank in range(place.world_size) if rank and rank not in self.here]
        expected = node_of_ranks(place)
        nodes = nodes_without(place, missing, [self.nodes[rank] for rank in (0, *self.here)])
        seconds = f"{self.timeout:g} s"
        return RendezvousError(
            f"{described_ranks(missing, expected)} of {place.world_size} did not come to rank 0 at {place.address}:"
            f"{self.port} within {seconds}; see whether they started there, and whether they reach that address, or "
            "raise engine.rendezvous_timeout.",
            ranks=missing,
            nodes=nodes,
        )

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # gone again
            connection, _ = self.listening.accept()
            connection.setblocking(False)
            self.selector.register(connection, selectors.EVENT_READ, _Visitor(connection))

    def _hear(self, visitor: _Visitor) -> None:
        try:
            received = visitor.connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        visitor.read += received
        if not received or len(visitor.read) > _LONGEST_LINE:
            self._leave(visitor)
            return
        while b"\n" in visitor.read:
            line, _, visitor.read = visitor.read.partition(b"\n")
            self._answer(visitor, _parsed(line))

    def _leave(self, visitor: _Visitor) -> None:
        self.selector.unregister(visitor.connection)
        visitor.connection.close()
        if visitor.here and visitor.rank is not None:
            del self.here[visitor.rank]
            self.left.add(visitor.rank)

    def _answer(self, visitor: _Visitor, said: Any) -> None:
        if said == "here" and visitor.rank is not None:
            visitor.here = True
            self.here[visitor.rank] = visitor
            if self.refusal:
                _send(visitor.connection, self.refusal)
                self.told.add(visitor.rank)
            return
        match said:
            case {"identity": self.place.identity, "rank": int(rank), "node": str(node), "problem": problem} if (
                0 < rank < self.place.world_size and rank not in self.here
            ):
                visitor.rank, self.nodes[rank] = rank, node
                if problem:
                    self.problems[rank] = str(problem)
                _send(visitor.connection, self.refusal or {"left": max(0.0, self.end - time.monotonic())})
                if self.refusal:
                    self.told.add(rank)
            case _:
                _send(visitor.connection, {"other": self.place.identity})

    def tell(self, verdict: dict[str, Any]) -> None:
        """Says to all who are here what became of the meeting."""
        for visitor in self.here.values():
            _send(visitor.connection, verdict)

    def refuse(self, verdict: dict[str, Any]) -> None:
        """Says to all who are here, and to those who come a little later, that there is no meeting."""
        self.refusal = verdict
        self.tell(verdict)
        self.told |= set(self.here)
        end = min(self.end, time.monotonic() + _REACHED)
        while len(self.told | self.left) + 1 < self.place.world_size and (seconds := end - time.monotonic()) > 0:
            self._serve(seconds)

    def close(self) -> None:
        """Closes every connection; what was sent on it still arrives."""
        for key in list(self.selector.get_map().values()):
            if isinstance(key.data, _Visitor):
                key.data.connection.close()
        self.selector.close()


def _send(connection: socket.socket, said: Any) -> None:
    with contextlib.suppress(OSError):  # whoever has gone does not hear it
        connection.settimeout(_REACHED)
        connection.sendall(json.dumps(said).encode() + b"\n")
        connection.setblocking(False)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


# ---------------------------------------------------------------------------------------------- the others


def _come(place: Place, timeout: float, problem: str | None) -> Met:
    end = time.monotonic() + timeout
    connection, left = _find_rank_0(place, end, timeout, problem)
    with connection:
        connection.settimeout(left + _GRACE)
        verdict = _line(connection)
    _check_refused(verdict)
    match verdict:
        case {"port": int(port), "nodes": list(nodes)}:
            return Met(_join_store(place, port), tuple(nodes))
    node = node_of_ranks(place)[0]
    raise _said_once_a_node(
        place,
        f"rank {place.rank} ({place.node}) lost {described_ranks([0], [node])} before all had come; rank 0's own last "
        "lines in the log say why.",
        node,
    )


def _find_rank_0(place: Place, end: float, timeout: float, problem: str | None) -> tuple[socket.socket, float]:
    """A connection to rank 0, which knows of this rank; and how many seconds it still waits for the others."""
    others: set[str] = set()
    hello = {"identity": place.identity, "rank": place.rank, "node": place.node, "problem": problem}
    where = f"{place.address}:{place.port}"
    while time.monotonic() < end:
        ports = _ports(place)
        if place.agent is not None:
            announced = place.agent.port_of_rank_0(end - time.monotonic())
            ports = [] if announced is None else [announced]
        for port in ports:
            left = end - time.monotonic()
            with contextlib.suppress(OSError):
                connection = socket.create_connection((place.address, port), timeout=max(0.1, min(_REACHED, left)))
                try:
                    _send_now(connection, hello)
                    answer = _line(connection)
                    _check_refused(answer)
                    match answer:
                        case {"left": float(seconds) | int(seconds)}:
                            _send_now(connection, "here")
                            return connection, float(seconds)
                        case {"other": str(identity)}:
                            others.add(identity)
                            where = f"{place.address}:{port}"
                except (OSError, RendezvousError):
                    connection.close()
                    raise
                connection.close()
        time.sleep(_PAUSE)
    node = node_of_ranks(place)[0]
    found = f" ({', '.join(sorted(others))} is there, which is not this run's {place.identity})" if others else ""
    raise _said_once_a_node(
        place,
        f"rank {place.rank} ({place.node}) found no rank 0{f' ({node})' if node else ''} at {where}{found} within "
        f"{timeout:g} s; see whether it started there, and whether this node reaches that address, or raise "
        "engine.rendezvous_timeout.",
        node,
    )


def _check_refused(answer: Any) -> None:
    match answer:
        case {"error": str(error), "ranks": list(ranks), "nodes": list(nodes)}:
            raise RendezvousError(error, ranks=ranks, nodes=nodes)


def _said_once_a_node(place: Place, message: str, node: str | None) -> RendezvousError:
    """The error of ranks that are without rank 0: with hundreds of them, one a node is enough to say it."""
    error = RendezvousError(message, ranks=[0], nodes=[node] if node else [])
    error.on_every_rank = place.local_rank != 0
    return error


def _send_now(connection: socket.socket, said: Any) -> None:
    connection.sendall(json.dumps(said).encode() + b"\n")


def _line(connection: socket.socket) -> Any:
    """The next line that is said, or None where it is none of ours, or the connection ends."""
    read = b""
    with contextlib.suppress(OSError):
        while not read.endswith(b"\n") and len(read) < _LONGEST_LINE:
            received = connection.recv(1 << 16)
            if not received:
                return None
            read += received
        return _parsed(read)
    return None


def _join_store(place: Place, port: int) -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(
        place.address, port, is_master=False, wait_for_workers=False, timeout=datetime.timedelta(seconds=60)
    )
