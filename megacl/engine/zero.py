"""The DeepSpeed engine: ZeRO over the ranks of a run."""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megacl.config import EngineConfig, OptimizerConfig
from megacl.engine import adapter
from megacl.engine.arithmetic import dtype_of
from megacl.engine.base import Engine, StepResult, part_shape
from megacl.engine.gathering import (
    Copy,
    Held,
    Part,
    Room,
    Stored,
    copy_at_once,
    fresh_room,
    gather_at_owners,
    part_of,
    stretch_of,
    whole_of,
)
from megacl.engine.monitors import Slice
from megacl.engine.replicas import compare_replicas
from megacl.kernels import Choice, Kernels
from megacl.model.gpt import GPT
from megacl.optimizer import build_optimizer
from megacl.parallel.ranks import Ranks
from megacl.parallel.tensor import shard_of, take_part


class DeepSpeedEngine(Engine):
    """ZeRO, stage 0 to 3, over the ranks that hold the same part of the layers: gradients averaged, state sharded."""

    update_choices = (
        Choice("adamw", "fused", "one kernel over this rank's parameters"),
        Choice("clip_grad_norm", "deepspeed", "the norm is over the ranks' shards"),
    )

    def __init__(
        self, model: GPT, ops: Kernels, config: EngineConfig, optimizer: OptimizerConfig, ranks: Ranks
    ) -> None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        adapter.start(config, ranks)
        fresh = model.embed.weight.is_meta
        if config.half and not fresh:
            raise ValueError("in 16 bits DeepSpeed would round the weights of a model that is not on 'meta'")
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
        super().__init__(model, self._deepspeed, ops, config, optimizer, device=device, ranks=ranks)
        if config.half:  # the masters were made from the rounded weights
            self.import_state(lambda name: {"weight": model.initial(name)}, optimizer_step=0, loss_scale=None)

    @property
    def _adam(self) -> torch.optim.AdamW:
        return adapter.adam_of(self._deepspeed)

    def _masters(self) -> list[Tensor]:
        return adapter.masters_of(self._deepspeed)

    def _spread_masters(self) -> None:
        adapter.spread_masters(self._deepspeed)

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
        mean = self._mean(sums)
        bad = ~(torch.isfinite(mean[0]) & (mean[0] <= skip_above))
        before = self.loss_scale
        if self._config.zero_stage == 0:
            # DeepSpeed clips here, but does not say to what, and would step with a gradient that is not finite.
            norm = _norm(self._model, self._ranks)
            bad |= ~torch.isfinite(norm)
            adapter.step(self._deepspeed, bad)
        else:
            adapter.step(self._deepspeed, bad)
            norm = torch.as_tensor(self._deepspeed.get_global_grad_norm(), device=self._device)
        # Read only now, when all of the step has been sent to the device.
        loss, log_z_squared, grad_norm, skipped = torch.stack([*mean, norm.double(), bad.double()]).tolist()
        finite = bool(self._deepspeed.was_step_applied())
        if not finite:  # with an optimizer on the host, DeepSpeed adds the next gradient to it
            adapter.drop_gradient(self._deepspeed)
        if before is not None and skipped:
            self._answer_loss(loss, skip_above, before, overflowed=not finite)
        return StepResult(loss, grad_norm, applied=finite and not skipped, log_z=math.sqrt(log_z_squared))

    def _mean(self, sums: Tensor) -> Tensor:
        """The mean over the ranks, float64 on the device, the same on each."""
        mean = sums.double()
        if self._ranks.world_size > 1:
            dist.all_reduce(mean)
        return mean / self._ranks.world_size

    def _answer_loss(self, loss: float, skip_above: float, before: tuple[float, int], *, overflowed: bool) -> None:
        """What a loss for which an update was skipped does to fp16's loss scale: nothing where it is above the limit;
        else it is an overflow, though the gradient may be none."""
        if loss > skip_above:
            self._set_loss_scale(*before)
        elif not overflowed:
            self._set_loss_scale(*before)
            adapter.lower_loss_scale(self._deepspeed)

    @property
    def loss_scale(self) -> tuple[float, int] | None:
        return adapter.loss_scale(self._deepspeed) if self._config.precision == "fp16" else None

    def export_state(
        self, owners: Mapping[str, int] | None = None, room: Room = fresh_room, copy: Copy = copy_at_once
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        if self._config.compare_replicas_every is not None:  # nothing is saved of replicas that differ
            compare_replicas(self._model, self._ranks)
        parts = [
            Part(name, part_shape(parameter), self._shards.get(name))
            for name, parameter in self._model.named_parameters()
        ]
        held = {piece.name: self._held(piece) for piece in adapter.slices_of(self._deepspeed)}
        yield from gather_at_owners(parts, held, self.state_keys, self._ranks, owners or {}, room, copy)

    def holdings(self) -> dict[str, int]:
        return {piece.name: piece.size for piece in adapter.slices_of(self._deepspeed)}

    def _held(self, piece: Slice) -> Held:
        """What this rank has of a parameter's state: views of stretches of what its optimizer steps."""
        state = {"weight": piece.master, **self._adam.state.get(piece.master, {})}
        stretch = slice(piece.start, piece.start + piece.size)
        return Held(piece.offset, {key: state[key].detach().view(-1)[stretch] for key in self.state_keys})

    def _writer(self) -> Callable[[str, nn.Parameter, Mapping[str, Tensor | Stored]], None]:
        held = {piece.name: self._held(piece) for piece in adapter.slices_of(self._deepspeed)}

        @torch.no_grad()
        def write(name: str, parameter: nn.Parameter, state: Mapping[str, Tensor | Stored]) -> None:
            if shard := self._shards.get(name):
                state = {key: part_of(value, shard) for key, value in state.items()}
            if parameter.shape == part_shape(parameter):  # at stage 3 only while it is gathered
                weight = whole_of(state["weight"])
                parameter.copy_(weight)
                state = {**state, "weight": weight}
            for key, value in state.items():
                if (mine := held.get(name)) is None or not mine.size:
                    continue
                piece = stretch_of(value, mine.offset, mine.size)
                mine.state[key].copy_(piece)
                if key == "weight" and (copy := adapter.shard_in_module(parameter)) is not None:
                    copy[: mine.size].copy_(piece)

        return write

    def _set_loss_scale(self, value: float, since_overflow: int) -> None:
        adapter.set_loss_scale(self._deepspeed, value, since_overflow)


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
