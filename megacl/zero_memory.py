"""What an engine holds of a model's weights on one rank: parameters, gradients, optimizer, and what it sends.

    held = held_by(engine, sizes=[51_511_296, ..., 51_511_296], ranks=8, accumulates=False, device="cuda")
    held.parameters + held.optimizer            # bytes, all the time

For `megacl.memory`. The numbers are those of torch's fused AdamW and of DeepSpeed 0.19 as `engine.adapter` sets it up,
read in its source and seen in what its allocations are (docs/parallelism.md has the table). On a CPU a buffer counts as
far as it was written to, since only that is resident; on a GPU it counts whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megacl.config import EngineConfig
from megacl.engine.adapter import BUCKET, PREFETCH

FP32 = 4
_ALL_REDUCE = 500_000_000
"""Elements of gradients that DeepSpeed's stage 0 lays end to end at a time."""
_LIVE = 1_000_000_000
"""Elements of whole weights that stage 3 keeps at most, between a forward pass and its backward pass too."""
_GLOO_COPIES = (2, 3)
"""Gathered pieces that are there twice at the peak, at least and at most: one that is copied out of what came, and
those of gloo's, as its threads come to work."""


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
    """Moments, masters where the parameters are not their own, and Reptile's anchor."""
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


def held_by(
    engine: EngineConfig,
    *,
    sizes: Sequence[int],
    ranks: int,
    accumulates: bool,
    anchor: bool = False,
    device: str,
) -> Held:
    """What the configured engine holds.

    sizes: elements of this rank's weights (its part of them under tensor parallelism), op by op in the order of a
    forward pass, from whose end their gradients come. ranks: how many hold the same weights. accumulates: whether there
    are gradients of an earlier micro batch. anchor: whether there is one of Reptile's, which lies where the masters do
    and is sharded as they are.
    """
    held = _held_by(engine, sizes=sizes, ranks=ranks, accumulates=accumulates, device=device)
    weights = sum(sizes)
    if not anchor:
        return held
    size = -(-FP32 * weights // ranks) if engine.kind == "deepspeed" and engine.zero_stage > 0 else FP32 * weights
    if engine.offload_optimizer and device != "cpu":
        return replace(held, host=held.host + size)
    return replace(held, optimizer=held.optimizer + size)


def _held_by(engine: EngineConfig, *, sizes: Sequence[int], ranks: int, accumulates: bool, device: str) -> Held:
    weights = sum(sizes)
    if engine.kind == "native":
        return _whole(weights, accumulates=accumulates, sending=0)
    if engine.zero_stage == 0:
        return _whole(weights, accumulates=accumulates, sending=FP32 * min(weights, _ALL_REDUCE))
    zero = _Zero(
        sizes=sizes,
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
class _Bucket:
    """The buffer that gradients are sent from, as one comes: elements. One that is larger goes by itself."""

    sent: int = 0
    """Before."""
    filled: int = 0
    leaves: int = 0
    """What is sent now, since there is no room for the one that comes."""
    fullest: int = 0
    """The most that was in it, the one that comes counted."""


@dataclass(frozen=True)
class _Zero:
    """The stages of ZeRO: each of `ranks` ranks has a shard of what the stage shards (arXiv 1910.02054)."""

    sizes: Sequence[int]
    bytes: int
    """Of an element of the parameters and of their gradients as they come."""
    ranks: int
    accumulates: bool
    on_cpu: bool
    offloads: bool

    @property
    def weights(self) -> int:
        """Elements of all weights."""
        return sum(self.sizes)

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

    def buckets(self) -> dict[int, _Bucket]:
        """By the elements of gradients that came before: what the buffer is when the next one comes, and at the end."""
        found: dict[int, _Bucket] = {}
        before = sent = filled = fullest = 0
        for own in reversed(self.sizes):
            leaves = filled if filled + own > BUCKET else 0
            if own:
                if own <= BUCKET:
                    fullest = max(fullest, filled - leaves + own)
                found[before] = _Bucket(sent, filled, leaves, fullest)
                before, sent, filled = before + own, sent + leaves, filled - leaves + own
        found[before] = _Bucket(sent, filled, 0, fullest)
        return found

    def buffer(self, filled: int) -> int:
        """Bytes of the buffer that gradients are sent from, when so many were in it at most."""
        return self.bytes * (filled if self.on_cpu else BUCKET)

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
        norm = 2 * FP32 * min(max(self.sizes), -(-self.weights // self.ranks))
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
        buckets = self.buckets()

        def arriving(before: int, own: int) -> Gradients:
            bucket = buckets[before // self.bytes]
            leaves = bucket.leaves if own else 0
            sent = bucket.sent + leaves
            kept = min(self.kept, FP32 * sent) if self.on_cpu else self.kept * (sent > 0)
            return Gradients(earlier + kept, self.buffer(bucket.fullest) + self.sent(leaves), own)

        copies = self.kept if self.bytes == FP32 else 0
        end = buckets[self.weights]
        # In fp32 a shard that was sent in one bucket is made when the copy that was sent is gone.
        shard = 0 if self.bytes == FP32 and self.weights <= BUCKET else self.kept
        return Held(
            parameters=self.whole,
            optimizer=3 * self.shard,
            arriving=arriving,
            endings={
                "reduction": Gradients(earlier + shard, self.buffer(end.fullest) + self.sent(end.filled)),
                **self._update(copies=copies),
            },
            between=earlier,
        )

    def stage_3(self) -> Held:
        """Parameters are sharded too, and gathered for their use, which one rank alone does without a copy. The shard
        of gradients is there all the time, and the buffer from which they are sent."""
        live = self.bytes * min(self.weights, _LIVE) if self.ranks > 1 else 0
        buckets = self.buckets()
        end = buckets[self.weights]
        buffer = self.buffer(end.fullest)

        def arriving(before: int, own: int) -> Gradients:
            leaves = self._scattered(buckets[before // self.bytes].leaves) if own else 0
            gathered = min(live, self.whole - before)  # those of layers that are done are let go
            return Gradients(self.kept, buffer + leaves + gathered, own)

        endings = {
            "reduction": Gradients(self.kept, buffer + self._scattered(end.filled)),
            "update": Gradients(self.kept, buffer, self.kept),
        }
        if self.on_cpu and self.ranks > 1:
            # The next step begins, and all is gathered, piece by piece: the first one's weights are copied out of it
            # while gloo has buffers for the next ones. Where a piece is one large weight, how many varies from run to
            # run by what it takes: the estimate lies midway.
            pieces = sorted(self._pieces(), reverse=True)
            copies = self.bytes * sum(sum(pieces[:count]) for count in _GLOO_COPIES) // len(_GLOO_COPIES)
            endings["gathering"] = Gradients(self.kept, buffer + live + copies)
        return Held(
            parameters=-(-self.whole // self.ranks),
            optimizer=(2 if self.bytes == FP32 else 3) * self.shard,
            arriving=arriving,
            endings=endings,
            gathered=live,
            gathering=self.bytes * self._pieces()[-1] if self.ranks > 1 else 0,
            between=self.kept + buffer,
        )

    def _pieces(self) -> list[int]:
        """Elements of the weights that are gathered in one go each, which lie end to end until the last is used."""
        pieces = [0]
        for size in self.sizes:
            if pieces[-1] >= PREFETCH["cpu" if self.on_cpu else "cuda"]:
                pieces.append(0)
            pieces[-1] += size
        return pieces

    def _scattered(self, elements: int) -> int:
        """Bytes of the copies of a bucket whose shards go to their ranks; gloo makes one more."""
        return self.sent(elements) + (FP32 * elements if self.on_cpu else 0)

    def offloaded(self, held: Held) -> Held:
        """Masters, moments and gradients on the host, which also has a copy of the shard in the parameters' dtype; on
        the device two buffers of the largest gradient."""
        host = (3 + 1 + self.accumulates) * self.shard + self.whole // self.ranks
        buffers = 2 * self.bytes * max(self.sizes)
        if self.on_cpu:  # the host is the device
            return replace(held, optimizer=host + buffers)
        return replace(held, optimizer=buffers, host=host)
