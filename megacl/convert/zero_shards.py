"""Parameters out of the files in which DeepSpeed's ZeRO keeps them cut up: fp32 masters, by the parameters' names.

    shards = open_shards(files, folder)                 # model-parallel rank -> parameters
    shards[0]["gpt_neox.embed_in.weight"].read()        # one parameter, of the parts of its file that hold it

Stages 1 and 2 lay the parameters of an optimizer's group end to end and give each data-parallel rank R an equal part of
that, so that a parameter may lie on two ranks. Stage 3 cuts each parameter into equal parts, padded with zeros, and
lays a rank's parts end to end. The order is that of `param_shapes` in the files of the module. A frozen parameter has
no master: it stands whole in the module's file, or at stage 3 cut alike in each rank's. Layout as in DeepSpeed's
utils/zero_to_fp32.py, runtime/zero/ and runtime/bf16_optimizer.py of 0.19.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacl.convert.parts import Part
from megacl.convert.pickled import PickledFiles
from megacl.errors import ConversionError

_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_CUT_MODULE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_MODULE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_EXPERTS = re.compile(r"layer_\d+_expert_\d+_.*\.pt")

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Piece:
    """A flat tensor in a file, of which the first `length` numbers count."""

    file: Path
    keys: Key
    length: int


@dataclass(frozen=True)
class Span:
    """Flat pieces laid end to end."""

    files: PickledFiles
    pieces: tuple[Piece, ...]

    @property
    def length(self) -> int:
        return sum(piece.length for piece in self.pieces)

    def read(self, begin: int, end: int) -> Tensor:
        """The numbers from begin to end; only the pieces that hold them are read."""
        found, at = [], 0
        for piece in self.pieces:
            first, last = max(begin - at, 0), min(end - at, piece.length)
            if first < last:
                found.append(self.files.tensor(piece.file, piece.keys, span=slice(first, last)))
            at += piece.length
        return torch.cat(found) if found else torch.empty(0)


@dataclass(frozen=True)
class ZeroFiles:
    """The files of a folder, by (data-parallel rank, model-parallel rank), or by model-parallel rank."""

    optimizer: Mapping[tuple[int, int], Path]
    cut_modules: Mapping[tuple[int, int], Path]
    modules: Mapping[int, Path]

    @property
    def model_ranks(self) -> list[int]:
        return sorted({*self.modules, *(rank for _, rank in (*self.optimizer, *self.cut_modules))})

    def all(self) -> list[Path]:
        return sorted({*self.optimizer.values(), *self.cut_modules.values(), *self.modules.values()})


def find_files(folder: Path) -> ZeroFiles:
    """DeepSpeed's files in the folder of one step; ConversionError for experts."""
    optimizer, cut_modules, modules = {}, {}, {}
    for file in sorted(folder.iterdir()):
        if _EXPERTS.fullmatch(file.name):
            raise ConversionError(f"{file}: a part of experts; megacl's model has none.")
        if match := _OPTIMIZER.fullmatch(file.name):
            optimizer[int(match[1]), int(match[2])] = file
        elif match := _CUT_MODULE.fullmatch(file.name):
            cut_modules[int(match[1]), int(match[2])] = file
        elif match := _MODULE.fullmatch(file.name):
            modules[int(match[1])] = file
    return ZeroFiles(optimizer, cut_modules, modules)


def open_shards(found: ZeroFiles, files: PickledFiles) -> dict[int, dict[str, Part]]:
    """For each model-parallel rank, every parameter by its name; ConversionError where files are missing or disagree.

    Without the optimizer's files (stage 0, or removed) they are the module's own weights.
    """
    return {rank: _parameters(found, files, rank) for rank in found.model_ranks}


def _parameters(found: ZeroFiles, files: PickledFiles, rank: int) -> dict[str, Part]:
    optimizer = _in_order(found.optimizer, rank)
    cut = _in_order(found.cut_modules, rank)
    module = cut[0] if cut else found.modules.get(rank)
    if module is None:
        raise ConversionError(
            f"{optimizer[0].parent}: mp_rank_{rank:02d}_model_states.pt is missing, without which nothing says where "
            "each parameter lies. Copy it again."
        )
    state = files.open(module)
    if not optimizer:
        if cut or not isinstance(state.get("module"), dict):
            raise ConversionError(f"{module}: its weights are in the optimizer's files, and there are none beside it.")
        return dict(_module(files, module, state))
    groups = state.get("param_shapes")
    if not groups:
        raise ConversionError(f"{module}: it has no param_shapes, by which the parameters of ZeRO are known.")
    groups = groups if isinstance(groups, list) else [groups]
    inner = files.open(optimizer[0]).get("optimizer_state_dict", {})
    _check_count(optimizer, inner.get("partition_count"))
    # Parameters that were not trained have no masters.
    parameters = dict(_cut_frozen(files, cut, state) if cut else _module(files, module, state))
    if "fp32_flat_groups" in inner:
        parameters |= _stage_3(files, optimizer, groups)
    elif "single_partition_of_fp32_groups" in inner:
        parameters |= _stages_1_and_2(files, optimizer, groups)
    else:
        raise ConversionError(f"{optimizer[0]}: it holds no fp32 weights of ZeRO.")
    shared = state.get("shared_params") or {}
    return parameters | {alias: parameters[stored] for alias, stored in shared.items() if stored in parameters}


