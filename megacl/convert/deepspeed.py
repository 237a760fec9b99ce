"""DeepSpeed's own checkpoints: fp32 masters of ZeRO 1 to 3 put together, or the module's weights where there are none.

A folder with `latest`, or the folder of one step in it. Parameters have the names of the module that was trained, and
two kinds are known: transformers' models, described by their config.json, and gpt-neox, described by its YAML, whose
parts of tensor-parallel ranks and pipeline stages are merged as in `neox_model`.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from megacl.convert.hf import CONFIG, table_of
from megacl.convert.hf_config import read_config
from megacl.convert.neox import read_settings, tag_folder
from megacl.convert.neox_model import build
from megacl.convert.opened import OpenedModel, ReadOptions
from megacl.convert.parts import Part, assemble
from megacl.convert.pickled import PickledFiles
from megacl.convert.zero_shards import ZeroFiles, find_files, open_shards
from megacl.errors import ConversionError

FORMAT = "deepspeed"
WORDS = "[bf16_]zero_pp_rank_R_mp_rank_MM_optim_states.pt and mp_rank_MM_model_states.pt"

_NEOX_NAME = re.compile(r"(?:sequential\.)?(?:(\d+)|tied_modules\.embed)\.(.+)")
_EMBEDDINGS = ("gpt_neox.embed_in.weight", "model.embed_tokens.weight")
_BUFFERS = r"\.attention\.(bias|masked_bias)$|rotary_emb\.inv_freq$"


def recognises(path: Path) -> bool:
    """Whether DeepSpeed saved it."""
    folder = tag_folder(path)
    return folder.is_dir() and any(file.name.endswith("model_states.pt") for file in folder.iterdir())


def open_deepspeed(path: Path, options: ReadOptions) -> OpenedModel:
    """Opens a checkpoint; raises ConversionError for what is missing, and for a module whose names are not known."""
    folder = tag_folder(path)
    found = find_files(folder)
    if not found.model_ranks:
        raise ConversionError(f"{folder}: no files of DeepSpeed.")
    ranks = open_shards(found, PickledFiles())
    if all(_NEOX_NAME.fullmatch(name) for name in ranks[0]):
        return _open_neox(path, ranks, found, options)
    if len(ranks) > 1:
        raise ConversionError(
            f"{folder}: files of {len(ranks)} model-parallel ranks; only gpt-neox is known by how it cuts its model."
        )
    return _open_transformers(path, ranks[0], found, options)


def _open_neox(
    path: Path, ranks: Mapping[int, Mapping[str, Part]], found: ZeroFiles, options: ReadOptions
) -> OpenedModel:
    """Model-parallel ranks are counted stage by stage, and within one by tensor-parallel rank."""
    settings, configs = read_settings(path, options.config)
    parallel = settings.get("model_parallel_size", 1)
    if not ranks or len(ranks) % parallel or sorted(ranks) != list(range(len(ranks))):
        raise ConversionError(
            f"{path}: files of model-parallel ranks {', '.join(map(str, sorted(ranks)))}; model_parallel_size is "
            f"{parallel}, so that their number must be a multiple of that. Copy the checkpoint again."
        )
    merged: list[dict[str, Part]] = [{} for _ in range(parallel)]
    for rank, parts in ranks.items():
        for name, part in parts.items():
            match = _NEOX_NAME.fullmatch(name)
            assert match is not None, "all names were looked at"
            merged[rank % parallel].setdefault(f"{match[1] or 0}.{match[2]}", part)
    return build(path, settings, merged, options, sources=[*found.all(), *configs], format=FORMAT)


def _open_transformers(
    path: Path, parameters: Mapping[str, Part], found: ZeroFiles, options: ReadOptions
) -> OpenedModel:
    prefix = next((name.removesuffix(end) for name in parameters for end in _EMBEDDINGS if name.endswith(end)), None)
    if prefix is None:
        raise ConversionError(
            f"{path}: its parameters are named {', '.join(sorted(parameters)[:2])} and so on; known are those of "
            "transformers' GPTNeoX, Llama, Mistral, Qwen2 and Qwen3, and of gpt-neox."
        )
    file = options.config or _config_beside(path)
    config = read_config(file)
    table = table_of(config.architecture)
    head = table["head"].theirs[0].format(part="weight")
    tensors = {name.removeprefix(prefix): part for name, part in parameters.items()}
    if "lm_head.weight" in tensors:
        tensors.setdefault(head, tensors.pop("lm_head.weight"))
    if config.model.tie_embeddings:
        tensors.pop(head, None)
    return assemble(
        format=FORMAT,
        path=path,
        model=config.model,
        table=table,
        tensors=tensors,
        sources=[*found.all(), file],
        options=options,
        ignored=_BUFFERS,
        notes=config.notes,
        seq_length=config.seq_length,
    )


def _config_beside(path: Path) -> Path:
    folder = tag_folder(path)
    for place in (folder, path, folder.parent):
        if (place / CONFIG).is_file():
            return place / CONFIG
    raise ConversionError(
        f"{path}: no config.json of transformers, without which its model is not known; name it with --config."
    )
