"""The words of a study's bars, against Python's own evaluation of the same text."""

import contextlib
import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacl.errors import ConfigError
from megacl.study_words import parse_bar


@dataclass(frozen=True)
class Fake:
    """An outcome whose numbers follow from its arm's name."""

    arm: str
    tokens: int

    def loss(self, source: str) -> float:
        return len(self.arm) + len(source) / 10

    def bits_per_byte(self, source: str) -> float:
        return self.loss(source) / 3

    def mean(self, sources: tuple[str, ...]) -> float:
        return sum(map(self.loss, sources or ("a", "b"))) / len(sources or "ab")

    def rise(self, source: str) -> float:
        return self.loss(source) - 1.5

    def bump(self, source: str) -> float:
        return -0.25 * self.loss(source)


def outcome_of(arm: str) -> Fake:
    return Fake(arm, 1000 * len(arm))


PYTHON = {
    "loss": lambda arm, source: outcome_of(arm).loss(source),
    "bpb": lambda arm, source: outcome_of(arm).bits_per_byte(source),
    "mean": lambda arm, *sources: outcome_of(arm).mean(sources),
    "rise": lambda arm, source: outcome_of(arm).rise(source),
    "bump": lambda arm, source: outcome_of(arm).bump(source),
    "tokens": lambda arm: outcome_of(arm).tokens,
}
names = st.text("abc-25 é\"'\\", min_size=1, max_size=6).map(repr)
words = st.one_of(
    st.builds("{}({}, {})".format, st.sampled_from(["loss", "bpb", "rise", "bump"]), names, names),
    st.builds("tokens({})".format, names),
    st.builds("mean({})".format, st.lists(names, min_size=1, max_size=3).map(", ".join)),
)
numbers = st.one_of(st.integers(0, 10**6), st.floats(0, 1e6)).map(repr)
sides = st.recursive(
    words | numbers,
    lambda below: st.one_of(
        st.builds("({} {} {})".format, below, st.sampled_from("+-*/"), below), below.map("-{}".format)
    ),
    max_leaves=8,
)


@given(left=st.builds("{} + {}".format, words, sides), right=sides, how=st.sampled_from(["<", "<=", ">", ">="]))
def test_a_bar_says_what_python_says_of_the_same_text(left, right, how):
    bar = parse_bar(f"{left} {how} {right}", "here")
    try:
        expected = [eval(side, {"__builtins__": {}}, PYTHON) for side in (left, right)]
    except ZeroDivisionError:
        assert math.isnan(bar.margin(outcome_of))
        return
    assert bar.sides(outcome_of) == pytest.approx(expected, nan_ok=True)
    margin = bar.margin(outcome_of)
    assert margin == pytest.approx((expected[0] - expected[1]) * (1 if how in "<=" else -1), nan_ok=True, abs=1e-9)


def test_a_bar_knows_the_arms_and_sources_that_it_names_each_once():
    bar = parse_bar('rise("a", "x") <= 0.1 * (rise("b-2", "x") + mean("a", "y", "z")) - tokens("c")', "here")
    assert bar.arms == ("a", "b-2", "c")
    assert bar.sources == ("x", "y", "z")


def test_a_chain_holds_where_each_of_its_comparisons_does_and_its_margin_is_the_worst():
    chain = parse_bar('loss("four", "x") < loss("seven77", "x") < loss("sixsix", "x")', "here")
    assert chain.margin(outcome_of) == pytest.approx(1.0)  # 7.1 is to lie below 6.1
    assert parse_bar('loss("four", "x") < loss("sixsix", "x") < 7', "here").margin(outcome_of) < 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" + ".join(["1"] * 500) + ' < loss("a", "x")', "is nested more than 100 deep"),
        ("loss(", "is not a comparison"),
        ('loss("a", "x")', "must compare two values"),
        ('loss("a", "x") == 1', "must compare two values"),
        ('loss("a", "x") < 1 and True', "must compare two values"),
        ("1 < 2", "names no arm"),
        ('lose("a", "x") < 1', "did you mean 'loss'?"),
        ('loss("a") < 1', 'it must be loss(arm, source), names in quotes: loss("an-arm", "a-source")'),
        ("loss(a, x) < 1", "names in quotes"),
        ('loss("a", source="x") < 1', "it must be loss(arm, source)"),
        ('tokens("a", "x") < 1', 'it must be tokens(arm), names in quotes: tokens("an-arm")'),
        ('mean(*["a"]) < 1', "it must be mean(arm, source...)"),
        ('loss("a", "x") < 2 ** 9', "there may be numbers"),
        ('loss("a", "x") < True', "there may be numbers"),
        ('loss("a", "x") < 1e400', "there may be numbers to 1e30"),
        ('loss("a", "x") < 1' + "0" * 400, "there may be numbers to 1e30"),
        ('__import__("os").getpid() < loss("a", "x")', "there may be numbers"),
        ('(lambda: 1)() < loss("a", "x")', "there may be numbers"),
        ('loss("a", "x").real < 1', "there may be numbers"),
        ("(" * 5000 + '1 < loss("a", "x")', "is not a comparison"),
        ("-" * 50_000 + '1 < loss("a", "x")', "is not a comparison"),
        ('loss("a", "x") < 1\0', "is not a comparison"),
    ],
)
def test_what_is_no_bar_is_named_in_one_line(text, words):
    with pytest.raises(ConfigError, match=r"^bars\[3\]\.holds (is|has) ") as error:
        parse_bar(text, "bars[3].holds")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@given(st.text(max_size=60))
def test_any_text_is_a_bar_or_a_config_error(text):
    with contextlib.suppress(ConfigError):
        parse_bar(text, "here")
