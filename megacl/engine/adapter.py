"""What the engine asks of DeepSpeed: start it, and read and write a model's state by name at every ZeRO stage.

Written against DeepSpeed 0.19, whose inner parts it leans on where the public functions fall short:

- Nothing is compiled at start: the optimizer is torch's own, and the shared-memory op that DeepSpeed builds on a CPU is
  declared incompatible before the process group is taken over.
- Its functions that read a parameter's whole state give it to every rank, and where there are no moments yet they raise
  on some ranks and leave the others waiting. Those that write one want the whole on every rank, and fail at stage 3
  where its size does not divide by the ranks. `slices_of` says what a rank has of it: that is read and written.
- Writing the fp32 master of a parameter leaves the module's own copy as it was until the next step; both are written.
- Setting the parameters' gradients to zero leaves those that stages 1 to 3 have gathered, and the next step adds to
  them; they are dropped as each stage itself does after an overflow. With an optimizer on the host, stages 1 and 2 do
  not: one gradient that is not finite would make all that follow so.
- Its own group of all ranks, over which it averages gradients, would wait for a silent rank as long as PyTorch likes;
  it is given one that waits as long as ours.
"""

import contextlib
import importlib.metadata
import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megacl.config import EngineConfig
from megacl.engine.arithmetic import device_here
from megacl.engine.loss_scale import LossScale
from megacl.engine.monitors import Slice
from megacl.errors import LaunchError
from megacl.model.gpt import GPT
from megacl.parallel.ranks import Ranks

VERSION = "0.19"
BUCKET = 50_000_000
"""Elements that DeepSpeed sends at a time: a tenth of its default, whose buffers alone are gigabytes."""
PREFETCH = {"cuda": 50_000_000, "cpu": 10_000_000}
"""Elements of weights that stage 3 gathers ahead of their use, in one go: DeepSpeed's default on a GPU. On a CPU gloo
copies what it gathers, some pieces at once and others one by one, as its threads come to work: pieces of a fifth take
as long (docs/log.md), and what they hold at the peak does not vary by a tenth of the whole."""


def check(config: EngineConfig) -> None:
    """Raises LaunchError where DeepSpeed is missing, of another minor version, or has not config.precision."""
    try:
        found = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        found = "not there"
    if found.rpartition(".")[0] != VERSION:
        raise LaunchError(
            f"engine.kind deepspeed needs DeepSpeed {VERSION}, and it is {found}: pip install 'deepspeed=={VERSION}.*'."
        )
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed calls collectives by names that newer versions of torch warn about.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if config.precision == "fp16" and not deepspeed.get_accelerator().is_fp16_supported():
        raise LaunchError("engine.precision is fp16, which DeepSpeed does not run on this device; use fp32 or bf16.")


def start(config: EngineConfig, ranks: Ranks) -> None:
    """Readies DeepSpeed for `partition` and `initialize`: its process group, and what it must leave alone.

    Raises LaunchError as `check` does.
    """
    check(config)
    if not dist.is_initialized():  # one rank, without a launcher: no port is needed to meet oneself
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=dist.HashStore(),  # type: ignore[attr-defined]
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    groups = deepspeed.utils.groups
    groups.mpu = None  # it keeps the groups of an engine before this one
    if groups._WORLD_GROUP is None:
        groups._WORLD_GROUP = dist.new_group(timeout=ranks.timeout)


def partition(module: nn.Module, dtype: torch.dtype, ranks: Ranks) -> None:
    """Leaves each rank its shard of the module's parameters, in `dtype`: what ZeRO-3 makes of a model, for one module.

    Every rank must call it, with the same modules in the same order.
    """
    import deepspeed

    deepspeed.zero.Init(module=module.to(dtype), dtype=dtype, data_parallel_group=ranks.replica_group)


def initialize(
    model: GPT, optimizer: torch.optim.AdamW, config: EngineConfig, *, max_grad_norm: float | None, ranks: Ranks
) -> Any:
    """DeepSpeed's engine around the model, on this rank's device.

    One micro batch is one step as far as DeepSpeed knows: the caller sets the accumulation boundary and scales the
    loss.
    """
    import deepspeed

    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": PREFETCH[device_here()],
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm or 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # its own is built by a compiler; torch's is as good on a host
        "steps_per_print": sys.maxsize,
    }
    if config.half:
        # Left to itself, it adds micro batches up in fp32 at most, and averages over the ranks in 16 bits.
        settings |= {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
    if config.precision == "bf16":
        settings["bf16"] = {"enabled": True}
    if config.precision == "fp16":
        settings["fp16"] = {
            "enabled": True,
            "initial_scale_power": int(math.log2(LossScale.FIRST)),
            "loss_scale_window": LossScale.WINDOW,
            "min_loss_scale": LossScale.LEAST,
            "hysteresis": 1,
        }
    mpu = _ModelParallelUnit(ranks) if ranks.tp_size > 1 else None
    with contextlib.redirect_stdout(io.StringIO()):  # some stages print their memory
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=mpu)[0]
    if config.precision == "fp16":
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False  # stability.py says when overflows are too many
    if config.zero_stage == 3 and config.precision in ("fp32", "tf32") and not config.offload_optimizer:
        # The shards are fp32 already: they serve as masters, where DeepSpeed keeps a copy of them.
        masters, shards = engine.optimizer.fp32_partitioned_groups_flat, engine.optimizer.fp16_partitioned_groups_flat
        for master, shard in zip(masters, shards, strict=True):
            master.data = shard.data
    return engine


