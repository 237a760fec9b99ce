"""What an engine holds of a model's weights on one rank: parameters, gradients, optimizer, and what it sends.

    held = held_by(engine, weights=405_334_016, largest=51_511_296, ranks=8, accumulates=False, device="cuda")
    held.parameters + held.optimizer            # bytes, all the time

For `megacl.memory`. The numbers are those of torch's fused AdamW and of DeepSpeed 0.19 as `engine.adapter` sets it up,
read in its source and seen in what its allocations are (docs/parallelism.md has the table). On a CPU a buffer counts as
far as it was written to, since only that is resident; on a GPU it counts whole.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from megacl.config import EngineConfig
from megacl.engine.adapter import BUCKET

FP32 = 4
_ALL_REDUCE = 500_000_000
"""Elements of gradients that DeepSpeed's stage 0 lays end to end at a time."""
_LIVE = 1_000_000_000
"""Elements of whole weights that stage 3 keeps at most, between a forward pass and its backward pass too."""
_PREFETCH = 50_000_000
"""Elements that stage 3 gathers ahead of their use, in one go."""


@dataclass(frozen=True)
class Gradients:
    """What there is of gradients at some moment, in bytes."""

    kept: int = 0
    """Of weights, until the update."""
    sending: int = 0
    """Buffers of what is sent."""
    passing: int = 0
    """Temporaries."""


@dataclass(frozen=True)
class Held:
    """What an engine holds of the weights on one rank, in bytes."""

    parameters: int
    optimizer: int
    """Moments, and masters where the parameters are not their own."""
    arriving: Callable[[int, int], Gradients]
    """(before, own) -> what there is while an op's gradient, `own` bytes, comes after `before` bytes of others."""
    endings: dict[str, Gradients]
    """Moments behind the backward pass."""
    gathered: int = 0
    """Whole weights that are there when the forward pass is over, beside the rank's shards."""
    gathering: int = 0
    """And while they come, in the forward pass."""
    between: int = 0
    """Gradients that are there in the forward pass."""
    host: int = 0
    """Of all that, what is in the host's memory where the device is a GPU."""


def held_by(engine: EngineConfig, *, weights: int, largest: int, ranks: int, accumulates: bool, device: str) -> Held:
    """What the configured engine holds.

    weights: elements of this rank's weights (its part of them under tensor parallelism); largest: of the largest of
    them. ranks: how many hold the same weights. accumulates: whether there are gradients of an earlier micro batch.
    """
    if engine.kind == "native":
        return _whole(weights, accumulates=accumulates, sending=0)
    if engine.zero_stage == 0:
        return _whole(weights, accumulates=accumulates, sending=FP32 * min(weights, _ALL_REDUCE))
    zero = _Zero(
        weights=weights,
        largest=largest,
        bytes=2 if engine.half else FP32,
        ranks=ranks,
        accumulates=accumulates,
        on_cpu=device == "cpu",
        offloads=engine.offload_optimizer,
    )
    if engine.zero_stage == 1 and engine.precision == "bf16":
        held = zero.stage_1_bf16()
    else:
        held = {1: zero.stage_1, 2: zero.stage_2, 3: zero.stage_3}[engine.zero_stage]()
    return zero.offloaded(held) if engine.offload_optimizer else held


def _whole(weights: int, *, accumulates: bool, sending: int) -> Held:
    """All of the weights, their gradients and their moments, in fp32; sending: a copy that goes to other ranks."""
    size = FP32 * weights

    def arriving(before: int, own: int) -> Gradients:
        return Gradients(size, 0, own) if accumulates else Gradients(before + own)

    return Held(
        parameters=size,
        optimizer=2 * size,
        arriving=arriving,
        endings={"update": Gradients(size, sending)},
        between=size if accumulates else 0,
    )


