"""What a step or an evaluation did, as a record in metrics.jsonl (docs/formats.md) and a line on the terminal."""

from collections.abc import Mapping

from megacl.engine import StepResult
from megacl.heldout import SourceLoss
from megacl.lineage import Lineage
from megacl.log import RunLog
from megacl.model.config import ModelConfig
from megacl.model.gpt import flops_per_token


def record_step(
    log: RunLog,
    lineage: Lineage,
    model: ModelConfig,
    result: StepResult,
    *,
    step: int,
    total_steps: int,
    begun: int,
    lr: float,
    seconds: float,
    waited: float,
    targets: int | None,
) -> None:
    """Records the step after which the lineage is as given, and what was seen inside it.

    step, total_steps: of the run. begun: how many of the lineage's phases are the run's. seconds: inside the engine.
    waited: seconds for its batch. targets: of the global batch, where it may hold padding.
    """
    phase = lineage.phases[-1]
    rate = phase.global_batch_size * phase.seq_length / seconds
    flops = rate * flops_per_token(model, phase.seq_length)
    log.record(
        "step",
        step=step,
        phase=phase.name,
        samples=phase.samples,
        tokens=lineage.tokens,
        loss=result.loss,
        lr=lr,
        grad_norm=result.grad_norm,
        log_z=result.log_z,
        applied=result.applied,
        updates=sum(each.updates for each in lineage.phases[-begun:]),
        seconds=seconds,
        waited=waited,
        tokens_per_second=rate,
        flops_per_second=flops,
        **({} if targets is None else {"real_tokens": targets}),
    )
    if result.monitors is not None:
        log.record("monitor", step=step, phase=phase.name, log_z=result.log_z, **result.monitors.record())
    text = f"{phase.name}  loss {result.loss:.4f}  lr {lr:.3g}  {rate:,.0f} tokens/s  {flops / 1e9:,.1f} GFLOP/s"
    log.progress(step, total_steps, text)


def record_evaluation(
    log: RunLog, lineage: Lineage, results: Mapping[str, SourceLoss], *, step: int, phase: str, at: str
) -> None:
    """Records the held-out losses of sources. at: where in the phase, "start", "interval" or "end"."""
    sources = {name: result.record() for name, result in results.items()}
    log.record("evaluation", step=step, phase=phase, tokens=lineage.tokens, at=at, sources=sources)
    if results:
        losses = "  ".join(f"{name} {result.loss:.4f}" for name, result in results.items())
        log.say(f"held-out loss at step {step}: {losses}")
