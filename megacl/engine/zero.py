"""The DeepSpeed engine: ZeRO over the ranks of a run."""

import contextlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megacl.config import EngineConfig, OptimizerConfig
from megacl.engine import adapter
from megacl.engine.arithmetic import dtype_of
from megacl.engine.base import Engine, StepResult, load_checked
from megacl.engine.loss_scale import too_small
from megacl.engine.monitors import Slice
from megacl.engine.replicas import compare_replicas
from megacl.kernels import Kernels
from megacl.model.gpt import GPT
from megacl.optimizer import build_optimizer
from megacl.parallel.ranks import Ranks
from megacl.parallel.tensor import gather, shard_of, take_part


class DeepSpeedEngine(Engine):
    """ZeRO, stage 0 to 3, over the ranks that hold the same part of the layers: gradients averaged, state sharded."""

    def __init__(
        self, model: GPT, ops: Kernels, config: EngineConfig, optimizer: OptimizerConfig, ranks: Ranks
    ) -> None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        adapter.start(config, ranks)
        fresh = model.embed.weight.is_meta
        if fresh:
            dtype = dtype_of(config.precision)

            def finish(module: nn.Module) -> None:
                if config.zero_stage == 3:
                    adapter.partition(module, dtype, ranks)
                else:
                    module.to(dtype)

            model.materialize(device, part=take_part, finish=finish)
        self._deepspeed = adapter.initialize(
            model,
            build_optimizer(model, optimizer, width_ratio=model.config.width_ratio),
            config,
            max_grad_norm=optimizer.max_grad_norm,
            ranks=ranks,
        )
        self._shards = {name: shard for name, each in model.named_parameters() if (shard := shard_of(each))}
        if fresh and config.half:  # the masters were made from the rounded weights
            adapter.import_parameters(
                self._deepspeed, lambda name, shape: {"weight": self._part(name, model.initial(name))}, step=0
            )
        super().__init__(model, self._deepspeed, ops, config, optimizer, device=device, ranks=ranks)

    @property
    def _adam(self) -> torch.optim.AdamW:
        return adapter.adam_of(self._deepspeed)

    def _slices(self) -> Iterator[Slice]:
        # At stage 0 every replica steps everything, so the first one's counts; of a tensor-parallel group, the first
        # rank's where all of it have the whole.
        first = self._ranks.rank < self._ranks.tp_size
        for piece in adapter.slices_of(self._deepspeed) if first or self._config.zero_stage > 0 else ():
            if self._ranks.tp_rank == 0 or piece.name in self._shards:
                yield piece

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        self._deepspeed.backward(loss)

    def _update(self, sums: Tensor, skip_above: float) -> StepResult:
        mean = self._ranks.sum(np.array(sums.tolist())) / self._ranks.world_size
        loss, log_z = float(mean[0]), math.sqrt(mean[1])
        if loss > skip_above or not math.isfinite(loss):
            norm = float(_norm(self._model, self._ranks)) if self._config.zero_stage == 0 else math.nan
            adapter.drop_gradient(self._deepspeed)
            if self._config.precision == "fp16" and not loss > skip_above:
                with _scale_too_small():
                    adapter.lower_loss_scale(self._deepspeed)
            return StepResult(loss, norm, applied=False, log_z=log_z)
        if self._config.zero_stage == 0:
            # DeepSpeed clips here, but does not say to what, and would step with a gradient that is not finite.
            norm = float(_norm(self._model, self._ranks))
            if not math.isfinite(norm):
                adapter.drop_gradient(self._deepspeed)
                return StepResult(loss, norm, applied=False, log_z=log_z)
            self._deepspeed.step()
            return StepResult(loss, norm, applied=True, log_z=log_z)
        with _scale_too_small():
            self._deepspeed.step()
        applied = bool(self._deepspeed.was_step_applied())
        if not applied:  # with an optimizer on the host, DeepSpeed adds the next gradient to it
            adapter.drop_gradient(self._deepspeed)
        return StepResult(loss, float(self._deepspeed.get_global_grad_norm()), applied=applied, log_z=log_z)

    @property
    def loss_scale(self) -> tuple[float, int] | None:
        return adapter.loss_scale(self._deepspeed) if self._config.precision == "fp16" else None

    def reset_optimizer(self) -> None:
        adapter.reset_moments(self._deepspeed)
        self._updates = 0

    def export_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        if self._config.compare_replicas_every is not None:  # nothing is saved of replicas that differ
            compare_replicas(self._model, self._ranks)
        for name, state in adapter.export_parameters(self._deepspeed, with_moments=self._updates > 0):
            if shard := self._shards.get(name):
                state = {key: shard.join(gather(part, self._ranks.tp_group)) for key, part in state.items()}
            yield name, state

    def import_state(
        self, load: Callable[[str], dict[str, Tensor]], *, optimizer_step: int, loss_scale: tuple[float, int] | None
    ) -> None:
        def checked(name: str, shape: torch.Size) -> dict[str, Tensor]:
            shard = self._shards.get(name)
            loaded = load_checked(load, name, shard.whole_shape(shape) if shard else shape)
            return {key: self._part(name, whole) for key, whole in loaded.items()}

        adapter.import_parameters(self._deepspeed, checked, step=optimizer_step)
        self._updates = optimizer_step
        if loss_scale is not None and self._config.precision == "fp16":
            adapter.set_loss_scale(self._deepspeed, *loss_scale)

    def _part(self, name: str, whole: Tensor) -> Tensor:
        """What of a parameter's whole value lies on this rank, before ZeRO shards it."""
        shard = self._shards.get(name)
        return shard.take(whole) if shard else whole


@contextlib.contextmanager
def _scale_too_small() -> Iterator[None]:
    """Says in our words that fp16's loss scale cannot be lowered any more."""
    try:
        yield
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        raise too_small() from None


def _norm(model: GPT, ranks: Ranks) -> Tensor:
    """The norm of the whole gradient; of what the ranks of a tensor-parallel group hold alike, the first one's."""
    own = [
        parameter.grad
        for parameter in model.parameters()
        if parameter.grad is not None and (ranks.tp_rank == 0 or shard_of(parameter))
    ]
    squares = nn.utils.get_total_norm(own).square()
    if ranks.tp_size > 1:
        dist.all_reduce(squares, group=ranks.tp_group)
    return squares.sqrt()
