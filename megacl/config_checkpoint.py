"""The schema of a run's checkpoints: when to save, and what stays. retention.py carries it out."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

from megacl.model.config import STRICT


@dataclass(frozen=True, kw_only=True)
class KeepBestConfig:
    """The checkpoints with the lowest held-out loss."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    source: Annotated[str, Field(min_length=1, description="the source whose held-out loss counts")] | None = None
    """Null: the mean over all sources, in nats a token."""
    keep: Annotated[int, Field(ge=1, description="how many of the best checkpoints to keep")] = 1


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and what stays. A checkpoint is also saved at each phase's end and when the run is told to stop.

    What any of the rules keeps, stays; so do ends of phases, checkpoints with a name, and the one to go back to.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    every_steps: Annotated[int, Field(ge=1, description="optimizer steps between two checkpoints")] | None = None
    keep_last: Annotated[int, Field(ge=1, description="how many checkpoints inside a phase to keep")] | None = 2
    """Null keeps everything."""
    keep_every: Annotated[int, Field(ge=1, description="optimizer steps between two checkpoints that stay")] | None = (
        None
    )
    keep_best: KeepBestConfig | None = None

    def problem(self, *, evaluated_every: int | None) -> str | None:
        """What does not fit together, said of this section's settings, or None.

        evaluated_every: optimizer steps between two evaluations, if there are any inside a phase.
        """
        for key in ("keep_every", "keep_best"):
            if getattr(self, key) is None:
                continue
            if self.keep_last is None:
                return f"{key} is given, and keep_last is null, which keeps everything; give keep_last a number"
            if self.every_steps is None:
                return f"{key} is given, and no checkpoints are saved inside a phase; set checkpoint.every_steps"
        if self.keep_every is not None and self.keep_every % (self.every_steps or 1):
            return (
                f"keep_every is {self.keep_every}; it must be a multiple of checkpoint.every_steps, "
                f"{self.every_steps}: only at such steps are checkpoints saved"
            )
        if self.keep_best is not None and (evaluated_every is None or (self.every_steps or 0) % evaluated_every):
            return (
                f"keep_best is given, and not every checkpoint is evaluated: evaluation.every_steps is "
                f"{evaluated_every or 'null'}; make it checkpoint.every_steps, {self.every_steps}, or a divisor of that"
            )
        return None
