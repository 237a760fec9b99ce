"""Writes run directories as a trainer leaves them, with numbers that a test chooses."""

import json
import math
from pathlib import Path
from typing import Any

from megacl.lineage import (
    BranchRecord,
    CheckpointMark,
    Lineage,
    MergedCheckpoint,
    MergeRecord,
    MixturePiece,
    PhaseRecord,
    ReplayedPhase,
    ReplayRecord,
    SourceRecord,
    load_lineage,
)

TOKENS_PER_STEP = 8192

CONFIG = """\
run_dir: {run_dir}
model: {{vocab_size: 512, hidden_size: 32, num_layers: 2, num_attention_heads: 2}}
sources:
  english: {{path: data/english}}
phases:
- {{name: english, mixture: {{english: 1.0}}, steps: 10, schedule: {{kind: constant, max_lr: 1e-3}}}}
seq_length: 256
global_batch_size: 32
"""


def phase(
    run: str, name: str, steps: int, sources: dict[str, float], replay: ReplayRecord | None = None
) -> PhaseRecord:
    """A phase that is over, on sources with the given shares."""
    return PhaseRecord(
        run=run,
        name=name,
        order="v1",
        seed=0,
        seq_length=256,
        global_batch_size=32,
        budget_samples=32 * steps,
        samples=32 * steps,
        tokens=TOKENS_PER_STEP * steps,
        tokenizer="f00d",
        sources=tuple(
            SourceRecord(
                name=source,
                path=f"data/{source}",
                generation=1,
                fingerprint=f"fingerprint of {source}",
                train_tokens=800_000,
                first=0,
                samples=32 * steps,
                share=share,
                epochs=0.5,
            )
            for source, share in sources.items()
        ),
        mixture=(MixturePiece(first=0, weights=(1,) * len(sources)),),
        replay=replay,
        schedule={"kind": "cosine", "max_lr": 1e-3, "min_lr": 1e-4, "warmup": "1%"},
        optimizer_state="new",
        start_lr=0.0,
    )


def quarter_replay(of: str, samples: int) -> ReplayRecord:
    """A quarter of the samples drawn from one earlier phase."""
    return ReplayRecord(
        share="1/4",
        samples=samples,
        mixture=(MixturePiece(first=0, weights=(1,)),),
        from_=(ReplayedPhase(phase=of, first=0, samples=samples),),
    )


def step(number: int, *, phase: str, tokens: int, loss: float | None = 5.0, **values: Any) -> dict[str, Any]:
    """A step record."""
    record = {"lr": 1e-3, "grad_norm": 1.0, "applied": True, "seconds": 0.5, "tokens_per_second": 16384.0}
    return {"kind": "step", "step": number, "phase": phase, "tokens": tokens, "loss": loss, **record, **values}


def evaluation(step: int, *, phase: str, tokens: int, at: str, losses: dict[str, float | None]) -> dict[str, Any]:
    """An evaluation record; all that is not given follows from a made-up text of 2000 bytes in 500 tokens."""
    sources = {
        name: {
            "loss": loss,
            "perplexity": None if loss is None else math.exp(loss),
            "bits_per_byte": None if loss is None else loss / 4 / math.log(2),
            "nats": None if loss is None else 500 * loss,
            "tokens": 500,
            "text_bytes": 2000.0,
            "fingerprint": f"fingerprint of {name}",
        }
        for name, loss in losses.items()
    }
    return {"kind": "evaluation", "step": step, "phase": phase, "tokens": tokens, "at": at, "sources": sources}


def write_run(folder: Path, phases: list[PhaseRecord], records: list[dict[str, Any]]) -> Path:
    """A run directory with a configuration, a lineage and metrics."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(run_dir=json.dumps(str(folder))))
    (folder / "lineage.json").write_text(Lineage(phases=tuple(phases)).dump())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def branch_off(run: Path, parent: Path, after: int, step: int) -> Path:
    """Makes a written run one that began from a step of another, behind the first `after` phases of its lineage."""
    config = run / "config.yaml"
    config.write_text(f"start_from: {json.dumps(f'{parent}@{step}')}\n" + config.read_text())
    before = load_lineage(parent)
    before = Lineage(phases=load_lineage(run).phases[:after], events=before.events)
    mark = CheckpointMark(run=parent.name, step=step, tokens=before.tokens, id=before.id, weights="c0de")
    branched = before.with_event(BranchRecord(after=after, checkpoint=mark))
    lineage = Lineage(phases=load_lineage(run).phases, events=branched.events)
    (run / "lineage.json").write_text(lineage.dump())
    return run


def merge_of(run: Path, parent: Path, name: str, after: int, step: int) -> Path:
    """Makes a written run the merge of one checkpoint of another, behind the first `after` phases of its lineage."""
    config = run / "config.yaml"
    config.write_text(f"start_from: {json.dumps(f'{parent}@{step}')}\n" + config.read_text())
    before = load_lineage(parent)
    mark = MergedCheckpoint(run=parent.name, step=step, tokens=before.tokens, id=before.id, weights="c0de", weight=1)
    merged = before.with_event(MergeRecord(name=name, after=after, shape="linear", checkpoints=(mark,)))
    (run / "lineage.json").write_text(merged.dump())
    return run


def write_two_phases(folder: Path, german: str = "german") -> Path:
    """English for 10 steps, then German for 10 with a quarter of replay; the losses are those of the tests below.

    german: how the phase and its source are called.
    """
    name = folder.name
    records = [evaluation(0, phase="english", tokens=0, at="start", losses={"english": 8.0, german: 8.25})]
    for number in range(1, 21):
        now = "english" if number <= 10 else german
        tokens = TOKENS_PER_STEP * number
        records.append(step(number, phase=now, tokens=tokens, loss=8 - number / 10, lr=1e-3 * (1 - number / 40)))
        if number == 5:
            losses = {"english": 6.5, german: 7.75}
            records.append(evaluation(5, phase=now, tokens=tokens, at="interval", losses=losses))
        if number == 10:
            losses = {"english": 5.0, german: 7.5}
            records.append(evaluation(10, phase=now, tokens=tokens, at="end", losses=losses))
        if number == 20:
            losses = {"english": 5.125, german: 5.5}
            records.append(evaluation(20, phase=now, tokens=tokens, at="end", losses=losses))
    replay = quarter_replay("english", 80)
    phases = [phase(name, "english", 10, {"english": 1.0}), phase(name, german, 10, {german: 1.0}, replay)]
    return write_run(folder, phases, records)
