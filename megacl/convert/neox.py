"""gpt-neox checkpoints: layer files of a pipeline, or one module a tensor-parallel rank.

A folder SAVE with `latest`, or the folder of one step in it. The weights do not say what the model is; the run's YAML
does, which gpt-neox copies into configs/ beside them (`neox_model`). Layout as in gpt-neox's megatron/checkpointing.py.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from megacl.convert.neox_model import FIRST_LAYER, build
from megacl.convert.opened import OpenedModel, ReadOptions
from megacl.convert.parts import Part
from megacl.convert.pickled import PickledFiles, tensors_of
from megacl.errors import ConversionError

FORMAT = "gpt-neox"
WORDS = "layer_XX-model_YY-model_states.pt, or mp_rank_YY_model_states.pt with configs/*.yml"

_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_SEQUENTIAL = "sequential."


def recognises(path: Path) -> bool:
    """Whether it is a gpt-neox folder: layer files, or modules by rank beside a gpt-neox YAML."""
    folder = tag_folder(path)
    if not folder.is_dir():
        return False
    names = [file.name for file in folder.iterdir()]
    if any(_LAYER_FILE.fullmatch(name) for name in names):
        return True
    return any(_RANK_FILE.fullmatch(name) for name in names) and bool(yaml_files(path))


def tag_folder(path: Path) -> Path:
    """The folder of one step: the one that `latest` names, or the path itself."""
    try:
        named = (path / "latest").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return path
    return path / named if named and (path / named).is_dir() else path


def open_neox(path: Path, options: ReadOptions) -> OpenedModel:
    """Opens a checkpoint; raises ConversionError for what is missing, and for settings that megacl's model lacks."""
    folder = tag_folder(path)
    settings, configs = read_settings(path, options.config)
    files = PickledFiles()
    found = {file.name: file for file in sorted(folder.iterdir())}
    layers = {(int(m[1]), int(m[2])): found[m[0]] for name in found if (m := _LAYER_FILE.fullmatch(name))}
    modules = {int(m[1]): found[m[0]] for name in found if (m := _RANK_FILE.fullmatch(name))}
    ranks = _layer_parts(folder, files, layers, settings) if layers else _module_parts(folder, files, modules, settings)
    sources = [*(layers or modules).values(), *configs]
    return build(path, settings, ranks, options, sources=sources, format=FORMAT)


def yaml_files(path: Path) -> list[Path]:
    """The YAML files of a run: gpt-neox puts them into configs/ in the folder of a step, or beside it."""
    folder = tag_folder(path)
    for place in (folder / "configs", folder, path / "configs", path, folder.parent / "configs"):
        if found := sorted([*place.glob("*.yml"), *place.glob("*.yaml")]):
            return found
    return []


def read_settings(path: Path, config: Path | None) -> tuple[dict[str, Any], list[Path]]:
    """A run's settings, by names with underscores, and the files that they stand in.

    config: a YAML file or a folder of some; None: those of the checkpoint. Several files make one configuration.
    """
    if config is None:
        files = yaml_files(path)
    else:
        files = sorted([*config.glob("*.yml"), *config.glob("*.yaml")]) if config.is_dir() else [config]
    if not files:
        raise ConversionError(f"{path}: no gpt-neox YAML, without which its model is not known; name it with --config.")
    settings: dict[str, Any] = {}
    for file in files:
        try:
            tree = yaml.safe_load(file.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConversionError(f"{file}: not a YAML file: {str(error).splitlines()[0]}.") from None
        if isinstance(tree, dict):
            settings |= {str(name).replace("-", "_"): value for name, value in tree.items()}
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        if not isinstance(settings.get(name), int):
            raise ConversionError(f"{files[0]}: {name} is {settings.get(name)!r}; a gpt-neox YAML has a number there.")
    return settings, files


def _part(files: PickledFiles, file: Path, keys: tuple[str, ...], tensor: Tensor) -> Part:
    return Part(tuple(tensor.shape), tensor.dtype, partial(files.tensor, file, keys))


def tensor_parallel_of(path: Path, settings: Mapping[str, Any], found: int) -> int:
    """The number of tensor-parallel ranks: as the YAML says, else as the files do."""
    said = settings.get("model_parallel_size")
    if said is not None and type(said) is not int:
        raise ConversionError(f"{path}: model_parallel_size is {said!r}; a gpt-neox YAML has a number there.")
    if said is not None and said < found:
        raise ConversionError(
            f"{path}: model_parallel_size is {said}, but there are files of {found} tensor-parallel ranks."
        )
    return said or found


def _layer_parts(
    folder: Path, files: PickledFiles, layers: Mapping[tuple[int, int], Path], settings: Mapping[str, Any]
) -> list[dict[str, Part]]:
    """By rank and name, from layer files; those that the model needs must all be there."""
    count = settings["num_layers"]
    needed = [0, *range(FIRST_LAYER, FIRST_LAYER + count), count + 3]
    if settings.get("no_weight_tying", False):
        needed.append(count + 4)
    parallel = tensor_parallel_of(folder, settings, 1 + max(rank for _, rank in layers))
    if beyond := sorted({layer for layer, _ in layers} - set(needed)):
        kind = "untied" if count + 4 in needed else "tied"
        raise ConversionError(
            f"{folder}: there are files of layer {beyond[0]}, which a model of num_layers {count} with {kind} "
            "embeddings has not. Is it the YAML of this checkpoint?"
        )
    ranks: list[dict[str, Part]] = [{} for _ in range(parallel)]
    for layer in needed:
        for rank, parts in enumerate(ranks):
            file = layers.get((layer, rank))
            if file is None:
                name = f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"
                raise ConversionError(f"{folder}: {name} is missing; the checkpoint is not whole. Copy it again.")
            for keys, tensor in tensors_of(files.open(file)):
                parts[f"{layer}.{'.'.join(keys)}"] = _part(files, file, keys, tensor)
    return ranks


def _module_parts(
    folder: Path, files: PickledFiles, modules: Mapping[int, Path], settings: Mapping[str, Any]
) -> list[dict[str, Part]]:
    """By rank and name, from the module in each rank's file (pipe_parallel_size 0)."""
    if not modules:
        raise ConversionError(f"{folder}: neither layer files nor mp_rank files of gpt-neox.")
    parallel = tensor_parallel_of(folder, settings, 1 + max(modules))
    ranks = []
    for rank in range(parallel):
        file = modules.get(rank)
        if file is None:
            raise ConversionError(
                f"{folder}: mp_rank_{rank:02d}_model_states.pt is missing; the checkpoint is not whole. Copy it again."
            )
        module = files.open(file).get("module")
        if not isinstance(module, dict):
            raise ConversionError(
                f"{file}: it holds no weights, which a pipeline keeps in layer files, and there are none beside it."
            )
        ranks.append(
            {
                name.removeprefix(_SEQUENTIAL): _part(files, file, ("module", name), tensor)
                for name, tensor in module.items()
                if isinstance(tensor, Tensor)
            }
        )
    return ranks
