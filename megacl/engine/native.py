"""The native engine: plain PyTorch on one device."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from megacl.config import EngineConfig, OptimizerConfig
from megacl.engine.arithmetic import device_here, dtype_of
from megacl.engine.base import Engine, StepResult
from megacl.engine.gathering import Copy, Room, Stored, copy_at_once, fresh_room, whole_of
from megacl.engine.loss_scale import LossScale
from megacl.engine.monitors import Slice
from megacl.errors import LaunchError
from megacl.kernels import Choice, Kernels
from megacl.model.gpt import GPT
from megacl.optimizer import EagerAdamW, build_optimizer
from megacl.parallel.ranks import Ranks


class NativeEngine(Engine):
    """Plain PyTorch on one device: the GPU where there is one. On a CPU in fp32 every run is bitwise the same."""

    update_choices = (
        Choice("adamw", "fused", "one kernel over all parameters"),
        Choice("clip_grad_norm", "fused", "adamw's kernel divides the gradient, and nothing waits for the norm"),
    )

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
        width_ratio = model.config.width_ratio
        self._optimizer = build_optimizer(model, optimizer, width_ratio=width_ratio, kind=EagerAdamW)
        self._scale = LossScale() if config.precision == "fp16" else None

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self._device.type, dtype_of(self._config.precision), enabled=self._config.half)

    @property
    def _adam(self) -> torch.optim.AdamW:
        return self._optimizer

    def _masters(self) -> list[Tensor]:
        return list(self._model.parameters())

    def _spread_masters(self) -> None:
        """Parameters are their own masters here."""

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

    def export_state(
        self, owners: Mapping[str, int] | None = None, room: Room = fresh_room, copy: Copy = copy_at_once
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, parameter in self._model.named_parameters():
            whole = {"weight": parameter.detach(), **self._optimizer.state.get(parameter, {})}
            state = {key: room(name, key, parameter.shape) for key in self.state_keys}
            for key, into in state.items():
                copy(into, whole[key])
            yield name, state

    def holdings(self) -> dict[str, int]:
        return {name: parameter.numel() for name, parameter in self._model.named_parameters()}

    def _writer(self) -> Callable[[str, nn.Parameter, Mapping[str, Tensor | Stored]], None]:
        return self._write

    @torch.no_grad()
    def _write(self, name: str, parameter: nn.Parameter, state: Mapping[str, Tensor | Stored]) -> None:
        for key, value in state.items():
            (parameter if key == "weight" else self._optimizer.state[parameter][key]).copy_(whole_of(value))

    def _set_loss_scale(self, value: float, since_overflow: int) -> None:
        self._scale = LossScale(value, since_overflow)
