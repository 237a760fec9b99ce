"""Any shape, cut for any number of ranks in any format, comes back as the numbers that went in."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from litgpt_layout import write_litgpt
from megatron_layout import CORE, ENGINE, LEGACY, OLDER, write_megatron, write_torch_dist
from neox_layout import write_neox
from whole_models import random_llama, random_model

from megacl.convert.detect import open_model
from megacl.convert.opened import OpenedModel


def expected(whole):
    """The tensors by megacl's names: qkv as a block, the gate before up."""
    t = whole.tensors
    places = {"norm1": "attention_norm", "norm2": "mlp_norm", "o": "attention.out", "down": "mlp.down"}
    places |= {f"{part}_norm": f"attention.{part}_norm" for part in "qk"}
    out = {"embed.weight": t["embed.weight"]}
    if not whole.tied:
        out["head.weight"] = t["head.weight"]
    for name, value in t.items():
        layer, _, rest = name.partition(".")
        part, _, kind = rest.partition(".")
        if layer == "final":
            out[f"final_norm.{part}"] = value
        elif part in places:
            out[f"layers.{layer}.{places[part]}.{kind}"] = value
        elif part == "q":
            out[f"layers.{layer}.attention.qkv.{kind}"] = np.concatenate([t[f"{layer}.{p}.{kind}"] for p in "qkv"])
        elif part == "up" and whole.gated:
            out[f"layers.{layer}.mlp.gate_up.{kind}"] = np.concatenate([t[f"{layer}.gate.{kind}"], value])
        elif part == "up":
            out[f"layers.{layer}.mlp.up.{kind}"] = value
    return out


def assert_same(opened: OpenedModel, whole):
    want = expected(whole)
    if opened.format == "litgpt" and whole.tied:
        want["head.weight"] = whole.tensors["embed.weight"]
    assert set(opened.shapes) == set(want)
    for name, value in want.items():
        read = opened.read(name)
        assert read.is_contiguous(), name
        summed = name.endswith(("out.bias", "down.bias")) and whole.parallel
        np.testing.assert_allclose(read.numpy(), value, atol=1e-5 if summed else 1e-6, rtol=0, err_msg=name)


@st.composite
def models(draw, *, parallel=(False, True)):
    """Shapes that four ranks divide, of either family, with grouped keys in the llama one."""
    kv_heads, head_dim = draw(st.sampled_from([4, 8])), 2 * draw(st.integers(1, 4))
    shape = {
        "ffn": 4 * draw(st.integers(1, 5)),
        "vocab": 4 * draw(st.integers(1, 9)),
        "layers": 4,
        "tied": draw(st.booleans()),
        "kv_heads": kv_heads,
        "head_dim": head_dim,
    }
    seed = draw(st.integers(0, 99))
    if draw(st.booleans()):
        heads = kv_heads * draw(st.integers(1, 3))
        bias = draw(st.sampled_from(["none", "all"]))
        shape |= {"heads": heads, "hidden": heads * head_dim, "attention_bias": bias, "mlp_bias": bias == "all"}
        return random_llama(seed, **shape)
    shape |= {"heads": kv_heads, "hidden": kv_heads * head_dim, "parallel": draw(st.sampled_from(parallel))}
    return random_model(seed, rotary_pct=1.0, **shape)


def check(write, whole, **how):
    with tempfile.TemporaryDirectory() as folder:
        assert_same(open_model(write(Path(folder) / "source", whole, **how)), whole)


def neox(whole, tensor_parallel, sequential, old):
    how = {"mlp_names": "linear"}
    if old:
        how = {"mlp_names": "w", "mlp_type": "llama", "activation": "silu"} if whole.gated else {"mlp_names": "dense"}
    check(write_neox, whole, tensor_parallel=tensor_parallel, sequential=sequential, **how)


def megatron(whole, tensor_parallel, stages, names, version, less_one):
    if whole.gated or names in (CORE, ENGINE):
        version = 3.0
    how = {"names": names, "version": version, "apply_layernorm_1p": less_one and names in (CORE, ENGINE)}
    pipeline, virtual = stages
    check(write_megatron, whole, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline, virtual=virtual, **how)


def torch_dist(whole, ranks, stacked):
    check(write_torch_dist, whole, ranks=ranks, stacked=stacked)


def litgpt(whole, old, trained):
    check(write_litgpt, whole, old=old, trained=trained)


@pytest.mark.parametrize("examples", [6, pytest.param(100, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("format", "drawn"),
    [
        (neox, (models(), st.sampled_from([1, 2, 4]), st.booleans(), st.booleans())),
        (
            megatron,
            (
                models(parallel=[False]),
                st.sampled_from([1, 2, 4]),
                st.sampled_from([(1, 1), (2, 1), (4, 1), (2, 2)]),
                st.sampled_from([LEGACY, OLDER, CORE, ENGINE]),
                st.sampled_from([None, 1.0, 2.0, 3.0]),
                st.booleans(),
            ),
        ),
        (torch_dist, (models(parallel=[False]), st.sampled_from([None, (1, 4), (2, 2), (4, 1)]), st.booleans())),
        (litgpt, (models(), st.booleans(), st.booleans())),
    ],
)
def test_any_shape_in_any_number_of_parts_comes_back_as_it_went_in(format, drawn, examples):
    settings(max_examples=examples, suppress_health_check=[HealthCheck.too_slow])(given(*drawn)(format))()
