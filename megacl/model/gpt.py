"""The decoder: the block, the whole, its initial weights, its size and its cost.

    model = build_model(config.model, seed=config.seed)
    objective, nats, squares = model(tokens_BT, targets_BT)    # sums over all targets but IGNORED
    logits_BTV = model(tokens_BT)

Parameters, by name. Checkpoints and conversions hold these names and shapes, so they are a contract:

    embed.weight                      [vocab_size, hidden_size]
    layers.{i}.attention_norm.weight  [hidden_size]                 and .bias in the gpt_neox form
    layers.{i}.attention.qkv.weight   [(heads + 2 kv_heads) x head_size, hidden_size]   and .bias where attention_bias
                                      rows: all query heads, all key heads, all value heads, each in order
    layers.{i}.attention.q_norm.weight  [head_size]                 where qk_norm, k_norm too; and .bias in layer_norm
    layers.{i}.attention.out.weight   [hidden_size, heads x head_size]  and .bias where attention_bias is all
    layers.{i}.mlp_norm.weight        [hidden_size]                 and .bias in the gpt_neox form
    layers.{i}.mlp.up.weight          [mlp_size, hidden_size]       gpt_neox form; and .bias where mlp_bias
    layers.{i}.mlp.gate_up.weight     [2 x mlp_size, hidden_size]   llama form; rows: gate, then up; .bias as above
    layers.{i}.mlp.down.weight        [hidden_size, mlp_size]       and .bias where mlp_bias
    final_norm.weight                 [hidden_size]                 and .bias in the gpt_neox form
    head.weight                       [vocab_size, hidden_size]     absent where tie_embeddings: embed.weight serves
"""

import functools
import hashlib
import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megacl.kernels import LOSS_CHUNK, REFERENCE, Kernels
from megacl.model.checkpointing import Checkpointing, run_layer
from megacl.model.config import ModelConfig
from megacl.model.layers import Attention, GeluMLP, SwiGLUMLP, build_norm, find_documents, rotary_tables


class Block(nn.Module):
    """One layer: attention and MLP, side by side on one residual or one after the other (`parallel_residual`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.parallel = config.parallel
        self.attention_norm = build_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = build_norm(config)
        self.mlp = GeluMLP(config) if config.form == "gpt_neox" else SwiGLUMLP(config)

    def forward(
        self, x_BTD: Tensor, delta_BTD: Tensor | None, cos_PR: Tensor, sin_PR: Tensor, bounds: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(x, delta) -> (x, delta), whose sum is the residual stream: a norm adds them while it reads them."""
        normed_BTD, x_BTD = self.attention_norm(x_BTD, delta_BTD)
        attended_BTD: Tensor = self.attention(normed_BTD, cos_PR, sin_PR, bounds)
        if self.parallel:
            normed_BTD, _ = self.mlp_norm(x_BTD)
            x_BTD = x_BTD + attended_BTD
        else:
            normed_BTD, x_BTD = self.mlp_norm(x_BTD, attended_BTD)
        return x_BTD, self.mlp(normed_BTD)