def _in_order(files: Mapping[tuple[int, int], Path], rank: int) -> list[Path]:
    """The files of one model-parallel rank, by data-parallel rank."""
    found = {data_rank: file for (data_rank, model_rank), file in files.items() if model_rank == rank}
    for data_rank in range(max(found, default=-1)):
        if data_rank not in found:
            name = next(iter(found.values())).name.replace(f"pp_rank_{next(iter(found))}", f"pp_rank_{data_rank}")
            folder = next(iter(found.values())).parent
            raise ConversionError(f"{folder}: {name} is missing; the checkpoint is not whole. Copy it again.")
    return [found[data_rank] for data_rank in sorted(found)]


def _check_count(optimizer: Sequence[Path], count: Any) -> None:
    counts = set(count) if isinstance(count, list) else {count}
    if counts not in ({None}, {len(optimizer)}):
        raise ConversionError(
            f"{optimizer[0].parent}: the optimizer was cut into {max(counts)} parts, and there are files of "
            f"{len(optimizer)}; the checkpoint is not whole. Copy it again."
        )


def _module(files: PickledFiles, file: Path, state: Mapping[str, Any]) -> Iterator[tuple[str, Part]]:
    """The module's own parameters, in the dtype that it computes with; none where a pipeline keeps them elsewhere."""
    buffers = set(state.get("buffer_names") or ())
    for name, tensor in (state.get("module") or {}).items():
        if isinstance(tensor, Tensor) and name not in buffers:
            yield name, Part(tuple(tensor.shape), tensor.dtype, partial(files.tensor, file, ("module", name)))


def _stages_1_and_2(
    files: PickledFiles, optimizer: Sequence[Path], groups: Sequence[Mapping[str, Sequence[int]]]
) -> Iterator[tuple[str, Part]]:
    spans = [_partitions(files, optimizer, group) for group in range(len(groups))]
    inner = files.open(optimizer[0])["optimizer_state_dict"]
    gaps = inner.get("param_alignment_paddings")
    for group, (shapes, span) in enumerate(zip(groups, spans, strict=True)):
        at = 0
        between = gaps[group] if gaps else [0] * len(shapes)
        for (name, shape), gap in zip(shapes.items(), between, strict=True):
            numel = math.prod(shape)
            yield name, Part(tuple(shape), torch.float32, partial(_read, span, at, at + numel, tuple(shape)))
            at += numel + gap
        aligned = 2 * len(optimizer)  # a group is padded to a multiple of this, and its last part may be without
        if math.ceil(at / aligned) != math.ceil(span.length / aligned):
            raise ConversionError(
                f"{optimizer[0].parent}: group {group} of the optimizer has {span.length} numbers, and its parameters "
                f"{at}. The files are not of one checkpoint, or damaged."
            )


def _partitions(files: PickledFiles, optimizer: Sequence[Path], group: int) -> Span:
    """One group of all ranks, laid end to end; padding is removed where the file has it still (BF16_Optimizer)."""
    pieces = []
    for file in optimizer:
        inner = files.open(file)["optimizer_state_dict"]
        flat = inner["single_partition_of_fp32_groups"][group]
        padding = 0 if "zero_stage" in inner else inner["group_paddings"][group]
        keys = ("optimizer_state_dict", "single_partition_of_fp32_groups", group)
        pieces.append(Piece(file, keys, flat.numel() - padding))
    return Span(files, tuple(pieces))


def _stage_3(
    files: PickledFiles, optimizer: Sequence[Path], groups: Sequence[Mapping[str, Sequence[int]]]
) -> Iterator[tuple[str, Part]]:
    keys: Key = ("optimizer_state_dict", "fp32_flat_groups")
    spans = []
    for file in optimizer:
        flats = files.open(file)["optimizer_state_dict"]["fp32_flat_groups"]
        spans.append(Span(files, tuple(Piece(file, (*keys, n), flat.numel()) for n, flat in enumerate(flats))))
    shapes = {name: tuple(shape) for group in groups for name, shape in group.items()}
    shares = [math.ceil(math.prod(shape) / len(spans)) for shape in shapes.values()]
    if any(span.length < sum(shares) for span in spans):
        raise ConversionError(
            f"{optimizer[0].parent}: a rank's part of the optimizer is shorter than its parameters. The files are not "
            "of one checkpoint, or damaged."
        )
    begins = accumulate(shares, initial=0)
    for (name, shape), share, begin in zip(shapes.items(), shares, begins, strict=False):
        yield name, Part(shape, torch.float32, partial(_gather, spans, begin, share, shape))


def _read(span: Span, begin: int, end: int, shape: tuple[int, ...]) -> Tensor:
    return span.read(begin, end).view(shape)


def _gather(spans: Sequence[Span], begin: int, share: int, shape: tuple[int, ...]) -> Tensor:
    """A parameter of which each rank has an equal share; behind the last there may be padding."""
    return torch.cat([span.read(begin, begin + share) for span in spans])[: math.prod(shape)].view(shape)


def _cut_frozen(files: PickledFiles, cut: Sequence[Path], state: Mapping[str, Any]) -> Iterator[tuple[str, Part]]:
    """Parameters that stage 3 did not train: each rank has an equal share, in the dtype that is computed with."""
    for name, shape in (state.get("frozen_param_shapes") or {}).items():
        keys: Key = ("frozen_param_fragments", name)
        share = math.ceil(math.prod(shape) / len(cut))
        spans = [Span(files, (Piece(file, keys, share),)) for file in cut]
        dtype = state["frozen_param_fragments"][name].dtype
        yield name, Part(tuple(shape), dtype, partial(_gather, spans, 0, share, tuple(shape)))
