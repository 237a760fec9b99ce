"""A study's page: one self-contained HTML file, in the looks of a run's report.

    publish_text(out / "report.html", render_study(results), "the page")

The page follows from the study's folder alone. There is no clock in it: its dates are those of the runs.
"""

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from megacl.config_phase import PhaseConfig
from megacl.configfile import dump_tree, to_tree
from megacl.page import Column, number, plot, render_page, sample, short, table, text
from megacl.study_config import study_tree
from megacl.study_plots import curve_figure, end_figure, style_of_arm
from megacl.study_results import BarResult, Results, found_text, path_of, spread_text
from megacl.study_statistics import Spread

STATES = {True: "good", False: "bad", None: "open"}


def render_study(results: Results) -> str:
    """The page of a study as HTML."""
    study = results.study
    return render_page(
        title=study.name,
        summary=_summary(results),
        main=chain(_bars(results), _losses(results), _differences(results), _arms(results), _made(results)),
        footer="Made anew, in this folder, by <code>megacl study study.yaml --out .</code>",
        kind="study",
    )


def _summary(results: Results) -> Iterable[str]:
    study = results.study
    if study.question:
        yield f'<p class="lead">{text(study.question)}</p>'
    claims = [bar for bar in results.bars if not bar.config.control]
    controls = [bar for bar in results.bars if bar.config.control]
    facts = [f"{len(study.arms)} arms", f"seeds {', '.join(map(str, study.seeds))}"]
    if claims:
        facts.append(f"{sum(bar.as_meant is True for bar in claims)} of {len(claims)} bars held")
    if controls:
        facts.append(f"{sum(bar.as_meant is True for bar in controls)} of {len(controls)} controls fail as they must")
    if study.budget:
        facts.append(f"budget: {study.budget}")
    yield f"<p>{text(' · '.join(facts))}</p>"


def _bars(results: Results) -> Iterable[str]:
    if not results.bars:
        return
    yield "<section><h2>Bars</h2>"
    yield (
        '<p class="note">A bar compares what came of arms, seed by seed. Its margin is how far the side that should '
        "be the smaller one lies above the other (where several are compared, the worst of them): at most 0 where the "
        "bar holds. Noise is twice the standard error of the margin's mean over seeds. Held: the mean lies at or below "
        "0 by at least the noise. Not held: it lies above 0 by more. Within noise: neither. One seed shows no noise: "
        "the sign decides, and little is known. A control is a bar that must not hold. Reported: what the claim's "
        "source found.</p>"
    )
    head = [
        Column("claim", wide=True),
        Column("found", wide=True),
        Column("margin", number=True),
        Column("noise", number=True),
        Column("seeds", number=True),
        Column("what must hold", wide=True),
        Column("reported", wide=True),
    ]
    rows = [
        [
            bar.config.claim + (" (control)" if bar.config.control else ""),
            found_text(bar),
            number(bar.margin.mean, "+.4g"),
            number(bar.margin.noise, ".2g"),
            f"{len(bar.seeds)}",
            bar.config.holds,
            bar.config.reported or "–",
        ]
        for bar in results.bars
    ]
    yield table(head, rows, marks=[STATES[bar.as_meant] for bar in results.bars])
    yield "<details><summary>The values compared, seed by seed</summary>"
    head = [Column("claim", wide=True), *(Column(f"seed {seed}", number=True) for seed in results.study.seeds)]
    yield table(head, [[bar.config.claim, *_sides(bar, results)] for bar in results.bars])
    yield "</details></section>"


def _sides(bar: BarResult, results: Results) -> Iterable[str]:
    sides = dict(zip(bar.seeds, bar.sides, strict=True))
    for seed in results.study.seeds:
        yield " | ".join(number(value, ".4g") for value in sides.get(seed, ())) or "–"


