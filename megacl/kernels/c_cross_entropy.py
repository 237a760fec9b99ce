"""The chunked cross-entropy of a linear layer, whose softmax is cross_entropy.c's: a CPU's, in fp32.

A row of logits is read from memory once and written once; what lies between happens in the cache. In plain PyTorch it
is five passes over the chunk.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from megacl.kernels import c_library, chunked, onednn
from megacl.kernels.reference import IGNORED

# Not torch.library.custom_op: its first call imports the compiler, which takes two seconds.
torch.library.define(
    "megacl::c_cross_entropy",
    "(Tensor(a!) logits, Tensor targets, float z_loss, float scale, bool differentiate) -> (Tensor, Tensor)",
)


@torch.library.impl("megacl::c_cross_entropy", "CPU")
def _cross_entropy(
    logits_NV: Tensor, targets_N: Tensor, z_loss: float, scale: float, differentiate: bool
) -> tuple[Tensor, Tensor]:
    """(nats_N, squares_N) of logits in fp32, which become their gradient where that is wanted; both contiguous.

    Raises ValueError where there is not an int64 target to each row, IndexError where one is none of the classes.
    """
    if targets_N.dtype != torch.int64 or targets_N.shape != logits_NV.shape[:1]:
        raise ValueError(
            f"logits of shape {[*logits_NV.shape]} want as many targets of int64, "
            f"not {[*targets_N.shape]} of {targets_N.dtype}"
        )
    nats_N, squares_N = (logits_NV.new_empty(logits_NV.shape[0]) for _ in range(2))
    outside = c_library.load().cross_entropy(
        *(ctypes.c_int64(size) for size in logits_NV.shape),
        *c_library.pointers(logits_NV, targets_N),
        ctypes.c_int64(IGNORED),
        ctypes.c_float(z_loss),
        ctypes.c_float(scale),
        differentiate,
        *c_library.pointers(nats_N, squares_N),
        torch.get_num_threads(),
    )
    if outside:
        raise IndexError(f"a target is none of the {logits_NV.shape[1]} classes")
    return nats_N, squares_N


@torch.library.register_fake("megacl::c_cross_entropy")  # type: ignore[untyped-decorator]
def _cross_entropy_shape(
    logits_NV: Tensor, targets_N: Tensor, z_loss: float, scale: float, differentiate: bool
) -> tuple[Tensor, Tensor]:
    return logits_NV.new_empty(logits_NV.shape[0]), logits_NV.new_empty(logits_NV.shape[0])


def _softmax(
    logits: Tensor, targets: Tensor, z_loss: float, scale: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`chunked.Softmax`; what is not in fp32 is PyTorch's."""
    if logits.dtype != torch.float32:
        return chunked.softmax(logits, targets, z_loss, scale)
    nats_N, squares_N = torch.ops.megacl.c_cross_entropy(
        logits, targets.long().contiguous(), z_loss, scale or 0.0, scale is not None
    )
    return nats_N.sum(), squares_N.sum(), None if scale is None else logits


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, chunk: int, z_loss: float) -> Tensor:
    """`Kernels.linear_cross_entropy`, holding the logits of at most `chunk` tokens."""
    product = onednn.product if onednn.is_faster() else F.linear
    return chunked.linear_cross_entropy(
        x_ND, weight_VD, targets_N, chunk=chunk, z_loss=z_loss, softmax=_softmax, product=product
    )
