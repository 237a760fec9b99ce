"""What every engine is: a model under training, its step, and its state as whole tensors."""

import contextlib
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from megacl.config import EngineConfig, OptimizerConfig
from megacl.data.packing import PADDING
from megacl.engine.gathering import Copy, Room, Stored, copy_at_once, fresh_room
from megacl.engine.monitors import Monitors, Slice, UpdateWatch, assemble, part_of, watched
from megacl.engine.replicas import compare_replicas
from megacl.errors import CheckpointError, LaunchError
from megacl.kernels import IGNORED, Choice, Kernels
from megacl.model.gpt import GPT
from megacl.model.layers import Attention
from megacl.optimizer import set_rates
from megacl.parallel.apply import parallel_kernels
from megacl.parallel.ranks import Ranks
from megacl.parallel.tensor import shard_of

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The names of Adam's moments, in torch's optimizer and in checkpoints."""
ANCHOR = "anchor"
"""The name of Reptile's anchor there. It is one more tensor of Adam's state of each master, so that it is sharded, put
on the host, read and written whole as the moments are."""


@dataclass(frozen=True)
class StepResult:
    """What one step did; the same on every rank."""

    loss: float
    """Mean over the targets of the global batch, nats per token, before the update."""
    grad_norm: float
    """Of the whole gradient, before clipping; inf or nan where the gradient is not finite."""
    applied: bool
    """False where the weights are as before: the loss or the gradient was not finite, or the loss above `skip_above`.
    With fp16 it happens now and then, and the loss scale has been lowered."""
    log_z: float
    """The root of the mean square of log Z over the targets, Z the sum of the exponentials of a token's logits."""
    monitors: Monitors | None = None
    """Where they were asked for."""


