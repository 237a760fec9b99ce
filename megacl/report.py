"""Run directories -> one HTML page: losses, what was learned and forgotten, speed, lineage, configuration.

    megacl report runs/english runs/german --out report.html

    save_report([Path("runs/english"), Path("runs/german")], Path("report.html"))

The page holds all that it needs, Plotly's script included (some 5 MB): it opens from a disk, without network, and its
content security policy forbids any. Several runs are laid into the same plots. A report reads files only, so it can be
made while a run is going on. Reading is in report_run.py, the plots are in report_plots.py, and the page's style and
script are report.css and report.js.
"""

import datetime
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from megacl import __version__
from megacl.errors import DataError
from megacl.heldout import Unit
from megacl.lineage import Entry, Event, PhaseRecord
from megacl.lineage_text import describe_event
from megacl.model.gpt import count_parameters
from megacl.page import Column, duration, number, plot, render_page, sample, short, table, text
from megacl.publish import disk_errors, publish_text
from megacl.report_plots import (
    QUANTITIES,
    Style,
    loss_figure,
    points_per_mean,
    sources_of,
    step_figure,
    style_of_run,
    style_of_source,
)
from megacl.report_run import RecordedRun, read_runs
from megacl.transfer import Matrix, matrix_of, matrix_table


def save_report(run_dirs: Sequence[Path], out: Path) -> None:
    """Writes the report of one or several runs to `out`, whole or not at all.

    Raises as `render_report` does, and DataError where `out` cannot be written.
    """
    if out.is_dir() or not all(folder.is_dir() for folder in out.parents if folder.exists()):
        raise DataError(f"{out}: a report cannot be written there; name a file in a folder, such as report.html.")
    page = render_report(run_dirs)
    with disk_errors(out, "the report"):
        out.parent.mkdir(parents=True, exist_ok=True)
    publish_text(out, page, "the report")


def render_report(run_dirs: Sequence[Path]) -> str:
    """The report of one or several run directories as one HTML page.

    Raises CheckpointError where one of them is no run directory, has recorded nothing yet, or holds a broken file.
    """
    runs = read_runs(run_dirs)
    title = ", ".join(run.name for run in runs)
    command = shlex.join(["megacl", "report", *map(str, run_dirs), "--out", "report.html"])
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return render_page(
        title=title,
        kind="report",
        summary=_summary(runs),
        main=[*_losses(runs), *_forgetting(runs), *_training(runs), *_history(runs)],
        footer=f"Made on {now} by megacl {__version__}: <code>{text(command)}</code>",
    )


# ---------------------------------------------------------------------------------------------- sections


def _summary(runs: Sequence[RecordedRun]) -> Iterable[str]:
    """A line for one run, a table with a row a run for several."""
    if len(runs) == 1:
        run = runs[0]
        facts = [f"{short(count_parameters(run.model))} parameters"]
        trained = bool(len(run.steps["step"]))
        facts += [f"phases: {_phases(run)}" if trained else _phases(run), f"{short(run.tokens)} tokens seen"]
        if trained:
            facts += [f"{duration(_seconds(run))} of training", f"median {short(_throughput(run))} tokens/s"]
        yield f'<p class="lead">{text(" · ".join(facts))}</p>'
        return
    sources = sources_of(runs)
    head = [
        Column("run"),
        Column("phases"),
        Column("parameters", number=True),
        Column("tokens seen", number=True),
        Column("steps", number=True),
        Column("training", number=True),
        Column("tokens/s", number=True),
        *(Column(f"{source}, last loss", number=True) for source in sources),
    ]
    rows = [
        [
            run.name,
            _phases(run),
            short(count_parameters(run.model)),
            short(run.tokens),
            f"{len(run.steps['step']):,}",
            duration(_seconds(run)),
            short(_throughput(run)) if len(run.steps["step"]) else "",
            *(_last_loss(run, source) for source in sources),
        ]
        for run in runs
    ]
    yield table(head, rows)
    yield (
        '<p class="note">Tokens seen count all of a model\'s history, earlier runs included. Training is the time '
        "inside optimizer steps; tokens/s is their median. Losses are of held-out text, in nats per token.</p>"
    )


