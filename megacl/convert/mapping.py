"""From megacl's parameters to another format's tensors and back: one table a format, used in both directions.

    TABLE = {
        "embed": Rule(("model.embed_tokens.{part}",)),
        "layers.attention.qkv": Rule(("layers.{i}.q.{part}", "layers.{i}.k.{part}", "layers.{i}.v.{part}"), QKV_APART),
        ...
    }
    named = expand(TABLE, config)              # {"layers.0.attention.qkv.weight": Named(("layers.0.q.weight", ...))}
    ours = named[name].join(theirs, config)
    theirs = named[name].split(ours, config)

A key is a module of megacl's without its layer's number; {i} stands for that number, {part} for weight or bias. Which
parameters there are follows from the configuration alone (`parameter_shapes`), so a table may have more rules than one
model needs.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megacl.convert import layouts
from megacl.model.config import ModelConfig
from megacl.model.gpt import build_model


@dataclass(frozen=True)
class Transform:
    """How one of megacl's tensors lies in another format: in one or several tensors, in its order of rows."""

    join: Callable[[Sequence[Tensor], ModelConfig], Tensor]
    """Theirs, in the rule's order, to ours."""
    split: Callable[[Tensor, ModelConfig], Sequence[Tensor]]
    """The inverse; on "meta" tensors it gives their shapes."""


SAME = Transform(lambda theirs, config: theirs[0], lambda ours, config: (ours,))
QKV_APART = Transform(
    lambda theirs, config: layouts.join_qkv(theirs),
    lambda ours, config: layouts.split_qkv(ours, config.num_attention_heads, config.kv_heads),
)
QKV_PER_HEAD = Transform(
    lambda theirs, config: layouts.per_head_to_block(theirs[0], config.num_attention_heads),
    lambda ours, config: (layouts.block_to_per_head(ours, config.num_attention_heads),),
)
QKV_GROUPED = Transform(
    lambda theirs, config: layouts.grouped_to_block(theirs[0], config.num_attention_heads, config.kv_heads),
    lambda ours, config: (layouts.block_to_grouped(ours, config.num_attention_heads, config.kv_heads),),
)
GATE_UP_APART = Transform(
    lambda theirs, config: torch.cat(tuple(theirs)),
    lambda ours, config: layouts.split_halves(ours),
)
UP_THEN_GATE = Transform(
    lambda theirs, config: layouts.swap_halves(theirs[0]),
    lambda ours, config: (layouts.swap_halves(ours),),
)


@dataclass(frozen=True)
class Rule:
    """The tensors of another format that hold one of megacl's modules."""

    theirs: tuple[str, ...]
    transform: Transform = SAME


@dataclass(frozen=True)
class Named:
    """A rule for one parameter: names written out."""

    theirs: tuple[str, ...]
    join: Callable[[Sequence[Tensor], ModelConfig], Tensor]
    split: Callable[[Tensor, ModelConfig], Sequence[Tensor]]


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of a model by its name, in the model's order, with its shape; no head where it is tied."""
    model = build_model(config, seed=0, device="meta")
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def expand(table: Mapping[str, Rule], config: ModelConfig, *, first_layer: int = 0) -> dict[str, Named]:
    """The table written out for one model: megacl's name -> theirs, in the model's order.

    first_layer: the number that the format gives to the first layer. A parameter without a rule is a bug: what a format
    cannot express is refused by the configuration, before.
    """
    found = {}
    for name in parameter_shapes(config):
        module, part = name.rsplit(".", 1)
        number = re.match(r"layers\.(\d+)\.", module)
        rule = table[re.sub(r"^layers\.\d+\.", "layers.", module)]
        layer = first_layer + int(number[1]) if number else ""
        theirs = tuple(each.format(i=layer, part=part) for each in rule.theirs)
        found[name] = Named(theirs, rule.transform.join, rule.transform.split)
    return found


def foreign_shapes(named: Mapping[str, Named], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the other format's tensors, by its names, in megacl's order of parameters."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in parameter_shapes(config).items():
        parts = named[name].split(torch.empty(shape, device="meta"), config)
        found |= {theirs: tuple(part.shape) for theirs, part in zip(named[name].theirs, parts, strict=True)}
    return found
