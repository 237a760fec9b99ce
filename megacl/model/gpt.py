"""The decoder: the block, the whole, its initial weights, its size and its cost.

    model = build_model(config.model, seed=config.seed)
    nats = model(tokens_BT, targets_BT)       # a scalar: the sum over all targets but IGNORED
    logits_BTV = model(tokens_BT)

Parameters, by name. Checkpoints and conversions hold these names and shapes, so they are a contract:

    embed.weight                      [vocab_size, hidden_size]
    layers.{i}.attention_norm.weight  [hidden_size]                 and .bias in the gpt_neox form
    layers.{i}.attention.qkv.weight   [(heads + 2 kv_heads) x head_dim, hidden_size]   and .bias in the gpt_neox form
                                      rows: all query heads, all key heads, all value heads, each in order
    layers.{i}.attention.out.weight   [hidden_size, hidden_size]    and .bias in the gpt_neox form
    layers.{i}.mlp_norm.weight        [hidden_size]                 and .bias in the gpt_neox form
    layers.{i}.mlp.up.weight          [mlp_size, hidden_size]       gpt_neox form, and .bias
    layers.{i}.mlp.gate_up.weight     [2 x mlp_size, hidden_size]   llama form; rows: gate, then up
    layers.{i}.mlp.down.weight        [hidden_size, mlp_size]       and .bias in the gpt_neox form
    final_norm.weight                 [hidden_size]                 and .bias in the gpt_neox form
    head.weight                       [vocab_size, hidden_size]     absent where tie_embeddings: embed.weight serves
"""

import functools
import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megacl import kernels
from megacl.model.config import ModelConfig
from megacl.model.layers import Attention, GeluMLP, SwiGLUMLP, build_norm, find_documents, rotary_tables


class Block(nn.Module):
    """One layer: attention and MLP, side by side on one residual (gpt_neox) or one after the other (llama)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.parallel = config.form == "gpt_neox"
        self.attention_norm = build_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = build_norm(config)
        self.mlp = GeluMLP(config) if config.form == "gpt_neox" else SwiGLUMLP(config)

    def forward(self, x_BTD: Tensor, cos_PR: Tensor, sin_PR: Tensor, bounds: Tensor | None) -> Tensor:
        attended_BTD: Tensor = x_BTD + self.attention(self.attention_norm(x_BTD), cos_PR, sin_PR, bounds)
        mlp_input_BTD = x_BTD if self.parallel else attended_BTD
        x_BTD = attended_BTD + self.mlp(self.mlp_norm(mlp_input_BTD))
        return x_BTD


class Head(nn.Module):
    """The output layer: logits, or the loss straight from the hidden states, so that all logits never exist at once.

    Both go through `forward`, because that is where ZeRO-3 gathers a module's weight.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight: Tensor = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, x_BTD: Tensor, targets_BT: Tensor | None, chunk: int) -> Tensor:
        if targets_BT is None:
            return F.linear(x_BTD, self.weight)
        return kernels.linear_cross_entropy(x_BTD.flatten(0, 1), self.weight, targets_BT.flatten(), chunk=chunk)


class GPT(nn.Module):
    """A decoder-only transformer of either form. `build_model` gives one with its initial weights.

    loss_chunk: tokens whose logits exist at one time while a loss is computed.
    checkpoint_layers: keep only each layer's input for the backward pass and compute the layer again there.
    document_end: the token that ends a document. With it, tokens do not look across documents and positions count from
    where each begins (`find_documents`); with None, a sequence is one text.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.loss_chunk = 1024
        self.checkpoint_layers = False
        self.document_end: int | None = None
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = build_norm(config)
        self.head = Head(config)
        self.tie()

    def tie(self) -> None:
        """Makes the head's weight the embedding's, where the configuration ties them."""
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None, *, last_only: bool = False) -> Tensor:
        """Logits, or with targets the loss.

        tokens_BT: int64 in [0, vocab_size). targets_BT: int64, IGNORED where there is none.
        Returns the sum of -log p(target) in nats, a scalar in fp32 (fp64 in an fp64 model); without targets the logits
        [B, T, V] in the model's dtype, or [B, 1, V] of the last position with last_only.
        """
        cos_PR, sin_PR = rotary_tables(self.config, tokens_BT.shape[1], tokens_BT.device)
        bounds = None
        if self.document_end is not None:
            bounds, positions_BT = find_documents(tokens_BT, self.document_end)
            cos_PR, sin_PR = (table_TR[positions_BT].unsqueeze(1) for table_TR in (cos_PR, sin_PR))
        x_BTD: Tensor = self.embed(tokens_BT)
        for layer in self.layers:
            if self.checkpoint_layers and torch.is_grad_enabled():
                x_BTD = checkpoint(layer, x_BTD, cos_PR, sin_PR, bounds, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTD = layer(x_BTD, cos_PR, sin_PR, bounds)
        if last_only:
            x_BTD = x_BTD[:, -1:]
        result: Tensor = self.head(self.final_norm(x_BTD), targets_BT, self.loss_chunk)
        return result


def build_model(config: ModelConfig, *, seed: int, device: str = "cpu") -> GPT:
    """The model with its initial weights in fp32 on `device`; on "meta" only the shapes.

    The weights are a function of (config, seed) alone: each parameter has a generator of its own, seeded by its name.
    Matrices are normal: embedding, head and input matrices with a standard deviation of sqrt(2 / (5 hidden_size))
    (Nguyen & Salazar 2019, arXiv 1910.05895), output matrices of attention and MLP with
    2 / (num_layers sqrt(hidden_size)) (Wang & Komatsuzaki 2021, GPT-J), as in GPT-NeoX and Pythia. Biases are 0, norms
    are 1.
    """
    with torch.device("meta"):
        model = GPT(config)
    if device == "meta":
        return model
    model.to_empty(device=device)
    model.tie()  # to_empty gives the two names memory of their own
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                # Drawn on the CPU: a GPU's generator gives other numbers.
                draw = torch.randn(parameter.shape, generator=_generator(seed, name))
                parameter.copy_(draw.mul_(_standard_deviation(config, name)))
    return model


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _standard_deviation(config: ModelConfig, name: str) -> float:
    if name.endswith((".attention.out.weight", ".mlp.down.weight")):
        return 2 / (config.num_layers * math.sqrt(config.hidden_size))
    return math.sqrt(2 / (5 * config.hidden_size))


def count_parameters(config: ModelConfig) -> int:
    """The exact number of parameters; a tied head counts once."""
    return sum(parameter.numel() for parameter in build_model(config, seed=0, device="meta").parameters())


@functools.cache  # asked for at every step
def flops_per_token(config: ModelConfig, seq_length: int) -> int:
    """Floating-point operations that training on one token takes, forward and backward, without recomputation.

    6 x (weights of all matrix products, the head's included, the embedding's not) + 12 x num_layers x hidden_size x
    seq_length. The second term counts attention's products in full, as the source does; a causal kernel computes about
    half of it. Source: Chowdhery et al. 2022 (PaLM), arXiv 2204.02311, appendix B.
    """
    model = build_model(config, seed=0, device="meta")
    in_layers = sum(parameter.numel() for parameter in model.layers.parameters() if parameter.ndim == 2)
    products = in_layers + model.head.weight.numel()
    return 6 * products + 12 * config.num_layers * config.hidden_size * seq_length
