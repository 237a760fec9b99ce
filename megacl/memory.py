"""How much memory a training step takes on one rank, worked out before it runs.

    estimate = estimate_memory(model, engine, seq_length=2048, micro_batch_size=8, device="cuda")
    estimate.peak.total                         # bytes, at the moment at which they are most
    estimate.peak.when                          # "loss", "backward" or "update"

A step has three moments at which memory can be highest: while the loss is computed, when all that the forward pass
keeps is there; somewhere in the backward pass; and the optimizer's update. Each is a sum of terms, and each term stands
in one small function below or as an `Op` of `megacl.activations`. It is the memory of tensors: the interpreter,
libraries and a GPU's context come on top, and so does what an allocator keeps for later. tools/bench/memory.py measures
how far it is right; docs/parallelism.md shows it for whole models. With engine.compile it counts what would be kept
without.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

from megacl.activations import WIDE, Op, Sizes, embedding, final_norm, layer_ops, loss, rotary_tables
from megacl.config import EngineConfig
from megacl.kernels import choose_kernels
from megacl.model.config import ModelConfig


@dataclass(frozen=True)
class Moment:
    """A rank's memory at one moment of a step, in bytes."""

    when: str
    parameters: int
    optimizer: int
    """Adam's moments, and fp32 masters of the weights."""
    gradients: int = 0
    """Of weights."""
    activations: int = 0
    """What autograd keeps for the backward pass."""
    loss: int = 0
    """Logits, and the gradients that the loss computes with them."""
    temporaries: int = 0

    @property
    def total(self) -> int:
        """The sum of all terms."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "when")


@dataclass(frozen=True)
class MemoryEstimate:
    """What `estimate_memory` found."""

    moments: tuple[Moment, ...]
    """While the loss is computed, in the backward pass where it is highest, in the update."""
    kept: int
    """What autograd keeps of a micro batch between its forward and its backward pass."""

    @property
    def peak(self) -> Moment:
        """The moment at which memory is highest."""
        return max(self.moments, key=lambda moment: moment.total)


def estimate_memory(
    model: ModelConfig,
    engine: EngineConfig,
    *,
    seq_length: int,
    micro_batch_size: int,
    micro_batches: int = 1,
    documents: bool = False,
    device: str,
) -> MemoryEstimate:
    """The memory of one rank in a step after the first, when Adam's moments are there.

    micro_batch_size: sequences; micro_batches: how many of them make a step of this rank. documents: whether attention
    stays inside documents. device: "cpu" or "cuda".
    """
    half = engine.precision in ("bf16", "fp16")
    kernels = _implementations(engine, device=device, half=half)
    s = _sizes(model, seq_length=seq_length, micro_batch_size=micro_batch_size, half=half)
    walk = _Walk(
        tables=rotary_tables(model, s, documents=documents),
        embed=embedding(s),
        layers=model.num_layers * [_layer(engine, s, layer_ops(model, s, kernels, documents=documents))],
        norm=final_norm(model, s, kernels),
        loss=loss(s, kernels, chunk=engine.loss_chunk, device=device),
        tied=model.tie_embeddings,
        accumulates=micro_batches > 1,
    )
    between = Moment("between", parameters=walk.weights, optimizer=2 * walk.weights)
    return MemoryEstimate((walk.forward(between), walk.backward(between), walk.update(between)), kept=walk.kept)


def _sizes(model: ModelConfig, *, seq_length: int, micro_batch_size: int, half: bool) -> Sizes:
    """What a micro batch measures on one rank. Under autocast only what goes into matrix products has 16 bits."""
    return Sizes(
        rows=micro_batch_size,
        length=seq_length,
        hidden=model.hidden_size,
        queries=model.num_attention_heads * model.head_dim,
        keys=model.kv_heads * model.head_dim,
        heads=model.num_attention_heads,
        mlp=model.mlp_size,
        vocab=model.vocab_size,
        value=2 if half else WIDE,
        stream=WIDE,
        weight=WIDE,
    )


def _implementations(engine: EngineConfig, *, device: str, half: bool) -> Mapping[str, str]:
    """The implementation of each op, by name."""
    chosen = choose_kernels(device=device, half=half, compiled=engine.compile, overrides=engine.kernels)
    return {choice.op: choice.implementation for choice in chosen.choices}


@dataclass(frozen=True)
class _Layer:
    """A layer's ops, and what there is of it before its backward pass begins; from then on all that they keep."""

    ops: list[Op]
    keeps: int
    casts: int = 0
    """Autocast's copies that it does not keep: they end with the forward pass of the whole model."""


def _layer(engine: EngineConfig, s: Sizes, ops: list[Op]) -> _Layer:
    """A checkpointed layer keeps its input alone, and is computed again before it goes backward."""
    if engine.activation_checkpointing == "full":
        return _Layer(ops, keeps=s.residual, casts=sum(op.cast for op in ops))
    return _Layer(ops, keeps=sum(op.keeps + op.cast for op in ops))


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
    def weights(self) -> int:
        """Bytes of all weights, and as many of their gradients."""
        in_layers = sum(op.gradients for layer in self.layers for op in layer.ops)
        return (0 if self.tied else self.embed.gradients) + in_layers + self.norm.gradients + self.loss.gradients

    @property
    def kept(self) -> int:
        """Bytes that are kept when the forward pass is over."""
        return self.tables + sum(layer.keeps for layer in self.layers) + self.norm.keeps + self.loss.keeps

    def forward(self, between: Moment) -> Moment:
        """While the loss is computed, when all layers were gone through."""
        return replace(
            between,
            when="loss",
            gradients=self.weights if self.accumulates else 0,
            activations=self.kept - self.loss.keeps + sum(layer.casts for layer in self.layers),
            loss=self.loss.keeps + self.loss.forward,
        )

    def backward(self, between: Moment) -> Moment:
        """Where the backward pass takes most: activations go as gradients come."""
        moments, gradients = [], 0
        for op, kept in self._backward_ops():
            # The gradient of weights is a temporary where it is added to another: to that of an earlier micro batch, or
            # a tied embedding's to the head's, which waits for it.
            added = op.gradients if self.accumulates or (self.tied and op is self.embed) else 0
            waits = self.loss.gradients if self.accumulates and self.tied and op is not self.loss else 0
            gradients += 0 if added else op.gradients
            moments.append(
                replace(
                    between,
                    when="backward",
                    gradients=self.weights if self.accumulates else gradients,
                    activations=kept,
                    loss=self.loss.keeps if op is self.loss else 0,
                    temporaries=op.backward + added + waits,
                )
            )
        return max(moments, key=lambda moment: moment.total)

    def update(self, between: Moment) -> Moment:
        """AdamW's fused kernel goes over all weights in place."""
        return replace(between, when="update", gradients=self.weights)

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
