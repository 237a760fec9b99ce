"""Megatron-LM checkpoints: torch files by tensor- and pipeline-parallel rank, and the torch_dist folder.

A folder SAVE with `latest_checkpointed_iteration.txt`, or the folder of one iteration in it. The arguments that say
what the model is lie in the files (`megatron_model`). Layout as in Megatron-LM's megatron/training/checkpointing.py and
megatron/core/transformer/transformer_layer.py, read at d98e8a64, and the legacy code before 39ec5ebe.
"""

import json
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megacl.convert.megatron_model import Ranks, build
from megacl.convert.opened import OpenedModel, ReadOptions
from megacl.convert.parts import Part, settings_of
from megacl.convert.pickled import PickledFiles, load, tensors_of
from megacl.errors import ConversionError

FORMAT = "megatron"
WORDS = "mp_rank_TT[_PPP]/model_optim_rng.pt, or metadata.json with .metadata and common.pt"

_RANK_FOLDER = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(_\d{3})?")
_WEIGHTS = "model_optim_rng.pt"
_STACKED = re.compile(r"decoder\.layers\.(?!\d)(.+)")
_UNEVEN = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
    "pipeline_model_parallel_split_rank",
)
"""Arguments under which pipeline stages do not have equal numbers of layers."""


def recognises(path: Path) -> bool:
    """Whether it is a Megatron folder of torch files, or one in the torch_dist format."""
    folder = _iteration_folder(path)
    if not folder.is_dir():
        return False
    return _is_torch_dist(folder) or any(
        _RANK_FOLDER.fullmatch(each.name) and (each / _WEIGHTS).is_file() for each in folder.iterdir()
    )


def _is_torch_dist(folder: Path) -> bool:
    return (folder / "metadata.json").is_file() and any((folder / n).is_file() for n in ("common.pt", ".metadata"))


def _iteration_folder(path: Path) -> Path:
    try:
        named = (path / "latest_checkpointed_iteration.txt").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return path
    return path / ("release" if named == "release" else f"iter_{named:0>7}")


def open_megatron(path: Path, options: ReadOptions) -> OpenedModel:
    """Opens a checkpoint; raises ConversionError for what is missing, and for arguments that megacl's model lacks."""
    folder = _iteration_folder(path)
    if _is_torch_dist(folder):
        return _open_torch_dist(path, folder, options)
    return _open_torch(path, folder, options)


def _arguments(file: Path, state: Any) -> dict[str, Any]:
    arguments = state.get("args") if isinstance(state, dict) else None
    found = arguments if isinstance(arguments, dict) else getattr(arguments, "__dict__", None)
    if not found:
        raise ConversionError(f"{file}: it holds no arguments of Megatron, without which the model is not known.")
    return found


def _open_torch(path: Path, folder: Path, options: ReadOptions) -> OpenedModel:
    places = _rank_files(folder)
    files = PickledFiles()
    first = places[0, 0]
    state = files.open(first)
    arguments = _arguments(first, state)
    tensor_parallel, stages = 1 + max(rank for rank, _ in places), 1 + max(stage for _, stage in places)
    _check_ranks(folder, arguments, places, tensor_parallel, stages)
    if stages > 1:
        for name in _UNEVEN:
            if arguments.get(name):
                raise ConversionError(f"{first}: {name} is {arguments[name]!r}; only equal pipeline stages are read.")
    ranks: Ranks = [{} for _ in range(tensor_parallel)]
    for (rank, stage), file in sorted(places.items()):
        for name, part in _stage_parts(files, file, arguments, stage, stages):
            ranks[rank].setdefault(name, part)  # a copy of the embedding in the last stage comes later
    return build(
        path,
        arguments,
        ranks,
        options,
        sources=list(places.values()),
        format=FORMAT,
        version=float(state.get("checkpoint_version", 0) or 0),
    )


def _rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    """(tensor-parallel rank, pipeline stage) -> file."""
    found = {}
    for each in sorted(folder.iterdir()):
        if match := _RANK_FOLDER.fullmatch(each.name):
            if match[3]:
                raise ConversionError(f"{each}: a part of experts; megacl's model has none.")
            found[int(match[1]), int(match[2] or 0)] = each / _WEIGHTS
    if not found:
        raise ConversionError(f"{folder}: no mp_rank folders of Megatron.")
    return found


