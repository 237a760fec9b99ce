"""What a step shows of the inside of a model: the size of attention's logits, of gradients and of updates, by part.

    result = engine.step(batch.tokens, lr, monitor=True)
    result.monitors.layers[3].attention_logit_max

A run that is going to diverge may show it here first: logits of attention that grow towards 1e4, a log Z that moves
away from 0, updates out of proportion to their weights (Wortsman et al. 2023, arXiv 2309.14322).

Attention's logits come from a forward pass of their own, over the first sequence of each rank, through the model's own
layers, whose op for attention is exchanged for one that looks on. Gradients and updates are seen where torch's AdamW
makes them, in the tensors that it holds on this rank: whole parameters, or ZeRO's flat slices of them. An update
follows from the moments, so that no weights are kept from before it, and only sums of squares travel between ranks.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megacl.kernels import Kernels

LOGIT_ALARM = 1e3
"""Attention's largest logit that is warned about: runs diverge at about 1e4 (arXiv 2309.14322)."""
_SCORES = 2**24
"""Logits of attention that exist at one time."""
_ELEMENTS = 2**24
"""Elements of a parameter whose update is worked out at one time."""


@dataclass(frozen=True)
class PartMonitor:
    """A part of the model: the embedding, a layer, the last norm, the head. nan where the update was skipped."""

    grad_norm: float
    """Of its part of the whole gradient, before clipping."""
    update_to_weight: float
    """|what the update added| / |weights before it|, decay included."""


@dataclass(frozen=True)
class LayerMonitor(PartMonitor):
    attention_logit_max: float
    """The largest scaled product of a query with a key that it sees, in the first sequence of each rank."""


@dataclass(frozen=True)
class Monitors:
    """The same on every rank."""

    layers: tuple[LayerMonitor, ...]
    others: dict[str, PartMonitor]
    """By the first word of their parameters' names: embed, final_norm, and head where it is not the embedding."""

    def record(self) -> dict[str, Any]:
        """As it stands in metrics.jsonl."""
        return {
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            **{name: dataclasses.asdict(part) for name, part in self.others.items()},
        }

    def alarm(self) -> str | None:
        """What is to be warned about, or None."""
        largest = [layer.attention_logit_max for layer in self.layers]
        if not any(logit > LOGIT_ALARM for logit in largest):  # what is not a number is for the loss to tell
            return None
        largest = [logit if logit > LOGIT_ALARM else 0.0 for logit in largest]
        return (
            f"attention's largest logit is {max(largest):.4g}, in layer {largest.index(max(largest))}, and runs in "
            "which it reaches 1e4 diverge; lower max_lr, or give a new model a qk_norm."
        )


def part_of(name: str) -> str:
    """The part that a parameter belongs to: "layers.3" of "layers.3.mlp.down.weight", or "embed" of "embed.weight"."""
    words = name.split(".")
    return ".".join(words[:2]) if words[0] == "layers" else words[0]


def assemble(parts: list[str], sums: NDArray[np.float64], grad_norm: float, logits: list[float]) -> Monitors:
    """sums: [3, parts], of the squares of gradients, updates and weights, over all ranks; see `UpdateWatch`.

    The optimizer is given gradients that are clipped, and in fp16 scaled, so that the sums of their squares only say
    how the norm of the whole, grad_norm, is shared by the parts; nan where the update was skipped.
    """
    whole = sums[0].sum()
    found = {}
    for part, (gradient, update, weight) in zip(parts, sums.T.tolist(), strict=True):
        share = gradient / whole if whole else 0.0
        ratio = math.sqrt(update / weight) if weight else 0.0
        found[part] = PartMonitor(grad_norm * math.sqrt(share), ratio if math.isfinite(grad_norm) else math.nan)
    layers = tuple(
        LayerMonitor(**dataclasses.asdict(found.pop(f"layers.{index}")), attention_logit_max=largest)
        for index, largest in enumerate(logits)
    )
    return Monitors(layers, found)


# ---------------------------------------------------------------------------------------------- attention's logits


def watched(ops: Kernels, largest: list[Tensor]) -> Kernels:
    """The same ops, whose attention also appends the largest of its logits, one tensor [] a call."""

    def attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, scale: float) -> Tensor:
        largest.append(largest_logit(q_BHTE, k_BKTE, scale))
        return ops.attention(q_BHTE, k_BKTE, v_BKTE, scale)

    def document_attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, bounds_D: Tensor, scale: float) -> Tensor:
        largest.append(largest_logit(q_BHTE, k_BKTE, scale, bounds_D))
        return ops.document_attention(q_BHTE, k_BKTE, v_BKTE, bounds_D, scale)

    return dataclasses.replace(ops, attention=attention, document_attention=document_attention, rotary_attention=None)


