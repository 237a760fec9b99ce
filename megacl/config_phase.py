"""The schema of a phase: mixture, budget, schedule, replay, Reptile. Frozen data; config.py has the rest of a run.

Rules for one setting stand in its type, rules that tie a phase's settings together in `RunConfig.check`.
"""

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from megacl.model.config import STRICT


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
class Decay(_Schedule):
    max_lr: Rate | Literal["last"]
    min_lr: Floor | None = None
    """The last update's rate; a tenth of max_lr if null."""


@dataclass(frozen=True, kw_only=True)
class LinearSchedule(Decay):
    """A straight line from max_lr to min_lr."""

    kind: Literal["linear"]


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(Decay):
    """Half a cosine from max_lr to min_lr."""

    kind: Literal["cosine"]


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecaySchedule(Decay):
    """max_lr, then a decay at the end of the phase."""

    kind: Literal["wsd"]
    decay: Length = "20%"
    shape: Literal["linear", "1-sqrt"] = "linear"


AnnealShape = Literal["exponential", "linear", "cosine", "1-sqrt"]
"""How the rate of a release falls."""


@dataclass(frozen=True, kw_only=True)
class AnnealSchedule(Decay):
    """From the rate at which the last phase ended to min_lr: what makes a release of a trunk."""

    kind: Literal["anneal"]
    max_lr: Rate | Literal["last"] = "last"
    warmup: Length = "0 steps"
    shape: AnnealShape = "exponential"

    @property
    def keeps_optimizer_state(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class InverseSqrtSchedule(_Schedule):
    """max_lr sqrt(t_w / t), t_w being the warm-up's length."""

    kind: Literal["inverse_sqrt"]
    max_lr: Rate | Literal["last"]


@dataclass(frozen=True, kw_only=True)
class RexSchedule(Decay):
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
    | AnnealSchedule
    | InverseSqrtSchedule
    | RexSchedule
    | InfiniteSchedule,
    Field(discriminator="kind"),
]


def misfit(schedule: ScheduleConfig, *, phase_steps: int, tokens_per_step: int) -> str | None:
    """Why a schedule cannot be laid over a phase of so many steps, as the rest of a sentence, or None."""
    parts = schedule.parts(phase_steps=phase_steps, tokens_per_step=tokens_per_step)
    if sum(parts.values()) > phase_steps:
        spelled = " + ".join(f"{key} {length}" for key, length in parts.items())
        return (
            f" is longer than its phase: {spelled} = {sum(parts.values())} steps, "
            f"and the phase has {phase_steps}; shorten a part or give the phase more tokens."
        )
    if isinstance(schedule, InverseSqrtSchedule) and not parts["warmup"]:
        return f".warmup is {schedule.warmup!r}; inverse_sqrt needs at least one step of it."
    if isinstance(schedule, AnnealSchedule) and schedule.shape == "exponential" and schedule.min_lr == 0:
        return ".min_lr is 0, which an exponential anneal never reaches; give a rate above 0, or another shape."
    if isinstance(schedule, Decay) and (parts["warmup"] == phase_steps or parts.get("decay") == 0):
        return f" has no step left to decay in: the phase has {phase_steps}; shorten the warm-up."
    return None


# ---------------------------------------------------------------------------------------------- data

Weight = Annotated[float, Field(gt=0, le=1e30, description="a weight, relative to its neighbours")]
SeqLength = Annotated[int, Field(ge=2, le=2**24, description="tokens that a sequence predicts")]
BatchSize = Annotated[int, Field(ge=1, le=2**24, description="sequences per optimizer step")]

MAX_TOKENS = 2**60
"""Of a phase: positions are numbers of 64 bits, and so are their sums."""


def share_of(share: float) -> Fraction:
    """The fraction that a decimal spells, 0.05 -> 1/20, to nine digits."""
    return Fraction(repr(share)).limit_denominator(10**9)


