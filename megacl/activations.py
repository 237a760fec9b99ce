"""What a forward and backward pass takes beside the weights, counted op by op as the model's code goes through them.

    ops = layer_ops(model, sizes, kernels, documents=False, exchanged=False, repeats=False)
    kept = sum(op.keeps for op in ops)          # what autograd keeps of one layer until its backward pass

Pure arithmetic; `megacl.memory` puts it together with weights, gradients and the optimizer's state. The ops stand in
the order of `model.gpt` and `model.layers`. tests/test_memory.py holds what they keep against what autograd keeps, to
the byte, and what a whole step takes against what the allocator gave out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megacl.model.config import ModelConfig

WIDE = 4
"""Bytes of fp32, in which logits, statistics and rotary tables are."""


@dataclass(frozen=True)
class Op:
    """One op of the forward pass; everything in bytes on one rank."""

    name: str
    keeps: int = 0
    """What it saves for its backward pass and no op before it has saved: inputs, results, statistics."""
    forward: int = 0
    """What its forward pass holds at most beyond what is kept; counted of the loss, where it matters."""
    backward: int = 0
    """What its backward pass holds at most beyond what is kept: gradients on their way, temporaries."""
    gradients: int = 0
    """Gradients of its weights."""
    result: int = 0
    """Of what it keeps or gives out, what selective checkpointing holds on to: products, and attention's results."""
    cast: int = 0
    """Autocast's copy of its weight: it is kept like the others, but exists while the whole forward pass lasts."""


@dataclass(frozen=True)
class Sizes:
    """A micro batch on one rank: numbers of elements, and the bytes that one takes."""

    rows: int
    """Sequences."""
    length: int
    """Tokens of a sequence that this rank computes."""
    hidden: int
    """Width of the residual stream."""
    queries: int
    """Width of this rank's query heads together."""
    keys: int
    """Width of this rank's key heads together; its value heads are as wide."""
    heads: int
    """Query heads of this rank."""
    mlp: int
    """Width inside this rank's part of the MLP."""
    vocab: int
    """Rows of this rank's part of the embedding and of the head."""
    value: int
    """Bytes of an activation that goes into a matrix product."""
    stream: int
    """Bytes of an element of the residual stream."""
    weight: int
    """Bytes of an element of a weight, and of its gradient."""

    @property
    def tokens(self) -> int:
        """Tokens of the micro batch that this rank computes."""
        return self.rows * self.length

    @property
    def residual(self) -> int:
        """Bytes of the residual stream."""
        return self.tokens * self.hidden * self.stream

    def values(self, width: int) -> int:
        """Bytes of an activation of this width that goes into a matrix product or comes out of one."""
        return self.tokens * width * self.value

    def cast(self, elements: int) -> int:
        """Bytes of autocast's copies of so many weights, which live until the backward pass; none without it."""
        return elements * self.value if self.value < self.weight else 0


