"""The schema of a run: frozen data, no torch. configfile.py reads it from files and writes it back.

What follows from a setting is a property, never a second setting. Every rule that ties two settings together stands
here, in `RunConfig.check`; rules for one setting stand in its type.
"""

import difflib
import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from megacl.errors import ConfigError
from megacl.model.config import STRICT, ModelConfig


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" with the closest of the known names, or just a full stop."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "."


# ---------------------------------------------------------------------------------------------- lengths

_LENGTH = re.compile(r"(?P<number>\d+(?:\.\d*)?(?:[eE][+-]?\d{1,2})?)\s*(?P<unit>steps?|tokens?|%)")


def _check_length(text: Any) -> str:
    if not isinstance(text, str) or _LENGTH.fullmatch(text.strip()) is None:
        raise ValueError('it must be a length such as "100 steps", "2e9 tokens" or "1%" (of the phase)')
    return text.strip()


Length = Annotated[str, BeforeValidator(_check_length)]


def length_in_steps(length: str, *, phase_steps: int, tokens_per_step: int) -> Fraction:
    """A length in optimizer steps of a phase, exactly: "100 steps", "2e9 tokens", "1%" of the phase."""
    match = _LENGTH.fullmatch(length)
    assert match is not None, "checked when the configuration was loaded"
    number = Fraction(match["number"])
    unit = match["unit"]
    if unit == "%":
        return number * phase_steps / 100
    return number / tokens_per_step if unit.startswith("token") else number


# ---------------------------------------------------------------------------------------------- schedules

Rate = Annotated[float, Field(gt=0, description="a learning rate")]
Floor = Annotated[float, Field(ge=0, description="a learning rate")]


@dataclass(frozen=True, kw_only=True)
class _Schedule:
    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    warmup: Length = "1%"
    """Linear rise to max_lr, from where the last phase ended (from 0 in a model's first phase)."""

    @property
    def keeps_optimizer_state(self) -> bool:
        """Whether the moments of the last phase are of use: not where the rate rises again (arXiv 2403.08763)."""
        return False

    def parts(self, *, phase_steps: int, tokens_per_step: int) -> dict[str, int]:
        """The lengths of warmup, cooldown, decay and anneal, those that this kind has, in whole optimizer steps.

        Each is rounded up; where they fit their phase exactly and no more fit it rounded, the longest gives way.
        """
        exact = {
            key: length_in_steps(getattr(self, key), phase_steps=phase_steps, tokens_per_step=tokens_per_step)
            for key in ("warmup", "cooldown", "decay", "anneal")
            if hasattr(self, key)
        }
        parts = {key: math.ceil(length) for key, length in exact.items()}
        if sum(exact.values()) <= phase_steps < sum(parts.values()):
            parts[max(parts, key=lambda key: parts[key])] -= sum(parts.values()) - phase_steps
        return parts


