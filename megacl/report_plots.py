"""The report's plots, as Plotly figures; titles, sizes and the colours of text come from the page around them.

One run: a colour is a source. Several runs: a colour is a run, and a dash with its marker is a source, so that a run
has the same colour in every plot. The colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from megacl.report_run import RecordedRun

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x")
MOST_POINTS = 600
NEUTRAL = "#8a8f98"  # grid and boundaries, on light and dark paper alike


@dataclass(frozen=True)
class Style:
    colour: str
    dash: str = "solid"
    marker: str = "circle"


@dataclass(frozen=True)
class Quantity:
    """A column of the step records as a plot: its heading, and Plotly's name for the form of its large numbers."""

    column: str
    title: str
    exponents: str = "B"


QUANTITIES = (
    Quantity("lr", "Learning rate", exponents="e"),
    Quantity("tokens_per_second", "Throughput, tokens per second"),
    Quantity("grad_norm", "Gradient norm, before clipping"),
)


def sources_of(runs: Sequence[RecordedRun]) -> list[str]:
    """Names of the evaluated sources of all runs, in the order in which they first appear."""
    return list(dict.fromkeys(name for run in runs for name in run.sources))


def style_of_run(index: int) -> Style:
    """How the curves of run number `index` look where no source is meant."""
    return Style(COLOURS[index % len(COLOURS)])


def style_of_source(index: int, run_index: int, runs: int) -> Style:
    """How the curve of source number `index` of run number `run_index` looks among `runs` runs."""
    marker = MARKERS[index % len(MARKERS)]
    if runs == 1:
        return Style(COLOURS[index % len(COLOURS)], marker=marker)
    return Style(COLOURS[run_index % len(COLOURS)], DASHES[index % len(DASHES)], marker)


def points_per_mean(run: RecordedRun, most: int = MOST_POINTS) -> int:
    """How many steps one point of a step plot stands for."""
    return max(1, -(-len(run.steps["step"]) // most))


def thinned(values: NDArray[np.float64], group: int) -> NDArray[np.float64]:
    """Means of `group` neighbours each, the last of what is left; NaN where all of a group is NaN."""
    padded = np.full(-(-len(values) // group) * group, np.nan)
    padded[: len(values)] = values
    rows = padded.reshape(-1, group)
    counts = np.isfinite(rows).sum(axis=1)
    sums = np.where(np.isfinite(rows), rows, 0.0).sum(axis=1)
    means: NDArray[np.float64] = np.divide(sums, counts, out=np.full(len(rows), np.nan), where=counts > 0)
    return means


def loss_figure(runs: Sequence[RecordedRun]) -> go.Figure:
    """Held-out loss of every source of every run over tokens, the training loss thin behind it."""
    figure = _figure(runs, rangemode="normal")
    sources = sources_of(runs)
    for index, run in enumerate(runs):
        colour = NEUTRAL if len(runs) == 1 else style_of_run(index).colour
        _add_steps(figure, run, "loss", colour, name=f"training loss{_of(run, runs)}", number=".3f", opacity=0.45)
    for index, run in enumerate(runs):
        for number, source in enumerate(sources):
            points = [each for each in run.evaluations if source in each.sources]
            style = style_of_source(number, index, len(runs))
            figure.add_scatter(
                x=np.array([each.tokens for each in points], dtype=np.float64),
                y=np.array([each.sources[source].loss for each in points], dtype=np.float64),
                mode="lines+markers",
                line={"color": style.colour, "dash": style.dash, "width": 2},
                marker={"symbol": style.marker, "size": 6},
                name=_plain(f"{source}{_of(run, runs)}"),
                hovertemplate="%{y:.3f} nats per token<br>at %{x:.3~s} tokens<extra>%{fullData.name}</extra>",
            )
    return figure


def step_figure(runs: Sequence[RecordedRun], quantity: Quantity) -> go.Figure:
    """One quantity of the step records of every run over tokens."""
    figure = _figure(runs, rangemode="tozero", exponents=quantity.exponents)
    for index, run in enumerate(runs):
        name = _plain(run.name)
        _add_steps(figure, run, quantity.column, style_of_run(index).colour, name=name, number=".3~g", opacity=1.0)
    return figure


def _add_steps(
    figure: go.Figure, run: RecordedRun, column: str, colour: str, *, name: str, number: str, opacity: float
) -> None:
    figure.add_scatter(
        x=_by_stretches(run, "tokens"),
        y=_by_stretches(run, column),
        mode="lines" if len(run.steps["step"]) > 1 else "markers",
        line={"color": colour, "width": 1.25},
        opacity=opacity,
        name=_plain(name),
        hovertemplate=f"%{{y:{number}}}<br>at %{{x:.3~s}} tokens<extra>%{{fullData.name}}</extra>",
    )


def _by_stretches(run: RecordedRun, column: str) -> NDArray[np.float64]:
    """A column of the step records, thinned, with a gap where the run went back and its tokens with it."""
    ends = np.searchsorted(run.steps["step"], [record["step"] for record in run.went_back], side="right")
    stretches = np.split(run.steps[column], ends)
    group, gap = points_per_mean(run), np.array([np.nan])
    return np.concatenate([part for stretch in stretches for part in (thinned(stretch, group), gap)][:-1])


def _of(run: RecordedRun, runs: Sequence[RecordedRun]) -> str:
    return f", {run.name}" if len(runs) > 1 else ""


def _plain(text: str) -> str:
    """Plotly reads tags in its texts as markup; text out of files is none."""
    return html.escape(text, quote=False)


def _figure(runs: Sequence[RecordedRun], *, rangemode: str, exponents: str = "B") -> go.Figure:
    figure = blank_figure(rangemode=rangemode, exponents=exponents)
    _mark_phases(figure, runs)
    return figure


def blank_figure(*, rangemode: str, exponents: str = "B") -> go.Figure:
    """A figure over tokens with nothing in it. rangemode, exponents: of the vertical axis, as Plotly names them."""
    axis = {"gridcolor": "rgba(138, 143, 152, 0.25)", "zeroline": False, "automargin": True}
    return go.Figure(
        layout={
            "template": "none",
            "paper_bgcolor": "rgba(0, 0, 0, 0)",
            "plot_bgcolor": "rgba(0, 0, 0, 0)",
            "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12},
            "margin": {"l": 8, "r": 12, "t": 26, "b": 8},
            "showlegend": False,
            "hovermode": "closest",
            "xaxis": {**axis, "title": {"text": "tokens seen", "standoff": 8}, "exponentformat": "B", "nticks": 8},
            "yaxis": {**axis, "exponentformat": exponents, "rangemode": rangemode, "nticks": 7},
        }
    )


def _mark_phases(figure: go.Figure, runs: Sequence[RecordedRun]) -> None:
    """A dotted line where a phase begins, its name beside it; phases of several runs that begin together share one."""
    names: dict[float, list[str]] = {}
    for run in runs:
        for name, start, _ in run.phase_spans():
            here = names.setdefault(start, [])
            if name not in here:
                here.append(name)
    first = min(names, default=0.0)
    for start, here in names.items():
        if start > first:
            figure.add_shape(
                type="line",
                yref="paper",
                x0=start,
                x1=start,
                y0=0,
                y1=1,
                line={"color": NEUTRAL, "width": 1, "dash": "dot"},
            )
        figure.add_annotation(
            x=start, y=1, yref="paper", text=_plain(" / ".join(here)), showarrow=False, xanchor="left", yanchor="bottom"
        )
