"""What came of a study: its runs' files -> results.json, and the same as tables in results.md.

    results = gather(study, tree)            # once every run is done
    publish_text(out / "results.json", results_json(results), "the results")

All follows from the study and its folder, and there is no clock in it: made again, it is the same bytes.
docs/formats.md has the form of results.json.
"""

import functools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from megacl.errors import CheckpointError, DataError
from megacl.heldout import Evaluation, bump, curve, loss_at, read_evaluations, rise
from megacl.log import table_text, without_nan
from megacl.study_config import BarConfig, StudyConfig
from megacl.study_statistics import Spread, State, paired, verdict
from megacl.study_tree import Node, Tree

FORMAT, VERSION = "megacl-study", 1


@dataclass(frozen=True)
class ArmOutcome:
    """What came of one arm under one seed, in the words of study_words.py."""

    evaluations: tuple[Evaluation, ...]

    @property
    def tokens(self) -> int:
        return self.evaluations[-1].tokens

    @property
    def sources(self) -> list[str]:
        """Those that its end was evaluated on."""
        return list(self.evaluations[-1].sources)

    def loss(self, source: str) -> float:
        return loss_at(self.evaluations, source)

    def bits_per_byte(self, source: str) -> float:
        return loss_at(self.evaluations, source, unit="bits_per_byte")

    def mean(self, sources: tuple[str, ...]) -> float:
        return statistics.fmean(self.loss(source) for source in sources or self.sources)

    def rise(self, source: str) -> float:
        return rise(self.evaluations, source)

    def bump(self, source: str) -> float:
        return bump(self.evaluations, source)

    def curve(self, source: str) -> list[tuple[int, float]]:
        """(tokens, loss) on its way."""
        return curve(self.evaluations, source)


@dataclass(frozen=True)
class ArmResult:
    """One arm over its seeds."""

    seeds: tuple[int, ...]
    outcomes: tuple[ArmOutcome, ...]
    """One a seed."""
    runs: tuple[tuple[str, ...], ...]
    """The names of the runs on its path, one tuple a seed."""

    @property
    def tokens(self) -> int:
        """Tokens learned from on its path, under its first seed."""
        return self.outcomes[0].tokens

    @property
    def sources(self) -> list[str]:
        return self.outcomes[0].sources

    def loss(self, source: str) -> Spread:
        return Spread(tuple(outcome.loss(source) for outcome in self.outcomes))

    def bits_per_byte(self, source: str) -> Spread:
        return Spread(tuple(outcome.bits_per_byte(source) for outcome in self.outcomes))

    def rise(self, source: str) -> Spread:
        return Spread(tuple(outcome.rise(source) for outcome in self.outcomes))

    def mean(self) -> Spread:
        return Spread(tuple(outcome.mean(()) for outcome in self.outcomes))


@dataclass(frozen=True)
class BarResult:
    """A bar over the seeds that all of its arms have."""

    config: BarConfig
    seeds: tuple[int, ...]
    sides: tuple[tuple[float, ...], ...]
    """The values that are compared, one tuple a seed."""
    margin: Spread

    @property
    def state(self) -> State | None:
        return verdict(self.margin)

    @property
    def as_meant(self) -> bool | None:
        """Whether a claim is held, or a control is not; None where that is within noise, or not known."""
        if self.state in (None, "within noise"):
            return None
        return (self.state == "held") != self.config.control


@dataclass(frozen=True)
class Results:
    """What came of a study."""

    study: StudyConfig
    arms: Mapping[str, ArmResult]
    bars: tuple[BarResult, ...]
    made: tuple[Mapping[str, Any], ...]
    """What each run's done.json says, in the order of the tree: when, where and with what it was trained."""

    @property
    def sources(self) -> list[str]:
        """All that an arm was evaluated on, in order."""
        return list(dict.fromkeys(source for arm in self.arms.values() for source in arm.sources))

    def difference(self, arm: str, against: str, source: str) -> Spread | None:
        """arm - against in a source's loss, over the seeds that both have; None where one was not evaluated on it."""
        one, other = self.arms[arm], self.arms[against]
        seeds = [seed for seed in one.seeds if seed in other.seeds]
        if not seeds or source not in one.sources or source not in other.sources:
            return None
        losses = [[result.outcomes[result.seeds.index(seed)].loss(source) for seed in seeds] for result in (one, other)]
        return paired(*losses)