@dataclass(frozen=True, kw_only=True)
class ConstantSchedule(_Schedule):
    """One rate; `max_lr: last` goes on with the rate at which the last phase ended."""

    kind: Literal["constant"]
    max_lr: Rate | Literal["last"]
    warmup: Length = "0 steps"

    @property
    def keeps_optimizer_state(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class _Decay(_Schedule):
    max_lr: Rate | Literal["last"]
    min_lr: Floor | None = None
    """The last update's rate; a tenth of max_lr if null."""


@dataclass(frozen=True, kw_only=True)
class LinearSchedule(_Decay):
    """A straight line from max_lr to min_lr."""

    kind: Literal["linear"]


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(_Decay):
    """Half a cosine from max_lr to min_lr."""

    kind: Literal["cosine"]


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecaySchedule(_Decay):
    """max_lr, then a decay at the end of the phase."""

    kind: Literal["wsd"]
    decay: Length = "20%"
    shape: Literal["linear", "1-sqrt"] = "linear"


@dataclass(frozen=True, kw_only=True)
class InverseSqrtSchedule(_Schedule):
    """max_lr sqrt(t_w / t), t_w being the warm-up's length."""

    kind: Literal["inverse_sqrt"]
    max_lr: Rate | Literal["last"]


@dataclass(frozen=True, kw_only=True)
class RexSchedule(_Decay):
    """Reflected exponential: slow at first, fast at the end."""

    kind: Literal["rex"]
    d: Annotated[float, Field(gt=0, lt=1, description="how long the rate stays high")] = 0.5


@dataclass(frozen=True, kw_only=True)
class InfiniteSchedule(_Schedule):
    """Warm-up, cool-down to constant_lr, constant for as long as one likes; an anneal to min_lr where one is asked for.

    Later phases of the same run set warmup and cooldown to "0 steps": no re-warming, no jump.
    """

    kind: Literal["infinite"]
    max_lr: Rate | Literal["last"]
    constant_lr: Rate | Literal["last"]
    min_lr: Rate | None = None
    """The rate at the end of an anneal; a tenth of constant_lr if null."""
    cooldown: Length = "60%"
    shape: Literal["cosine", "inverse_sqrt"] = "cosine"
    anneal: Length = "0 steps"

    @property
    def keeps_optimizer_state(self) -> bool:
        return True


ScheduleConfig = Annotated[
    ConstantSchedule
    | LinearSchedule
    | CosineSchedule
    | WarmupStableDecaySchedule
    | InverseSqrtSchedule
    | RexSchedule
    | InfiniteSchedule,
    Field(discriminator="kind"),
]

# ---------------------------------------------------------------------------------------------- data

Weight = Annotated[float, Field(gt=0, description="a weight, relative to its neighbours")]


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer: a SentencePiece .model file, a Hugging Face tokenizer.json, or a folder that holds one."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    path: str
    train: "TokenizerTraining | None" = None
    """How to make it where `path` does not exist yet."""


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining:
    """A SentencePiece model with byte fallback, trained on raw documents."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    documents: tuple[str, ...]
    vocab_size: Annotated[int, Field(ge=300, description="the number of pieces, the 256 bytes included")]
    model_type: Literal["bpe", "unigram"] = "bpe"


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of tokens: a folder that `megacl prepare` wrote."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    path: str
    generation: Annotated[int, Field(ge=1, description="a state of the source's manifest")] | None = None
    """Null: the newest one when the run begins; from then on the run keeps it."""
    documents: tuple[str, ...] | None = None
    """Raw documents to prepare first where `path` does not exist yet."""
    validation: Annotated[float, Field(ge=0, lt=1, description="the part of the documents that is held out")] = 0.01


def share_of(share: float) -> Fraction:
    """The fraction that a decimal spells, 0.05 -> 1/20, to nine digits."""
    return Fraction(repr(share)).limit_denominator(10**9)


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """A share of earlier data in every batch, taken out of the new data's tokens: the total stays the same."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    share: Annotated[float, Field(ge=0, lt=1, description="the part of each batch drawn from earlier data")]
    from_: Annotated[dict[str, Weight] | None, Field(alias="from")] = None
    """Weights over earlier phases by name; null: all of them, by the tokens of their own that they saw."""
    from_sources: dict[str, Weight] | None = None
    """Weights over `sources` to replay instead, for a model whose own history is not megacl's."""


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One stretch of training: a mixture, a budget, a schedule, a replay share."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the phase's name")]
    mixture: dict[str, Weight]
    schedule: ScheduleConfig
    tokens: Annotated[int, Field(ge=1, description="the phase's budget in tokens")] | None = None
    steps: Annotated[int, Field(ge=1, description="the phase's budget in optimizer steps")] | None = None
    replay: ReplayConfig | None = None
    optimizer_state: Literal["keep", "reset"] | None = None
    """Null: kept by constant and infinite schedules, reset by those that warm up again."""
    seq_length: Annotated[int, Field(ge=2, description="tokens that a sequence predicts")] | None = None
    global_batch_size: Annotated[int, Field(ge=1, description="sequences per optimizer step")] | None = None


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
    max_grad_norm: Annotated[float, Field(gt=0, description="the gradient norm to clip to")] | None = 1.0


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the arithmetic is carried out. Nothing here changes what a run is: all of it may differ after a resume."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["native", "deepspeed"] = "native"
    micro_batch_size: Annotated[int, Field(ge=1, description="sequences per forward pass on one rank")] | None = None
    """Null: this rank's whole share of the global batch."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    zero_stage: Annotated[int, Field(ge=0, le=3, description="DeepSpeed's ZeRO stage")] = 1
    activation_checkpointing: Literal["none", "full"] = "none"
    compile: bool = False
    loss_chunk: Annotated[int, Field(ge=1, description="tokens whose logits exist at one time")] = 1024
    timeout: Annotated[float, Field(gt=0, description="seconds after which a silent rank is given up")] = 600.0


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save. A checkpoint is also saved at each phase's end and when the run is told to stop."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    every_steps: Annotated[int, Field(ge=1, description="optimizer steps between two checkpoints")] | None = None
    keep_last: Annotated[int, Field(ge=1, description="how many checkpoints inside a phase to keep")] | None = 2
    """Ends of phases are always kept; null keeps everything."""


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
    seq_length: Annotated[int, Field(ge=2, description="tokens that a sequence predicts")]
    global_batch_size: Annotated[int, Field(ge=1, description="sequences per optimizer step")]
    tokenizer: TokenizerConfig | None = None
    """Null: the one that the sources were prepared with."""
    seed: Annotated[int, Field(ge=0, lt=2**63, description="the seed of weights and order")] = 0
    order: Literal["v1"] = "v1"
    start_from: str | None = None
    """A model to go on from, weights and history: RUN, RUN@PHASE, RUN@STEP, or a checkpoint's folder."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
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

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all phases together."""
        return sum(self.steps_of(phase) for phase in self.phases)

    def check(self) -> None:
        """Raises ConfigError where settings do not fit one another."""
        problem = self.model.problem()
        if problem:
            raise ConfigError(f"model.{problem}.")
        if not self.phases:
            raise ConfigError("phases is empty; a run needs at least one phase.")
        seen: list[str] = []
        for index, phase in enumerate(self.phases):
            self._check_phase(f"phases[{index}]", phase, seen)
            seen.append(phase.name)
        engine = self.engine
        if engine.kind == "deepspeed" and engine.precision != "fp32" and engine.zero_stage == 0:
            raise ConfigError(
                f"engine.zero_stage is 0 with engine.precision {engine.precision}; DeepSpeed takes one step too many "
                "there, so use zero_stage 1."
            )
        if engine.kind == "deepspeed" and engine.zero_stage == 3 and engine.compile:
            raise ConfigError(
                "engine.compile is true with engine.zero_stage 3, whose gathering of weights breaks compiled graphs, "
                "so compile with zero_stage 2, or leave it out."
            )

    def _check_phase(self, where: str, phase: PhaseConfig, earlier: list[str]) -> None:
        if phase.name in earlier:
            raise ConfigError(
                f"{where}.name is {phase.name!r}, as that of phases[{earlier.index(phase.name)}]; name it differently."
            )
        if phase.name == "before":
            raise ConfigError(f"{where}.name is 'before', which stands for a run's start in every table; rename it.")
        if not phase.mixture:
            raise ConfigError(f"{where}.mixture is empty; it must name at least one source and its weight.")
        replayed = (phase.replay.from_sources or {}) if phase.replay else {}
        for key, names in ((f"{where}.mixture", phase.mixture), (f"{where}.replay.from_sources", replayed)):
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
        micro = self.engine.micro_batch_size
        if micro is not None and self.batch_size_of(phase) % micro:
            raise ConfigError(
                f"global_batch_size of {where} is {self.batch_size_of(phase)}; "
                f"it must be a multiple of engine.micro_batch_size, {micro}."
            )
        self._check_schedule(f"{where}.schedule", phase, first=not earlier)
        if phase.replay:
            self._check_replay(f"{where}.replay", phase.replay, earlier)

    def _check_schedule(self, where: str, phase: PhaseConfig, *, first: bool) -> None:
        schedule = phase.schedule
        steps, per_step = self.steps_of(phase), self.tokens_per_step(phase)
        parts = schedule.parts(phase_steps=steps, tokens_per_step=per_step)
        if sum(parts.values()) > steps:
            spelled = " + ".join(f"{key} {length}" for key, length in parts.items())
            raise ConfigError(
                f"{where} is longer than its phase: {spelled} = {sum(parts.values())} steps, "
                f"and the phase has {steps}; shorten a part or give the phase more tokens."
            )
        rates = {key: getattr(schedule, key) for key in ("max_lr", "constant_lr", "min_lr") if hasattr(schedule, key)}
        if first and self.start_from is None and "last" in rates.values():
            raise ConfigError(
                f"{where} goes on with the last phase's rate, but there is no earlier phase; give a number."
            )
        known = [(key, rate) for key, rate in rates.items() if isinstance(rate, float)]
        for (upper, high), (lower, low) in itertools.pairwise(known):
            if low > high:
                raise ConfigError(f"{where}.{lower} is {low}; it must not exceed {upper}, {high}.")
        if isinstance(schedule, InverseSqrtSchedule) and not parts["warmup"]:
            raise ConfigError(f"{where}.warmup is {schedule.warmup!r}; inverse_sqrt needs at least one step of it.")
        if isinstance(schedule, _Decay) and (parts["warmup"] == steps or parts.get("decay") == 0):
            raise ConfigError(f"{where} has no step left to decay in: the phase has {steps}; shorten the warm-up.")

    def _check_replay(self, where: str, replay: ReplayConfig, earlier: list[str]) -> None:
        if replay.share and share_of(replay.share) in (0, 1):
            raise ConfigError(f"{where}.share is {replay.share}; it must not have more than nine digits.")
        if replay.from_ and replay.from_sources:
            raise ConfigError(f"{where} has both from and from_sources; replay either earlier phases or named sources.")
        if self.start_from is None and not replay.from_sources:
            if not earlier:
                raise ConfigError(
                    f"{where} has nothing to replay: this is the model's first phase. "
                    "Take replay out, or name prepared sources in from_sources."
                )
            for name in replay.from_ or {}:
                if name not in earlier:
                    raise ConfigError(f"{where}.from names {name!r}, which is no earlier phase{nearest(name, earlier)}")
