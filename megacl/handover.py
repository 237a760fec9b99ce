"""What a phase makes of the engine that the phase before left: its optimizer's state, and Reptile's anchor.

    record = take_over(engine, record)      # where a phase begins; the record says what became of the optimizer's state
    go_on(engine, record)                   # inside it, where a checkpoint of it was loaded
    after_step(engine, record, step)        # behind each step: Reptile's moves

`optimizer_state` of a phase, in AdamW's terms: m and v are its moments, t its count of updates (arXiv 1711.05101). An
update goes by m / (1 - beta1^t) over sqrt(v / (1 - beta2^t)), since moments that began at zero are too small by that.

- `keep`: m, v and t go on. It is as if there were no boundary.
- `reset`: m = v = 0 and t = 0, as for a new model. The first update is as large as the rate for nearly every weight.
- `reset_step`: m and v go on, t = 0. They are corrected for a beginning at zero that they did not have, so that update
  j of the phase is sqrt(1 - beta2^j) / (1 - beta1^j) times what it is with `keep`, where t is large. With beta1 0.9 and
  beta2 0.95 that is 2.2 for the first, 1.2 for the fifth, 0.91 for the twentieth, 0.97 for the fiftieth; with beta2
  0.999 it is 0.32, 0.17, 0.16 and 0.22. What decays of the weights stays as it is.

Other programs have no setting of this name: it is what comes of setting `step` in the state of torch's optimizer to 0
by hand. Where gpt-neox and Megatron-LM `finetune`, they count their steps, and so the schedule, from 0 and leave the
optimizer's state out, which is `reset`. A schedule that begins anew while Adam's count goes on is `keep`: a phase's
schedule always counts the phase's own steps.

Reptile's moves count batches taken, as the schedule does, so that an update that was skipped does not shift them. A
phase whose steps are no multiple of k ends between two moves, with the weights as they are there. Going back to a
checkpoint brings back its anchor.
"""

import dataclasses

from megacl.engine import Engine
from megacl.lineage import PhaseRecord

_SAID = {
    "new": "optimizer state new",
    "kept": "optimizer state kept",
    "reset": "optimizer state reset",
    "step_reset": "optimizer moments kept, Adam's count of updates reset",
}


def take_over(engine: Engine, record: PhaseRecord) -> PhaseRecord:
    """Readies the engine for a phase's first step. Every rank calls it.

    Returns the record, whose optimizer_state is "new" where there were no moments to keep or to reset.
    """
    if not engine.has_moments:
        record = dataclasses.replace(record, optimizer_state="new")
    match record.optimizer_state:
        case "reset":
            engine.reset_optimizer()
        case "step_reset":
            engine.reset_optimizer_step()
    if record.reptile is None:
        engine.drop_anchor()
    else:
        engine.set_anchor()
    return record


def go_on(engine: Engine, record: PhaseRecord) -> None:
    """Readies an engine that holds a checkpoint from inside a phase. Every rank calls it.

    One that stands at a move holds no anchor, since its weights are the anchor.
    """
    if record.reptile is not None and not engine.has_anchor:
        engine.set_anchor()


def after_step(engine: Engine, record: PhaseRecord, step: int) -> None:
    """Reptile's move behind a phase's step, 1 being its first, where the phase has one there. Every rank calls it."""
    if record.reptile is None:
        return
    if step % record.reptile.every_steps == 0:
        engine.outer_update(record.reptile.epsilon)
    if step == record.budget_steps:  # no move is left, so that the checkpoint of the phase's end need not hold it
        engine.drop_anchor()


def described(record: PhaseRecord) -> str:
    """What the log says of it where the phase begins."""
    said = _SAID[record.optimizer_state]
    return f"{said}; {record.reptile.words}" if record.reptile else said
