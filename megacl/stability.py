"""Updates that would do harm: which are skipped, and when that is too many in a row.

    result = engine.step(tokens, lr, skip_above=skip_above(watch, stability))
    watch, trouble = after_step(watch, stability, result.loss, applied=result.applied, fp16=False)
    if given_up(watch, stability): ...                    # go back to a checkpoint, or end the run

A loss x is a spike iff

    x > m + k max(s, |m| / 100)

m and s being the mean and the standard deviation of the last `window` losses that were learned from, and k
`stability.spike`. The floor under s keeps a loss that has become flat from making spikes of its noise: what lies less
than k per cent above the mean is none. Nothing is a spike before half a window was seen since the phase began or its
mixture changed, for other data has another loss.

Going back to a checkpoint and passing over the data in between: Chowdhery et al. 2022, arXiv 2204.02311, section 5.1.
"""

import math
from dataclasses import dataclass, replace

from megacl.config import StabilityConfig

_FLOOR = 0.01
"""The least standard deviation, as a part of the mean."""
_MAX_OVERFLOWS = 20
"""Updates in a row that fp16 may skip: by then its loss scale is a millionth of what it was, or 1."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What the rule remembers. It stands in every checkpoint, so that a run that goes on decides as it would have."""

    losses: tuple[float, ...] = ()
    """Of the last `window` updates that were applied since the phase began or its mixture changed."""
    skipped: int = 0
    """Updates skipped since the last one that was applied; what fp16's loss scale skips is no matter of theirs."""
    overflows: int = 0
    """Updates in a row that the loss scale skipped."""
    went_back: int = 0
    """How often the run has gone back to a checkpoint."""


def skip_above(watch: Watch, stability: StabilityConfig) -> float:
    """The loss above which the next one is a spike, in nats per token; inf where none would be."""
    count = len(watch.losses)
    if stability.spike is None or count < stability.window / 2:
        return math.inf
    # Sums without rounding, so that every machine of a run comes to the same bits.
    mean = math.fsum(watch.losses) / count
    deviation = math.sqrt(math.fsum((loss - mean) ** 2 for loss in watch.losses) / count)
    return mean + stability.spike * max(deviation, _FLOOR * abs(mean))


def after_step(
    watch: Watch, stability: StabilityConfig, loss: float, *, applied: bool, fp16: bool
) -> tuple[Watch, str]:
    """What to remember after a step, and what was wrong with it in words, or "".

    loss: of the step, nats per token. applied: whether the update was made, as one above `skip_above` is not. fp16:
    whether a gradient that is not finite is for the loss scale to mend.
    """
    if applied:
        losses = (*watch.losses, loss)[-stability.window :]
        return replace(watch, losses=losses, skipped=0, overflows=0), ""
    if not math.isfinite(loss):
        trouble = "the loss is not finite"
    elif loss > (threshold := skip_above(watch, stability)):
        trouble = f"the loss, {loss:.4f}, is a spike above {threshold:.4f}"
    elif fp16 and watch.overflows < _MAX_OVERFLOWS:
        return replace(watch, overflows=watch.overflows + 1), ""
    else:
        trouble = "the gradient is not finite"
        trouble += " in fp16, even at lower loss scales (bf16 has a wider range)" if fp16 else ""
    return replace(watch, skipped=watch.skipped + 1), trouble


def given_up(watch: Watch, stability: StabilityConfig) -> bool:
    """Whether more updates in a row were skipped than the run bears."""
    return watch.skipped > stability.skip


def gone_back(watch: Watch, losses: tuple[float, ...]) -> Watch:
    """What to remember after going back to a checkpoint. losses: those from which the next ones are judged."""
    return Watch(losses=losses, went_back=watch.went_back + 1)