def layer_ops(
    model: ModelConfig,
    s: Sizes,
    kernels: Mapping[str, str],
    *,
    documents: bool,
    exchanged: bool,
    repeats: bool,
) -> list[Op]:
    """The ops of a layer. kernels: the implementation of each op, by name.

    documents: whether attention stays inside documents; exchanged: whether it works on whole sequences, which came from
    other ranks; repeats: whether each query head is given keys and values of its own where heads share them.
    """
    whole = kernels["rotary_attention"] == "c" and model.qk_norm == "none" and not exchanged
    copies = exchanged or (documents and not whole)  # of documents that are laid end to end, or of what came
    parallel, gelu = model.parallel, model.form == "gpt_neox"
    into_mlp = s.mlp if gelu else 2 * s.mlp
    # The gradients that wait while a branch goes backward: that of the layer's output while the MLP does; then its sum
    # with what comes out of the MLP, beside which a parallel block still has the first, for its other branch.
    waiting = s.residual
    qkv, out, mlp = model.qkv_biased, model.attention_out_biased, model.mlp_biased
    ops = [
        _norm(model, s, kernels, "attention_norm", keeps_input=True, waiting=waiting),
        _linear(s, "qkv", s.hidden, s.queries + 2 * s.keys, bias=qkv, waiting=waiting),
        _head_norms(model, s, kernels, copies=copies, waiting=waiting),
        _attention(
            s,
            whole=whole,
            rotates=not (whole or copies),
            repeats=repeats and s.keys < s.queries,
            normed=model.qk_norm != "none",
            waiting=waiting,
        ),
        _linear(s, "out", s.queries, s.hidden, bias=out, waiting=2 * waiting if parallel else waiting),
        _norm(model, s, kernels, "mlp_norm", keeps_input=not parallel, waiting=waiting),
        _linear(s, "up" if gelu else "gate_up", s.hidden, into_mlp, bias=mlp, waiting=waiting),
        _gelu(s, waiting) if gelu else _swiglu(s, kernels, waiting),
        _linear(s, "down", s.mlp, s.hidden, bias=mlp, waiting=waiting),
    ]
    return [op for op in ops if op is not None]


def _linear(s: Sizes, name: str, inputs: int, outputs: int, *, bias: bool, waiting: int) -> Op:
    """A linear layer keeps its input, and under autocast its weight in 16 bits."""
    weights = inputs * outputs + (outputs if bias else 0)
    return Op(
        name,
        keeps=s.values(inputs),
        backward=waiting + s.values(inputs) + s.values(outputs) + s.cast(weights),
        gradients=weights * s.weight,
        result=s.values(outputs),
        cast=s.cast(inputs * outputs),
    )


def _norm(
    model: ModelConfig, s: Sizes, kernels: Mapping[str, str], name: str, *, keeps_input: bool, waiting: int
) -> Op:
    """A norm keeps the sum that it norms, unless another norm of it does, and its statistics of each token."""
    kind = "layer_norm" if model.form == "gpt_neox" else "rms_norm"
    normed = s.tokens * s.hidden * WIDE if _keeps_normed(kind, kernels) else 0
    kept = max(s.residual, normed) if keeps_input else 0  # such an RMSNorm keeps its input in fp32, too
    return Op(
        name,
        keeps=kept + normed + s.tokens * _statistics(kind),
        backward=waiting + 2 * s.residual + 2 * normed,
        gradients=_vectors(kind) * s.hidden * s.weight,
    )


def _head_norms(model: ModelConfig, s: Sizes, kernels: Mapping[str, str], *, copies: bool, waiting: int) -> Op | None:
    """The norms of queries and keys, where the model has them: of what qkv gave, which attention counts."""
    if model.qk_norm == "none":
        return None
    qk, width = s.values(s.queries + s.keys), s.queries // s.heads
    normed = qk if _keeps_normed(model.qk_norm, kernels) else 0
    statistics = s.tokens * (s.queries + s.keys) // width * _statistics(model.qk_norm)
    kept = s.values(s.queries + 2 * s.keys) if copies else 0  # what qkv gave, which attention does not keep then
    return Op(
        "qk_norm",
        keeps=kept + normed + statistics,
        backward=waiting + 3 * qk,
        gradients=2 * _vectors(model.qk_norm) * width * s.weight,
    )


def _keeps_normed(kind: str, kernels: Mapping[str, str]) -> bool:
    """Whether the values are kept once more, before the weight: by an RMSNorm that is made of several ops."""
    return kind == "rms_norm" and kernels[kind] not in ("triton", "lean", "c")


def _statistics(kind: str) -> int:
    """Bytes of what a norm keeps of each vector: 1 / its deviation, and for LayerNorm its mean."""
    return WIDE * _vectors(kind)


def _vectors(kind: str) -> int:
    """Weight, and for LayerNorm bias."""
    return 2 if kind == "layer_norm" else 1


