"""The DeepSpeed engine: ZeRO over the ranks of a run."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megacl.config import EngineConfig, OptimizerConfig
from megacl.engine import adapter
from megacl.engine.base import Engine, StepResult, load_checked
from megacl.errors import LaunchError
from megacl.kernels import Kernels
from megacl.model.gpt import GPT
from megacl.optimizer import build_optimizer
from megacl.parallel.ranks import Ranks


class DeepSpeedEngine(Engine):
    """ZeRO over all ranks, stage 0 to 3: gradients averaged, state sharded as the stage says."""

    def __init__(
        self, model: GPT, ops: Kernels, config: EngineConfig, optimizer: OptimizerConfig, ranks: Ranks
    ) -> None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        adapter.start(config, ranks)
        fresh = model.embed.weight.is_meta
        if fresh:
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision, torch.float32)

            def finish(module: nn.Module) -> None:
                if config.zero_stage == 3:
                    adapter.partition(module, dtype)
                else:
                    module.to(dtype)

            model.materialize(device, finish=finish)
        self._deepspeed = adapter.initialize(
            model,
            build_optimizer(model, optimizer, width_ratio=model.config.width_ratio),
            config,
            max_grad_norm=optimizer.max_grad_norm,
        )
        if fresh and dtype != torch.float32:  # the masters were made from the rounded weights
            adapter.import_parameters(self._deepspeed, lambda name, shape: {"weight": model.initial(name)}, step=0)
        super().__init__(model, self._deepspeed, ops, config, optimizer, device=device, ranks=ranks)

    @property
    def _param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._deepspeed.optimizer.param_groups
        return groups

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        self._deepspeed.backward(loss)

    def _update(self, sums: Tensor, skip_above: float) -> StepResult:
        mean = self._ranks.sum(np.array(sums.tolist())) / self._ranks.world_size
        loss, log_z = float(mean[0]), math.sqrt(mean[1])
        if loss > skip_above:
            norm = float(_norm(self._model)) if self._config.zero_stage == 0 else math.nan
            self._deepspeed.zero_grad()
            return StepResult(loss, norm, applied=False, log_z=log_z)
        if self._config.zero_stage == 0:
            # DeepSpeed clips here, but does not say to what, and would step with a gradient that is not finite.
            norm = float(_norm(self._model))
            if not math.isfinite(norm):
                self._deepspeed.zero_grad()
                return StepResult(loss, norm, applied=False, log_z=log_z)
            self._deepspeed.step()
            return StepResult(loss, norm, applied=True, log_z=log_z)
        try:
            self._deepspeed.step()
        except Exception as error:
            if "loss scale already at minimum" not in str(error):
                raise
            raise LaunchError(
                "the gradient overflows fp16 even at the smallest loss scale; lower the learning rate or use bf16."
            ) from None
        norm = float(self._deepspeed.get_global_grad_norm())
        return StepResult(loss, norm, applied=bool(self._deepspeed.was_step_applied()), log_z=log_z)

    @property
    def loss_scale(self) -> float | None:
        return float(self._deepspeed.optimizer.loss_scale) if self._config.precision == "fp16" else None

    def reset_optimizer(self) -> None:
        adapter.reset_moments(self._deepspeed)
        self._updates = 0

    def export_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        yield from adapter.export_parameters(self._deepspeed, with_moments=self._updates > 0)

    def import_state(
        self, load: Callable[[str], dict[str, Tensor]], *, optimizer_step: int, loss_scale: float | None
    ) -> None:
        def checked(name: str, shape: torch.Size) -> dict[str, Tensor]:
            return load_checked(load, name, shape)

        adapter.import_parameters(self._deepspeed, checked, step=optimizer_step)
        self._updates = optimizer_step
        if loss_scale is not None and self._config.precision == "fp16":
            self._deepspeed.optimizer.loss_scaler.cur_scale = loss_scale


def _norm(model: GPT) -> Tensor:
    """The norm of the whole gradient."""
    return nn.utils.get_total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
