"""The plots of a study's page, as Plotly figures: a colour with its dash is an arm, the same one in every plot."""

import html
from collections.abc import Sequence

import plotly.graph_objects as go

from megacl.report_plots import COLOURS, DASHES, MARKERS, Style, blank_figure
from megacl.study_results import ArmResult, Results
from megacl.study_statistics import Spread


def style_of_arm(index: int) -> Style:
    """How arm number `index` looks."""
    round_ = index // len(COLOURS)
    return Style(COLOURS[index % len(COLOURS)], DASHES[round_ % len(DASHES)], MARKERS[round_ % len(MARKERS)])


def curve_figure(results: Results, source: str) -> go.Figure:
    """A source's held-out loss on the way of each arm over tokens: the mean, a standard deviation on either side."""
    figure = blank_figure(rangemode="normal")
    for index, (name, arm) in enumerate(results.arms.items()):
        if source not in arm.sources:
            continue
        style = style_of_arm(index)
        points = mean_curve(arm, source)
        tokens, means = [tokens for tokens, _ in points], [spread.mean for _, spread in points]
        _add_band(figure, points, style.colour)
        figure.add_scatter(
            x=tokens,
            y=means,
            mode="lines+markers" if len(points) < 40 else "lines",
            line={"color": style.colour, "dash": style.dash, "width": 2},
            marker={"symbol": style.marker, "size": 5},
            name=html.escape(name, quote=False),
            hovertemplate="%{y:.3f} nats per token<br>at %{x:.3~s} tokens<extra>%{fullData.name}</extra>",
        )
    return figure


def mean_curve(arm: ArmResult, source: str) -> list[tuple[int, Spread]]:
    """(tokens, loss over seeds) at all numbers of tokens at which every seed was evaluated, ascending."""
    curves = [dict(outcome.curve(source)) for outcome in arm.outcomes]
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [(tokens, Spread(tuple(curve[tokens] for curve in curves))) for tokens in common]


def _add_band(figure: go.Figure, points: Sequence[tuple[int, Spread]], colour: str) -> None:
    known = [(tokens, spread.mean, spread.deviation) for tokens, spread in points]
    edges = [(tokens, mean, each) for tokens, mean, each in known if mean is not None and each is not None]
    figure.add_scatter(
        x=[tokens for tokens, _, _ in edges] + [tokens for tokens, _, _ in reversed(edges)],
        y=[mean + each for _, mean, each in edges] + [mean - each for _, mean, each in reversed(edges)],
        mode="lines",
        fill="toself",
        line={"color": colour, "width": 0},
        opacity=0.2,
        hoverinfo="skip",
    )


def end_figure(results: Results, source: str) -> go.Figure:
    """A source's held-out loss at the end of each arm: the mean, a standard deviation on either side, every seed."""
    figure = blank_figure(rangemode="normal")
    names = [name for name, arm in results.arms.items() if source in arm.sources]
    for index, (name, arm) in enumerate(results.arms.items()):
        if source not in arm.sources:
            continue
        style, loss = style_of_arm(index), arm.loss(source)
        figure.add_scatter(
            x=[loss.mean],
            y=[name],
            error_x={"type": "data", "array": [loss.deviation or 0.0], "color": style.colour, "thickness": 1.5},
            mode="markers",
            marker={"color": style.colour, "symbol": style.marker, "size": 9},
            hovertemplate="%{x:.3f} nats per token<extra>%{y}</extra>",
        )
        figure.add_scatter(
            x=list(loss.values),
            y=[name] * len(loss.values),
            mode="markers",
            marker={"color": style.colour, "symbol": "line-ns-open", "size": 8},
            hoverinfo="skip",
        )
    figure.update_layout(
        xaxis={"title": {"text": "nats per token"}},
        yaxis={"type": "category", "categoryorder": "array", "categoryarray": names[::-1], "dtick": 1},
    )
    return figure