def largest_logit(
    q_BHTE: Tensor, k_BKTE: Tensor, scale: float, bounds_D: Tensor | None = None, *, scores: int = _SCORES
) -> Tensor:
    """max of scale q k^T over each query's own place and those before it, inside its document where there are bounds.

    Arguments as `Kernels.attention` and `document_attention` take them; scores: how many products exist at one time, at
    least those of one query. In fp32 or wider, as the kernels hold them. Returns [].
    """
    batch, heads, length, _ = q_BHTE.shape
    kv_heads = k_BKTE.shape[1]
    wide = torch.promote_types(q_BHTE.dtype, torch.float32)
    q_BKGTE = q_BHTE.to(wide).view(batch, kv_heads, heads // kv_heads, length, -1)
    k_BKET = k_BKTE.to(wide).mT
    places_T = torch.arange(length, device=q_BHTE.device)
    first_BT = torch.zeros(batch, length, dtype=torch.long, device=q_BHTE.device)
    if bounds_D is not None:
        rows_B = torch.arange(batch, device=q_BHTE.device)[:, None] * length
        document_BT = torch.searchsorted(bounds_D.long(), rows_B + places_T, right=True) - 1
        first_BT = bounds_D.long()[document_BT] - rows_B
    block = max(1, scores // (batch * heads * length))
    found = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        products = q_BKGTE[:, :, :, start:stop].flatten(2, 3) @ k_BKET[..., :stop]
        seen_BQT = (places_T[:stop] <= places_T[start:stop, None]) & (places_T[:stop] >= first_BT[:, start:stop, None])
        products = products.view(batch, kv_heads, -1, stop - start, stop)
        found.append(products.masked_fill(~seen_BQT[:, None, None], -torch.inf).amax())
    return torch.stack(found).amax() * scale


# ---------------------------------------------------------------------------------------------- gradients and updates


@dataclass(frozen=True)
class Slice:
    """Where a parameter, or a rank's part of it, lies in a tensor that the optimizer steps."""

    master: Tensor
    start: int
    size: int
    name: str
    """The parameter's."""
    offset: int = 0
    """Which of the parameter's elements, row by row, is the first: of its tensor-parallel part, where it is cut."""


class UpdateWatch:
    """Sees the update that an AdamW makes while this is open: sums of squares of gradient, update and weights, by part.

    sums: float64 [3, parts] on the device, over the slices that are given; zeros where no update was made.
    """

    def __init__(
        self, adam: torch.optim.AdamW, slices: Iterable[Slice], parts: list[str], device: torch.device
    ) -> None:
        self._adam = adam
        self._slices: dict[Tensor, list[tuple[Slice, int]]] = {}
        for piece in slices:
            self._slices.setdefault(piece.master, []).append((piece, parts.index(part_of(piece.name))))
        self.sums = torch.zeros(3, len(parts), dtype=torch.float64, device=device)

    def __enter__(self) -> "UpdateWatch":
        self._hook = self._adam.register_step_post_hook(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    @torch.no_grad()
    def _look(self, adam: torch.optim.Optimizer, *_: object) -> None:
        # ZeRO steps its flat tensors one after another: those at hand have a gradient.
        for group in adam.param_groups:
            for master in group["params"]:
                if master.grad is None:
                    continue
                state = adam.state[master]
                tensors = [tensor.flatten() for tensor in (master.grad, master, state["exp_avg"], state["exp_avg_sq"])]
                for piece, part in self._slices.get(master, ()):
                    end = piece.start + piece.size
                    for start in range(piece.start, end, _ELEMENTS):
                        chunk = slice(start, min(start + _ELEMENTS, end))
                        self._add(part, group, state["step"], *(tensor[chunk] for tensor in tensors))

    def _add(
        self, part: int, group: dict[str, Any], step: Tensor, gradient: Tensor, weight: Tensor, m: Tensor, v: Tensor
    ) -> None:
        """w <- (1 - lr decay) w - lr m^ / (sqrt(v^) + eps) was made of it (arXiv 1711.05101, algorithm 2)."""
        beta1, beta2 = group["betas"]
        decay = group["lr"] * group["weight_decay"]
        direction = m / ((v / (1 - beta2**step)).sqrt_().add_(group["eps"]) * (1 - beta1**step)) * group["lr"]
        before = (weight + direction) / (1 - decay)
        update = direction.add_(before, alpha=decay)
        for row, values in enumerate((gradient, update, before)):
            self.sums[row, part] += torch.linalg.vector_norm(values).double().square()
