"""Engines: how a step's arithmetic is carried out. `native` on one device, `deepspeed` over the ranks of a run.

    engine = build_engine(model, engine=config.engine, optimizer=config.optimizer, ranks=ranks)
    result = engine.step(batch.tokens, lr)
    check_engine(config.engine, device=device_here())       # what would stop it, before there is a model

Both give the same losses; a state exported from one is imported by the other, at any ZeRO stage and number of ranks.
"""

from collections.abc import Mapping

from megacl.config import EngineConfig, OptimizerConfig
from megacl.engine import adapter
from megacl.engine.arithmetic import Device, device_here, set_arithmetic
from megacl.engine.base import Engine, StepResult
from megacl.engine.heap import keep_freed_blocks
from megacl.engine.native import NativeEngine
from megacl.engine.zero import DeepSpeedEngine
from megacl.kernels import LOSS_CHUNK, choices_of_kernels, choose_kernels
from megacl.model.checkpointing import FULL, SELECTIVE, Checkpointing
from megacl.model.gpt import GPT
from megacl.parallel.apply import apply_sequence_parallel, apply_tensor_parallel, parallel_kernels
from megacl.parallel.ranks import Ranks

__all__ = ["Device", "Engine", "StepResult", "build_engine", "check_engine", "device_here"]


def check_engine(engine: EngineConfig, *, device: Device) -> None:
    """Raises ConfigError or LaunchError where the settings name kernels or a precision that `device` has not.

    It may be a GPU that is not here. `build_engine` refuses the same, but late in a run's start.
    """
    choices_of_kernels(device=device, half=engine.half, compiled=engine.compile, overrides=engine.kernels)
    if device == "cpu" and engine.kind == "deepspeed" and engine.precision == "fp16":
        adapter.check(engine)


def build_engine(model: GPT, *, engine: EngineConfig, optimizer: OptimizerConfig, ranks: Ranks) -> Engine:
    """The engine that the configuration asks for, around a model whose weights it takes over.

    A model on "meta" is given its memory and initial weights here, no more than this rank's part. Raises LaunchError
    where the engine cannot run so: native on several ranks, DeepSpeed of another version; ConfigError where
    engine.kernels names what there is not; ValueError where `ranks` are not arranged as the engine has it, or a model
    that DeepSpeed is to train in 16 bits is not on "meta".
    """
    if (ranks.tp_size, ranks.sp_size) != (engine.tensor_parallel, engine.sequence_parallel):
        raise ValueError(
            f"{ranks} for tensor_parallel {engine.tensor_parallel}, sequence_parallel {engine.sequence_parallel}"
        )
    device = device_here()
    notices = set_arithmetic(engine, device=device)
    ops = choose_kernels(device=device, half=engine.half, compiled=engine.compile, overrides=engine.kernels)
    shared = parallel_kernels(ops, ranks)
    model.use(shared)
    apply_tensor_parallel(model, ranks)
    apply_sequence_parallel(model, ranks)
    model.loss_chunk, model.z_loss = engine.loss_chunk or LOSS_CHUNK[device], optimizer.z_loss
    model.checkpointing = _checkpointing(engine, len(model.layers))
    if engine.compile:
        for layer in model.layers:
            layer.compile()  # the layers share one graph, so it is compiled once
    if device == "cpu":
        keep_freed_blocks()
    kind = DeepSpeedEngine if engine.kind == "deepspeed" else NativeEngine
    built = kind(model, ops, engine, optimizer, ranks)
    built.choices, built.notices = (*shared.choices, *kind.update_choices), notices
    return built


def _checkpointing(engine: EngineConfig, num_layers: int) -> Mapping[int, Checkpointing]:
    match engine.activation_checkpointing:
        case "none":
            return {}
        case "full":
            return dict.fromkeys(range(num_layers), FULL)
        case "selective":
            return {} if engine.compile else dict.fromkeys(range(num_layers), SELECTIVE)
        case layers:
            return dict.fromkeys(layers, FULL)