class Engine(ABC):
    """A model under training. With several ranks every method must be called on all of them, in the same order."""

    choices: tuple[Choice, ...]
    """What computes each op of the model, and the update."""
    update_choices: ClassVar[tuple[Choice, ...]]
    """What computes the update, which is not to be chosen."""
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
        self._has_moments = False
        self._has_anchor = self._at_anchor = False  # at it: no update was made since it was set
        self._steps = 0
        self.progress: Callable[[], None] = lambda: None
        """Called whenever a micro batch is done."""
        self.before_change: Callable[[], None] = lambda: None
        """Called before masters, moments or anchor are changed in place: who reads them beside the engine has until it
        returns."""

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
            self.progress()
        self.before_change()
        set_rates(self._adam.param_groups, self._optimizer_config, lr, weight_decay)
        if logits is None:
            result = self._update(sums[1:], skip_above)
        else:
            result = self._watched_update(sums[1:], skip_above, logits)
        if result.applied:
            self._updates += 1
            self._has_moments, self._at_anchor = True, False
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
        """Adam's count of updates, by which it corrects its moments' bias: those applied since it was set to zero."""
        return self._updates

    @property
    def has_moments(self) -> bool:
        """Whether Adam's moments hold anything."""
        return self._has_moments

    @property
    @abstractmethod
    def loss_scale(self) -> tuple[float, int] | None:
        """fp16's factor on the loss and the updates since it last overflowed, or None in another precision."""

    def reset_optimizer(self) -> None:
        """Sets the moments and Adam's count of updates to zero; Reptile's anchor stays."""
        self.before_change()
        for state in self._adam.state.values():
            for key in MOMENTS:
                state[key].zero_()
        self._has_moments = False
        self.reset_optimizer_step()

    def reset_optimizer_step(self) -> None:
        """Sets Adam's count of updates to zero and leaves its moments as they are (`megacl.handover`)."""
        self._count_from(0)

    # ------------------------------------------------------------------------------------------ Reptile

    @property
    def has_anchor(self) -> bool:
        """Whether there is an anchor of Reptile's."""
        return self._has_anchor

    @torch.no_grad()
    def set_anchor(self) -> None:
        """Makes the present weights Reptile's anchor: a copy of the masters, on their device, sharded as they are."""
        self._make_state()
        for master in self._masters():
            self._adam.state[master][ANCHOR] = master.detach().clone()
        self._has_anchor = self._at_anchor = True

    def drop_anchor(self) -> None:
        """Forgets Reptile's anchor, if there is one."""
        for state in self._adam.state.values():
            state.pop(ANCHOR, None)
        self._has_anchor = self._at_anchor = False

    @torch.no_grad()
    def outer_update(self, epsilon: float) -> None:
        """Reptile's move: weights <- anchor + epsilon (weights - anchor), and these are the anchor from here on.

        It is made on the fp32 masters, by each rank on its own shards; what the model computes with is then made of
        them anew, as behind an update. Bitwise nothing changes with epsilon 1. Adam's moments stay: they are means over
        gradients of the last tens of updates, taken where the weights were then, and are of as much use a move away as
        an update away. There must be an anchor. Source: Nichol et al. 2018, arXiv 1803.02999, algorithm 1.
        """
        if self._at_anchor:
            return
        self.before_change()
        for master in self._masters():
            anchor = self._adam.state[master][ANCHOR]
            anchor.lerp_(master, epsilon)
            master.copy_(anchor)
        self._spread_masters()
        self._at_anchor = True

    # ------------------------------------------------------------------------------------------ the state by name

    @property
    def state_keys(self) -> tuple[str, ...]:
        """What `export_state` gives of each parameter: "weight", moments where there are any, "anchor"; see there."""
        moments = MOMENTS if self._has_moments else ()
        anchor = (ANCHOR,) if self._has_anchor and not self._at_anchor else ()
        return ("weight", *moments, *anchor)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Each parameter's whole shape by its name, in the order of the model, the same on every rank."""
        return {name: whole_shape(parameter) for name, parameter in self._model.named_parameters()}

    @abstractmethod
    def export_state(
        self, owners: Mapping[str, int] | None = None, room: Room = fresh_room, copy: Copy = copy_at_once
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(name, its state by `state_keys`) of one parameter after another, in the order of the model.

        The tensors are whole, fp32, on the CPU; "anchor" is there where Reptile has one that the weights have left.
        owners: the rank that is given a parameter's state, rank 0 where it names none; on the others it is empty, and
        no rank has more than its own and one tensor. room: makes what a tensor is copied into. copy: is given what need
        only be copied within this rank, and may do it later, but before `before_change` returns. A collective: every
        rank must go through all of it.
        """

    @abstractmethod
    def holdings(self) -> dict[str, int]:
        """How many elements of each parameter's state this rank holds; a parameter of which it has none may be left
        out. It does not change."""

    def import_state(
        self,
        load: Callable[[str], Mapping[str, Tensor | Stored]],
        *,
        optimizer_step: int,
        loss_scale: tuple[float, int] | None,
    ) -> None:
        """Goes on from an exported state: `load(name)` gives what `export_state` gave its owner, on every rank.

        Of all parameters it gives the same things: "weight", and the moments and the anchor, where there are any. What
        it does not give is zero, and there is no anchor. Of what is not in memory yet a rank reads what it needs, one
        tensor at a time. optimizer_step: Adam's count. loss_scale is used in fp16 only; None keeps the present one.
        Raises CheckpointError where a tensor has another shape than the model's.
        """
        write = None
        for name, parameter in self._model.named_parameters():
            loaded = load(name)
            check_shapes(name, loaded, whole_shape(parameter))
            if write is None:
                self._ready_state([key for key in loaded if key != "weight"], optimizer_step)
                write = self._writer()
            write(name, parameter, loaded)
        if loss_scale is not None and self._config.precision == "fp16":
            self._set_loss_scale(*loss_scale)

    def _ready_state(self, keys: Collection[str], step: int) -> None:
        """Makes Adam's state ready to be filled with the tensors named by `keys`."""
        self.reset_optimizer()
        self.drop_anchor()
        if keys:
            self._make_state()
        if ANCHOR in keys:
            for master in self._masters():
                self._adam.state[master][ANCHOR] = torch.empty_like(master)
        self._has_moments, self._has_anchor = MOMENTS[0] in keys, ANCHOR in keys
        self._count_from(step)

    def _make_state(self) -> None:
        """Makes Adam's state where there is none yet, as torch does in the first step."""
        for master in self._masters():
            if not self._adam.state[master]:
                self._adam.state[master] = {
                    # fused AdamW keeps its step count beside the parameter
                    "step": torch.zeros((), dtype=torch.float32, device=master.device),
                    **{key: torch.zeros_like(master) for key in MOMENTS},
                }

    def _count_from(self, step: int) -> None:
        for state in self._adam.state.values():
            state["step"].fill_(float(step))
        self._updates = step

    @abstractmethod
    def _writer(self) -> Callable[[str, nn.Parameter, Mapping[str, Tensor | Stored]], None]:
        """What sets a parameter, by its name, its master, and what a whole state has of Adam's, once that is ready."""

    @abstractmethod
    def _set_loss_scale(self, value: float, since_overflow: int) -> None:
        """Goes on with fp16's loss scale as `loss_scale` gave it."""

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
    def _masters(self) -> list[Tensor]:
        """The fp32 tensors that the optimizer steps on this rank."""

    @abstractmethod
    def _spread_masters(self) -> None:
        """Makes the parameters of the masters anew where they are tensors of their own. A collective."""

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


def part_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of what a rank's model has of a parameter, under ZeRO-3 too."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape that a parameter has in a model of one rank."""
    shard = shard_of(parameter)
    return shard.whole_shape(part_shape(parameter)) if shard else part_shape(parameter)


def check_shapes(name: str, state: Mapping[str, Tensor | Stored], shape: torch.Size) -> None:
    """Raises CheckpointError where a tensor of a parameter's state has not the parameter's whole shape."""
    for key, value in state.items():
        if value.shape != shape:
            raise CheckpointError(
                f"{name} ({key}) is {list(value.shape)} in the checkpoint and {list(shape)} in the model; "
                "the checkpoint is another model's."
            )
