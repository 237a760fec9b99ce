"""Checkpoints that DeepSpeed itself saves, on gloo ranks, of modules whose parameters have any names."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from ranks import arranged
from torch import Tensor, nn
from whole_models import Array

from megacl.config import EngineConfig
from megacl.engine import adapter
from megacl.parallel.ranks import Ranks

Named = dict[str, Array]


class Leaf(nn.Module):
    """The parameters of one place; it computes where ZeRO-3 gathers them."""

    def forward(self) -> Tensor:
        return sum((parameter.float().square().sum() for parameter in self._parameters.values()), torch.zeros(()))


class Tree(nn.Module):
    """Parameters under any dotted names; its loss is the mean of their squares."""

    def __init__(self, arrays: Named) -> None:
        super().__init__()
        for name, array in arrays.items():
            *path, last = name.split(".")
            place: nn.Module = self
            for part in path:
                if part not in place._modules:
                    place.add_module(part, Leaf())
                place = place._modules[part]  # type: ignore[assignment]
            place.register_parameter(last, nn.Parameter(torch.from_numpy(array.copy())))

    def forward(self, scale: Tensor) -> Tensor:
        return scale * sum((leaf() for leaf in self.modules() if isinstance(leaf, Leaf)), torch.zeros(()))


def save_zero(
    ranks: Ranks,
    folder: Path,
    by_tensor_rank: list[Named],
    *,
    stage: int,
    bf16: bool = False,
    steps: int = 0,
    frozen: str = "no such",
    latest: str | None = None,
) -> Named:
    """Saves a checkpoint of the module after some steps; returns its fp32 weights, as DeepSpeed gives them by name.

    by_tensor_rank: the parameters of each tensor-parallel rank. The optimizer has two groups, vectors and matrices.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    arrangement = arranged(ranks, len(by_tensor_rank), 1)
    adapter.start(EngineConfig(kind="deepspeed"), arrangement)
    model = Tree(by_tensor_rank[arrangement.tp_rank])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
        parameter.tensor_model_parallel = len(by_tensor_rank) > 1  # type: ignore[attr-defined]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": [p for p in trained if (p.ndim == 1) == flat], "weight_decay": 0.1} for flat in (True, False)]
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
    }
    mpu = adapter._ModelParallelUnit(arrangement) if len(by_tensor_rank) > 1 else None
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-2)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=mpu)[0]
    for step in range(steps):
        engine.backward(engine(torch.tensor(0.1 + step)))
        engine.step()
    masters = {}
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter) if parameter.requires_grad and stage else None
        masters[name] = None if full is None else np.array(full.detach().float())
    engine.save_checkpoint(str(folder), tag=latest or "global_step3")
    return {name: value for name, value in masters.items() if value is not None}


class Stage(Tree):
    """One layer of a pipeline."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(torch.ones(()))

    @property
    def word_embeddings_weight(self) -> nn.Parameter:
        """What tied layers share, by gpt-neox's name for it."""
        return self.word_embeddings.weight


def save_pipeline(
    ranks: Ranks,
    folder: Path,
    by_tensor_rank: list[dict[int, Named]],
    *,
    tied: bool,
    stages: int = 2,
    bf16: bool = False,
    zero: int = 1,
) -> None:
    """Saves gpt-neox's layers from DeepSpeed's own pipeline, whose layers are numbered as gpt-neox numbers them.

    by_tensor_rank: for each tensor-parallel rank, the parameters of each layer; numbers left out are plain functions.
    """
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    adapter.start(EngineConfig(kind="deepspeed"), ranks)
    parallel = len(by_tensor_rank)
    replicas = ranks.world_size // stages // parallel
    topology = PipeModelDataParallelTopology(num_pp=stages, num_mp=parallel, num_dp=replicas)
    layers = by_tensor_rank[topology.get_coord(ranks.rank).model]

    shared = {"tied_weight_attr": "word_embeddings_weight"}
    specs: list[Any] = [TiedLayerSpec("embed", Stage, layers[0], **shared) if tied else LayerSpec(Stage, layers[0])]
    for number in range(1, max(layers) + 1):
        specs.append(LayerSpec(Stage, layers[number]) if number in layers else _through)
    if tied:
        specs.append(TiedLayerSpec("embed", Stage, layers[0], forward_fn=_tied_head, **shared))
    model = PipelineModule(layers=specs, loss_fn=_mean, topology=topology, partition_method="uniform")
    for parameter in model.parameters():
        parameter.tensor_model_parallel = True
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": zero},
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    engine.save_checkpoint(str(folder), tag="global_step3")


def _through(x: Tensor) -> Tensor:
    return x


def _tied_head(embedding: nn.Module, x: Tensor) -> Tensor:
    return x


def _mean(x: Tensor, target: Tensor) -> Tensor:
    return x.mean()
