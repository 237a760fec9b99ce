"""A parameter's whole state on the rank that owns it, put together from what the ranks hold of it; and back.

    for name, state in gather_at_owners(parts, held, ("weight", "exp_avg"), ranks, owners, room):
        ...                     # state is empty but on the parameter's owner

Pieces travel in host memory (gloo), so that no device needs room for a whole tensor, and each goes to the owner alone.
Ranks that own nothing of what is under way send ahead, so that several owners receive at one time.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megacl.parallel.ranks import Ranks
from megacl.parallel.tensor import Shard

Room = Callable[[str, str, torch.Size], Tensor]
"""(parameter, "weight" or what it is of Adam's state, shape) -> an fp32 tensor on the CPU, without gaps."""
Copy = Callable[[Tensor, Tensor], None]
"""(into, source): copies one tensor of the engine's own into another of the same shape, there and then or later, but
before the source is changed."""


class Stored(Protocol):
    """A whole tensor that is not in memory."""

    @property
    def shape(self) -> torch.Size: ...

    def read(self) -> Tensor:
        """All of it, on the CPU."""

    def stretch(self, start: int, count: int) -> Tensor:
        """`count` of its elements from the start-th on, row by row: 1-D, on the CPU."""


def whole_of(tensor: Tensor | Stored) -> Tensor:
    """The tensor, in memory."""
    return tensor if isinstance(tensor, Tensor) else tensor.read()


def stretch_of(tensor: Tensor | Stored, start: int, count: int) -> Tensor:
    """`count` of a tensor's elements from the start-th on, row by row: 1-D. No more than these is read."""
    return tensor.flatten()[start : start + count] if isinstance(tensor, Tensor) else tensor.stretch(start, count)


def part_of(tensor: Tensor | Stored, shard: Shard) -> Tensor:
    """A rank's part of a whole tensor. Where it is cut by rows, no more than these are read."""
    if isinstance(tensor, Tensor) or shard.dim != 0:
        return shard.take(whole_of(tensor))
    width = tensor.shape[1:].numel()
    firsts = [0, *itertools.accumulate(shard.sections)]
    lengths = [section // shard.size for section in shard.sections]
    rows = [
        tensor.stretch((first + shard.rank * length) * width, length * width)
        for first, length in zip(firsts, lengths, strict=False)
    ]
    return torch.cat(rows).reshape(-1, *tensor.shape[1:])


_AHEAD = 2**28
"""Bytes that a rank has on their way to owners at one time."""


def fresh_room(name: str, key: str, shape: torch.Size) -> Tensor:
    """New memory."""
    return torch.empty(shape, dtype=torch.float32)


def copy_at_once(into: Tensor, source: Tensor) -> None:
    """`Copy` that is done when it returns."""
    into.copy_(source)


@dataclass(frozen=True)
class Part:
    """A parameter as a rank's model has it: the whole, or its tensor-parallel part."""

    name: str
    shape: torch.Size
    shard: Shard | None


@dataclass(frozen=True)
class Held:
    """What a rank has of a Part's state: elements from `offset` on, row by row."""

    offset: int
    state: Mapping[str, Tensor]
    """One-dimensional, by key, all of one length; on any device."""

    @property
    def size(self) -> int:
        return self.state["weight"].numel()


def gather_at_owners(
    parts: Sequence[Part],
    held: Mapping[str, Held],
    keys: Sequence[str],
    ranks: Ranks,
    owners: Mapping[str, int],
    room: Room,
    copy: Copy = copy_at_once,
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name, the whole state on the owner, elsewhere nothing) of each of `parts`, which are in one order on all ranks.

    A collective. Over the ranks of one tp_rank, what is held must cover each part; it may do so several times.
    copy: copies what an owner itself holds of a tensor that is not cut by tensor parallelism; the rest is there when a
    parameter's state is.
    """
    mine = [(held[part.name].offset, held[part.name].size) if part.name in held else (0, 0) for part in parts]
    layout = np.stack(ranks.gather(np.array(mine, np.int64).reshape(-1, 2)))  # rank, part, (offset, size)
    under_way = _UnderWay()
    for index, part in enumerate(parts):
        owner = owners.get(part.name, 0)
        sources = _sources(layout[:, index, 1], part, owner, ranks)
        if ranks.rank == owner:
            state = {}
            for place, key in enumerate(keys):
                pieces = _Pieces(layout[:, index], held.get(part.name), key, ranks.rank, index * len(keys) + place)
                state[key] = _whole(part, sources, pieces, partial(room, part.name, key), copy)
            yield part.name, state
        else:
            if any(ranks.rank in column for column in sources):
                for place, key in enumerate(keys):
                    under_way.send(held[part.name].state[key], owner, index * len(keys) + place)
            yield part.name, {}
    under_way.finish()


def _sources(sizes: np.ndarray[Any, Any], part: Part, owner: int, ranks: Ranks) -> list[list[int]]:
    """For each tensor-parallel part of which the whole is made, the ranks whose pieces make it up."""
    tp = ranks.tp_size
    columns = range(tp) if part.shard is not None else [owner % tp]
    found = []
    for column in columns:
        near = owner - owner % tp + column  # in the owner's own group
        if sizes[near] == part.shape.numel():
            found.append([near])
        else:
            found.append([rank for rank in range(column, ranks.world_size, tp) if sizes[rank]])
    return found


@dataclass(frozen=True)
class _Pieces:
    """How an owner comes by the pieces of one tensor."""

    layout: np.ndarray[Any, Any]
    own: Held | None
    key: str
    rank: int
    tag: int

    def fill(self, flat: Tensor, sources: Sequence[int], copy: Copy) -> None:
        works: list[Any] = []
        for source in sources:
            offset, size = self.layout[source].tolist()
            into = flat[offset : offset + size]
            if source == self.rank:
                assert self.own is not None
                copy(into, self.own.state[self.key])
            else:
                works.append(dist.irecv(into, source, tag=self.tag))
        for work in works:
            work.wait()


def _whole(
    part: Part, sources: list[list[int]], pieces: _Pieces, room: Callable[[torch.Size], Tensor], copy: Copy
) -> Tensor:
    if part.shard is None:
        whole = room(part.shape)
        pieces.fill(whole.view(-1), sources[0], copy)
        return whole
    parts = []
    for column in sources:
        parts.append(torch.empty(part.shape, dtype=torch.float32))
        pieces.fill(parts[-1].view(-1), column, copy_at_once)  # joined in the next line
    return part.shard.join(parts, out=room(part.shard.whole_shape(part.shape)))


class _UnderWay:
    """What was sent and has not arrived yet."""

    def __init__(self) -> None:
        self._sent: deque[tuple[Any, Tensor]] = deque()
        self._bytes = 0

    def send(self, piece: Tensor, owner: int, tag: int) -> None:
        piece = piece.to("cpu", torch.float32)
        self._sent.append((dist.isend(piece, owner, tag=tag), piece))  # the piece must live as long
        self._bytes += piece.nbytes
        while self._bytes > _AHEAD:
            self._finish_one()

    def finish(self) -> None:
        while self._sent:
            self._finish_one()

    def _finish_one(self) -> None:
        work, piece = self._sent.popleft()
        work.wait()
        self._bytes -= piece.nbytes
