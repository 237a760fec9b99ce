"""The words in which a study's bars are written: a comparison of what came of its arms.

    bar = parse_bar('rise("replay-25", "english") <= 0.1 * rise("replay-0", "english")', "bars[0].holds")
    margin = bar.margin(outcome_of)     # at most 0 where the comparison holds

    loss(arm, source)       held-out loss at the arm's end, nats per token
    bpb(arm, source)        the same in bits per byte
    mean(arm, source...)    mean of the losses over these sources, or over all that are evaluated
    rise(arm, source)       how far that loss lies above the best one before it
    bump(arm, source)       how far the loss rose, in the arm's last phase, above where that phase began
    tokens(arm)             tokens learned from on the arm's path

with numbers, + - * / and parentheses, and <, <=, > or >= between two sides, or between several: a < b < c holds where
each of its comparisons does. Names of arms and sources are strings. It is read by Python's own parser, and nothing but
what is listed here is evaluated.
"""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from megacl.config_phase import nearest
from megacl.errors import ConfigError


class Outcome(Protocol):
    """What came of one arm under one seed."""

    @property
    def tokens(self) -> int: ...
    def loss(self, source: str) -> float: ...
    def bits_per_byte(self, source: str) -> float: ...
    def mean(self, sources: tuple[str, ...]) -> float: ...
    def rise(self, source: str) -> float: ...
    def bump(self, source: str) -> float: ...


OutcomeOf = Callable[[str], Outcome]
"""From an arm's name, under one seed."""

_WORDS: dict[str, tuple[str, Callable[[Outcome, tuple[str, ...]], float]]] = {
    "loss": ("(arm, source)", lambda outcome, sources: outcome.loss(sources[0])),
    "bpb": ("(arm, source)", lambda outcome, sources: outcome.bits_per_byte(sources[0])),
    "rise": ("(arm, source)", lambda outcome, sources: outcome.rise(sources[0])),
    "bump": ("(arm, source)", lambda outcome, sources: outcome.bump(sources[0])),
    "mean": ("(arm, source...)", lambda outcome, sources: outcome.mean(sources)),
    "tokens": ("(arm)", lambda outcome, sources: float(outcome.tokens)),
}

_ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: lambda left, right: left + right,
    ast.Sub: lambda left, right: left - right,
    ast.Mult: lambda left, right: left * right,
    ast.Div: lambda left, right: left / right if right else float("nan"),
}

_LARGEST = 1e30
"""Of numbers that are written out."""

_DEEPEST = 100
"""Of terms in terms: 1 + 1 + 1 is two deep."""

_UP = (ast.Lt, ast.LtE)
_DOWN = (ast.Gt, ast.GtE)


@dataclass(frozen=True)
class Bar:
    """A comparison that was found to be one."""

    text: str
    tree: ast.Compare
    arms: tuple[str, ...]
    """That it names, each once."""
    sources: tuple[str, ...]

    def sides(self, outcome_of: OutcomeOf) -> tuple[float, ...]:
        """The values that are compared, left to right; NaN where one is divided by 0."""
        return tuple(_value(side, outcome_of) for side in (self.tree.left, *self.tree.comparators))

    def margin(self, outcome_of: OutcomeOf) -> float:
        """How far the side that should be the smaller one lies above the other; of several, the largest such.

        At most 0 where the bar holds: left - right for left <= right, right - left for left >= right.
        """
        pairs = zip(pairwise(self.sides(outcome_of)), self.tree.ops, strict=True)
        margins = [left - right if isinstance(how, _UP) else right - left for (left, right), how in pairs]
        return next((margin for margin in margins if margin != margin), max(margins))  # a NaN is kept


def parse_bar(text: str, where: str) -> Bar:
    """A bar out of its text; where: the setting's path, for messages. Raises ConfigError in one line."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ConfigError(f'{where} is {text!r}; it is not a comparison such as loss("a", "x") <= 2.') from None
    if not (isinstance(tree, ast.Compare) and all(isinstance(how, _UP + _DOWN) for how in tree.ops)):
        raise ConfigError(f"{where} is {text!r}; it must compare two values by <, <=, > or >=.")
    if _depth(tree) > _DEEPEST:
        raise ConfigError(f"{where} is nested more than {_DEEPEST} deep; write it with fewer terms.")
    calls = [call for side in (tree.left, *tree.comparators) for call in _calls(side, where)]
    if not calls:
        raise ConfigError(f"{where} is {text!r}; it names no arm, so that nothing which is trained decides it.")
    names = [[_name(argument) for argument in call.args] for call in calls]
    return Bar(
        text=text.strip(),
        tree=tree,
        arms=tuple(dict.fromkeys(arm for arm, *_ in names)),
        sources=tuple(dict.fromkeys(source for _, *sources in names for source in sources)),
    )


def _calls(node: ast.expr, where: str) -> Iterator[ast.Call]:
    """The words used below a node. Raises ConfigError at the first thing that is none of the language's."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool) and value <= _LARGEST:
            return
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            yield from _calls(operand, where)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            yield from _calls(left, where)
            yield from _calls(right, where)
        case ast.Call(func=ast.Name(id=word)) if word in _WORDS:
            form, _ = _WORDS[word]
            fits = bool(node.args) if word == "mean" else len(node.args) == form.count(",") + 1
            if node.keywords or not fits or not all(_is_string(argument) for argument in node.args):
                raise ConfigError(
                    f"{where} has {_text(node)}; it must be {word}{form}, names in quotes: "
                    f'{word}("an-arm"{"" if word == "tokens" else ", " + chr(34) + "a-source" + chr(34)}).'
                )
            yield node
        case ast.Call(func=ast.Name(id=word)):
            raise ConfigError(f"{where} has {word}(...); the words are {', '.join(_WORDS)}{nearest(word, _WORDS)}")
        case _:
            raise ConfigError(
                f"{where} has {_text(node)}; there may be numbers to 1e30, + - * / ( ), and {', '.join(_WORDS)}."
            )


def _text(node: ast.expr) -> str:
    return " ".join(ast.unparse(node).split())


def _depth(tree: ast.AST) -> int:
    depth, level = 0, [tree]
    while level:
        depth, level = depth + 1, [child for node in level for child in ast.iter_child_nodes(node)]
    return depth


def _is_string(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _name(node: ast.expr) -> str:
    assert isinstance(node, ast.Constant)
    return str(node.value)


def _value(node: ast.expr, outcome_of: OutcomeOf) -> float:
    match node:
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.UnaryOp(op=op, operand=operand):
            value = _value(operand, outcome_of)
            return -value if isinstance(op, ast.USub) else value
        case ast.BinOp(left=left, op=op, right=right):
            return _ARITHMETIC[type(op)](_value(left, outcome_of), _value(right, outcome_of))
        case ast.Call(func=ast.Name(id=word), args=[arm, *sources]):
            _, measure = _WORDS[word]
            return measure(outcome_of(_name(arm)), tuple(_name(source) for source in sources))
    raise AssertionError("found to be in the language when it was parsed")
