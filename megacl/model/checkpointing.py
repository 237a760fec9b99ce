"""Activation checkpointing: what a layer keeps for its backward pass, and what is computed again there.

    model.checkpointing = {0: FULL, 1: SELECTIVE}      # layers that are not named keep everything

FULL keeps the layer's input alone; the whole layer is computed once more. SELECTIVE keeps the results of matrix
products and of attention as well, and computes again what is cheap: norms, rotary positions, activations (after
Korthikanti et al. 2022, arXiv 2205.05198, section 5, which computes attention again; its scores are not kept today). It
is what torch.compile does of its own accord, so a compiled layer is better left to it.

PyTorch has a selective checkpointing of its own. It demands that every operator comes again in the backward pass as it
came in the forward pass, which under ZeRO-3 does not hold for those that gather and release weights; this one looks
only at the operators whose results it keeps.
"""

from collections import deque
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

Checkpointing = Literal["full", "selective"]
FULL: Checkpointing = "full"
SELECTIVE: Checkpointing = "selective"

_SUM = "megacl::sum_over"
"""Over the ranks of a tensor-parallel group, of a layer's partial product."""
KEPT = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "megacl::onednn_product",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
        "megacl::c_attention",
        _SUM,
    }
)
"""The operators whose results SELECTIVE keeps, by the names under which PyTorch dispatches them.

Products of batches are not among them: those are the scores of an attention that writes them out."""


def run_layer(layer: nn.Module, how: Checkpointing | None, *inputs: Any) -> Any:
    """layer(*inputs), keeping for the backward pass what `how` says; None keeps everything."""
    if how is None:
        return layer(*inputs)
    contexts = _keep_products if how == SELECTIVE else _keep_nothing
    return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""Those of the forward pass, and of the computation in the backward pass."""


def _keep_nothing() -> Contexts:
    return nullcontext(), nullcontext()


def _keep_products() -> Contexts:
    results: deque[Any] = deque()
    return _Keep(results), _GiveBack(results)


@dataclass(frozen=True)
class _Unread:
    """In place of a result that nobody will read: what is given back has its shape."""

    shape: torch.Size


class _Keep(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, results: deque[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._results = results

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator._schema.is_mutable:
            self._save_from(tree_leaves((args, kwargs)))
        result = operator(*args, **(kwargs or {}))
        if operator.name() in KEPT:
            if operator.name() == _SUM:  # of the product before it, whose result nobody reads then
                self._results[-1] = _Unread(self._results[-1].shape)
            self._results.append(tree_map_only(Tensor, Tensor.detach, result))  # with its graph it would hold itself
        return result

    def _save_from(self, written: list[Any]) -> None:
        """Copies what is kept in the memory of these: an operator is about to write there, and will once more.

        ZeRO-3 is why: DeepSpeed's own torch.nn.functional.linear adds the bias in place to the product.
        """
        memory = {each.untyped_storage()._cdata for each in written if isinstance(each, Tensor)}

        def saved(kept: Tensor) -> Tensor:
            return kept.clone() if kept.untyped_storage()._cdata in memory else kept

        for index, kept in enumerate(self._results):
            self._results[index] = tree_map_only(Tensor, saved, kept)

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        if self._results:  # the layer's last product is what it returns, which nothing in it needs
            self._results.pop()


class _GiveBack(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, results: deque[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._results = results

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._results and operator.name() in KEPT:
            kept = self._results.popleft()
            return args[0].new_empty(kept.shape) if isinstance(kept, _Unread) else kept
        return operator(*args, **(kwargs or {}))