def _attention(s: Sizes, *, whole: bool, rotates: bool, repeats: bool, normed: bool, waiting: int) -> Op:
    """Rotary position and attention: queries, keys and values, what comes out, log Z of each query.

    whole: whether it is one op, which keeps what qkv gave, and what comes out, which the next layer keeps. rotates:
    whether rotated queries and keys are kept beside all that qkv gave, of which the values are a view; else copies are.
    repeats: whether each query head is given copies of keys and values. Of the turned keys and of what qkv gave there
    is then kept what is in one tensor with the queries, and, if normed, what the norms before it have kept.
    """
    qkv, mixed = s.values(s.queries + 2 * s.keys), s.values(s.queries)
    rotated = s.values(s.queries + (0 if repeats and normed else s.keys)) if rotates else 0
    log_z = s.tokens * s.heads * WIDE
    repeated = 2 * mixed if repeats else 0
    came = 0 if repeats and rotates and not normed else qkv
    kept = rotated + came + log_z + repeated + (0 if whole else mixed)
    return Op("attention", keeps=kept, backward=waiting + mixed + qkv + repeated, result=mixed + log_z)


def _gelu(s: Sizes, waiting: int) -> Op:
    """Keeps the values before it; the gradients of both sides exist while it goes backward."""
    return Op("gelu", keeps=s.values(s.mlp), backward=waiting + 2 * s.values(s.mlp))


def _swiglu(s: Sizes, kernels: Mapping[str, str], waiting: int) -> Op:
    """Keeps gate and up, and where it is made of several ops silu(gate)."""
    mlp = s.values(s.mlp)
    return Op("swiglu", keeps=(3 if kernels["swiglu"] == "reference" else 2) * mlp, backward=waiting + 3 * mlp)


def rotary_tables(model: ModelConfig, s: Sizes, *, documents: bool) -> int:
    """Bytes of cosine and sine, which all layers share: of each position, or of each token in rows of documents."""
    return 2 * (s.tokens if documents else s.length) * (model.rotary_dims // 2) * WIDE


def embedding(s: Sizes) -> Op:
    """Keeps the tokens, which the batch counts; its gradient is as large as the table, and comes last."""
    return Op("embed", backward=s.residual, gradients=s.vocab * s.hidden * s.weight)


def final_norm(model: ModelConfig, s: Sizes, kernels: Mapping[str, str]) -> Op:
    """The norm before the head; the sum that it norms is new."""
    return _norm(model, s, kernels, "final_norm", keeps_input=True, waiting=0)


def loss(s: Sizes, kernels: Mapping[str, str], *, chunk: int, fp16: bool, device: str) -> Op:
    """The head and the loss in chunks, which keep the gradients of the hidden states and of the head's weight.

    While it runs there are the hidden states and the last layer's two results; a chunk's logits; in 16 bits a copy of
    the head's weight, and unless one kernel does the softmax the logits once more in fp32. A CPU multiplies copies of
    16-bit factors in fp32.
    """
    logits, head = min(chunk, s.tokens) * s.vocab, s.vocab * s.hidden
    dx, dhead = s.tokens * s.hidden * (WIDE if fp16 else s.stream), head * WIDE
    held = 2 * s.residual + s.values(s.hidden)
    in_softmax = logits * (WIDE if s.value == WIDE else s.value)
    if s.value < WIDE and kernels["linear_cross_entropy"] != "triton":
        in_softmax += logits * WIDE
    in_products = logits * WIDE + head * WIDE if kernels["linear_cross_entropy"] == "onednn" else 0
    if s.value < WIDE and device == "cpu":
        in_products = logits * (s.value + WIDE) + (head * WIDE if s.stream == WIDE else 0)
    return Op(
        "loss",
        keeps=dx + dhead,
        forward=held + s.cast(head) + max(in_softmax, in_products),
        backward=dx + (head * WIDE if s.weight < WIDE else 0),
        gradients=head * s.weight,
    )
