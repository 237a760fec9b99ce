"""Run directories -> one HTML page: losses, what was forgotten and gained, speed, lineage, configuration.

    megacl report runs/english runs/german --out report.html

    save_report([Path("runs/english"), Path("runs/german")], Path("report.html"))

The page holds all that it needs, Plotly's script included (some 5 MB): it opens from a disk, without network, and its
content security policy forbids any. Several runs are laid into the same plots. A report reads files only, so it can be
made while a run is going on. Reading is in report_run.py, the plots are in report_plots.py, and the page's style and
script are report.css and report.js.
"""

import datetime
import html
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from plotly.offline import get_plotlyjs

from megacl import __version__
from megacl.errors import DataError
from megacl.evaluate import ForgettingRow, forgetting_table
from megacl.lineage import PhaseRecord
from megacl.model.gpt import count_parameters
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

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


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

    Raises CheckpointError where one of them is no run directory, has taken no step yet, or holds a broken file.
    """
    runs = read_runs(run_dirs)
    title = ", ".join(run.name for run in runs)
    command = shlex.join(["megacl", "report", *map(str, run_dirs), "--out", "report.html"])
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    folder = Path(__file__).parent
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}: megacl report</title>",
            f"<style>\n{(folder / 'report.css').read_text()}</style>",
            "</head>",
            "<body>",
            f"<header><h1>{_text(title)}</h1>",
            *_summary(runs),
            "</header>",
            "<main>",
            *_losses(runs),
            *_forgetting(runs),
            *_training(runs),
            *_history(runs),
            "</main>",
            f"<footer><p>Made on {now} by megacl {__version__}: <code>{_text(command)}</code></p></footer>",
            f"<script>{get_plotlyjs()}</script>",
            f"<script>\n{(folder / 'report.js').read_text()}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


# ---------------------------------------------------------------------------------------------- sections


def _summary(runs: Sequence[RecordedRun]) -> Iterable[str]:
    """A line for one run, a table with a row a run for several."""
    if len(runs) == 1:
        run = runs[0]
        phases = ", ".join(name for name, _, _ in run.phase_spans())
        facts = [
            f"{short(count_parameters(run.model))} parameters",
            f"phases: {phases}",
            f"{short(run.tokens)} tokens seen",
            f"{duration(_seconds(run))} of training",
            f"median {short(_throughput(run))} tokens/s",
        ]
        yield f'<p class="lead">{_text(" · ".join(facts))}</p>'
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
            ", ".join(name for name, _, _ in run.phase_spans()),
            short(count_parameters(run.model)),
            short(run.tokens),
            f"{len(run.steps['step']):,}",
            duration(_seconds(run)),
            short(_throughput(run)),
            *(_last_loss(run, source) for source in sources),
        ]
        for run in runs
    ]
    yield _table(head, rows)
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
    yield _plot("loss", loss_figure(runs).to_json(), "Held-out loss of each source over the tokens seen")
    yield "</section>"


def _forgetting(runs: Sequence[RecordedRun]) -> Iterable[str]:
    yield "<section><h2>Forgetting and gain</h2>"
    yield (
        '<p class="note">Held-out loss at the end of each phase, nats per token. Forgetting: how far the last one lies '
        "above the best before it. Gain: how far it lies below the first. Perplexity and bits per byte: the latest.</p>"
    )
    tables = [{row.source: row for row in forgetting_table(run.evaluations)} for run in runs]
    labels = list(dict.fromkeys(label for table in tables for row in table.values() for label, _ in row.losses))
    head = [
        Column("source"),
        *([Column("run")] if len(runs) > 1 else []),
        *(Column(label, number=True) for label in labels),
        *(Column(name, number=True) for name in ("forgetting", "gain", "perplexity", "bits/byte")),
    ]
    rows = [
        _forgetting_row(run, table[source], labels, named=len(runs) > 1)
        for source in sources_of(runs)  # the runs of one source below one another: that is what one compares
        for run, table in zip(runs, tables, strict=True)
        if source in table
    ]
    yield _table(head, rows) if rows else '<p class="note">Nothing has been evaluated at the end of a phase yet.</p>'
    yield "</section>"


def _forgetting_row(run: RecordedRun, row: ForgettingRow, labels: Sequence[str], *, named: bool) -> list[str]:
    losses = dict(row.losses)
    latest = next(record["sources"][row.source] for record in run.evaluations[::-1] if row.source in record["sources"])
    return [
        row.source,
        *([run.name] if named else []),
        *(number(losses.get(label), ".3f") for label in labels),
        number(row.forgetting, "+.3f"),
        number(row.gain, "+.3f"),
        number(latest.get("perplexity"), ",.1f"),
        number(latest.get("bits_per_byte"), ".3f"),
    ]


def _training(runs: Sequence[RecordedRun]) -> Iterable[str]:
    yield "<section><h2>Training</h2>"
    yield from _ways_back(runs)
    if len(runs) > 1:
        yield _legend(runs, sources=False)
    yield '<div class="small">'
    for quantity in QUANTITIES:
        yield f"<div><h3>{quantity.title}</h3>"
        yield _plot(quantity.column, step_figure(runs, quantity).to_json(), f"{quantity.title} over the tokens seen")
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
            yield f'<p class="note">{_text(line)}</p>'


def _history(runs: Sequence[RecordedRun]) -> Iterable[str]:
    yield "<section><h2>What the model has seen</h2>"
    for run in runs:
        if len(runs) > 1:
            yield f"<h3>{_text(run.name)}</h3>"
        yield _table(LINEAGE_HEAD, [_lineage_row(phase) for phase in run.lineage.phases])
    yield "</section><section><h2>Configuration</h2>"
    for run in runs:
        yield f"<details><summary>{_text(run.name)}: every setting as resolved</summary>"
        yield f'<div class="scroll"><pre>{_text(run.config_text)}</pre></div></details>'
    yield "</section>"


# ---------------------------------------------------------------------------------------------- pieces of a page


@dataclass(frozen=True)
class Column:
    title: str
    number: bool = False
    wide: bool = False

    @property
    def attribute(self) -> str:
        """The class attribute of this column's cells, if any."""
        names = [name for name in ("number", "wide") if getattr(self, name)]
        return f' class="{" ".join(names)}"' if names else ""


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