class _ModelParallelUnit:
    """The groups of a run by the names under which DeepSpeed asks for them, as Megatron-LM's.

    Its data-parallel group is the one over which gradients are averaged and state is sharded.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def get_data_parallel_group(self) -> Any:
        return self._ranks.replica_group

    def get_data_parallel_rank(self) -> int:
        return self._ranks.rank // self._ranks.tp_size

    def get_data_parallel_world_size(self) -> int:
        return self._ranks.replica_size

    def get_model_parallel_group(self) -> Any:
        return self._ranks.tp_group

    def get_model_parallel_rank(self) -> int:
        return self._ranks.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self._ranks.tp_size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


def shard_in_module(parameter: Any) -> Tensor | None:
    """The module's own copy of this rank's shard of a parameter at stage 3, one-dimensional; its end may be padding."""
    return parameter.ds_tensor.detach().view(-1) if hasattr(parameter, "ds_tensor") else None


def spread_masters(engine: Any) -> None:
    """Makes the parameters of their masters anew, on all ranks, as at the end of a step."""
    zero = _zero_optimizer(engine)
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()  # gathers the parameters that are too small to be kept in shards
    elif zero is not None:
        zero.update_lp_params()


def adam_of(engine: Any) -> torch.optim.AdamW:
    """torch's optimizer, inside ZeRO's or by itself."""
    zero = _zero_optimizer(engine)
    adam: torch.optim.AdamW = engine.optimizer if zero is None else zero.optimizer
    return adam


def masters_of(engine: Any) -> list[Tensor]:
    """The fp32 tensors that torch's AdamW steps on this rank."""
    zero = _zero_optimizer(engine)
    if zero is None:
        return list(engine.module.parameters())
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(zero, name):  # stage 3; stages 1 and 2; stage 1 in bf16
            return list(getattr(zero, name))
    raise AssertionError(f"{type(zero).__name__} keeps its masters elsewhere")


def slices_of(engine: Any) -> Iterator[Slice]:
    """Where this rank's part of each parameter lies in the tensors that torch's AdamW steps, padding left out."""
    zero = _zero_optimizer(engine)
    masters = masters_of(engine)
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    if zero is None:
        for parameter, name in names.items():
            yield Slice(parameter, 0, parameter.numel(), name)
    elif hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3: a shard of every parameter, one behind the other
        for master, parameters in zip(masters, zero.fp16_groups, strict=True):
            start = 0
            for parameter in parameters:
                size = parameter.ds_tensor.numel()
                offset = dist.get_rank(parameter.ds_process_group) * size
                yield Slice(master, start, max(0, min(size, parameter.ds_numel - offset)), names[parameter], offset)
                start += size
    else:  # a stretch of all parameters laid end to end
        for parameter, name in names.items():
            if (mapping := parameter._hp_mapping) is not None:
                at, offset = mapping.hp_fragment_address, mapping.lp_fragment_address.start
                yield Slice(masters[mapping.param_group_index], at.start, at.numel, name, offset)


def step(engine: Any, bad: Tensor) -> None:
    """DeepSpeed's step, in which torch's AdamW leaves weights and moments as they are where `bad`, bool [] on the
    device, is set. So the caller need not know whether it is, but DeepSpeed's own counts go on.

    An update whose gradient is not finite DeepSpeed leaves out itself, in stages 1 to 3.
    """
    adam = adam_of(engine)
    # The attribute by which torch's GradScaler speaks to a fused optimizer; with an optimizer on the host it is there.
    adam.found_inf = bad.float().to(masters_of(engine)[0].device)  # type: ignore[attr-defined]
    engine.step()


def loss_scale(engine: Any) -> tuple[float, int]:
    """fp16's factor on the loss, and the updates since it last overflowed."""
    scaler = engine.optimizer.loss_scaler
    return float(scaler.cur_scale), int(scaler.cur_iter - scaler.last_overflow_iter - 1)


def set_loss_scale(engine: Any, value: float, since_overflow: int) -> None:
    """Goes on with what `loss_scale` gave."""
    scaler = engine.optimizer.loss_scaler
    scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = value, since_overflow, -1


def lower_loss_scale(engine: Any) -> None:
    """Answers a loss that is not finite as fp16's loss scale answers an overflow."""
    engine.optimizer.loss_scaler.update_scale(True)


def drop_gradient(engine: Any) -> None:
    """Forgets the gradient of the step under way, whose update is not to be made; fp16's loss scale stays."""
    zero = _zero_optimizer(engine)
    if zero is None:
        engine.zero_grad()
    elif hasattr(zero, "_overflow_clean_up"):  # stage 3
        zero._pre_step()
        zero._overflow_clean_up(zero.loss_scale)
    else:
        zero.zero_grad()
        if hasattr(zero, "averaged_gradients"):  # stages 1 and 2; in bf16, stage 1 is done
            zero.micro_step_id = -1
            zero._release_preflattened_grad_buffers()
            for group in zero.averaged_gradients:
                zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None
            if zero.cpu_offload:
                zero.reset_cpu_buffers()


def _zero_optimizer(engine: Any) -> Any:
    """ZeRO's optimizer, which wraps torch's, or None at stage 0, where torch's own holds the state."""
    return engine.optimizer if hasattr(engine.optimizer, "optimizer") else None
