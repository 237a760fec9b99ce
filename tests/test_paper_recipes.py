"""The recipes of arXiv 2403.08763, arm by arm: each command in their files is planned, and has the paper's figures.

The sources are small ones, which a plan reads again and again; the pre-trained model that arms go on from is a
checkpoint whose weights no plan looks at.
"""

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import Prepared
from runs import WEIGHTS

from megacl.checkpoint import RunState, checkpoint_path
from megacl.checkpoint_files import Contents, write_manifest
from megacl.config import RunConfig
from megacl.config_phase import ConstantSchedule, InfiniteSchedule
from megacl.configfile import dump, load, load_arguments, shipped
from megacl.lineage import Lineage, PhaseRecord
from megacl.model.gpt import count_parameters
from megacl.plan import plan_phases, schedule_of
from megacl.resume import find_inputs, find_origin, open_sources
from megacl.tensorfile import facts_of

RECIPES = shipped("configs") / "recipe" / "paper"
BATCH, T = 1104, 2048
WHOLE, GERMAN, PART = 132_366, 88_456, 44_122
"""Optimizer steps: of 299 billion tokens; of the whole batches in 200 billion; of a third of the first."""


@dataclass(frozen=True)
class Arm:
    """What one command must come to at 405M: of its last phase, where it does not say otherwise."""

    steps: tuple[int, ...]
    """Of each phase."""
    first: float
    """The rate of the first update."""
    peak: float
    last: float
    replay: Fraction = Fraction(0)
    state: str = "reset"


# The rate of update 1 of a warm-up over w updates from a to b is a + (b - a) / w. 1 % of 132,366 steps are 1324
# updates, of 88,456 they are 885, of 44,122 they are 442; 0.5 % and 2 % of the first are 662 and 2648. A cosine without
# warm-up begins with its second value, which lies below the peak by less than a part in 10^9.
UP = 3e-5 + 2.7e-4 / 1324
UP_GERMAN = 3e-5 + 2.7e-4 / 885
ARMS = {
    "pile": Arm((WHOLE,), 3e-4 / 1324, 3e-4, 3e-5, state="new"),
    "slim-pajama": Arm((WHOLE,), 3e-4 / 1324, 3e-4, 3e-5, state="new"),
    "german": Arm((GERMAN,), 3e-4 / 885, 3e-4, 3e-5, state="new"),
    "union-weak": Arm((2 * WHOLE,), 3e-4 / 2648, 3e-4, 3e-5, state="new"),
    "union-strong": Arm((WHOLE + GERMAN,), 3e-4 / 2209, 3e-4, 3e-5, state="new"),
    "warm-up-0": Arm((WHOLE,), 3e-4, 3e-4, 3e-5),
    "warm-up-0.5": Arm((WHOLE,), 3e-5 + 2.7e-4 / 662, 3e-4, 3e-5),
    "warm-up-1": Arm((WHOLE,), UP, 3e-4, 3e-5),
    "warm-up-2": Arm((WHOLE,), 3e-5 + 2.7e-4 / 2648, 3e-4, 3e-5),
    "max-lr-0.5": Arm((WHOLE,), 3e-5 + 1.2e-4 / 1324, 1.5e-4, 1.5e-5),
    "max-lr-1": Arm((WHOLE,), UP, 3e-4, 3e-5),
    "max-lr-2": Arm((WHOLE,), 3e-5 + 5.7e-4 / 1324, 6e-4, 6e-5),
    "max-lr-never": Arm((WHOLE,), 3e-5, 3e-5, 3e-5),
    **{
        f"weak-{percent}": Arm((WHOLE,), UP, 3e-4, 3e-5, Fraction(percent) / 100)
        for percent in ("0", "0.5", "1", "5", "10", "50")
    },
    **{
        f"strong-{percent}": Arm((GERMAN,), UP_GERMAN, 3e-4, 3e-5, Fraction(percent) / 100)
        for percent in ("0", "1", "5", "10", "25", "50")
    },
    "infinite": Arm((WHOLE,), 3e-4 / 1324, 3e-4, 1.65e-4, state="new"),
    "infinite-inverse-sqrt": Arm((WHOLE,), 3e-4 / 1324, 3e-4, 1.65e-4, state="new"),
    "infinite-annealed": Arm((WHOLE,), 3e-4 / 1324, 3e-4, 3e-5, state="new"),
    "stream-cosine": Arm((PART,) * 3, 3e-5 + 2.7e-4 / 442, 3e-4, 3e-5),
    "stream-infinite": Arm((PART,) * 3, 1.65e-4, 1.65e-4, 1.65e-4, state="kept"),
}


def commands() -> Iterator[list[str]]:
    """The arguments of every `megacl train` in the recipes' files."""
    for file in sorted(RECIPES.glob("*.yaml")):
        for line in re.findall(r"^#     megacl train (.*)$", file.read_text(), re.MULTILINE):
            yield shlex.split(line)


def name_of(arguments: list[str]) -> str:
    return Path(load_arguments(arguments).run_dir).name


BY_NAME = {name_of(arguments): arguments for arguments in commands()}


def at_10b(arguments: list[str]) -> list[str]:
    """The same arm at 10B, as base.yaml says: another model, what it needs, and two fifths of the rates."""
    config = load_arguments(arguments)
    swapped = ["model/10b.yaml" if each == "model/405m.yaml" else each for each in arguments]
    swapped.insert(swapped.index("recipe/paper/base.yaml") + 1, "recipe/paper/10b.yaml")
    for index, phase in enumerate(config.phases):
        for key in ("max_lr", "constant_lr", "min_lr"):
            if isinstance(rate := getattr(phase.schedule, key, None), float):
                swapped.append(f"phases[{index}].schedule.{key}={0.4 * rate}")
    return swapped