def _lineage_row(phase: PhaseRecord) -> list[str]:
    sources = "; ".join(f"{each.name}: {each.share:.0%}, {each.epochs:.2f}" for each in phase.sources)
    replay = "none"
    if phase.replay is not None:
        parts = [f"{each.phase}: {each.samples:,}" for each in phase.replay.from_]
        parts += [f"{each.name}: {each.samples:,}" for each in phase.replay.from_sources]
        replay = f"{phase.replay.share} of samples ({'; '.join(parts)})"
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
        sources,
        replay,
        f"{kind}: {settings}",
        phase.optimizer_state,
    ]


def _table(head: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls inside its own box; the first column names the row."""
    cells = "".join(f'<th scope="col"{column.attribute}>{_text(column.title)}</th>' for column in head)
    lines = []
    for row in rows:
        first = f'<th scope="row">{_text(row[0])}</th>'
        rest = "".join(
            f"<td{column.attribute}>{_text(value)}</td>" for column, value in zip(head[1:], row[1:], strict=True)
        )
        lines.append(f"<tr>{first}{rest}</tr>")
    body = "\n".join(lines)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _plot(name: str, figure: str, description: str) -> str:
    """A place for a plot and the figure that report.js draws there; "<" is escaped so that no text ends the script."""
    data = figure.replace("<", "\\u003c")
    return (
        f'<div class="plot" role="img" aria-label="{_text(description)}" data-figure="figure-{name}"></div>\n'
        f'<script type="application/json" id="figure-{name}">{data}</script>'
    )


_DASH_LENGTHS = {"solid": "none", "dash": "6 4", "dot": "2 3", "dashdot": "6 3 2 3", "longdash": "10 4"}
_MARKER_SHAPES = {
    "circle": '<circle cx="17" cy="7" r="3.5"/>',
    "square": '<rect x="14" y="4" width="6" height="6"/>',
    "diamond": '<path d="M17 3 l4 4 l-4 4 l-4 -4 z"/>',
    "triangle-up": '<path d="M17 3 l4 7 h-8 z"/>',
    "x": '<path d="M14 4 l6 6 m0 -6 l-6 6" stroke="currentColor" stroke-width="2"/>',
}


def _legend(runs: Sequence[RecordedRun], *, sources: bool = True) -> str:
    """What colours and dashes mean, for plots of one or of several runs."""
    lists = []
    if len(runs) > 1:
        lists.append([_sample(style_of_run(index), run.name, marker=False) for index, run in enumerate(runs)])
    if sources:
        styles = [style_of_source(index, 0, len(runs)) for index in range(len(sources_of(runs)))]
        if len(runs) > 1:
            styles = [Style("currentColor", style.dash, style.marker) for style in styles]
        lists.append([_sample(style, name) for style, name in zip(styles, sources_of(runs), strict=True)])
    return "".join(f'<ul class="legend">{"".join(entries)}</ul>' for entries in lists)


def _sample(style: Style, name: str, *, marker: bool = True) -> str:
    shape = _MARKER_SHAPES[style.marker] if marker else ""
    return (
        f'<li><svg width="34" height="14" aria-hidden="true" style="color:{style.colour}" fill="currentColor">'
        f'<path d="M1 7 h32" stroke="currentColor" stroke-width="2" stroke-dasharray="{_DASH_LENGTHS[style.dash]}"/>'
        f"{shape}</svg>{_text(name)}</li>"
    )


# ---------------------------------------------------------------------------------------------- words and numbers


def _seconds(run: RecordedRun) -> float:
    return float(np.nansum(run.steps["seconds"]))


def _throughput(run: RecordedRun) -> float:
    return float(np.nanmedian(run.steps["tokens_per_second"]))


def _last_loss(run: RecordedRun, source: str) -> str:
    losses = [record["sources"][source]["loss"] for record in run.evaluations if source in record["sources"]]
    return number(losses[-1] if losses else None, ".3f")


def _text(value: str) -> str:
    return html.escape(value)


def number(value: float | None, form: str) -> str:
    """A number in a format of Python's, with a true minus sign; a dash where there is none."""
    return "–" if value is None or math.isnan(value) else format(value, form).replace("-", "−")


def short(value: float) -> str:
    """A count for reading: 8,192 in full, then three digits and a unit: 819K, 1.31M, 300B, 12.0T."""
    if value < 10_000:
        return f"{value:,.0f}"
    for unit in "KMBT":
        value /= 1000
        if value < 999.5 or unit == "T":
            break
    return f"{value:#.3g}".rstrip(".") + unit


def duration(seconds: float) -> str:
    """A time for reading: 12.3 s, 6 min 12 s, 3 h 05 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"
