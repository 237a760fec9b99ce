"""How much memory a training step takes on one rank, worked out before it runs: `megacl train CONFIG --dry-run`.

    estimate = estimate_memory(model, engine, seq_length=2048, micro_batch_size=8, ranks=4, device="cuda")
    estimate.peak.total                         # bytes, at the moment at which they are most
    estimate.peak.when                          # "loss", "backward", "update", ...

A step has moments at which memory can be highest: while the loss is computed, when all that the forward pass keeps is
there; somewhere in the backward pass; and behind it, when gradients are sent and the optimizer updates the weights.
Each is a sum of terms. What is kept of activations is counted by op, in `megacl.activations`; what there is of weights,
gradients and optimizer by engine and ZeRO stage, in `megacl.zero_memory`; here they are put together. It is the memory
of tensors: the interpreter, libraries and a GPU's context come on top, and so does what an allocator keeps for later.
tools/bench/memory.py measures how far it is right; docs/parallelism.md shows it for whole models. With engine.compile
it counts what would be kept without.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

from megacl.activations import WIDE, Op, Sizes, embedding, final_norm, layer_ops, loss, rotary_tables
from megacl.config import EngineConfig
from megacl.kernels import LOSS_CHUNK, choices_of_kernels, onednn, repeats_keys
from megacl.log import table_text
from megacl.model.config import ModelConfig
from megacl.zero_memory import Held, held_by


@dataclass(frozen=True)
class Moment:
    """A rank's memory at one moment of a step, in bytes."""

    when: str
    parameters: int
    optimizer: int
    """Adam's moments, fp32 masters of the weights, and Reptile's anchor."""
    gradients: int = 0
    """Of weights."""
    activations: int = 0
    """What autograd keeps for the backward pass."""
    loss: int = 0
    """Logits, and the gradients that the loss computes with them."""
    communication: int = 0
    """Buffers of what is sent, and whole weights that were gathered."""
    temporaries: int = 0

    @property
    def total(self) -> int:
        """The sum of all terms."""
        return sum(getattr(self, term) for term in TERMS)


TERMS = tuple(field.name for field in fields(Moment) if field.name != "when")
"""The names of what a moment is the sum of."""


@dataclass(frozen=True)
class MemoryEstimate:
    """What `estimate_memory` found."""

    moments: tuple[Moment, ...]
    """In the order of a step; of the backward pass the one that is highest."""
    kept: int
    """What autograd keeps of a micro batch between its forward and its backward pass."""
    host: int
    """Memory of the host that is taken beside a GPU's, by an optimizer that was put there."""

    @property
    def peak(self) -> Moment:
        """The moment at which memory is highest."""
        return max(self.moments, key=lambda moment: moment.total)

    def table(self) -> Iterator[str]:
        """Lines: a column for each moment, a row for each term that is not 0 throughout, and the sum; in MB, 10^6."""
        rows = []
        for term in (*TERMS, "total"):
            sizes = [getattr(moment, term) for moment in self.moments]
            if any(sizes):
                rows.append([term, *(f"{size / 1e6:,.1f}" for size in sizes)])
        yield from table_text(["MB", *(moment.when for moment in self.moments)], rows)