def _losses(runs: Sequence[RecordedRun]) -> Iterable[str]:
    group = max(points_per_mean(run) for run in runs)
    mean = f", up to {group} steps to a point" if group > 1 else ""
    yield "<section><h2>Held-out loss</h2>"
    yield (
        '<p class="note">Nats per token on held-out documents of each source, over the tokens that the model has seen; '
        f"training loss thin behind it{mean}. Dotted lines: where a phase begins.</p>"
    )
    yield _legend(runs)
    yield plot("loss", loss_figure(runs).to_json(), "Held-out loss of each source over the tokens seen")
    yield "</section>"


def _forgetting(runs: Sequence[RecordedRun]) -> Iterable[str]:
    yield "<section><h2>What was learned and what was forgotten</h2>"
    yield (
        '<p class="note">Held-out loss where the model began and behind each phase; *: the phase read that source. '
        "Learned: the loss behind a source's own phase. Forgetting: the rise above the best loss before. Backward: how "
        "far later phases made a source of an earlier one better; forward: how far earlier phases had made it better "
        "before it was read; below 0 is worse. Behind each phase: learned loss is the mean over the phase's sources, "
        "retained loss, forgetting and backward over those of earlier phases.</p>"
    )
    yield from (f'<p class="note">{text(line[:1].upper() + line[1:])}</p>' for run in runs for line in run.unknown)
    units: dict[str, Unit] = {"Nats per token": "loss", "Bits per byte of text": "bits_per_byte"}
    for title, unit in units.items():
        matrices = [matrix_of(run.way, run.lineage, unit=unit) for run in runs]
        if not any(matrix.rows for matrix in matrices):
            yield '<p class="note">Nothing has been evaluated yet.</p>'
            break
        yield f"<h3>{title}</h3>"
        yield _matrices([run.name for run in runs], matrices)
    yield "</section>"


def _matrices(names: Sequence[str], matrices: Sequence[Matrix]) -> str:
    """One table for all runs: the runs of one phase below one another, since that is what one compares."""
    sources = list(dict.fromkeys(source for matrix in matrices for source in matrix.sources))
    several = len(names) > 1
    phases: list[tuple[str, list[str]]] = []
    quantities: list[tuple[str, list[str]]] = []
    for name, matrix in zip(names, matrices, strict=True):
        head, rows = matrix_table(matrix, _value, sources)
        count = len(matrix.rows)
        phases += [(name, row) for row in rows[:count]]
        quantities += [(name, row) for row in rows[count:]]
    columns = [
        Column("behind"),
        *([Column("run")] if several else []),
        *(Column(each, number=True) for each in head[1:]),
    ]
    body = [
        [label, *([name] if several else []), *row[1:]]
        for part in (phases, quantities)
        for label in dict.fromkeys(row[0] for _, row in part)
        for name, row in part
        if row[0] == label
    ]
    return table(columns, body)


def _value(value: float | None, signed: bool) -> str:
    return number(value, "+.3f" if signed else ".3f")


def _training(runs: Sequence[RecordedRun]) -> Iterable[str]:
    if not any(len(run.steps["step"]) for run in runs):
        return
    yield "<section><h2>Training</h2>"
    yield from _ways_back(runs)
    if len(runs) > 1:
        yield _legend(runs, sources=False)
    yield '<div class="small">'
    for quantity in QUANTITIES:
        yield f"<div><h3>{quantity.title}</h3>"
        yield plot(quantity.column, step_figure(runs, quantity).to_json(), f"{quantity.title} over the tokens seen")
        yield "</div>"
    yield "</div></section>"


def _ways_back(runs: Sequence[RecordedRun]) -> Iterable[str]:
    """A line for each time that a run went back to a checkpoint; its curves have a gap there."""
    for run in runs:
        for record in run.went_back:
            (first, end), to_step = record["passed_over"], record.get("to_step")
            place = "the model that it started from" if to_step is None else f"step {to_step:,}"
            line = (
                f"{run.name} went back from step {record['step']:,} to {place}, and passed over samples {first:,} to "
                f"{end:,} of phase {record['phase']}."
            )
            yield f'<p class="note">{text(line)}</p>'