@dataclass(frozen=True)
class _Zero:
    """The stages of ZeRO: each of `ranks` ranks has a shard of what the stage shards (arXiv 1910.02054)."""

    weights: int
    largest: int
    bytes: int
    """Of an element of the parameters and of their gradients as they come."""
    ranks: int
    accumulates: bool
    on_cpu: bool
    offloads: bool

    @property
    def shard(self) -> int:
        """Bytes of a rank's shard in fp32: of masters, of a moment, of gradients that were added up."""
        return -(-FP32 * self.weights // self.ranks)

    @property
    def kept(self) -> int:
        """Bytes of the shard of gradients that were added up, where they do not go to the host."""
        return 0 if self.offloads else self.shard

    @property
    def whole(self) -> int:
        """Bytes of the parameters, and of their gradients as they come."""
        return self.bytes * self.weights

    def bucket(self, filled: int) -> int:
        """Bytes of the buffer that gradients are sent from, when so many are in it."""
        size = self.bytes * BUCKET
        return min(filled, size) if self.on_cpu else size

    def sent(self, elements: int) -> int:
        """Bytes of the copy of a bucket that is sent: in fp32, beside one in 16 bits where gradients come in those."""
        return elements * (FP32 if self.bytes == FP32 else FP32 + self.bytes)

    def stage_1(self) -> Held:
        """Sharded masters and moments. Gradients come whole and are added up in fp32; behind the last backward pass
        they are sent."""
        size = FP32 * self.weights

        def arriving(before: int, own: int) -> Gradients:
            if self.accumulates:
                return Gradients(size, 0, own)
            return Gradients(FP32 * (before + own) // self.bytes, 0, 0 if self.bytes == FP32 else own)

        return Held(
            parameters=self.whole,
            optimizer=3 * self.shard,
            arriving=arriving,
            endings={"reduction": self._reduction(size), **self._update(copies=self.kept)},
            between=size if self.accumulates else 0,
        )

    def _reduction(self, size: int) -> Gradients:
        """All gradients, `size` bytes, go through a bucket of fp32; what is sent is one more copy. Then this rank's
        shard is left."""
        if self.weights <= BUCKET:
            return Gradients(0, (size if self.on_cpu else FP32 * BUCKET) + size)
        return Gradients(size + self.kept, 0 if self.on_cpu else FP32 * BUCKET)

    def _update(self, *, copies: int) -> dict[str, Gradients]:
        """The shard of gradients; for its norm each part in fp64, then a copy laid end to end. Then all parameters
        come from the ranks that have updated them, for which gloo takes a buffer."""
        norm = 2 * FP32 * min(self.largest, -(-self.weights // self.ranks))
        gloo = self.whole if self.on_cpu and self.ranks > 1 else 0
        return {"update": Gradients(self.kept, 0, max(norm, copies)), "gathering": Gradients(0, gloo)}

    def stage_1_bf16(self) -> Held:
        """DeepSpeed has another optimizer for it: it keeps whole gradients in fp32, and sends a copy of them."""
        size = FP32 * self.weights
        return Held(
            parameters=self.whole,
            optimizer=3 * self.shard,
            arriving=lambda before, own: Gradients(size + before + own),
            endings={"update": Gradients(size + self.whole, size)},
            between=size,
        )

    def stage_2(self) -> Held:
        """Gradients are sent as they come, and this rank's shard of them is kept, from the first bucket on."""
        earlier = self.kept if self.accumulates else 0

        def arriving(before: int, own: int) -> Gradients:
            sent = before + own > self.bytes * BUCKET
            kept = earlier + (self.kept if sent else 0)
            copy = self.sent(BUCKET) if sent else 0
            return Gradients(kept, self.bucket(before + own) + copy, own)

        copies = self.kept if self.bytes == FP32 else 0
        last = min(self.weights, BUCKET)
        # In fp32 a shard that was sent in one bucket is made when the copy that was sent is gone.
        shard = 0 if self.bytes == FP32 and self.weights <= BUCKET else self.kept
        return Held(
            parameters=self.whole,
            optimizer=3 * self.shard,
            arriving=arriving,
            endings={
                "reduction": Gradients(earlier + shard, self.bucket(self.bytes * last) + self.sent(last)),
                **self._update(copies=copies),
            },
            between=earlier,
        )

    def stage_3(self) -> Held:
        """Parameters are sharded too, and gathered for their use. The shard of gradients is there all the time."""
        live = self.bytes * min(self.weights, _LIVE)
        ahead = self.bytes * min(self.weights, _PREFETCH) if self.ranks > 1 else 0

        def arriving(before: int, own: int) -> Gradients:
            filled = min(before + own, self.bytes * BUCKET)
            copies = self._scattered(BUCKET) if before + own > self.bytes * BUCKET else 0
            gathered = min(live, self.whole - before)  # those of layers that are done are let go
            return Gradients(self.kept, self.bucket(filled) + copies + gathered, own)

        last = min(self.weights, BUCKET)
        return Held(
            parameters=-(-self.whole // self.ranks),
            optimizer=(2 if self.bytes == FP32 else 3) * self.shard,
            arriving=arriving,
            endings={
                "reduction": Gradients(self.kept, self.bucket(self.bytes * last) + self._scattered(last)),
                "update": Gradients(self.kept, self.bucket(0), self.kept),
            },
            gathered=live,
            gathering=ahead + (ahead if self.on_cpu else 0),
            between=self.kept + self.bucket(0),
        )

    def _scattered(self, elements: int) -> int:
        """Bytes of the copies of a bucket whose shards go to their ranks; gloo makes one more."""
        return self.sent(elements) + (FP32 * elements if self.on_cpu else 0)

    def offloaded(self, held: Held) -> Held:
        """Masters, moments and gradients on the host, which also has a copy of the shard in the parameters' dtype; on
        the device two buffers of the largest gradient."""
        host = (3 + 1 + self.accumulates) * self.shard + self.whole // self.ranks
        buffers = 2 * self.bytes * self.largest
        if self.on_cpu:  # the host is the device
            return replace(held, optimizer=host + buffers)
        return replace(held, optimizer=buffers, host=host)