def estimate_memory(
    model: ModelConfig,
    engine: EngineConfig,
    *,
    seq_length: int,
    micro_batch_size: int,
    micro_batches: int = 1,
    ranks: int = 1,
    documents: bool = False,
    reptile: bool = False,
    device: str,
) -> MemoryEstimate:
    """The memory of one rank in a step after the first, when Adam's moments are there.

    micro_batch_size: sequences; micro_batches: how many of them make a step of this rank. ranks: of the whole run, a
    multiple of engine.tensor_parallel x engine.sequence_parallel. documents: whether attention stays inside documents.
    reptile: whether the phase has it, and so an anchor. device: "cpu" or "cuda", which need not be here.
    """
    s = _sizes(model, engine, seq_length=seq_length, micro_batch_size=micro_batch_size)
    kernels = _implementations(engine, device=device)
    ops = layer_ops(
        model,
        s,
        kernels,
        documents=documents,
        exchanged=engine.sequence_parallel > 1,
        repeats=repeats_keys(device, s.value),
    )
    walk = _Walk(
        tables=rotary_tables(model, s, documents=documents),
        embed=embedding(s),
        layers=_layers(model, engine, s, ops),
        norm=final_norm(model, s, kernels),
        loss=loss(
            s,
            kernels,
            chunk=engine.loss_chunk or LOSS_CHUNK[device],
            fp16=engine.precision == "fp16",
            device=device,
        ),
        tied=model.tie_embeddings,
        accumulates=micro_batches > 1,
    )
    held = held_by(
        engine,
        sizes=[size // s.weight for size in walk.sizes],
        ranks=ranks // engine.tensor_parallel,
        anchor=reptile,
        accumulates=walk.accumulates,
        device=device,
    )
    moments = (walk.forward(held), walk.at_loss(held), walk.backward(held), *_endings(held))
    return MemoryEstimate(moments, kept=walk.kept, host=held.host)


def _sizes(model: ModelConfig, engine: EngineConfig, *, seq_length: int, micro_batch_size: int) -> Sizes:
    """What a micro batch measures on one rank. DeepSpeed computes all in 16 bits, autocast only matrix products."""
    cut = engine.tensor_parallel
    stored = 2 if engine.half and engine.kind == "deepspeed" else WIDE
    return Sizes(
        rows=micro_batch_size,
        length=seq_length // engine.sequence_parallel,
        hidden=model.hidden_size,
        queries=model.query_size // cut,
        keys=model.kv_size // cut,
        heads=model.num_attention_heads // cut,
        mlp=model.mlp_size // cut,
        vocab=model.vocab_size // cut,
        value=2 if engine.half else WIDE,
        stream=stored,
        weight=stored,
    )


def _implementations(engine: EngineConfig, *, device: str) -> Mapping[str, str]:
    """The implementation of each op, by name."""
    choices = choices_of_kernels(device=device, half=engine.half, compiled=engine.compile, overrides=engine.kernels)
    chosen = {choice.op: choice.implementation for choice in choices}
    if engine.tensor_parallel > 1:  # parallel/vocabulary.py's, by PyTorch's own products
        chosen["linear_cross_entropy"] = "chunked"
    elif chosen["linear_cross_entropy"] == "c":  # whose products are the ones that count
        chosen["linear_cross_entropy"] = "onednn" if onednn.is_faster() else "chunked"
    return chosen


@dataclass(frozen=True)
class _Layer:
    """A layer's ops, and what there is of it before its backward pass begins; from then on all that they keep."""

    ops: list[Op]
    keeps: int
    casts: int = 0
    """Autocast's copies that it does not keep: they end with the forward pass of the whole model."""


def _layers(model: ModelConfig, engine: EngineConfig, s: Sizes, ops: list[Op]) -> list[_Layer]:
    """What is kept of each layer, as activation checkpointing says; what is not is computed again.

    Of a layer that is checkpointed that is its input, and if it is so selectively also the results of its products, but
    for the last, and of attention.
    """
    everything = _Layer(ops, keeps=sum(op.keeps + op.cast for op in ops))
    input_alone = _Layer(ops, keeps=s.residual, casts=sum(op.cast for op in ops))
    match engine.activation_checkpointing:
        case "none":
            return [everything] * model.num_layers
        case "full":
            return [input_alone] * model.num_layers
        case "selective":
            results = sum(op.result for op in ops[:-1])
            return [replace(input_alone, keeps=s.residual + results)] * model.num_layers
        case chosen:
            return [input_alone if layer in chosen else everything for layer in range(model.num_layers)]


@dataclass(frozen=True)
class _Walk:
    """The ops of a micro batch in their order, gone through forward and backward while what they keep is added up."""

    tables: int
    embed: Op
    layers: list[_Layer]
    norm: Op
    loss: Op
    tied: bool
    accumulates: bool
    """Whether there are gradients of an earlier micro batch."""

    @property
    def sizes(self) -> list[int]:
        """Bytes of the weights of each op, and as many of their gradients; a tied embedding's are the head's."""
        in_layers = [op.gradients for layer in self.layers for op in layer.ops]
        return [0 if self.tied else self.embed.gradients, *in_layers, self.norm.gradients, self.loss.gradients]

    @property
    def kept(self) -> int:
        """Bytes that are kept when the forward pass is over."""
        return self.tables + sum(layer.keeps for layer in self.layers) + self.norm.keeps + self.loss.keeps

    def forward(self, held: Held) -> Moment:
        """When the last layer was gone through, and weights are still being gathered."""
        return Moment(
            "forward",
            parameters=held.parameters,
            optimizer=held.optimizer,
            gradients=held.between,
            activations=self.kept - self.loss.keeps + sum(layer.casts for layer in self.layers),
            communication=held.gathered + held.gathering,
        )

    def at_loss(self, held: Held) -> Moment:
        """While the loss is computed, when all layers were gone through."""
        loss = self.loss.keeps + self.loss.forward
        return replace(self.forward(held), when="loss", loss=loss, communication=held.gathered)

    def backward(self, held: Held) -> Moment:
        """Where the backward pass takes most: activations go as gradients come."""
        moments, before = [], 0
        for op, kept in self._backward_ops():
            # A tied embedding's gradient is added to the head's, which waits for it where there are earlier ones.
            tied = self.tied and op is self.embed
            own = 0 if tied else op.gradients
            waits = self.loss.gradients if self.tied and self.accumulates and op is not self.loss else 0
            found = held.arriving(before, own)
            before += own
            moments.append(
                Moment(
                    "backward",
                    parameters=held.parameters,
                    optimizer=held.optimizer,
                    gradients=found.kept,
                    activations=kept,
                    loss=self.loss.keeps if op is self.loss else 0,
                    communication=found.sending,
                    temporaries=op.backward + found.passing + (op.gradients if tied else 0) + waits,
                )
            )
        return max(moments, key=lambda moment: moment.total)

    def _backward_ops(self) -> Iterator[tuple[Op, int]]:
        """(op, bytes of activations that are kept as its backward pass begins), the last op first."""
        below = self.kept - self.loss.keeps
        yield self.loss, below
        yield self.norm, below
        below -= self.norm.keeps
        for layer in reversed(self.layers):
            below -= layer.keeps
            inside = sum(op.keeps + op.cast for op in layer.ops)
            for op in reversed(layer.ops):
                yield op, below + inside
                inside -= op.keeps + op.cast
        yield self.embed, self.tables


def _endings(held: Held) -> Iterator[Moment]:
    """Behind the backward pass: gradients are sent, the weights updated, and sent in their turn."""
    for when, found in held.endings.items():
        yield Moment(
            when,
            parameters=held.parameters,
            optimizer=held.optimizer,
            gradients=found.kept,
            communication=found.sending,
            temporaries=found.passing,
        )