def _history(runs: Sequence[RecordedRun]) -> Iterable[str]:
    yield "<section><h2>What the model has seen</h2>"
    for run in runs:
        if len(runs) > 1:
            yield f"<h3>{text(run.name)}</h3>"
        yield table(LINEAGE_HEAD, [_lineage_row(entry) for entry in run.lineage.entries])
    yield "</section><section><h2>Configuration</h2>"
    for run in runs:
        yield f"<details><summary>{text(run.name)}: every setting as resolved</summary>"
        yield f'<div class="scroll"><pre>{text(run.config_text)}</pre></div></details>'
    yield "</section>"


# ---------------------------------------------------------------------------------------------- pieces of a page


LINEAGE_HEAD = [
    Column("run"),
    Column("phase"),
    Column("tokens", number=True),
    Column("samples", number=True),
    Column("batch", number=True),
    Column("sources: share, epochs", wide=True),
    Column("replay", wide=True),
    Column("schedule", wide=True),
    Column("optimizer"),
]


def _lineage_row(entry: Entry) -> list[str]:
    return _phase_row(entry) if isinstance(entry, PhaseRecord) else _event_row(entry)


def _event_row(event: Event) -> list[str]:
    head, *details = describe_event(event)
    return ["", head.replace("  ", " "), "", "", "", "; ".join(details), "", "", ""]


def _phase_row(phase: PhaseRecord) -> list[str]:
    passed_over = phase.samples - phase.learned_samples
    kind = str(phase.schedule.get("kind", ""))
    settings = ", ".join(
        f"{key} {value}" for key, value in phase.schedule.items() if key != "kind" and value is not None
    )
    return [
        phase.run,
        phase.name,
        short(phase.tokens),
        f"{phase.samples:,}" + (f", {passed_over:,} passed over" if passed_over else ""),
        f"{phase.global_batch_size:,} × {phase.seq_length:,}",
        "; ".join(f"{each.name}: {each.share:.0%}, {each.epochs:.2f}" for each in phase.sources),
        _replay(phase),
        f"{kind}: {settings}",
        phase.optimizer_state,
    ]


def _replay(phase: PhaseRecord) -> str:
    if phase.replay is None:
        return "none"
    parts = [f"{each.phase}: {each.samples:,}" for each in phase.replay.from_]
    parts += [f"{each.name}: {each.samples:,}" for each in phase.replay.from_sources]
    return f"{phase.replay.share} of samples ({'; '.join(parts)})"


def _legend(runs: Sequence[RecordedRun], *, sources: bool = True) -> str:
    """What colours and dashes mean, for plots of one or of several runs."""
    lists = []
    if len(runs) > 1:
        lists.append([sample(style_of_run(index), run.name, marker=False) for index, run in enumerate(runs)])
    if sources:
        styles = [style_of_source(index, 0, len(runs)) for index in range(len(sources_of(runs)))]
        if len(runs) > 1:
            styles = [Style("currentColor", style.dash, style.marker) for style in styles]
        lists.append([sample(style, name) for style, name in zip(styles, sources_of(runs), strict=True)])
    return "".join(f'<ul class="legend">{"".join(entries)}</ul>' for entries in lists)


# ---------------------------------------------------------------------------------------------- words and numbers


def _phases(run: RecordedRun) -> str:
    """The phases on the run's axis of tokens; what it is instead where it took no step."""
    if run.lineage.untrained_merge:
        return "merged, not trained"
    return ", ".join(name for name, _, _ in run.phase_spans()) or "no step yet"


def _seconds(run: RecordedRun) -> float:
    return float(np.nansum(run.steps["seconds"]))


def _throughput(run: RecordedRun) -> float:
    return float(np.nanmedian(run.steps["tokens_per_second"]))


def _last_loss(run: RecordedRun, source: str) -> str:
    losses = [each.sources[source].loss for each in run.evaluations if source in each.sources]
    return number(losses[-1] if losses else None, ".3f")