def placed(arguments: list[str], prepared: Prepared, folder: Path) -> RunConfig:
    """The configuration with its sources and runs where this test has them."""
    config = load_arguments(arguments)
    paths = {name: prepared.sources["english" if name == "pile" else "german"] for name in config.sources}
    moved = [f"sources.{name}.path={path}" for name, path in paths.items()]
    if config.start_from is not None:
        moved.append(f"start_from={folder / config.start_from}")
    return load_arguments([*arguments, *moved, f"run_dir={folder / config.run_dir}"])


def planned(config: RunConfig) -> tuple[PhaseRecord, ...]:
    """The records of the run's phases as they will have been when they are over."""
    origin = find_origin(config, Path(config.run_dir), None, resume=True, warn=pytest.fail)
    found = find_inputs(config, origin, open_sources(config, origin))
    *_, (_, _, after) = plan_phases(found)
    return after.phases[-len(config.phases) :]


@pytest.fixture(scope="module", params=["405m", "10b"])
def size(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(size: str, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which D0 has been trained, but for the weights."""
    folder = tmp_path_factory.mktemp(size)
    arguments = BY_NAME["pile"] if size == "405m" else at_10b(BY_NAME["pile"])
    config = placed(arguments, prepared, folder)
    lineage = Lineage(phases=planned(config))
    checkpoint = checkpoint_path(Path(config.run_dir), WHOLE)
    checkpoint.mkdir(parents=True)
    state = RunState(step=WHOLE, phase=0, samples=WHOLE * BATCH, optimizer_step=WHOLE, phase_end=True)
    (checkpoint / "state.json").write_text(json.dumps(dataclasses.asdict(state)))
    (checkpoint / "lineage.json").write_text(lineage.dump())
    (checkpoint / "config.yaml").write_text(dump(config))
    (checkpoint / WEIGHTS).write_bytes(b"")
    facts = facts_of(checkpoint / WEIGHTS)
    write_manifest(checkpoint, [Contents({WEIGHTS: facts}, {"exp_avg.embed.weight": WEIGHTS})])
    return folder


def test_every_arm_of_every_experiment_has_its_command() -> None:
    assert set(BY_NAME) == set(ARMS)
    assert len([*commands()]) == len(ARMS) + 1  # alone.yaml's first one stands in base.yaml, too


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_has_the_papers_tokens_batch_steps_rates_and_replay(
    name: str, size: str, folder: Path, prepared: Prepared
) -> None:
    expected = ARMS[name]
    arguments = BY_NAME[name] if size == "405m" else at_10b(BY_NAME[name])
    factor = 1.0 if size == "405m" else 0.4
    config = placed(arguments, prepared, folder)
    records = planned(config)
    assert count_parameters(config.model) == {"405m": 405_334_016, "10b": 9_642_249_216}[size]
    assert [record.budget_steps for record in records] == list(expected.steps)
    for record in records:
        assert (record.global_batch_size, record.seq_length) == (BATCH, T)
        assert record.budget_samples * T == record.budget_steps * 2_260_992  # 1104 x 2048 tokens a step
        assert record.tokens == record.budget_samples * T
    optimizer = config.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.max_grad_norm) == (0.9, 0.95, 0.1, 1.0)

    last = records[-1]
    assert last.optimizer_state == expected.state
    share = last.replay.fraction if last.replay else Fraction(0)
    assert share == expected.replay
    replayed = last.replay.samples if last.replay else 0
    assert replayed == expected.replay.numerator * last.budget_samples // expected.replay.denominator

    rate = schedule_of(config, config.phases[-1], last.start_lr, last.budget_steps)
    rates = [rate(k) for k in range(1, 4000)]
    assert rates[0] == pytest.approx(factor * expected.first, rel=1e-8)
    assert max(rates) == pytest.approx(factor * expected.peak, rel=1e-8)
    assert rate(last.budget_steps) == pytest.approx(factor * expected.last, rel=1e-8)


def test_the_infinite_schedules_turn_where_the_paper_says() -> None:
    config = load_arguments(BY_NAME["infinite"])
    rate = schedule_of(config, config.phases[0], 0.0, WHOLE)
    assert rate(1324) == 3e-4  # 1 % up, then 60 % down to 0.55 of the peak
    assert rate(1324 + 79_420) == 1.65e-4
    assert rate(1324 + 79_419) > 1.65e-4
    annealed = load_arguments(BY_NAME["infinite-annealed"])
    rate = schedule_of(annealed, annealed.phases[0], 0.0, WHOLE)
    assert rate(WHOLE - 13_237) == 1.65e-4  # a tenth of the phase is for the anneal
    assert rate(WHOLE - 13_236) < 1.65e-4


def test_experiments_differ_in_what_they_are_about_alone() -> None:
    base = load([str(RECIPES / "base.yaml"), "model/405m.yaml", str(RECIPES / "warm-up.yaml")])
    for name in ARMS:
        config = load_arguments(BY_NAME[name])
        assert (config.optimizer, config.engine, config.checkpoint) == (base.optimizer, base.engine, base.checkpoint)
        kinds = {type(phase.schedule) for phase in config.phases}
        assert (InfiniteSchedule in kinds) == ("infinite" in name)
        assert (ConstantSchedule in kinds) == (name == "max-lr-never")
