"""The model presets under configs/model, counted on the meta device."""

import re

import pytest
from pydantic import TypeAdapter

from megacl.configfile import find_config, load_tree, shipped
from megacl.model.config import ModelConfig
from megacl.model.gpt import count_parameters

PARAMETERS = {
    "tiny": 1_317_632,
    "14m": 14_067_712,  # of Pythia's published sizes
    "70m": 70_426_624,
    "160m": 162_322_944,
    "405m": 405_334_016,
    "1b": 1_011_781_632,
    "10b": 9_642_249_216,
    "llama-1b": 1_235_814_400,
    "llama-8b": 8_030_261_248,
}


def preset(name: str) -> ModelConfig:
    tree = load_tree([f"model/{name}.yaml"])
    assert list(tree) == ["model"]
    return TypeAdapter(ModelConfig).validate_python(tree["model"])


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_has_exactly_its_parameters(name):
    config = preset(name)
    assert config.problem() is None
    assert count_parameters(config) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_says_its_size_in_its_first_line(name):
    first = find_config(f"model/{name}.yaml").read_text().splitlines()[0]
    match = re.match(r"# ([\d,]+) parameters: ", first)
    assert match is not None
    assert int(match[1].replace(",", "")) == PARAMETERS[name]


def test_every_preset_is_counted_here():
    assert {file.stem for file in (shipped("configs") / "model").glob("*.yaml")} == set(PARAMETERS)
