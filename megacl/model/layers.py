"""The parts of a decoder block: norms, rotary position, attention, MLP. Plain single-device PyTorch.

Suffixes: B batch, T time, D hidden, H query heads, K key/value heads, E width of a head, R half of its rotated part.
P is T in rotary tables for all rows, and B x 1 x T in those where each row has positions of its own.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megacl.kernels import REFERENCE
from megacl.model.config import LinearRope, Llama3Rope, ModelConfig


class LayerNorm(nn.Module):
    """(x, residual) -> (norm of their sum, their sum), over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.ops, self.eps = REFERENCE, eps
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.ops.layer_norm(x, self.weight, self.bias, self.eps, residual)


class RMSNorm(nn.Module):
    """(x, residual) -> (norm of their sum, their sum), over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.ops, self.eps = REFERENCE, eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.ops.rms_norm(x, self.weight, self.eps, residual)


Norm = LayerNorm | RMSNorm


def build_norm(config: ModelConfig) -> Norm:
    """LayerNorm (gpt_neox) or RMSNorm (llama) over the hidden size."""
    kind: type[Norm] = LayerNorm if config.form == "gpt_neox" else RMSNorm
    return kind(config.hidden_size, config.norm_eps)


def build_head_norm(config: ModelConfig) -> Norm | None:
    """The norm of a head's queries or keys, over the head's width, where the model has one (`qk_norm`)."""
    if config.qk_norm == "none":
        return None
    kind: type[Norm] = LayerNorm if config.qk_norm == "layer_norm" else RMSNorm
    return kind(config.head_size, config.norm_eps)


def rotary_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """theta^(-2 r / rotary_dims), stretched as `rope_scaling` says: radians a position, [R] in fp32."""
    exponents_R = torch.arange(0, config.rotary_dims, 2, dtype=torch.float32, device=device) / config.rotary_dims
    frequencies_R: Tensor = config.rope_theta**-exponents_R
    match config.rope_scaling:
        case LinearRope(factor=factor):
            return frequencies_R / factor
        case Llama3Rope() as rope:
            turns_R = rope.original_max_position_embeddings / (2 * math.pi) * frequencies_R
            stays_R = (turns_R - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            return torch.lerp(frequencies_R / rope.factor, frequencies_R, stays_R.clamp(0, 1))
    return frequencies_R


def rotary_tables(config: ModelConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, both [T, R] in fp32.

    They are computed for each batch, not kept as buffers, which a cast of the module to 16 bits would round.
    """
    positions_T = torch.arange(length, dtype=torch.float32, device=device)
    angles_TR = torch.outer(positions_T, rotary_frequencies(config, device))
    return angles_TR.cos(), angles_TR.sin()


def find_documents(tokens_BT: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Where documents begin in a batch, and each token's position in its own.

    A document begins at each token `end`: as a target it is the last of its document, as an input it is what the first
    token of the next one is predicted from. Each row begins one, too, where it begins in the middle of a text.
    tokens_BT: int64. Returns the bounds that `Kernels.document_attention` takes, int32 [documents + 1], and positions,
    int64 [B, T], which count from 0 in each document.
    """
    begins_BT = tokens_BT == end
    begins_BT[:, 0] = True
    begins_N = begins_BT.flatten()
    starts = begins_N.nonzero().squeeze(1)
    positions_N = torch.arange(begins_N.numel(), device=tokens_BT.device) - starts[begins_N.cumsum(0) - 1]
    bounds = F.pad(starts, (0, 1), value=begins_N.numel()).int()
    return bounds, positions_N.view_as(tokens_BT)


class Linear(nn.Linear):
    """weight x + bias."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.ops = REFERENCE

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Causal self-attention; fewer key/value heads than query heads where the model has them (arXiv 2305.13245).

    With bounds (`find_documents`) it stays inside documents, without inside rows. qkv's rows are all query heads, then
    all key heads, then all value heads, each in order. With `qk_norm` each head's queries and keys are normed before
    they are turned, all heads by one weight, so that their products cannot grow without bound (Dehghani et al. 2023,
    arXiv 2302.05442; Wortsman et al. 2023, arXiv 2309.14322).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ops = REFERENCE
        self.heads, self.kv_heads, self.head_size = config.num_attention_heads, config.kv_heads, config.head_size
        self.scale = config.attention_scale
        self.qkv = Linear(config.hidden_size, config.query_size + 2 * config.kv_size, bias=config.qkv_biased)
        self.out: nn.Linear = Linear(config.query_size, config.hidden_size, bias=config.attention_out_biased)
        self.q_norm, self.k_norm = build_head_norm(config), build_head_norm(config)

    def forward(self, x_BTD: Tensor, cos_PR: Tensor, sin_PR: Tensor, bounds: Tensor | None) -> Tensor:
        batch, length, _ = x_BTD.shape
        heads_BTHE = self.qkv(x_BTD).view(batch, length, -1, self.head_size)
        if self.ops.rotary_attention is not None and self.q_norm is None:
            whole_BTHE = self.ops.rotary_attention(heads_BTHE, cos_PR, sin_PR, bounds, self.kv_heads, self.scale)
            whole: Tensor = self.out(whole_BTHE.flatten(2))
            return whole
        # Parted before they are turned, so that the gradient is put together in the order in which qkv takes it.
        parts = torch.split(heads_BTHE, [self.heads + self.kv_heads, self.kv_heads], dim=2)
        qk_BHTE, v_BKTE = (part_BTHE.transpose(1, 2) for part_BTHE in parts)
        if self.q_norm is None or self.k_norm is None:
            qk_BHTE = self.ops.rotary(qk_BHTE, cos_PR, sin_PR)
            q_BHTE, k_BKTE = torch.split(qk_BHTE, [self.heads, self.kv_heads], dim=1)
        else:
            q_BHTE, k_BKTE = torch.split(qk_BHTE, [self.heads, self.kv_heads], dim=1)
            q_BHTE = self.ops.rotary(self.q_norm(q_BHTE)[0], cos_PR, sin_PR)
            k_BKTE = self.ops.rotary(self.k_norm(k_BKTE)[0], cos_PR, sin_PR)
        if bounds is None:
            mixed_BHTE = self.ops.attention(q_BHTE, k_BKTE, v_BKTE, self.scale)
        else:
            mixed_BHTE = self.ops.document_attention(q_BHTE, k_BKTE, v_BKTE, bounds, self.scale)
        mixed: Tensor = self.out(mixed_BHTE.transpose(1, 2).flatten(2))
        return mixed


class LinearGelu(nn.Linear):
    """gelu(weight x + bias), with the exact (erf) GELU or the one by tanh."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, tanh: bool) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.ops, self.tanh = REFERENCE, tanh

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear_gelu(x, self.weight, self.bias, tanh=self.tanh)


class GeluMLP(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        bias = config.mlp_biased
        self.up = LinearGelu(config.hidden_size, config.mlp_size, bias=bias, tanh=config.gelu == "tanh")
        self.down: nn.Linear = Linear(config.mlp_size, config.hidden_size, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        down: Tensor = self.down(self.up(x_BTD))
        return down


class SwiGLUMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202); gate_up's rows are gate's, then up's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ops = REFERENCE
        self.gate_up = Linear(config.hidden_size, 2 * config.mlp_size, bias=config.mlp_biased)
        self.down: nn.Linear = Linear(config.mlp_size, config.hidden_size, bias=config.mlp_biased)

    def forward(self, x_BTD: Tensor) -> Tensor:
        down: Tensor = self.down(self.ops.swiglu(self.gate_up(x_BTD)))
        return down