def _losses(results: Results) -> Iterable[str]:
    yield "<section><h2>Held-out losses at the arms' ends</h2>"
    yield (
        '<p class="note">Nats per token: the mean over seeds ± the standard deviation. Mean: over the sources. Rise: '
        "how far the last loss lies above the best one where a phase began or ended before.</p>"
    )
    head = [
        Column("arm"),
        Column("phases", wide=True),
        Column("seeds", number=True),
        Column("tokens", number=True),
        *(Column(source, number=True) for source in results.sources),
        Column("mean", number=True),
        *(Column(f"{source}, rise", number=True) for source in results.sources),
        *(Column(f"{source}, bits/byte", number=True) for source in results.sources),
    ]
    rows = []
    for name, arm in results.arms.items():
        known = [source if source in arm.sources else None for source in results.sources]
        rows.append(
            [
                name,
                " → ".join(path_of(results.study, name)),
                f"{len(arm.seeds)}",
                short(arm.tokens),
                *(spread_text(arm.loss(source)) if source else "–" for source in known),
                spread_text(arm.mean()),
                *(_rise(arm.rise(source)) if source else "–" for source in known),
                *(spread_text(arm.bits_per_byte(source)) if source else "–" for source in known),
            ]
        )
    yield table(head, rows)
    yield '<div class="small">'
    for index, source in enumerate(results.sources):
        yield f"<div><h3>{text(source)}</h3>"
        yield plot(f"end-{index}", end_figure(results, source).to_json(), f"Loss of {source} at the end of each arm")
        yield "</div>"
    yield "</div></section><section><h2>Held-out losses on the way</h2>"
    yield (
        '<p class="note">Over all tokens that the model has learned from; the band is a standard deviation over seeds '
        "on either side of the mean.</p>"
    )
    entries = [sample(style_of_arm(index), name) for index, name in enumerate(results.arms)]
    yield f'<ul class="legend">{"".join(entries)}</ul>'
    for index, source in enumerate(results.sources):
        yield f"<h3>{text(source)}</h3>"
        yield plot(f"way-{index}", curve_figure(results, source).to_json(), f"Loss of {source} over the tokens seen")
    yield "</section>"


def _rise(rise: Spread) -> str:
    return spread_text(rise, signed=True)


def _differences(results: Results) -> Iterable[str]:
    if len(results.arms) < 2:
        return
    yield "<section><h2>Differences between arms</h2>"
    yield (
        "<p class=\"note\">The row's held-out loss less the column's, seed by seed: the mean, and where there are two "
        "seeds or more, p of the paired two-sided t-test over seeds; * where it is below 0.05. No correction is made "
        "for their number: of twenty comparisons of equal arms, one has a star.</p>"
    )
    for source in results.sources:
        yield f"<details><summary>{text(source)}</summary>"
        head = [Column("arm"), *(Column(f"− {name}", number=True) for name in results.arms)]
        rows = [
            [name, *(_difference(results.difference(name, against, source)) for against in results.arms)]
            for name in results.arms
        ]
        yield table(head, rows)
        yield "</details>"
    yield "</section>"


def _difference(difference: Spread | None) -> str:
    if difference is None or not any(difference.values):
        return "–" if difference is None else ""
    star = "*" if difference.p is not None and difference.p < 0.05 else ""
    p = "" if difference.p is None else f", p {difference.p:.2g}"
    return number(difference.mean, "+.3f") + star + p


def _arms(results: Results) -> Iterable[str]:
    yield "<section><h2>Arms and phases</h2>"
    head = [
        Column("phase"),
        Column("in arms", wide=True),
        Column("sources: weight", wide=True),
        Column("budget", number=True),
        Column("replay", wide=True),
        Column("schedule", wide=True),
        Column("other settings", wide=True),
    ]
    rows = []
    for name, phase in results.study.phases.items():
        arms = [arm for arm, config in results.study.arms.items() if name in config.phases]
        rows.append([name, ", ".join(arms), *_phase(phase)])
    yield table(head, rows)
    yield "<details><summary>The study in full</summary>"
    yield f'<div class="scroll"><pre>{text(dump_tree(study_tree(results.study)))}</pre></div></details></section>'


def _phase(phase: PhaseConfig) -> Iterable[str]:
    """The cells of a phase, of whose settings those are named that are not the defaults."""
    yield "; ".join(f"{name}: {weight:g}" for name, weight in phase.mixture.items())
    yield f"{phase.steps:,} steps" if phase.steps else f"{short(phase.tokens or 0)} tokens"
    settings = to_tree(phase, defaults=False)
    yield _words(settings["replay"]) if phase.replay else "none"
    yield _words(settings["schedule"])
    apart = ("name", "mixture", "steps", "tokens", "replay", "schedule")
    yield _words({key: value for key, value in settings.items() if key not in apart})


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _made(results: Results) -> Iterable[str]:
    dates = sorted(str(made["finished"]) for made in results.made)
    machines = dict.fromkeys(str(made["machine"]) for made in results.made)
    versions = dict.fromkeys(_words(made["versions"]) for made in results.made)
    threads = dict.fromkeys(str(made["threads"]) for made in results.made)
    yield "<section><h2>How it was made</h2>"
    head = [Column("what"), Column("value", wide=True)]
    rows = [
        ["runs", f"{len(results.made)}"],
        ["finished", dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"],
        ["machine", "; ".join(machines)],
        ["threads a run", ", ".join(threads)],
        ["versions", "; ".join(versions)],
        ["budget", results.study.budget or "–"],
    ]
    yield table(head, rows)
    yield "</section>"
