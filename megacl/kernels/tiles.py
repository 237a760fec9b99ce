"""How the Triton kernels cut a matrix into tiles, one or more for each of a launch's programs.

A tile's sides are powers of two, as Triton's are; what of it lies outside the matrix is masked. Nothing here imports
Triton, and nothing is tuned by trial: a run that chose by a clock would not repeat itself to the bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_ELEMENTS = 2048
"""Of a tile: 16 for each of 128 threads, so that a thread of a GPU has some loads of 16 bytes under way at once."""


@dataclass(frozen=True)
class Tiles:
    """Tiles of rows x columns, both powers of two."""

    rows: int
    columns: int

    @property
    def warps(self) -> int:
        """Groups of 32 threads that share a tile."""
        return min(16, max(1, self.rows * self.columns // 512))


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`, and at least 1."""
    return 1 << max(0, number - 1).bit_length()


def whole_rows(rows: int, columns: int) -> Tiles:
    """Tiles as wide as the matrix, for what reduces over a row."""
    width = power_of_two(columns)
    return Tiles(min(power_of_two(rows), max(1, _ELEMENTS // width)), width)


def any_part(rows: int, columns: int) -> Tiles:
    """Tiles for what works on each element by itself: of several rows, which share what belongs to a column."""
    return whole_rows(rows, min(columns, _ELEMENTS // 4))


def programs_for(work: int, device: torch.device, *, beside: int = 1) -> int:
    """How many programs share `work` tiles that lie below each other, where each takes several: at least 1.

    With the `beside` columns of tiles that makes four for each processor of a GPU; on a CPU, where Triton only
    interprets, four in all, so that they have to share.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(work, 4 * processors // beside))


def refuse_fp64(*tensors: Tensor | None) -> None:
    """Raises ValueError for values that the kernels, which compute in fp32, would make less exact than they are."""
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors):
        raise ValueError("the Triton kernels compute in fp32; give fp64 values to the reference implementation")