def gather(study: StudyConfig, tree: Tree) -> Results:
    """Reads what the runs have recorded. Raises CheckpointError or DataError where a run's files are not whole."""
    _check_same_data(tree)
    arms: dict[str, ArmResult] = {}
    for arm in study.arms:
        seeds = study.seeds_of(arm)
        paths = [tree.paths[arm, seed] for seed in seeds]
        arms[arm] = ArmResult(
            seeds=seeds,
            outcomes=tuple(_outcome(path[-1]) for path in paths),
            runs=tuple(tuple(node.name for node in path) for path in paths),
        )
    return Results(study=study, arms=arms, bars=_bars(study, arms), made=tuple(read_done(node) for node in tree.nodes))


def _check_same_data(tree: Tree) -> None:
    """Raises DataError where a source had other data in one run than in another, though they name the same folder.

    A source that an arm sets to another folder or generation is another one on purpose.
    """
    known: dict[tuple[str, str, int | None, int], tuple[str, str]] = {}
    for (arm, _), path in tree.paths.items():
        for node in path:
            evaluations = read_evaluations(node.run_dir)
            for name, found in evaluations[-1].sources.items() if evaluations else ():
                if (source := node.config.sources.get(name)) is None:
                    continue
                place = (name, source.path, source.generation, source.since)
                where = f"run {node.name} of arm {arm!r}"
                fingerprint, first = known.setdefault(place, (found.fingerprint, where))
                if found.fingerprint != fingerprint:
                    raise DataError(
                        f"source {name!r} ({source.path}) has fingerprint {found.fingerprint[:12]} in {where}, and "
                        f"{fingerprint[:12]} in {first}: these are two generations, whose losses do not compare; "
                        "give --out another folder, or remove the folder of the run whose data is not meant."
                    )


def _outcome(node: Node) -> ArmOutcome:
    evaluations = tuple(read_evaluations(node.run_dir))
    if not evaluations or not evaluations[-1].sources:
        raise DataError(f"{node.run_dir}: nothing was evaluated at its end; its sources need held-out documents.")
    return ArmOutcome(evaluations)


def _bars(study: StudyConfig, arms: Mapping[str, ArmResult]) -> tuple[BarResult, ...]:
    results = []
    for config, bar in zip(study.bars, study.parsed_bars(), strict=True):
        seeds = tuple(seed for seed in study.seeds if all(seed in arms[arm].seeds for arm in bar.arms))
        outcomes = [
            functools.partial(lambda arm, seed: arms[arm].outcomes[arms[arm].seeds.index(seed)], seed=seed)
            for seed in seeds
        ]
        try:
            sides = tuple(bar.sides(outcome_of) for outcome_of in outcomes)
            margin = Spread(tuple(bar.margin(outcome_of) for outcome_of in outcomes))
        except DataError as error:
            raise DataError(f"bar {config.claim!r}: {error}") from None
        results.append(BarResult(config, seeds, sides, margin))
    return tuple(results)


# ---------------------------------------------------------------------------------------------- what was done


def done_file(node: Node) -> Path:
    """Where it is said that a node is done."""
    return node.run_dir / "done.json"


def is_done(node: Node) -> bool:
    """Whether a node's command has ended well, with all that it should have been."""
    try:
        return bool(json.loads(done_file(node).read_bytes())["key"] == node.key)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_done(node: Node) -> dict[str, Any]:
    """What a node's done.json says. Raises CheckpointError where there is none."""
    try:
        said: dict[str, Any] = json.loads(done_file(node).read_bytes())
        return said
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{done_file(node)}: cannot be read: {error}; run the study again.") from None


# ---------------------------------------------------------------------------------------------- writing


