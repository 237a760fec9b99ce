"""Which implementation of each op is chosen, and what is said where one cannot be."""

import importlib.util
import re

import pytest
import torch
from runs import status_of

from megacl import kernels
from megacl.errors import ConfigError

FUSED_BY_COMPILER = ["rms_norm", "layer_norm", "rotary", "swiglu", "linear_gelu"]


def chosen(*, device: str, half: bool = True, compiled: bool = False, **overrides: str) -> dict[str, str]:
    choices = kernels.choices_of_kernels(device=device, half=half, compiled=compiled, overrides=overrides)
    return {choice.op: choice.implementation for choice in choices}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.fixture
def no_triton(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))


def test_on_a_gpu_triton_runs_where_the_compiler_does_not_fuse(gpu):
    pytest.importorskip("triton")
    eager, compiled = chosen(device="cuda"), chosen(device="cuda", compiled=True)
    assert {eager[op] for op in FUSED_BY_COMPILER} == {"triton"}
    assert {compiled[op] for op in FUSED_BY_COMPILER} == {"reference"}


def test_without_triton_a_gpu_runs_pytorchs_kernels(gpu, no_triton):
    assert "triton" not in chosen(device="cuda").values()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here_is_a_recent_one_with_triton(no_triton):
    assert {*chosen(device="cuda").values()} == {"triton", "flash", "sdpa", "reference", "apart"}  # linear is PyTorch's


def test_on_a_cpu_nothing_is_interpreted():
    assert "triton" not in chosen(device="cpu").values()


@pytest.mark.parametrize(
    ("vendor", "mkl", "linear", "loss"),
    [
        ("GenuineIntel", True, "reference", "chunked"),
        ("AuthenticAMD", True, "onednn", "onednn"),
        ("GenuineIntel", False, "onednn", "onednn"),  # PyTorch would multiply by something slower
        ("", True, "onednn", "onednn"),
    ],
)
def test_on_a_cpu_products_are_mkls_on_its_makers_cores_and_else_onednns(vendor, mkl, linear, loss, monkeypatch):
    monkeypatch.setattr(kernels.onednn, "_vendor", lambda: vendor)
    monkeypatch.setattr(kernels.onednn, "available", lambda: True)
    monkeypatch.setattr(kernels.c_library, "unavailable", lambda: "no C compiler")
    monkeypatch.setattr(torch._C, "has_mkl", mkl)
    for compiled in (False, True):
        found = chosen(device="cpu", half=False, compiled=compiled)
        assert (found["linear"], found["linear_gelu"], found["linear_cross_entropy"]) == (linear, linear, loss)
    assert chosen(device="cpu", half=False, linear="onednn")["linear"] == "onednn"


@pytest.mark.parametrize("compiled", [False, True])
def test_where_c_can_be_compiled_a_cpu_runs_it_but_for_what_a_graph_fuses(compiled, monkeypatch):
    monkeypatch.setattr(kernels.c_library, "unavailable", lambda: None)
    found = chosen(device="cpu", half=False, compiled=compiled)
    assert (found["rotary_attention"], found["linear_cross_entropy"]) == ("c", "c")
    for op in ("rms_norm", "layer_norm", "linear_gelu", "swiglu"):
        assert (found[op] == "c") is not compiled
    assert "c" not in chosen(device="cpu", half=True, compiled=compiled).values()


@pytest.mark.parametrize("part", ["rotary", "attention", "document_attention"])
def test_naming_a_part_of_attention_has_the_parts_run(part):
    assert chosen(device="cpu", half=False, **{part: "reference"})["rotary_attention"] == "apart"


def test_each_choice_has_its_reason_and_an_override_says_so():
    ops = kernels.choose_kernels(device="cpu", half=False, compiled=False, overrides={"swiglu": "reference"})
    assert [choice.op for choice in ops.choices] == list(kernels.FORMS)
    assert all(choice.why for choice in ops.choices)
    assert kernels.Choice("swiglu", "reference", "engine.kernels") in ops.choices
    assert ops.swiglu is kernels.REFERENCE.swiglu


def test_the_op_of_a_triton_module_itself_is_what_runs():
    pytest.importorskip("triton")
    from megacl.kernels import triton_norms

    ops = kernels.choose_kernels(device="cuda", half=False, compiled=False, overrides={"rms_norm": "triton"})
    assert ops.rms_norm is triton_norms.rms_norm


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"linear_cross_entropy": "fast"}, "engine.kernels.linear_cross_entropy is 'fast'; it must be one of "),
        ({"softmax": "chunked"}, "engine.kernels names 'softmax', which is no op; "),
        ({"document_attention": "flash"}, "engine.kernels.document_attention is 'flash', which cannot run here: "),
    ],
)
def test_an_implementation_that_is_unknown_or_cannot_run_is_refused(overrides, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        chosen(device="cpu", **overrides)


def test_triton_on_a_cpu_is_refused_but_in_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=r"rms_norm is 'triton', which cannot run here: Triton runs on a GPU"):
        chosen(device="cpu", rms_norm="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert chosen(device="cpu", rms_norm="triton")["rms_norm"] == "triton"


def test_triton_that_is_not_installed_is_refused(gpu, no_triton):
    with pytest.raises(ConfigError, match="Triton is not installed"):
        chosen(device="cuda", rms_norm="triton")


def test_triton_is_not_imported_before_one_of_its_ops_is_chosen():
    assert status_of("import sys, megacl.kernels; sys.exit('triton' in sys.modules)") == 0