class Head(nn.Module):
    """The output layer: logits, or the loss straight from the hidden states, so that all logits never exist at once.

    Both go through `forward`, because that is where ZeRO-3 gathers a module's weight.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ops = REFERENCE
        self.weight: Tensor = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, x_BTD: Tensor, targets_BT: Tensor | None, *, chunk: int, z_loss: float) -> Tensor:
        if targets_BT is None:
            return F.linear(x_BTD, self.weight)
        x_ND, targets_N = x_BTD.flatten(0, 1), targets_BT.flatten()
        return self.ops.linear_cross_entropy(x_ND, self.weight, targets_N, chunk=chunk, z_loss=z_loss)


class GPT(nn.Module):
    """A decoder-only transformer of either form. `build_model` gives one with its initial weights.

    loss_chunk: tokens whose logits exist at one time while a loss is computed. z_loss: the weight of (log Z)^2 in it.
    checkpointing: by a layer's number, what it keeps for its backward pass (`model.checkpointing`); else everything.
    time_part: (r, n): a loss is computed over the r-th of n equal parts of each row, its tokens at their places in it.
    initial: the whole initial weight of a parameter, by its name, fp32 on the CPU.
    document_end: the token that ends a document. With it, tokens do not look across documents and positions count from
    where each begins (`find_documents`); with None, a sequence is one text.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.loss_chunk = LOSS_CHUNK["cpu"]
        self.z_loss = 0.0
        self.checkpointing: Mapping[int, Checkpointing] = {}
        self.document_end: int | None = None
        self.time_part = (0, 1)
        self.initial: Callable[[str], Tensor] = _no_initial_weight
        # By a weight that is there: drawing one on "meta" imports PyTorch's compiler, a second and more of each start.
        weight_VD = torch.empty(config.vocab_size, config.hidden_size)
        self.embed = nn.Embedding.from_pretrained(weight_VD, freeze=False)  # type: ignore[no-untyped-call]
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = build_norm(config)
        self.head = Head(config)
        self.tie()

    def use(self, ops: Kernels) -> None:
        """Computes with these implementations of the ops from now on."""
        for module in self.modules():
            if hasattr(module, "ops"):
                module.ops = ops  # type: ignore[assignment]  # modules hold what they like

    def tie(self) -> None:
        """Makes the head's weight the embedding's, where the configuration ties them."""
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None, *, last_only: bool = False) -> Tensor:
        """Logits, or with targets the loss.

        tokens_BT: int64 in [0, vocab_size). targets_BT: int64, IGNORED where there is none.
        With targets it returns [3] in fp32 (fp64 in an fp64 model), sums over the targets: what is minimised, -log
        p(target) in nats, and (log Z)^2; only the first has a gradient. Without targets the logits [B, T, V] in the
        model's dtype, or [B, 1, V] of the last position with last_only.
        """
        cos_PR, sin_PR = rotary_tables(self.config, tokens_BT.shape[1], tokens_BT.device)
        bounds = None
        if self.document_end is not None:
            bounds, positions_BT = find_documents(tokens_BT, self.document_end)
            cos_PR, sin_PR = (table_TR[positions_BT].unsqueeze(1) for table_TR in (cos_PR, sin_PR))
        part, parts = self.time_part
        if targets_BT is not None and parts > 1:
            tokens_BT, targets_BT = (ids_BT.chunk(parts, dim=1)[part] for ids_BT in (tokens_BT, targets_BT))
            cos_PR, sin_PR = (table_PR.chunk(parts, dim=-2)[part] for table_PR in (cos_PR, sin_PR))
        x_BTD: Tensor = self.embed(tokens_BT)
        delta_BTD: Tensor | None = None
        for index, layer in enumerate(self.layers):
            how = self.checkpointing.get(index) if torch.is_grad_enabled() else None
            if how is not None and delta_BTD is not None:
                x_BTD, delta_BTD = x_BTD + delta_BTD, None  # a layer's input is kept, so it is one tensor
            x_BTD, delta_BTD = run_layer(layer, how, x_BTD, delta_BTD, cos_PR, sin_PR, bounds)
        assert delta_BTD is not None, "there is a layer"
        if last_only:
            x_BTD, delta_BTD = x_BTD[:, -1:], delta_BTD[:, -1:]
        normed_BTD, _ = self.final_norm(x_BTD, delta_BTD)
        if self.config.width_ratio != 1:
            normed_BTD = normed_BTD / self.config.width_ratio  # muP's factor on the logits
        result: Tensor = self.head(normed_BTD, targets_BT, chunk=self.loss_chunk, z_loss=self.z_loss)
        return result

    def materialize(
        self,
        device: torch.device | str,
        *,
        part: Callable[[nn.Parameter, Tensor], Tensor] = lambda parameter, whole: whole,
        finish: Callable[[nn.Module], None] = lambda module: None,
    ) -> None:
        """Gives the parameters of a model on "meta" memory and their initial weights, one module after another.

        part: what this process keeps of a parameter's whole weight. finish: called with each module that holds
        parameters of its own, when it has them, so that no more than one module is ever whole.
        """
        made: dict[nn.Parameter, nn.Parameter] = {}
        for prefix, module in self.named_modules():
            own = list(module.named_parameters(prefix, recurse=False))
            for name, parameter in own:
                if parameter not in made:
                    weight = part(parameter, self.initial(name)).to(device)
                    made[parameter] = nn.Parameter(weight)
                    made[parameter].__dict__.update(parameter.__dict__)
                setattr(module, name.rpartition(".")[2], made[parameter])
            if own:
                finish(module)


