"""Merging checkpoints in the place of decaying the rate: coefficients, and the weighted mean of weights.

    w = decay_over("linear", [700, 800, 900, 1000])     # the mean rate of each interval, as a part of the constant one
    merge_files([...], merge_weights(w), out)           # a weighted mean of four checkpoints' weights

Updates at a constant rate lead from checkpoint theta_0 over theta_1, ... to theta_k. Had the updates between
theta_{i-1} and theta_i been scaled by w_i, as a decay would have done, the last weights would be

    theta_0 + sum_i w_i (theta_i - theta_{i-1}) = sum_j c_j theta_j

    c_0 = 1 - w_1,  c_j = w_j - w_{j+1},  c_k = w_k

The updates are those of the trunk: it is what a decay gives exactly where gradients do not depend on the weights, and
to first order elsewhere. Source: "WSM: Decay-free learning rate schedule via checkpoint merging", arXiv 2507.17634.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from megacl.checkpoint_files import Contents, TensorFiles, file_name
from megacl.config_phase import AnnealShape
from megacl.errors import CheckpointError
from megacl.schedules import SHAPES
from megacl.tensorfile import TensorWriter

MergeShape = Literal[AnnealShape, "mean"]
"""The decay that the weights of a merge imitate; mean: none, all are weighed alike."""

_CHUNK = 2**18
"""Elements that are merged at one time."""

Entries = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of tensors, by name."""


def merge_weights(decay: Sequence[float]) -> list[float]:
    """The coefficients c_0 ... c_k of k + 1 checkpoints under which k intervals count w_1 ... w_k; their sum is 1.

    decay: w_i in [0, 1], none larger than the one before, else ValueError.
    """
    edges = [1.0, *decay, 0.0]
    falls = [earlier - later for earlier, later in itertools.pairwise(edges)]
    if len(edges) < 3 or min(falls) < 0:
        raise ValueError(f"weights of intervals are {[*decay]}; they must lie in [0, 1] and never rise")
    return falls


def decay_over(shape: str, steps: Sequence[int], *, floor: float = 0.0) -> list[float]:
    """w_1 ... w_k: the mean over each interval's updates of a decay from 1, at the first step, to `floor` at the last.

    shape: one of schedules.SHAPES. steps: k + 1 steps at which checkpoints stand, ascending; the intervals between them
    may be of any lengths. floor: in [0, 1], and above 0 for an exponential decay, else ValueError.
    """
    if not (all(first < end for first, end in itertools.pairwise(steps)) and len(steps) > 1):
        raise ValueError(f"steps are {[*steps]}; they must ascend, two or more of them")
    if not 0 <= floor <= 1 or (shape == "exponential" and not floor):
        raise ValueError(f"floor is {floor}; it must lie in [0, 1], and above 0 for an exponential decay")
    begin, span = steps[0], steps[-1] - steps[0]
    rate = SHAPES[shape]
    means = [
        math.fsum(rate((step - begin) / span, max_lr=1.0, min_lr=floor) for step in range(first + 1, end + 1))
        / (end - first)
        for first, end in itertools.pairwise(steps)
    ]
    # Where the decay is nearly flat, a mean may rise, or fall below the floor, by a rounding.
    return [max(floor, mean) for mean in itertools.accumulate(means, min)]


def merge_files(folders: Sequence[Path], coefficients: Sequence[float], out: Path) -> Contents:
    """Writes sum_j c_j theta_j of checkpoints' fp32 weights, computed in fp64, into one file in the folder `out`.

    The checkpoints may have their weights in any numbers of files. A mebibyte of each is in memory at one time.
    Raises CheckpointError, naming the tensor, where one has other tensors than the first, or other shapes.
    """
    files = [TensorFiles(folder) for folder in folders]
    entries = _entries_of(files[0])
    for folder, each in zip(folders, files, strict=True):
        _check_alike(_entries_of(each), entries, folder, folders[0])
    name = file_name("weights", 0, 1)
    with TensorWriter(out / name, entries, hashes=True) as merged:
        for tensor in merged.names:
            merged.write_pieces(tensor, _means(files, coefficients, tensor, math.prod(entries[tensor][1])))
        facts, hashes = merged.close(), merged.hashes()
    return Contents({name: facts}, dict.fromkeys(entries, name), hashes)


def _means(
    files: Sequence[TensorFiles], coefficients: Sequence[float], tensor: str, elements: int
) -> Iterator[torch.Tensor]:
    """The weighted sum of one tensor of all files, piece by piece."""
    for start in range(0, elements, _CHUNK):
        count = min(_CHUNK, elements - start)
        total = torch.zeros(count, dtype=torch.float64)
        for file, coefficient in zip(files, coefficients, strict=True):
            total += coefficient * file.stretch(tensor, start, count).double()
        yield total.float()


def _entries_of(files: TensorFiles) -> Entries:
    return {name: files.entry(name) for name in files.index.weights}


def _check_alike(entries: Entries, first: Entries, path: Path, first_path: Path) -> None:
    for name in {**first, **entries}:
        here, there = (list(each[name][1]) if name in each else "no such tensor" for each in (entries, first))
        if here != there:
            raise CheckpointError(
                f"{path}: {name} is {here}, and in {first_path} it is {there}; only checkpoints of one model merge."
            )
        if entries[name][0] != torch.float32:
            raise CheckpointError(f"{path}: {name} is not fp32.")
