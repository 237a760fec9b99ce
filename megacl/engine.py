"""Engines: how a step's arithmetic is carried out. `native` on one device, `deepspeed` over the ranks of a run.

    engine = build_engine(model, engine=config.engine, optimizer=config.optimizer, ranks=ranks)
    result = engine.step(batch.tokens, lr)

Both give the same losses; a state exported from one is imported by the other, at any ZeRO stage and number of ranks.
"""

import contextlib
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from megacl import engine_deepspeed
from megacl.config import EngineConfig, OptimizerConfig
from megacl.data.packing import PADDING
from megacl.errors import CheckpointError, LaunchError
from megacl.kernels import IGNORED
from megacl.model.gpt import GPT
from megacl.optimizer import build_optimizer
from megacl.parallel.ranks import Ranks


@dataclass(frozen=True)
class StepResult:
    """What one step did; the same on every rank."""

    loss: float
    """Mean over the targets of the global batch, nats per token, before the update."""
    grad_norm: float
    """Of the whole gradient, before clipping; inf or nan where the gradient is not finite."""
    applied: bool
    """False where the gradient was not finite: the weights are as before. With fp16 that happens now and then, and the
    loss scale has been lowered; with fp32 and bf16 the run has gone wrong."""


class Engine(ABC):
    """A model under training. With several ranks every method must be called on all of them, in the same order."""

    def __init__(
        self, model: GPT, forward: nn.Module, config: EngineConfig, device: torch.device, world_size: int
    ) -> None:
        self._model = model
        self._forward = forward  # the model, or DeepSpeed's engine around it
        self._config = config
        self._device = device
        self._world_size = world_size
        self._updates = 0

    def step(self, tokens: NDArray[np.int64], lr: float, *, targets: int | None = None) -> StepResult:
        """One optimizer step on the global batch of which `tokens`, int64 [rows, T + 1], is this rank's slice.

        Each rank must give as many rows. They are taken micro_batch_size at a time; LaunchError where that does not
        divide them. targets: how many tokens the global batch predicts, where some of its tokens are PADDING; None
        where none is.
        """
        micro_batches = self._micro_batches(tokens)
        # Ranks average their gradients, so each divides by an equal share of all targets, however many are its own.
        share = tokens.shape[0] * (tokens.shape[1] - 1) if targets is None else targets / self._world_size
        loss = torch.zeros((), device=self._device)
        self._forward.train()
        for index, batch_BT in enumerate(micro_batches, start=1):
            inputs_BT, targets_BT = batch_BT[:, :-1], batch_BT[:, 1:]
            if targets is not None:
                # Behind a row's last document nothing looks back, so any input will do but one that begins a document.
                filler = 1 if self._model.document_end == 0 else 0
                inputs_BT = inputs_BT.masked_fill(inputs_BT == PADDING, filler)
                targets_BT = targets_BT.masked_fill(targets_BT == PADDING, IGNORED)
            with self._autocast():
                part = self._forward(inputs_BT, targets_BT) / share
            self._backward(part, last=index == len(micro_batches))
            loss += part.detach()
        result = self._update(loss, lr)
        self._updates += result.applied
        return result

    @torch.no_grad()
    def nats(self, tokens: NDArray[np.int64], targets: NDArray[np.int64]) -> float:
        """Sum of -log p(target) over this rank's rows, both int64 [rows, T], in nats; a target of -100 counts nothing.

        The rows go through the model together. With ZeRO-3 every rank must call it as often.
        """
        self._forward.eval()
        with self._autocast():
            nats: Tensor = self._forward(self._on_device(tokens), self._on_device(targets))
        return nats.item()

    @torch.no_grad()
    def logits(self, tokens: NDArray[np.int64]) -> Tensor:
        """Logits of the position after the last of tokens, int64 [rows, T]: fp32 [rows, vocab_size] on the CPU."""
        self._forward.eval()
        with self._autocast():
            logits_B1V: Tensor = self._forward(self._on_device(tokens), last_only=True)
        return logits_B1V[:, 0].float().cpu()

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: every token must be below it."""
        return self._model.config.vocab_size

    @property
    def optimizer_step(self) -> int:
        """Adam's step: updates applied since its moments were zero."""
        return self._updates

    @property
    @abstractmethod
    def loss_scale(self) -> float | None:
        """The factor on fp16's losses, or None in another precision."""

    @abstractmethod
    def reset_optimizer(self) -> None:
        """Sets the moments and Adam's step to zero."""

    @abstractmethod
    def export_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(name, {"weight", "exp_avg", "exp_avg_sq"}) of one parameter after another, in the order of the model.

        The tensors are whole, fp32, on the CPU, and the caller's to keep; the moments are zeros before the first step.
        A collective: every rank must go through all of it, and only rank 0's tensors are promised to mean anything.
        """

    @abstractmethod
    def import_state(
        self, load: Callable[[str], dict[str, Tensor]], *, optimizer_step: int, loss_scale: float | None
    ) -> None:
        """Goes on from an exported state: `load(name)` gives what `export_state` gave, on every rank.

        With optimizer_step 0 only "weight" is read, and the moments are reset. loss_scale is used in fp16 only; None
        keeps the present one. Raises CheckpointError where a tensor has another shape than the model's.
        """

    @abstractmethod
    def _backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds a micro batch's gradient; `last` where the gradient of the step is then complete."""

    @abstractmethod
    def _update(self, loss: Tensor, lr: float) -> StepResult:
        """Clips and applies the gradient; `loss` is this rank's mean."""

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def stage(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The same tokens, in pinned memory where the device is a GPU, so that copying them there runs beside it.

        They must be kept until the step that takes them has returned. This has not run on a GPU yet; a test of it
        waits for one.
        """
        if self._device.type != "cuda":
            return tokens
        pinned: NDArray[np.int64] = torch.from_numpy(tokens).pin_memory().numpy()
        return pinned

    def _on_device(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _micro_batches(self, tokens: NDArray[np.int64]) -> tuple[Tensor, ...]:
        rows, size = tokens.shape[0], self._config.micro_batch_size or tokens.shape[0]
        if rows % size:
            raise LaunchError(
                f"a rank's share of the global batch is {rows} sequences; it must be a multiple of "
                f"engine.micro_batch_size, {size}: change the global batch, the number of ranks or the micro batch."
            )
        return torch.split(self._on_device(tokens), size)


def build_engine(model: GPT, *, engine: EngineConfig, optimizer: OptimizerConfig, ranks: Ranks) -> Engine:
    """The engine that the configuration asks for, around a model whose weights it takes over.

    Raises LaunchError where the engine cannot run so: native on several ranks, DeepSpeed of another version.
    """
    model.loss_chunk = engine.loss_chunk
    model.checkpoint_layers = engine.activation_checkpointing == "full"
    if engine.compile:
        for layer in model.layers:
            layer.compile()  # the layers share one graph, so it is compiled once
    if engine.kind == "deepspeed":
        return DeepSpeedEngine(model, engine, optimizer, ranks)
    return NativeEngine(model, engine, optimizer, ranks)


class NativeEngine(Engine):
    """Plain PyTorch on one device: the GPU where there is one. On a CPU in fp32 every run is bitwise the same."""

    def __init__(self, model: GPT, config: EngineConfig, optimizer: OptimizerConfig, ranks: Ranks) -> None:
        if ranks.world_size != 1:
            raise LaunchError(
                f"engine.kind native runs on one device, and {ranks.world_size} ranks were started; "
                "set engine.kind=deepspeed, or start one process."
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu" and config.precision != "fp32":
            warnings.warn(
                f"engine.precision {config.precision} on a CPU is many times slower than fp32; there is no GPU here.",
                stacklevel=3,
            )
        super().__init__(model, model.to(device), config, device, ranks.world_size)
        self._max_grad_norm = optimizer.max_grad_norm
        self._optimizer = build_optimizer(model, optimizer)
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self._config.precision]
        return torch.autocast(self._device.type, dtype, enabled=dtype is not None)

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        torch.autograd.backward(self._scaler.scale(loss))

    def _update(self, loss: Tensor, lr: float) -> StepResult:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._scaler.unscale_(self._optimizer)
        norm = _clip(self._model, self._max_grad_norm)
        applied = bool(torch.isfinite(norm) & torch.isfinite(loss))
        if applied:
            self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(loss.item(), norm.item(), applied)

    @property
    def loss_scale(self) -> float | None:
        return self._scaler.get_scale() if self._scaler.is_enabled() else None

    def reset_optimizer(self) -> None:
        self._optimizer.state.clear()
        self._updates = 0

    def export_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, parameter in self._model.named_parameters():
            state = self._optimizer.state.get(parameter, {})
            moments = {key: state.get(key, torch.zeros_like(parameter)) for key in engine_deepspeed.MOMENTS}
            whole = {"weight": parameter.detach(), **moments}
            yield name, {key: value.to("cpu", torch.float32, copy=True) for key, value in whole.items()}

    def import_state(
        self, load: Callable[[str], dict[str, Tensor]], *, optimizer_step: int, loss_scale: float | None
    ) -> None:
        self.reset_optimizer()
        for name, parameter in self._model.named_parameters():
            loaded = _load_checked(load, name, parameter.shape)
            with torch.no_grad():
                parameter.copy_(loaded["weight"])
            if optimizer_step > 0:
                self._optimizer.state[parameter] = {
                    # fused AdamW keeps its step count beside the parameter
                    "step": torch.tensor(float(optimizer_step), device=self._device),
                    **{key: loaded[key].to(self._device, copy=True) for key in engine_deepspeed.MOMENTS},
                }
        self._updates = optimizer_step
        if loss_scale is not None and self._scaler.is_enabled():
            self._scaler = torch.amp.GradScaler(self._device.type, init_scale=loss_scale)


class DeepSpeedEngine(Engine):
    """ZeRO over all ranks, stage 0 to 3: gradients averaged, state sharded as the stage says."""

    def __init__(self, model: GPT, config: EngineConfig, optimizer: OptimizerConfig, ranks: Ranks) -> None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self._deepspeed = engine_deepspeed.initialize(
            model,  # DeepSpeed moves it, after halving it where the precision says so
            build_optimizer(model, optimizer),
            config,
            max_grad_norm=optimizer.max_grad_norm,
            ranks=ranks,
        )
        super().__init__(model, self._deepspeed, config, device, ranks.world_size)
        self._ranks = ranks

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        self._deepspeed.backward(loss)

    def _update(self, loss: Tensor, lr: float) -> StepResult:
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr
        global_loss = float(self._ranks.sum(np.array([loss.item()]))[0] / self._ranks.world_size)
        if self._config.zero_stage == 0:
            # DeepSpeed clips here, but does not say to what, and would step with a gradient that is not finite.
            norm = float(_clip(self._model, None))
            if not math.isfinite(norm):
                self._deepspeed.zero_grad()
                return StepResult(global_loss, norm, applied=False)
            self._deepspeed.step()
            return StepResult(global_loss, norm, applied=True)
        try:
            self._deepspeed.step()
        except Exception as error:
            if "loss scale already at minimum" not in str(error):
                raise
            raise LaunchError(
                "the gradient overflows fp16 even at the smallest loss scale; lower the learning rate or use bf16."
            ) from None
        norm = float(self._deepspeed.get_global_grad_norm())
        return StepResult(global_loss, norm, applied=bool(self._deepspeed.was_step_applied()))

    @property
    def loss_scale(self) -> float | None:
        return float(self._deepspeed.optimizer.loss_scale) if self._config.precision == "fp16" else None

    def reset_optimizer(self) -> None:
        engine_deepspeed.reset_moments(self._deepspeed)
        self._updates = 0

    def export_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        yield from engine_deepspeed.export_parameters(self._deepspeed, with_moments=self._updates > 0)

    def import_state(
        self, load: Callable[[str], dict[str, Tensor]], *, optimizer_step: int, loss_scale: float | None
    ) -> None:
        def load_checked(name: str, shape: torch.Size) -> dict[str, Tensor]:
            return _load_checked(load, name, shape)

        engine_deepspeed.import_parameters(self._deepspeed, load_checked, step=optimizer_step)
        self._updates = optimizer_step
        if loss_scale is not None and self._config.precision == "fp16":
            self._deepspeed.optimizer.loss_scaler.cur_scale = loss_scale


def _clip(model: GPT, max_norm: float | None) -> Tensor:
    """The norm of the whole gradient, which is scaled down to max_norm where that is less."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm


def _load_checked(load: Callable[[str], dict[str, Tensor]], name: str, shape: torch.Size) -> dict[str, Tensor]:
    loaded = load(name)
    for key, value in loaded.items():
        if value.shape != shape:
            raise CheckpointError(
                f"{name} ({key}) is {list(value.shape)} in the checkpoint and {list(shape)} in the model; "
                "the checkpoint is another model's."
            )
    return loaded
