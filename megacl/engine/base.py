"""What every engine is: a model under training, its step, and its state as whole tensors."""

import contextlib
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from megacl.config import EngineConfig, OptimizerConfig
from megacl.data.packing import PADDING
from megacl.engine.monitors import Monitors, Slice, UpdateWatch, assemble, part_of, watched
from megacl.engine.replicas import compare_replicas
from megacl.errors import CheckpointError, LaunchError
from megacl.kernels import IGNORED, Kernels
from megacl.model.gpt import GPT
from megacl.model.layers import Attention
from megacl.optimizer import set_rates
from megacl.parallel.apply import parallel_kernels
from megacl.parallel.ranks import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The names of Adam's moments, in torch's optimizer and in checkpoints."""


@dataclass(frozen=True)
class StepResult:
    """What one step did; the same on every rank."""

    loss: float
    """Mean over the targets of the global batch, nats per token, before the update."""
    grad_norm: float
    """Of the whole gradient, before clipping; inf or nan where the gradient is not finite. Under ZeRO 1 to 3 nan, too,
    where the loss was not finite or above `skip_above`."""
    applied: bool
    """False where the weights are as before: the loss or the gradient was not finite, or the loss above `skip_above`.
    With fp16 it happens now and then, and the loss scale has been lowered."""
    log_z: float
    """The root of the mean square of log Z over the targets, Z the sum of the exponentials of a token's logits."""
    monitors: Monitors | None = None
    """Where they were asked for."""