def _check_ranks(
    folder: Path, arguments: Mapping[str, Any], places: Iterable[tuple[int, int]], tensor_parallel: int, stages: int
) -> None:
    said = arguments.get("tensor_model_parallel_size", arguments.get("model_parallel_size", tensor_parallel))
    said_stages = arguments.get("pipeline_model_parallel_size", stages)
    for rank in range(max(said, tensor_parallel)):
        for stage in range(max(said_stages, stages)):
            if (rank, stage) not in places:
                name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if max(said_stages, stages) > 1 else "")
                raise ConversionError(f"{folder}: {name} is missing; the checkpoint is not whole. Copy it again.")
    if (tensor_parallel, stages) != (said, said_stages):
        raise ConversionError(
            f"{folder}: files of {tensor_parallel} x {stages} ranks, but its arguments say {said} x {said_stages}."
        )


def _stage_parts(
    files: PickledFiles, file: Path, arguments: Mapping[str, Any], stage: int, stages: int
) -> Iterable[tuple[str, Part]]:
    """The tensors of one file by the names that they have in the whole model: stages count their layers from 0."""
    state = files.open(file)
    chunks = [name for name in state if re.fullmatch(r"model\d*", name)]
    if not chunks:
        raise ConversionError(f"{file}: it holds no model.")
    with settings_of(file):
        each, rest = divmod(arguments["num_layers"], stages * len(chunks))
    if rest:
        raise ConversionError(
            f"{file}: num_layers is {arguments['num_layers']}, which {stages} stages of {len(chunks)} chunks do not "
            "divide."
        )
    for number, chunk in enumerate(sorted(chunks, key=lambda name: int(name.removeprefix("model") or 0))):
        offset = (number * stages + stage) * each
        for keys, tensor in tensors_of(state[chunk], (chunk,)):
            name = _whole_name(".".join(keys[1:]), offset)
            yield name, Part(tuple(tensor.shape), tensor.dtype, partial(files.tensor, file, keys))


def _whole_name(name: str, offset: int) -> str:
    """Without the prefixes of the trees around a name, and with the number that a layer has in the whole model."""
    name = re.sub(r"^(language_model\.)?((encoder|transformer|decoder)\.(?=layers\.|final_))?", "", name)
    return re.sub(r"^layers\.(\d+)\.", lambda match: f"layers.{int(match[1]) + offset}.", name)


def _open_torch_dist(path: Path, folder: Path, options: ReadOptions) -> OpenedModel:
    from megacl.convert.torch_dist import StoredTensors  # a second of imports, which no other start needs

    try:
        backend = json.loads((folder / "metadata.json").read_bytes()).get("sharded_backend")
    except (ValueError, AttributeError):
        raise ConversionError(f"{folder / 'metadata.json'}: not JSON. Copy it again.") from None
    if backend != "torch_dist":
        raise ConversionError(f"{folder}: sharded_backend is {backend!r}; only torch_dist is read.")
    common = folder / "common.pt"
    if not common.is_file():
        raise ConversionError(f"{common}: no such file; the checkpoint is not whole. Copy it again.")
    arguments = _arguments(common, load(common, common))
    stored = StoredTensors(folder)
    parts: dict[str, Part] = {}
    for name, shape in stored.shapes.items():
        if name.startswith(("optimizer.", "rng_state", "rerun_state")):
            continue
        dtype = stored.dtypes[name]
        if match := _STACKED.fullmatch(name):
            for layer in range(shape[0]):
                read = partial(stored.read, name, layer)
                parts[f"layers.{layer}.{match[1]}"] = Part(shape[1:], dtype, read)
        else:
            parts[_whole_name(name, 0)] = Part(shape, dtype, partial(stored.read, name))
    sources = [common, folder / ".metadata", *stored.files]
    return build(path, arguments, [parts], options, sources=sources, format=FORMAT, version=3.0)
