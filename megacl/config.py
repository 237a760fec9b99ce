"""The schema of a run: frozen data, no torch. configfile.py reads it from files and writes it back.

What follows from a setting is a property, never a second setting. Every rule that ties two settings together stands
here, in `RunConfig.check`; rules for one setting stand in its type. What a phase is stands in config_phase.py, what
data is in config_data.py, when to save and what to keep in config_checkpoint.py.
"""

import itertools
import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from megacl.config_checkpoint import CheckpointConfig
from megacl.config_data import CacheConfig, SourceConfig, TokenizerConfig
from megacl.config_phase import (
    MAX_TOKENS,
    BatchSize,
    PhaseConfig,
    ReplayConfig,
    SeqLength,
    length_in_steps,
    misfit,
    nearest,
)
from megacl.errors import ConfigError
from megacl.model.config import STRICT, ModelConfig

# ---------------------------------------------------------------------------------------------- training


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW; weight decay on matrices only (never on norms and biases)."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["adamw"] = "adamw"
    beta1: Annotated[float, Field(ge=0, lt=1, description="the decay of the first moment")] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1, description="the decay of the second moment")] = 0.95
    eps: Annotated[float, Field(gt=0, description="Adam's epsilon")] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, description="the decoupled weight decay")] = 0.1
    independent_weight_decay: bool = False
    """False: an update takes weight_decay x rate of each matrix. True: weight_decay x rate / the schedule's max_lr."""
    max_grad_norm: Annotated[float, Field(gt=0, description="the gradient norm to clip to")] | None = 1.0
    z_loss: Annotated[float, Field(ge=0, description="the weight of (log Z)^2 in what is minimised")] = 0.0
    """Z is the sum of the exponentials of a token's logits; 1e-4 is usual where it is wanted."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the arithmetic is carried out. Nothing here changes what a run is: all of it may differ after a resume."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["native", "deepspeed"] = "native"
    micro_batch_size: Annotated[int, Field(ge=1, description="sequences per forward pass on one rank")] | None = None
    """Null: this rank's whole share of the global batch."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """tf32: fp32 whose matrix products a GPU multiplies with 10 bits of mantissa. bf16, fp16: with fp32 masters."""
    zero_stage: Annotated[int, Field(ge=0, le=3, description="DeepSpeed's ZeRO stage")] = 1
    tensor_parallel: Annotated[int, Field(ge=1, description="the number of ranks that share each layer")] = 1
    sequence_parallel: Annotated[int, Field(ge=1, description="the number of ranks that share each sequence")] = 1
    offload_optimizer: bool = False
    """Masters and moments in the memory of the host (ZeRO-Offload)."""
    activation_checkpointing: (
        Literal["none", "full", "selective"] | tuple[Annotated[int, Field(ge=0, description="a layer")], ...]
    ) = "none"
    """full: layers keep their inputs alone. selective: what is cheap to compute is not kept. [0, 2]: full in those."""
    compile: bool = False
    loss_chunk: Annotated[int, Field(ge=1, description="tokens whose logits exist at one time")] | None = None
    """Null: 1024 on a GPU, 256 on a CPU, which gains nothing by more."""
    kernels: dict[str, str] = field(default_factory=dict)
    """The implementation of an op, {rms_norm: reference}, where it is not to be chosen by what is here."""
    deterministic: bool = False
    """Only operations that give the same bits each time, on a GPU too."""
    compare_replicas_every: (
        Annotated[int, Field(ge=1, description="optimizer steps between two comparisons")] | None
    ) = None
    """Compares checksums of the weights that ranks hold alike, and names a rank that has others."""
    timeout: Annotated[float, Field(gt=0, description="seconds after which a silent rank is given up")] = 600.0
    rendezvous_timeout: Annotated[
        float, Field(gt=0, description="seconds that ranks wait for one another to start")
    ] = 180.0
    """Counted on each rank from when it has started; who has not come by then is named, and the run ends."""

    @property
    def half(self) -> bool:
        """Whether matrix products are of values of 16 bits."""
        return self.precision in ("bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class StabilityConfig:
    """What happens where an update would do harm. As it stands, a loss or gradient that is not finite ends the run."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    spike: Annotated[float, Field(gt=0, description="the standard deviations that make a loss a spike")] | None = None
    """A loss so far above the mean of those before it is a spike, and its update is skipped. Null: none is."""
    window: Annotated[int, Field(ge=10, description="how many losses the mean and the deviation are taken of")] = 100
    skip: Annotated[int, Field(ge=0, description="how many updates in a row may be skipped")] = 0
    go_back: Annotated[int, Field(ge=0, description="how often a run may go back to its last checkpoint")] = 0
    """After more than `skip` in a row: the data since that checkpoint is passed over."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Loss on held-out documents of every source that the model has seen or will see."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    every_steps: Annotated[int, Field(ge=1, description="optimizer steps between two evaluations")] | None = None
    """Null: only where a run begins and at each phase's end."""
    sequences: Annotated[int, Field(ge=1, description="held-out sequences per source")] | None = None
    """Null: all of them."""
    micro_batch_size: Annotated[int, Field(ge=1, description="sequences per forward pass of an evaluation")] = 16


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is written beside metrics.jsonl, which always has one record a step."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    every_steps: Annotated[int, Field(ge=1, description="optimizer steps between two lines on the terminal")] = 10
    monitor_every_steps: Annotated[int, Field(ge=1, description="optimizer steps between two looks inside")] | None = (
        None
    )
    """Null: none. Else largest attention logits, log Z, update-to-weight ratios and gradient norms of each layer."""
    tensorboard: bool = True
    """Written where the tensorboard package is installed."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All of a run. `dump` of it is itself a configuration file."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    run_dir: Annotated[str, Field(min_length=1, description="the folder that holds all that the run writes")]
    model: ModelConfig
    sources: dict[str, SourceConfig]
    phases: tuple[PhaseConfig, ...]
    seq_length: SeqLength
    global_batch_size: BatchSize
    tokenizer: TokenizerConfig | None = None
    """Null: the one that the sources were prepared with."""
    seed: Annotated[int, Field(ge=0, lt=2**63, description="the seed of weights and order")] = 0
    order: Literal["v1"] = "v1"
    boundaries: Literal["ignore", "attention"] = "ignore"
    """attention: tokens do not look across the documents of a sequence, and positions restart in each."""
    packing: Literal["cut", "best_fit"] = "cut"
    """cut: sequences are cut where they fall; best_fit: documents that fit stay whole, and the rest is padding."""
    start_from: str | None = None
    """A model to go on from, weights and history: RUN, RUN@PHASE, RUN@STEP, RUN@NAME, or a checkpoint's folder."""
    cache: CacheConfig | None = None
    """Needed where a source's path is a URL."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def seq_length_of(self, phase: PhaseConfig) -> int:
        """Tokens that a sequence of this phase predicts."""
        return phase.seq_length or self.seq_length

    def batch_size_of(self, phase: PhaseConfig) -> int:
        """Sequences per optimizer step of this phase."""
        return phase.global_batch_size or self.global_batch_size

    def tokens_per_step(self, phase: PhaseConfig) -> int:
        """Tokens that one optimizer step of this phase learns from."""
        return self.seq_length_of(phase) * self.batch_size_of(phase)

    def steps_of(self, phase: PhaseConfig) -> int:
        """Optimizer steps of this phase: as many whole batches as its budget holds."""
        return phase.steps or (phase.tokens or 0) // self.tokens_per_step(phase)

    def check(self) -> None:
        """Raises ConfigError where settings do not fit one another."""
        problem = self.model.problem()
        if problem:
            raise ConfigError(f"model.{problem}.")
        if self.tokenizer and self.tokenizer.new_rows and self.start_from is None:
            raise ConfigError(
                "tokenizer.new_rows is set without start_from, and it is of a model that is extended; leave it out."
            )
        if not self.phases and self.sources:  # without both it is a model's that was converted, which no run trained
            raise ConfigError("phases is empty; a run needs at least one phase.")
        for name, source in self.sources.items():
            if "://" in source.path and self.cache is None:
                raise ConfigError(
                    f"sources.{name}.path is {source.path!r}, a store, whose shards are fetched to a local disk; "
                    "set cache.path and cache.size."
                )
            if "://" in source.path and source.documents is not None:
                raise ConfigError(
                    f"sources.{name}.documents are prepared into a local folder, and its path is {source.path!r}; "
                    "prepare them with `megacl prepare` and upload the folder."
                )
        seen: list[str] = []
        for index, phase in enumerate(self.phases):
            self._check_phase(f"phases[{index}]", phase, seen)
            seen.append(phase.name)
        if self.optimizer.independent_weight_decay and self.optimizer.weight_decay > 0.01:
            raise ConfigError(
                f"optimizer.weight_decay is {self.optimizer.weight_decay:g} with independent_weight_decay, and so the "
                "part of every matrix that an update takes away; it must not exceed 0.01 there, and 1e-4 is usual."
            )
        self._check_engine()
        stability = self.stability
        if stability.spike is not None and not (stability.skip or stability.go_back):
            raise ConfigError(
                "stability.spike is set with stability.skip 0 and go_back 0, so that the first spike would end the "
                "run; set stability.skip to how many updates in a row may be skipped."
            )
        if stability.go_back and self.checkpoint.every_steps is None:
            raise ConfigError(
                "stability.go_back is set, and no checkpoints are saved inside a phase to go back to; "
                "set checkpoint.every_steps."
            )
        if problem := self.checkpoint.problem(evaluated_every=self.evaluation.every_steps):
            raise ConfigError(f"checkpoint.{problem}.")

    def _check_engine(self) -> None:
        engine = self.engine
        for name in ("offload_optimizer", "compare_replicas_every"):
            if engine.kind == "native" and getattr(engine, name):
                raise ConfigError(
                    f"engine.{name} is set with engine.kind native, which has one device; set engine.kind=deepspeed."
                )
        if engine.offload_optimizer and engine.zero_stage == 0:
            raise ConfigError("engine.offload_optimizer is true with engine.zero_stage 0; it needs stage 1, 2 or 3.")
        if isinstance(engine.activation_checkpointing, tuple):
            for layer in engine.activation_checkpointing:
                if layer >= self.model.num_layers:
                    raise ConfigError(
                        f"engine.activation_checkpointing names layer {layer}; "
                        f"the model has layers 0 to {self.model.num_layers - 1}."
                    )
        if engine.kind == "deepspeed" and engine.half and engine.zero_stage == 0:
            raise ConfigError(
                f"engine.zero_stage is 0 with engine.precision {engine.precision}; DeepSpeed takes one step too many "
                "there, so use zero_stage 1."
            )
        if engine.kind == "deepspeed" and engine.zero_stage == 3 and engine.compile:
            raise ConfigError(
                "engine.compile is true with engine.zero_stage 3, whose gathering of weights breaks compiled graphs, "
                "so compile with zero_stage 2, or leave it out."
            )
        self._check_groups()

    def _check_groups(self) -> None:
        model, tp, sp = self.model, self.engine.tensor_parallel, self.engine.sequence_parallel
        if tp * sp > 1 and self.engine.kind == "native":
            key = "tensor_parallel" if tp > 1 else "sequence_parallel"
            raise ConfigError(
                f"engine.{key} is {max(tp, sp)} with engine.kind native, which runs on one rank; "
                "set engine.kind=deepspeed."
            )
        for key, size in {
            "vocab_size": model.vocab_size,
            "num_attention_heads": model.num_attention_heads,
            "num_kv_heads": model.kv_heads,
            "intermediate_size": model.mlp_size,
        }.items():
            if size % tp:
                raise ConfigError(f"model.{key} is {size}; it must be a multiple of engine.tensor_parallel, {tp}.")
        if model.kv_heads % (tp * sp):
            raise ConfigError(
                f"model.num_kv_heads is {model.kv_heads}; it must be a multiple of engine.tensor_parallel x "
                f"engine.sequence_parallel, {tp} x {sp}: each rank attends with as many heads of every sequence."
            )
        lengths = {"seq_length": self.seq_length}
        lengths |= {f"seq_length of phases[{i}]": self.seq_length_of(phase) for i, phase in enumerate(self.phases)}
        for key, length in lengths.items():
            if length % sp:
                raise ConfigError(f"{key} is {length}; it must be a multiple of engine.sequence_parallel, {sp}.")

    def _check_phase(self, where: str, phase: PhaseConfig, earlier: list[str]) -> None:
        if phase.name in earlier:
            raise ConfigError(
                f"{where}.name is {phase.name!r}, as that of phases[{earlier.index(phase.name)}]; name it differently."
            )
        if phase.name == "before":
            raise ConfigError(f"{where}.name is 'before', which stands for a run's start in every table; rename it.")
        replayed = (phase.replay.from_sources or {}) if phase.replay else {}
        mixtures = {f"{where}.mixture": phase.mixture}
        for index, change in enumerate(phase.mixture_changes):
            mixtures[f"{where}.mixture_changes[{index}].mixture"] = change.mixture
        if phase.continues:
            if phase.mixture or phase.mixture_changes:
                raise ConfigError(
                    f"{where}.mixture is given, and continues is true, which is to go on with the mixture of the phase "
                    "before; leave one of them out."
                )
            if not earlier and self.start_from is None:
                raise ConfigError(f"{where}.continues is true, and this is the model's first phase; give a mixture.")
            mixtures = {}
        for key, names in mixtures.items():
            if not names:
                raise ConfigError(f"{key} is empty; it must name at least one source and its weight.")
        for key, names in {**mixtures, f"{where}.replay.from_sources": replayed}.items():
            for name in names:
                if name not in self.sources:
                    raise ConfigError(f"{key} names {name!r}, which is not in sources{nearest(name, self.sources)}")
        if (phase.tokens is None) == (phase.steps is None):
            raise ConfigError(f"{where} must have a budget, either tokens or steps, and not both.")
        if not self.steps_of(phase):
            raise ConfigError(
                f"{where}.tokens is {phase.tokens}; it must hold at least one batch, "
                f"{self.batch_size_of(phase)} x {self.seq_length_of(phase)} = {self.tokens_per_step(phase)} tokens."
            )
        if (tokens := self.steps_of(phase) * self.tokens_per_step(phase)) > MAX_TOKENS:
            raise ConfigError(
                f"{where} has {tokens:,} tokens; a phase may have {MAX_TOKENS:,}, so give it fewer steps."
            )
        micro = self.engine.micro_batch_size
        if micro is not None and self.batch_size_of(phase) % micro:
            raise ConfigError(
                f"global_batch_size of {where} is {self.batch_size_of(phase)}; "
                f"it must be a multiple of engine.micro_batch_size, {micro}."
            )
        if phase.reptile is not None and phase.reptile.every_steps > self.steps_of(phase):
            raise ConfigError(
                f"{where}.reptile.every_steps is {phase.reptile.every_steps:,}, and the phase has "
                f"{self.steps_of(phase):,} steps, so that there would be no move; make it less, or leave reptile out."
            )
        self._check_schedule(f"{where}.schedule", phase, first=not earlier)
        self._check_changes(where, phase)
        if phase.replay:
            self._check_replay(f"{where}.replay", phase.replay, earlier)

    def _check_schedule(self, where: str, phase: PhaseConfig, *, first: bool) -> None:
        schedule = phase.schedule
        steps, per_step = self.steps_of(phase), self.tokens_per_step(phase)
        if problem := misfit(schedule, phase_steps=steps, tokens_per_step=per_step):
            raise ConfigError(f"{where}{problem}")
        rates = {key: getattr(schedule, key) for key in ("max_lr", "constant_lr", "min_lr") if hasattr(schedule, key)}
        if first and self.start_from is None and "last" in rates.values():
            raise ConfigError(
                f"{where} goes on with the last phase's rate, but there is no earlier phase; give a number."
            )
        known = [(key, rate) for key, rate in rates.items() if isinstance(rate, float)]
        for (upper, high), (lower, low) in itertools.pairwise(known):
            if low > high:
                raise ConfigError(f"{where}.{lower} is {low}; it must not exceed {upper}, {high}.")

    def _check_changes(self, where: str, phase: PhaseConfig) -> None:
        steps, per_step = self.steps_of(phase), self.tokens_per_step(phase)
        before = 0
        for index, change in enumerate(phase.mixture_changes):
            at = math.ceil(length_in_steps(change.at, phase_steps=steps, tokens_per_step=per_step))
            last = steps if change.how == "linear" else steps - 1
            if not before < at <= last:
                raise ConfigError(
                    f"{where}.mixture_changes[{index}].at is {change.at!r}, step {at}; it must lie after "
                    f"step {before}, where the mixture before begins, and not after step {last} of {steps}."
                )
            before = at

    def _check_replay(self, where: str, replay: ReplayConfig, earlier: list[str]) -> None:
        if problem := replay.problem():
            raise ConfigError(f"{where}.{problem}.")
        if self.start_from is None and not replay.from_sources:
            if not earlier:
                raise ConfigError(
                    f"{where} has nothing to replay: this is the model's first phase. "
                    "Take replay out, or name prepared sources in from_sources."
                )
            for name in replay.from_ or {}:
                if name not in earlier:
                    raise ConfigError(f"{where}.from names {name!r}, which is no earlier phase{nearest(name, earlier)}")
