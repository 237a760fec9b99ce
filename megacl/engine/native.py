"""The native engine: plain PyTorch on one device."""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from megacl.config import EngineConfig, OptimizerConfig
from megacl.engine.arithmetic import device_here, dtype_of
from megacl.engine.base import MOMENTS, Engine, StepResult, load_checked
from megacl.engine.loss_scale import LossScale
from megacl.engine.monitors import Slice
from megacl.errors import LaunchError
from megacl.kernels import Kernels
from megacl.model.gpt import GPT
from megacl.optimizer import build_optimizer
from megacl.parallel.ranks import Ranks


class NativeEngine(Engine):
    """Plain PyTorch on one device: the GPU where there is one. On a CPU in fp32 every run is bitwise the same."""

    def __init__(
        self, model: GPT, ops: Kernels, config: EngineConfig, optimizer: OptimizerConfig, ranks: Ranks
    ) -> None:
        if ranks.world_size != 1:
            raise LaunchError(
                f"engine.kind native runs on one device, and {ranks.world_size} ranks were started; "
                "set engine.kind=deepspeed, or start one process."
            )
        device = torch.device(device_here())
        if model.embed.weight.is_meta:
            model.materialize(device)
        super().__init__(model, model.to(device), ops, config, optimizer, device=device, ranks=ranks)
        self._optimizer = build_optimizer(model, optimizer, width_ratio=model.config.width_ratio)
        self._scale = LossScale() if config.precision == "fp16" else None

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self._device.type, dtype_of(self._config.precision), enabled=self._config.half)

    @property
    def _adam(self) -> torch.optim.AdamW:
        return self._optimizer

    def _slices(self) -> Iterator[Slice]:
        for name, parameter in self._model.named_parameters():
            yield Slice(parameter, 0, parameter.numel(), name)

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        torch.autograd.backward(loss if self._scale is None else loss * self._scale.value)

    def _update(self, sums: Tensor, skip_above: float) -> StepResult:
        scale = 1.0 if self._scale is None else self._scale.value
        gradients = [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients) / scale
        bad = ~(torch.isfinite(norm) & torch.isfinite(sums[0]) & (sums[0] <= skip_above))
        # The fused kernel divides the gradient and leaves everything as it is where an update would be bad, so clipping
        # takes no pass of its own, and nothing is read from the device before all of the step has been sent to it.
        factor = torch.full((), scale, device=self._device)
        if (max_norm := self._optimizer_config.max_grad_norm) is not None:
            factor *= ((norm + 1e-6) / max_norm).clamp(min=1.0)
        # The attributes by which torch's GradScaler speaks to a fused optimizer.
        self._optimizer.grad_scale, self._optimizer.found_inf = factor, bad.float()  # type: ignore[attr-defined]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        loss, log_z_squared, grad_norm, skipped = torch.stack([*sums, norm, bad]).tolist()
        if self._scale is not None and not loss > skip_above:
            self._scale.update(overflowed=not math.isfinite(grad_norm + loss))
        return StepResult(loss, grad_norm, applied=not skipped, log_z=math.sqrt(log_z_squared))

    @property
    def loss_scale(self) -> tuple[float, int] | None:
        return None if self._scale is None else (self._scale.value, self._scale.since_overflow)

    def reset_optimizer(self) -> None:
        self._optimizer.state.clear()
        self._updates = 0

    def export_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, parameter in self._model.named_parameters():
            state = self._optimizer.state.get(parameter, {})
            moments = {key: state.get(key, torch.zeros_like(parameter)) for key in MOMENTS}
            whole = {"weight": parameter.detach(), **moments}
            yield name, {key: value.to("cpu", torch.float32, copy=True) for key, value in whole.items()}

    def import_state(
        self, load: Callable[[str], dict[str, Tensor]], *, optimizer_step: int, loss_scale: tuple[float, int] | None
    ) -> None:
        self.reset_optimizer()
        for name, parameter in self._model.named_parameters():
            loaded = load_checked(load, name, parameter.shape)
            with torch.no_grad():
                parameter.copy_(loaded["weight"])
            if optimizer_step > 0:
                self._optimizer.state[parameter] = {
                    # fused AdamW keeps its step count beside the parameter
                    "step": torch.tensor(float(optimizer_step), device=self._device),
                    **{key: loaded[key].to(self._device, copy=True) for key in MOMENTS},
                }
        self._updates = optimizer_step
        if loss_scale is not None and self._scale is not None:
            self._scale = LossScale(*loss_scale)