def results_json(results: Results) -> str:
    """results.json: all the numbers."""
    tree = {
        "format": FORMAT,
        "version": VERSION,
        "name": results.study.name,
        "question": results.study.question,
        "budget": results.study.budget,
        "seeds": results.study.seeds,
        "sources": results.sources,
        "arms": {name: _arm_record(results.study, name, arm) for name, arm in results.arms.items()},
        "differences": [
            {"source": source, "arm": arm, "against": against, **spread_record(difference)}
            for source in results.sources
            for arm, against in combinations(results.arms, 2)
            if (difference := results.difference(arm, against, source)) is not None
        ],
        "bars": [
            {
                "claim": bar.config.claim,
                "holds": bar.config.holds,
                "control": bar.config.control,
                "reported": bar.config.reported,
                "state": bar.state,
                "as_meant": bar.as_meant,
                "seeds": bar.seeds,
                "sides": [list(sides) for sides in bar.sides],
                "margin": spread_record(bar.margin),
            }
            for bar in results.bars
        ],
        "made": results.made,
    }
    return json.dumps(without_nan(tree), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _arm_record(study: StudyConfig, name: str, arm: ArmResult) -> dict[str, Any]:
    return {
        "phases": study.arms[name].phases,
        "seeds": arm.seeds,
        "runs": arm.runs,
        "tokens": arm.tokens,
        "mean": spread_record(arm.mean()),
        "sources": {
            source: {
                "loss": spread_record(arm.loss(source)),
                "bits_per_byte": spread_record(arm.bits_per_byte(source)),
                "rise": spread_record(arm.rise(source)),
            }
            for source in arm.sources
        },
    }


def spread_record(spread: Spread) -> dict[str, Any]:
    """A spread as it stands in results.json; noise is twice the standard error of the mean."""
    return {
        "mean": spread.mean,
        "deviation": spread.deviation,
        "noise": spread.noise,
        "p": spread.p,
        "values": list(spread.values),
    }


def results_markdown(results: Results) -> str:
    """results.md: the tables for reading."""
    study = results.study
    lines = [f"# {study.name}", ""]
    lines += [f"{text}\n" for text in (study.question, study.budget and f"Budget: {study.budget}") if text]
    lines += ["## Held-out losses", ""]
    lines += _markdown(*loss_table(results))
    if results.bars:
        lines += ["", "## Bars", ""]
        lines += _markdown(*bar_table(results))
    return "\n".join(lines) + "\n"


def loss_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """(head, rows): a row an arm, with the loss of each source, their mean, and what it took."""
    sources = results.sources
    head = ["arm", "phases", "seeds", "tokens", *sources, "mean"]
    rows = [
        [
            name,
            " → ".join(path_of(results.study, name)),
            str(len(arm.seeds)),
            f"{arm.tokens:,}",
            *(spread_text(arm.loss(source)) if source in arm.sources else "–" for source in sources),
            spread_text(arm.mean()),
        ]
        for name, arm in results.arms.items()
    ]
    return head, rows


def bar_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """(head, rows): a row a bar."""
    head = ["claim", "must hold", "found", "margin", "seeds", "reported"]
    rows = [
        [
            bar.config.claim + (" (control: must fail)" if bar.config.control else ""),
            f"`{bar.config.holds}`",
            found_text(bar),
            margin_text(bar.margin),
            str(len(bar.seeds)),
            bar.config.reported or "",
        ]
        for bar in results.bars
    ]
    return head, rows


def found_text(bar: BarResult) -> str:
    """Held, not held, within noise; of a control, whether it fails as it must."""
    if bar.state is None:
        return "no number"
    meant = {True: "not held, as it must be", False: "held, and must not be", None: bar.state}
    return meant[bar.as_meant] if bar.config.control else bar.state


def path_of(study: StudyConfig, arm: str) -> list[str]:
    """The names of an arm's phases, and of its release."""
    config = study.arms[arm]
    path = [*config.phases]
    if config.release is not None:
        path.append(f"anneal, {config.release.shape}")
    if config.merge is not None:
        path.append(f"merge of the last {config.merge.last}, {config.merge.shape}")
    return path


def spread_text(spread: Spread, *, signed: bool = False) -> str:
    """ "5.871 ± 0.012": the mean and the standard deviation over seeds; with a true minus sign."""
    if spread.mean is None:
        return "–"
    mean = format(spread.mean, "+.3f" if signed else ".3f").replace("-", "−")
    return mean + ("" if spread.deviation is None else f" ± {spread.deviation:.3f}")


def margin_text(margin: Spread) -> str:
    """ "−0.031, noise 0.004", with a true minus sign."""
    if margin.mean is None:
        return "–"
    return f"{margin.mean:+.4g}".replace("-", "−") + ("" if margin.noise is None else f", noise {margin.noise:.2g}")


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *(line(row) for row in rows)]


def summary(results: Results) -> list[str]:
    """Lines for the terminal: the losses, and what was found of each bar."""
    head, rows = loss_table(results)
    lines = [*table_text(head, rows, align="ll" + "r" * (len(head) - 2))]
    return lines + [f"{found_text(bar)}: {bar.config.claim} ({margin_text(bar.margin)})" for bar in results.bars]