@dataclass(frozen=True, kw_only=True)
class MixtureChange:
    """Other weights from some point of a phase on."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    at: Length
    """Rounded up to whole steps; "50%" is a part of the budget that is configured."""
    mixture: dict[str, Weight]
    """All the weights from there on: a source that is not named has none."""
    how: Literal["step", "linear"] = "step"
    """Linear: the shares move there in a straight line, from the change before or from the phase's beginning."""


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """A share of earlier data in every batch, taken out of the new data's tokens: the total stays the same."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    share: Annotated[float, Field(ge=0, lt=1, description="the part of each batch drawn from earlier data")]
    policy: Literal["original", "uniform", "power_law", "exponential", "latest"] = "original"
    """Which earlier phases are replayed how often, and in which order each of them is read."""
    from_: Annotated[dict[str, Weight] | None, Field(alias="from")] = None
    """Weights over earlier phases by name, for `original`; null: all, by the tokens of their own that they saw."""
    from_sources: dict[str, Weight] | None = None
    """Weights over `sources` to replay instead, for a model whose own history is not megacl's."""
    d: Annotated[float, Field(gt=0, description="how fast older phases fade")] | None = None
    """Of power_law and exponential; 0.5 if null."""
    age: Literal["phases", "tokens"] | None = None
    """What power_law and exponential count a phase's age in; phases if null."""
    max_times: Annotated[int, Field(ge=1, le=2**20, description="how often to replay a sample at most")] | None = None
    """Null: as often as it comes round."""

    def problem(self) -> str | None:
        """What does not fit together, said of this section's settings, or None."""
        if self.share and share_of(self.share) in (0, 1):
            return f"share is {self.share}; it must not have more than nine digits"
        if self.from_ and self.from_sources:
            return "from and from_sources are both given; replay either earlier phases or named sources"
        if self.policy != "original" and self.from_:
            return f"from is given, and policy {self.policy} sets the weights itself; leave one of them out"
        if self.policy != "original" and self.from_sources:
            return f"policy is {self.policy}, which is over earlier phases; leave it out, or from_sources"
        if self.max_times and self.from_sources:
            return "max_times is given, which counts replays of earlier phases; leave it out, or from_sources"
        if self.policy not in ("power_law", "exponential") and (self.d or self.age):
            key = "d" if self.d else "age"
            return (
                f"{key} is given, which only power_law and exponential have, and policy is {self.policy}; leave it out"
            )
        return None


# ---------------------------------------------------------------------------------------------- a phase


@dataclass(frozen=True, kw_only=True)
class ReptileConfig:
    """After every k-th step of the phase, weights <- anchor + epsilon (weights - anchor), which is the next anchor.

    The first anchor is what the phase began with (Reptile, arXiv 1803.02999; with replay it is MER, arXiv 2508.01908).
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    every_steps: Annotated[int, Field(ge=1, le=2**40, description="k, the optimizer steps between two moves")]
    epsilon: Annotated[float, Field(gt=0, le=1, description="the part of the way from the anchor that is kept")]

    @property
    def words(self) -> str:
        """It in words, for lines that people read."""
        return f"Reptile every {self.every_steps:,} steps, epsilon {self.epsilon:g}"


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One stretch of training: a mixture, a budget, a schedule, a replay share."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the phase's name")]
    mixture: dict[str, Weight] = field(default_factory=dict)
    schedule: ScheduleConfig
    continues: bool = False
    """True, and no mixture: the samples are those that the phase before would have read next, of its mixture, with the
    changes that it has still to come, and of its replay, which is given again."""
    weights_by: Literal["given", "tokens", "documents"] = "given"
    """What a source's number in a mixture multiplies: 1, its training tokens, or its training documents."""
    temperature: Annotated[float, Field(gt=0, description="the root that is taken of weights")] = 1.0
    """Shares are proportional to weight^(1 / temperature): above 1 it evens them out."""
    mixture_changes: tuple[MixtureChange, ...] = ()
    when_exhausted: Literal["repeat", "stop", "renormalise"] = "repeat"
    """Once a source has been read to its end: again, the phase ends, or the others fill its places."""
    tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS, description="the phase's budget in tokens")] | None = None
    steps: Annotated[int, Field(ge=1, le=2**40, description="the phase's budget in optimizer steps")] | None = None
    replay: ReplayConfig | None = None
    reptile: ReptileConfig | None = None
    optimizer_state: Literal["keep", "reset", "reset_step"] | None = None
    """What becomes of Adam's moments and count of updates. reset_step keeps the moments and counts from 0 again.

    Null: kept by constant and infinite schedules, reset by those that warm up again. megacl/handover.py has the
    arithmetic.
    """
    seq_length: SeqLength | None = None
    global_batch_size: BatchSize | None = None

    @property
    def source_names(self) -> tuple[str, ...]:
        """The sources of the mixture and of its changes, each once, as they come."""
        changes = (name for change in self.mixture_changes for name in change.mixture)
        return tuple(dict.fromkeys([*self.mixture, *changes]))
