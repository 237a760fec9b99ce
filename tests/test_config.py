"""Configurations: merged, checked, written and read back; whatever is wrong is said in one line."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megacl.configfile import dump, from_tree, load, load_tree
from megacl.errors import ConfigError
from megacl.plan import check_batches, check_ranks, schedule_of

BASE = """
run_dir: runs/x
model: {vocab_size: 100, hidden_size: 32, num_layers: 2, num_attention_heads: 4}
sources: {a: {path: data/a}, b: {path: data/b}}
seq_length: 32
global_batch_size: 8
phases:
  - {name: p0, mixture: {a: 1}, steps: 100, schedule: {kind: cosine, max_lr: 3e-4}}
  - {name: p1, mixture: {b: 1}, tokens: 2e5, schedule: {kind: wsd, max_lr: 3e-4}, replay: {share: 0.2, from: {p0: 1}}}
"""


@pytest.fixture
def base(tmp_path: Path) -> str:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return str(path)


def test_the_resolved_configuration_is_itself_a_configuration(base: str, tmp_path: Path) -> None:
    config = load([base])
    again = tmp_path / "resolved.yaml"
    again.write_text(dump(config))
    assert load([str(again)]) == config


@settings(deadline=None)
@given(st.floats(1e-12, 1e3), st.integers(1, 2**40))
def test_numbers_come_back_from_the_file_to_the_last_bit(rate: float, steps: int) -> None:
    tree = yaml.safe_load(BASE)
    tree["phases"][0]["schedule"] = {"kind": "constant", "max_lr": rate}
    tree["phases"][0]["steps"] = steps
    tree["phases"][1]["tokens"] = 200_000
    config = from_tree(tree)
    assert config.phases[0].schedule.max_lr == rate
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(dump(config))
        file.flush()
        assert load([file.name]) == config


@pytest.mark.parametrize(
    ("text", "value"), [("3e-4", 3e-4), ("1E5", 1e5), ("2e9", 2e9), (".5", 0.5), ("1.", 1.0), ("-1e-3", -1e-3)]
)
def test_a_number_with_an_exponent_is_a_number(text: str, value: float, base: str) -> None:
    assert load_tree([base], [f"x={text}"])["x"] == value


@pytest.mark.parametrize("text", ["1e", "e5", "3-4", "1.2.3", "--5", "3e-4x", "step-0001"])
def test_what_only_looks_like_a_number_stays_text(text: str, base: str) -> None:
    assert load_tree([base], [f"x={text}"])["x"] == text


def test_files_merge_left_to_right_and_overrides_come_last(base: str, tmp_path: Path) -> None:
    over = tmp_path / "over.yaml"
    over.write_text("model: {hidden_size: 64}\nsources: {c: {path: data/c}}\nseed: 3\n")
    config = load([base, str(over)], ["seed=4", "phases[0].schedule.max_lr=1e-3", "phases.1.steps=null"])
    assert (config.model.hidden_size, config.model.num_layers) == (64, 2)
    assert list(config.sources) == ["a", "b", "c"]
    assert config.seed == 4
    assert config.phases[0].schedule.max_lr == 1e-3


def test_what_follows_from_a_setting_is_derived(base: str) -> None:
    config = load([base])
    p0, p1 = config.phases
    assert config.tokens_per_step(p1) == 256
    assert (config.steps_of(p0), config.steps_of(p1)) == (100, 781)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("phases[1].replay.share=1.2", "phases[1].replay.share is 1.2; it must be less than 1. It is the part of each"),
        ("phases[0].steps=1e23", "phases[0].steps is 1e+23; it is too large. It is the phase's budget"),
        (
            "phases[0]={name: p, mixture: {a: 1}, steps: 1e12, global_batch_size: 2e6, seq_length: 1e6, "
            "schedule: {kind: constant, max_lr: 1e-3}}",
            "phases[0] has 2,000,000,000,000,000,000,000,000 tokens; a phase may have 1,152,921,504,606,846,976",
        ),
        ("global_batch_size=1e11", "global_batch_size is 100000000000.0; it must be less than or equal to 16777216"),
        ("seq_length=5000000000", "seq_length is 5000000000; it must be less than or equal to 16777216"),
        ("phases[0].mixture={a: 1e308, b: 1e-308}", "phases[0].mixture.a is 1e+308; it must be less than or equal to"),
        ("phases[1].replay={share: 0.1, max_times: 1e18}", "max_times is 1e+18; it must be less than or equal to"),
        ("phases[1].replay.share=-0.1", "phases[1].replay.share is -0.1; it must be greater than or equal to 0"),
        ("sources.a.pth=x", "sources.a.pth is not a setting; did you mean sources.a.path?"),
        ("max_lr=3", "max_lr is not a setting; it belongs at phases[].schedule.max_lr."),
        (
            "phases[0].schedule.min=3",
            "phases[0].schedule.min is not a setting; did you mean phases[0].schedule.min_lr?",
        ),
        ("xyz=3", "xyz is not a setting; known here: run_dir, model"),
        ("phases[0].schedule.kind=cosin", "did you mean 'cosine'?"),
        ("phases[0].schedule={max_lr: 1}", "phases[0].schedule.kind is missing; it must be one of constant, linear"),
        (
            "optimizer.independent_weight_decay=true",
            "optimizer.weight_decay is 0.1 with independent_weight_decay, and so the part of every matrix that an",
        ),
        ("phases[0].schedule.warmup=10", 'is 10; it must be a length such as "100 steps"'),
        ("phases[0].schedule.warmup=101 steps", "phases[0].schedule is longer than its phase: warmup 101 = 101 steps"),
        ("phases[1].schedule.decay=100%", "longer than its phase: warmup 8 + decay 781 = 789 steps, and the phase has"),
        ("phases[0].schedule.min_lr=3e-3", "phases[0].schedule.min_lr is 0.003; it must not exceed max_lr, 0.0003."),
        ("phases[0].schedule.max_lr=last", "but there is no earlier phase; give a number."),
        ("phases[0].schedule.max_lr=high", "phases[0].schedule.max_lr is 'high'; it must be a valid number"),
        ("model.num_attention_heads=5", "model.num_attention_heads is 5; it must divide hidden_size, 32, where"),
        ("model.vocab_size=", "model.vocab_size is None; it must be a valid integer. It is the number of rows"),
        ("engine.zero_stage=4", "engine.zero_stage is 4; it must be less than or equal to 3"),
        (
            "engine.micro_batch_size=3",
            "global_batch_size of phases[0] is 8; it must be a multiple of engine.micro_batch",
        ),
        ("phases[0].schedule.max_lr=.inf", "phases[0].schedule.max_lr is inf; it must be a finite number"),
        ("phases[0].schedule.kind=[1]", "phases[0].schedule.kind is [1]; it must be one of constant"),
        ("phases[0].schedule.warmup=1e999999999 steps", "it must be a length such as"),
        ("phases[0].schedule.warmup=100%", "phases[0].schedule has no step left to decay in: the phase has 100"),
        ("phases[1].schedule.decay=0 steps", "phases[1].schedule has no step left to decay in"),
        ("phases[1].replay.share=0.99999999999", "it must not have more than nine digits"),
        (
            "phases[0].schedule={kind: infinite, max_lr: 1, constant_lr: 1, min_lr: 0}",
            "min_lr is 0; it must be greater",
        ),
        ("phases=[]", "phases is empty"),
        ("phases=3", "phases is 3; it must be a list."),
        ("model=3", "model is 3; it must be a mapping of settings."),
        ("phases[0].tokens=3", "phases[0] must have a budget, either tokens or steps, and not both."),
        ("phases[1].tokens=255", "phases[1].tokens is 255; it must hold at least one batch, 8 x 32 = 256 tokens."),
        ("phases[1].mixture={c: 1}", "phases[1].mixture names 'c', which is not in sources."),
        ("phases[1].mixture={}", "phases[1].mixture is empty"),
        ("phases[0].mixture.a=0", "phases[0].mixture.a is 0; it must be greater than 0"),
        (
            "phases[1].replay.from={p: 1}",
            "phases[1].replay.from names 'p', which is no earlier phase; did you mean 'p0'?",
        ),
        ("phases[0].replay={share: 0.1}", "phases[0].replay has nothing to replay: this is the model's first phase."),
        ("phases[1].replay.from_sources={a: 1}", "replay.from and from_sources are both given"),
        (
            "phases[1].replay={share: 0.2, from: {p0: 1}, policy: uniform}",
            "phases[1].replay.from is given, and policy uniform sets the weights itself; leave one of them out.",
        ),
        (
            "phases[1].replay={share: 0.2, from_sources: {a: 1}, policy: latest}",
            "phases[1].replay.policy is latest, which is over earlier phases; leave it out, or from_sources.",
        ),
        (
            "phases[1].replay={share: 0.2, from_sources: {a: 1}, max_times: 2}",
            "phases[1].replay.max_times is given, which counts replays of earlier phases; leave it out, or",
        ),
        (
            "phases[1].replay={share: 0.2, d: 2}",
            "phases[1].replay.d is given, which only power_law and exponential have, and policy is original; leave it",
        ),
        (
            "phases[1].replay={share: 0.2, policy: latest, age: tokens}",
            "phases[1].replay.age is given, which only power",
        ),
        ("phases[1].replay.max_times=0", "phases[1].replay.max_times is 0; it must be greater than or equal to 1"),
        ("phases[1].replay.policy=newest", "phases[1].replay.policy is 'newest'; it must be 'original', 'uniform'"),
        ("phases[1].temperature=0", "phases[1].temperature is 0; it must be greater than 0. It is the root that is"),
        ("phases[1].weights_by=size", "phases[1].weights_by is 'size'; it must be 'given', 'tokens' or 'documents'."),
        ("phases[1].when_exhausted=end", "phases[1].when_exhausted is 'end'; it must be 'repeat', 'stop'"),
        (
            "phases[0].mixture_changes=[{at: 50%, mixture: {c: 1}}]",
            "phases[0].mixture_changes[0].mixture names 'c', which is not in sources.",
        ),
        (
            "phases[0].mixture_changes=[{at: 50%, mixture: {}}]",
            "phases[0].mixture_changes[0].mixture is empty; it must name at least one source and its weight.",
        ),
        (
            "phases[0].mixture_changes=[{at: 50%, mixture: {a: 1}}, {at: 50 steps, mixture: {b: 1}}]",
            "phases[0].mixture_changes[1].at is '50 steps', step 50; it must lie after step 50, where the mixture "
            "before begins, and not after step 99 of 100.",
        ),
        ("phases[0].mixture_changes=[{at: 100%, mixture: {b: 1}}]", "is '100%', step 100; it must lie after step 0"),
        ("phases[0].mixture_changes=[{at: 101%, mixture: {b: 1}, how: linear}]", "and not after step 100 of 100."),
        (
            "phases[0].mixture_changes=[{at: 0 steps, mixture: {b: 1}}]",
            "is '0 steps', step 0; it must lie after step 0",
        ),
        (
            "phases[0].mixture_changes=[{att: 50%, mixture: {b: 1}}]",
            "phases[0].mixture_changes[0].att is not a setting; did you mean phases[0].mixture_changes[0].at?",
        ),
        ("phases[1].name=p0", "phases[1].name is 'p0', as that of phases[0]; name it differently."),
        ("phases[0].name=a b", "phases[0].name is 'a b'; it must match pattern"),
        ("phases[7].name=x", "there is no element 7; the list has 2, counted from 0."),
        ("run_dir.x=1", "'x' lies below a plain value, 'runs/x'."),
        ("no-equals-sign", "an override has the form section.key=value."),
        ("seed=[1", "it is not valid YAML"),
    ],
)
def test_a_wrong_setting_is_one_line_that_says_what_where_and_what_to_do(
    base: str, override: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load([base], [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(BASE.replace("seq_length: 32\n", ""))
    with pytest.raises(ConfigError, match=r"^seq_length is missing; every configuration must give it"):
        load([str(path)])


def test_zero_stage_0_in_low_precision_names_the_stage_that_works(base: str) -> None:
    with pytest.raises(ConfigError, match="use zero_stage 1"):
        load([base], ["engine={kind: deepspeed, zero_stage: 0, precision: bf16}"])


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (
            "{offload_optimizer: true}",
            "engine.offload_optimizer is set with engine.kind native, which has one device; ",
        ),
        ("{compare_replicas_every: 9}", "engine.compare_replicas_every is set with engine.kind native"),
        (
            "{kind: deepspeed, zero_stage: 0, offload_optimizer: true}",
            "engine.offload_optimizer is true with engine.zero",
        ),
        (
            "{activation_checkpointing: [0, 2]}",
            "engine.activation_checkpointing names layer 2; the model has layers 0 to 1",
        ),
    ],
)
def test_engine_settings_that_do_not_fit_are_refused_in_one_line(base: str, engine: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load([base], [f"engine={engine}", "model.num_layers=2"])
    assert str(refused.value).startswith(message)


def test_tf32_needs_no_zero_stage_of_its_own(base: str) -> None:
    assert load([base], ["engine={kind: deepspeed, zero_stage: 0, precision: tf32}"]).engine.precision == "tf32"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\na: 2\n", r"line 1 the key 'a' stands twice"),
        ("a: [1\n", r"line \d+ .* it is not valid YAML"),
        ("- 1\n", "it holds no mapping of settings"),
        ("", "it holds no mapping of settings"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load([str(path)])
    assert str(path) in str(caught.value)


def test_names_that_look_like_numbers_or_truth_values_come_back_as_they_were(base: str, tmp_path: Path) -> None:
    over = tmp_path / "over.yaml"
    over.write_text("run_dir: '3e-4'\nsources:\n  no: {path: '1e5'}\n  2024: {path: 'on'}\n  2026-11-24: {path: '1'}\n")
    config = load([base, str(over)])
    assert list(config.sources) == ["a", "b", "no", "2024", "2026-11-24"]
    assert (config.run_dir, config.sources["no"].path, config.sources["2024"].path) == ("3e-4", "1e5", "on")
    again = tmp_path / "again.yaml"
    again.write_text(dump(config))
    assert load([str(again)]) == config


# YAML keeps no other line ends than its own, and no control characters; a path has neither.
@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=8))
def test_any_text_comes_back_from_the_file(text: str) -> None:
    tree = yaml.safe_load(BASE)
    tree["phases"][1]["tokens"], tree["phases"][0]["schedule"]["max_lr"] = 200_000, 3e-4
    tree["phases"][1]["schedule"]["max_lr"] = 3e-4
    tree["sources"]["a"]["path"] = text
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(dump(from_tree(tree)))
        file.flush()
        assert load([file.name]).sources["a"].path == text


def test_an_anchor_can_be_merged_and_changed(base: str, tmp_path: Path) -> None:
    over = tmp_path / "over.yaml"
    over.write_text("evaluation: &e {every_steps: 5}\nlogging: {<<: *e, tensorboard: false}\n")
    assert load([base, str(over)]).logging.every_steps == 5


def test_a_file_that_is_not_there_names_the_nearest_of_ours() -> None:
    with pytest.raises(ConfigError, match=r"recipe/demoo.yaml: no such file, .* did you mean 'recipe/demo.yaml'\?"):
        load(["recipe/demoo.yaml"])


@pytest.mark.parametrize("name", ["weak-shift", "strong-shift", "infinite"])
def test_the_papers_recipes_resolve_to_its_figures_at_405m(name: str) -> None:
    """arXiv 2403.08763: 1104 sequences of 2048, 132,366 steps or about 200B tokens, 3e-4 to 3e-5, warm-up 1 %."""
    config = load(["model/405m.yaml", f"recipe/{name}.yaml"])
    first, second = config.phases
    assert config.tokens_per_step(first) == 2_260_992
    assert config.steps_of(first) * config.tokens_per_step(first) == 299_278_467_072
    rate = schedule_of(config, first, 0.0, config.steps_of(first))
    assert rate(1324) == 3e-4
    assert first.schedule.parts(phase_steps=132_366, tokens_per_step=2_260_992)["warmup"] == 1324
    assert rate(132_366) == (1.65e-4 if name == "infinite" else 3e-5)
    if name == "strong-shift":
        assert config.steps_of(second) == 88_456
        assert (
            200e9 - config.tokens_per_step(second) < config.steps_of(second) * config.tokens_per_step(second) <= 200e9
        )
    assert second.replay is not None
    assert second.replay.share == (0.25 if name == "strong-shift" else 0.05)


@pytest.mark.parametrize("name", ["weak-shift", "strong-shift", "infinite"])
def test_the_papers_recipes_are_dealt_out_to_1_to_16_ranks(name: str) -> None:
    config = load(["model/405m.yaml", f"recipe/{name}.yaml"])
    for ranks in (1, 2, 4, 8, 16):
        check_ranks(config, ranks)
        check_batches(config, ranks)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"stability": {"spike": 6.0}}, "stability.spike is set with stability.skip 0"),
        ({"stability": {"go_back": 1}, "checkpoint": {}}, "stability.go_back is set, and no checkpoints are saved"),
    ],
)
def test_settings_that_would_skip_or_go_back_and_cannot_are_refused(tmp_path: Path, section: Any, said: str) -> None:
    base, more = tmp_path / "base.yaml", tmp_path / "more.yaml"
    tree = load_tree(["recipe/weak-shift.yaml", "model/tiny.yaml"])
    del tree["checkpoint"]
    base.write_text(yaml.safe_dump(tree))
    more.write_text(yaml.safe_dump(section))
    with pytest.raises(ConfigError, match=said):
        load([str(base), str(more)])


def test_the_demos_recipes_resolve() -> None:
    assert [phase.name for phase in load(["recipe/demo.yaml"]).phases] == ["english", "german"]
    branch = load(["recipe/demo.yaml", "recipe/demo-no-replay.yaml"])
    assert branch.start_from == "demo/replay-25@english"
    assert [phase.replay for phase in branch.phases] == [None]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["engine.tensor_parallel=2", "engine.kind=native"],
            "engine.tensor_parallel is 2 with engine.kind native, which runs on one rank; set engine.kind=deepspeed.",
        ),
        (
            ["engine.sequence_parallel=4", "engine.kind=native"],
            "engine.sequence_parallel is 4 with engine.kind native",
        ),
        (["engine.tensor_parallel=8"], "model.vocab_size is 100; it must be a multiple of engine.tensor_parallel, 8."),
        (
            ["engine.tensor_parallel=5"],
            "model.num_attention_heads is 4; it must be a multiple of engine.tensor_parallel, 5.",
        ),
        (
            ["engine.tensor_parallel=4", "model.form=llama", "model.num_kv_heads=2"],
            "model.num_kv_heads is 2; it must be a multiple of engine.tensor_parallel, 4.",
        ),
        (
            ["engine.tensor_parallel=2", "model.intermediate_size=33"],
            "model.intermediate_size is 33; it must be a multiple of engine.tensor_parallel, 2.",
        ),
        (
            ["engine.tensor_parallel=2", "engine.sequence_parallel=4"],
            "model.num_kv_heads is 4; it must be a multiple of engine.tensor_parallel x engine.sequence_parallel, 2 x",
        ),
        (
            ["engine.sequence_parallel=2", "phases[1].seq_length=33"],
            "seq_length of phases[1] is 33; it must be a multiple of engine.sequence_parallel, 2.",
        ),
        (
            ["engine.sequence_parallel=2", "seq_length=31"],
            "seq_length is 31; it must be a multiple of engine.sequence_parallel, 2.",
        ),
    ],
)
def test_what_ranks_in_groups_cannot_share_evenly_is_refused(base: str, overrides: list[str], message: str) -> None:
    load([base], ["engine.kind=deepspeed", "engine.tensor_parallel=2", "engine.sequence_parallel=2"])
    with pytest.raises(ConfigError) as error:
        load([base], ["engine.kind=deepspeed", *overrides])
    assert str(error.value).startswith(message)