def _no_initial_weight(name: str) -> Tensor:
    raise AssertionError(f"{name}: only build_model gives a model its initial weights")


def build_model(config: ModelConfig, *, seed: int | None, device: str = "cpu") -> GPT:
    """The model with its initial weights in fp32 on `device`; on "meta" it has only shapes, and knows its weights.

    The weights are a function of (config, seed) alone: each parameter has a generator of its own, seeded by its name.
    Matrices are normal: embedding, head and input matrices with a standard deviation of sqrt(2 / (5 hidden_size))
    (Nguyen & Salazar 2019, arXiv 1910.05895), output matrices of attention and MLP with
    2 / (num_layers sqrt(hidden_size)) (Wang & Komatsuzaki 2021, GPT-J), as in GPT-NeoX and Pythia. Biases are 0, norms
    are 1. Under muP (`MupConfig`) embedding and head have the standard deviation of the base width.

    seed None: all weights are NaN, for a model that is to be given others at once, as a checkpoint's: billions of
    normal values take minutes to draw.
    """
    with torch.device("meta"):
        model = GPT(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    model.initial = lambda name: _initial_weight(config, name, shapes[name], seed)
    if device != "meta":
        model.materialize(device)
    return model


def _initial_weight(config: ModelConfig, name: str, shape: torch.Size, seed: int | None) -> Tensor:
    """The whole of a parameter, fp32 on the CPU: a GPU's generator gives other numbers."""
    if seed is None:
        return torch.full(shape, torch.nan)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    return torch.randn(shape, generator=_generator(seed, name)).mul_(_standard_deviation(config, name))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _standard_deviation(config: ModelConfig, name: str) -> float:
    if name.endswith((".attention.out.weight", ".mlp.down.weight")):
        return 2 / (config.num_layers * math.sqrt(config.hidden_size))
    outside = name in ("embed.weight", "head.weight")
    width = config.mup.base_hidden_size if config.mup and outside else config.hidden_size
    return math.sqrt(2 / (5 * width))


def count_parameters(config: ModelConfig) -> int:
    """The exact number of parameters; a tied head counts once."""
    return sum(parameter.numel() for parameter in build_model(config, seed=0, device="meta").parameters())


@functools.cache  # asked for at every step
def flops_per_token(config: ModelConfig, seq_length: int) -> int:
    """Floating-point operations that training on one token takes, forward and backward, without recomputation.

    6 x (weights of all matrix products, the head's included, the embedding's not) + 12 x num_layers x (heads x
    head_size) x seq_length. The second term counts attention's products in full, as the source does; a causal kernel
    computes about half of it. Source: Chowdhery et al. 2022 (PaLM), arXiv 2204.02311, appendix B.
    """
    model = build_model(config, seed=0, device="meta")
    in_layers = sum(parameter.numel() for parameter in model.layers.parameters() if parameter.ndim == 2)
    products = in_layers + model.head.weight.numel()
    return 6 * products + 12 * config.num_layers * config.query_size * seq_length