class Engine(ABC):
    """A model under training. With several ranks every method must be called on all of them, in the same order."""

    kernels: Kernels
    """What computes each op."""
    notices: list[str]
    """What a user should know of how it computes here."""

    def __init__(
        self,
        model: GPT,
        forward: nn.Module,
        ops: Kernels,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        *,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self._model = model
        self._forward = forward  # the model, or DeepSpeed's engine around it
        self._ops = ops  # of one device; the model may have others where ranks share its work
        self._config = config
        self._optimizer_config = optimizer
        self._device = device
        self._ranks = ranks
        self._updates = 0
        self._steps = 0

    def step(
        self,
        tokens: NDArray[np.int64],
        lr: float,
        *,
        targets: int | None = None,
        weight_decay: float | None = None,
        skip_above: float = math.inf,
        monitor: bool = False,
    ) -> StepResult:
        """One optimizer step on the global batch of which `tokens`, int64 [rows, T + 1], is this rank's slice.

        Each rank must give as many rows. They are taken micro_batch_size at a time; LaunchError where that does not
        divide them, DivergedError where replicas that were due to be compared differ. targets: how many tokens the
        global batch predicts, where some of its tokens are PADDING; None where none is. weight_decay: the part that the
        update takes away from each matrix; None for AdamW's own, lr x optimizer.weight_decay. skip_above: with a loss
        above it the weights stay as they are. monitor: look inside.
        """
        micro_batches = self._micro_batches(tokens)
        every = self._config.compare_replicas_every
        if every is not None and self._steps % every == 0:
            compare_replicas(self._model, self._ranks)
        self._steps += 1
        # Ranks average their gradients, so each divides by an equal share of all targets, however many are its own.
        all_targets = tokens.shape[0] * (tokens.shape[1] - 1) * self._ranks.dp_size if targets is None else targets
        share = all_targets / self._ranks.replica_size
        padded = targets is not None
        logits = self._largest_logits(micro_batches[0][:1], padded) if monitor else None
        sums = torch.zeros(3, device=self._device)
        self._forward.train()
        for index, batch_BT in enumerate(micro_batches, start=1):
            inputs_BT, targets_BT = self._inputs_and_targets(batch_BT, padded)
            with self._autocast():
                part = self._forward(inputs_BT, targets_BT) / share
            self._backward(part[0], last=index == len(micro_batches))
            sums += part.detach()
        set_rates(self._adam.param_groups, self._optimizer_config, lr, weight_decay)
        if logits is None:
            result = self._update(sums[1:], skip_above)
        else:
            result = self._watched_update(sums[1:], skip_above, logits)
        self._updates += result.applied
        return result

    def _inputs_and_targets(self, batch_BT: Tensor, padded: bool) -> tuple[Tensor, Tensor]:
        """What the model takes of rows of T + 1 tokens."""
        inputs_BT, targets_BT = batch_BT[:, :-1], batch_BT[:, 1:]
        if padded:
            # Behind a row's last document nothing looks back, so any input will do but one that begins a document.
            filler = 1 if self._model.document_end == 0 else 0
            inputs_BT = inputs_BT.masked_fill(inputs_BT == PADDING, filler)
            targets_BT = targets_BT.masked_fill(targets_BT == PADDING, IGNORED)
        return inputs_BT, targets_BT

    @torch.no_grad()
    def _largest_logits(self, row_1T: Tensor, padded: bool) -> Tensor:
        """The largest of attention's logits in each layer, [layers], over one row of T + 1 tokens."""
        largest: list[Tensor] = []
        as_written = torch.compiler.set_stance("force_eager") if self._config.compile else contextlib.nullcontext()
        attentions = {module: module.ops for module in self._model.modules() if isinstance(module, Attention)}
        for attention in attentions:
            attention.ops = parallel_kernels(watched(self._ops, largest), self._ranks)
        self._forward.eval()
        try:
            with self._autocast(), as_written:
                self._forward(*self._inputs_and_targets(row_1T, padded))
        finally:
            for attention, ops in attentions.items():
                attention.ops = ops
        return torch.stack(largest)

    def _watched_update(self, sums: Tensor, skip_above: float, logits: Tensor) -> StepResult:
        """`_update`, and what there was to see of it, beside attention's logits [layers] on this rank."""
        parts = list(dict.fromkeys(part_of(name) for name, _ in self._model.named_parameters()))
        with UpdateWatch(self._adam, self._slices(), parts, self._device) as watch:
            result = self._update(sums, skip_above)
        squares = self._ranks.sum(watch.sums.cpu().numpy())
        largest = self._ranks.max(logits.double().cpu().numpy())
        norm = result.grad_norm if result.applied else math.nan
        return dataclasses.replace(result, monitors=assemble(parts, squares, norm, largest.tolist()))

    @torch.no_grad()
    def nats(self, tokens: NDArray[np.int64], targets: NDArray[np.int64]) -> float:
        """Sum of -log p(target) over this rank's rows, both int64 [rows, T], in nats; a target of -100 counts nothing.

        The rows go through the model together. Where ranks share rows, their results add up to the rows' sum. With
        ZeRO-3 and in groups every rank must call it as often.
        """
        self._forward.eval()
        with self._autocast():
            sums: Tensor = self._forward(self._on_device(tokens), self._on_device(targets))
        return sums[1].item() if self._ranks.tp_rank == 0 else 0.0  # the ranks of a group have the same

    @torch.no_grad()
    def logits(self, tokens: NDArray[np.int64]) -> Tensor:
        """Logits of the position after the last of tokens, int64 [rows, T]: fp32 [rows, vocab_size] on the CPU.

        Raises LaunchError where ranks share each sequence.
        """
        if self._ranks.sp_size > 1:
            raise LaunchError("logits are computed of whole sequences; set engine.sequence_parallel=1.")
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
    def loss_scale(self) -> tuple[float, int] | None:
        """fp16's factor on the loss and the updates since it last overflowed, or None in another precision."""

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
        self, load: Callable[[str], dict[str, Tensor]], *, optimizer_step: int, loss_scale: tuple[float, int] | None
    ) -> None:
        """Goes on from an exported state: `load(name)` gives what `export_state` gave, on every rank.

        With optimizer_step 0 only "weight" is read, and the moments are reset. loss_scale is used in fp16 only; None
        keeps the present one. Raises CheckpointError where a tensor has another shape than the model's.
        """

    @abstractmethod
    def _backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds a micro batch's gradient; `last` where the gradient of the step is then complete."""

    @abstractmethod
    def _update(self, sums: Tensor, skip_above: float) -> StepResult:
        """Clips and applies the gradient. sums: [2], this rank's mean loss, and its mean of (log Z)^2."""

    @property
    @abstractmethod
    def _adam(self) -> torch.optim.AdamW:
        """The optimizer, in whose groups the next update's rates are set."""

    @abstractmethod
    def _slices(self) -> Iterable[Slice]:
        """Where parameters lie in what the optimizer steps on this rank; over all ranks, each element stands once."""

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


def load_checked(load: Callable[[str], dict[str, Tensor]], name: str, shape: torch.Size) -> dict[str, Tensor]:
    loaded = load(name)
    for key, value in loaded.items():
        if value.shape != shape:
            raise CheckpointError(
                f"{name} ({key}) is {list(value.shape)} in the checkpoint and {list(shape)} in the model; "
                "the checkpoint is another model's."
            )
    return loaded
