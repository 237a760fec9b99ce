"""The kernels in C against their twins, as operators, and how the library comes to be where it runs."""

import contextlib
import math
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import status_of
from torch._subclasses import FakeTensorMode
from twins import OF_A_CPU, assert_matches_twin, drawn

from megacl import kernels
from megacl.kernels import c_attention, c_library
from megacl.model.config import ModelConfig
from megacl.model.gpt import build_model

pytestmark = [
    OF_A_CPU,
    pytest.mark.skipif(c_library.unavailable() is not None, reason=f"no library: {c_library.unavailable()}"),
]

ATTENTION = kernels.FORMS["rotary_attention"]


def tables(places: int, half: int, *, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    angles_PR = 3 * drawn(places, half, seed=seed).detach()
    return angles_PR.cos(), angles_PR.sin()


def documents(batch: int, length: int, density: float, seed: int) -> torch.Tensor:
    """The bounds of random documents, about one in 1 / density tokens."""
    begins_BT = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < density
    begins_BT[:, 0] = True
    return torch.cat([begins_BT.flatten().nonzero().squeeze(1), torch.tensor([batch * length])]).int()


# ------------------------------------------------------------------------------------------------------------ attention


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 3),
    length=st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 130])),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    width=st.sampled_from([1, 2, 7, 16, 33, 64, 80]),
    turned=st.floats(0, 1),
    density=st.sampled_from([None, 0.0, 0.1, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_attention_and_its_gradient_are_the_definitions(batch, length, heads, width, turned, density, seed):
    qkv = drawn(batch, length, heads[0] + 2 * heads[1], width, seed=seed)
    half = int(turned * (width // 2))
    cos, sin = tables(length if density is None else batch * length, half)
    bounds = None
    if density is not None:
        bounds = documents(batch, length, density, seed)
        cos, sin = (table.view(batch, 1, length, half) for table in (cos, sin))
    assert_matches_twin(ATTENTION["c"], ATTENTION["reference"], [qkv, cos, sin, bounds, heads[1], width**-0.5])


def test_sequences_longer_than_many_blocks_are_attended_to_in_full():
    qkv = drawn(1, 1030, 3, 16)
    assert_matches_twin(ATTENTION["c"], ATTENTION["reference"], [qkv, *tables(1030, 8), None, 1, 0.25])


def test_large_scores_neither_overflow_nor_lose_the_sum():
    """Scores of thousands, whose own rounding is what the result is off by."""
    qkv = drawn(2, 70, 3, 8, scale=30.0)
    assert_matches_twin(ATTENTION["c"], ATTENTION["reference"], [qkv, *tables(70, 4), None, 1, 1.0], epsilons=8192)


def test_what_is_not_a_number_reaches_what_sees_it_and_no_further_than_its_tile():
    qkv_BTHE = drawn(1, 200, 3, 16).detach()
    qkv_BTHE[0, 150] = float("nan")
    mixed_BTHE = ATTENTION["c"](qkv_BTHE, *tables(200, 8), None, 1, 0.25)
    assert mixed_BTHE[0, :144].isfinite().all()  # 0 times what is not a number is none, in the rows of one tile
    assert mixed_BTHE[0, 150:].isnan().all()


def test_views_and_gradients_with_any_strides_are_read():
    qkv = drawn(3, 16, 20, 2, seed=1).detach().permute(3, 2, 0, 1).requires_grad_()
    coming = [drawn(1, 16, seed=2).detach().expand(2, 20, 1, 16)]
    inputs = [qkv, *(table.t().contiguous().t() for table in tables(20, 4)), None, 1, 0.25]
    assert_matches_twin(ATTENTION["c"], ATTENTION["reference"], inputs, coming=coming)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_of_another_width_are_attended_to_by_parts(dtype, bounded):
    bounds = torch.tensor([0, 3, 5, 10], dtype=torch.int32) if bounded else None
    inputs = [drawn(2, 5, 3, 8, dtype=dtype), *tables(5, 2), bounds, 1, 0.3]
    assert_matches_twin(ATTENTION["c"], ATTENTION["reference"], inputs, roundings=4)


def test_tables_by_place_and_documents_inside_rows_are_read_as_the_twin_reads_them():
    bounds = torch.tensor([0, 3, 5, 9, 10])  # of 64 bits, as nonzero() gives them
    qkv, (cos, sin) = drawn(2, 5, 3, 8), tables(5, 2)
    assert_matches_twin(ATTENTION["c"], ATTENTION["reference"], [qkv, cos, sin, bounds, 1, 0.3])
    assert_matches_twin(ATTENTION["c"], ATTENTION["reference"], [qkv, cos[None, None], sin[None, None], None, 1, 0.3])


@pytest.mark.parametrize(("places", "half"), [(4, 2), (5, 5)])
def test_tables_that_do_not_fit_are_refused(places, half):
    with pytest.raises(ValueError, match=r"for 5 places and heads of 8"):
        ATTENTION["c"](drawn(2, 5, 3, 8), *tables(places, half), None, 1, 0.3)


@pytest.mark.parametrize("shape", [(0, 5, 3, 8), (2, 0, 3, 8)])
def test_empty_tensors_pass_attention(shape):
    (gradient,) = torch.autograd.grad(ATTENTION["c"](x := drawn(*shape), *tables(shape[1], 2), None, 1, 0.3).sum(), x)
    assert gradient.shape == shape


def test_attention_as_an_operator_of_no_row_is_of_no_row():
    qkv, (cos, sin) = drawn(0, 5, 3, 8).detach(), tables(5, 2)
    mixed, log_sum = torch.ops.megacl.c_attention(qkv, cos, sin, None, 1, 0.3)
    assert mixed.shape == (0, 5, 1, 8)
    args = (mixed, qkv, cos, sin, None, mixed, log_sum, 1, 0.3)
    assert torch.ops.megacl.c_attention_backward(*args).shape == qkv.shape


@settings(deadline=None)
@given(
    rows=st.integers(1, 6),
    classes=st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 1000])),
    spread=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    z_loss=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**32),
)
def test_nats_and_their_gradient_are_those_of_every_logit_of_the_row(rows, classes, spread, z_loss, seed):
    logits = drawn(rows, classes, seed=seed, scale=spread).detach()
    targets = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(seed))
    exact = logits.double().requires_grad_()
    log_z = exact.logsumexp(1)
    expected = log_z - exact.gather(1, targets[:, None]).squeeze(1), log_z.square()
    (slopes,) = torch.autograd.grad((expected[0] + z_loss * expected[1]).sum(), exact)
    untouched = logits.clone()
    for differentiate in (False, True):
        found = torch.ops.megacl.c_cross_entropy(untouched, targets, z_loss, 1.0, differentiate)
        for ours, exactly in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.double(), exactly.detach(), rtol=1e-5, atol=1e-5 * max(1, spread))
        assert torch.equal(untouched, logits) is not differentiate or classes == 1
    torch.testing.assert_close(untouched.double(), slopes, rtol=1e-4, atol=1e-6 * (1 + z_loss * slopes.abs().max()))


def test_a_class_without_a_chance_has_no_gradient():
    logits = torch.tensor([[0.0, float("-inf"), 1.0, -200.0]])
    nats, _ = torch.ops.megacl.c_cross_entropy(logits, torch.tensor([2]), 0.0, 1.0, True)
    assert nats.item() == pytest.approx(math.log1p(math.exp(-1)))
    assert logits[0, [1, 3]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("targets", [torch.zeros(3).long(), torch.zeros(2, dtype=torch.int32)])
def test_targets_of_another_number_or_type_are_refused(targets):
    with pytest.raises(ValueError, match=r"logits of shape \[2, 5\] want as many targets of int64, not \["):
        torch.ops.megacl.c_cross_entropy(torch.zeros(2, 5), targets, 0.0, 1.0, True)


@pytest.mark.parametrize("target", [-1, 5])
def test_a_target_that_is_no_class_is_refused(target):
    with pytest.raises(IndexError, match="a target is none of the 5 classes"):
        torch.ops.megacl.c_cross_entropy(torch.zeros(2, 5), torch.tensor([0, target]), 0.0, 1.0, True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_swiglu_of_another_width_is_pytorchs(dtype):
    gate_up, swiglu = drawn(3, 8, dtype=dtype), kernels.FORMS["swiglu"]
    assert torch.equal(swiglu["c"](gate_up), swiglu["lean"](gate_up))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_swiglu_of_what_is_not_finite_is_what_its_definition_says(value):
    gate_up = torch.tensor([[value, 1.0, 2.0, value], [1.0, 2.0, 3.0, 4.0]])
    swiglu = kernels.FORMS["swiglu"]
    torch.testing.assert_close(swiglu["c"](gate_up), swiglu["reference"](gate_up), equal_nan=True)


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_norms_of_another_width_are_pytorchs(name):
    parameters = [drawn(6, dtype=torch.float64, seed=seed) for seed in range(1 if name == "rms_norm" else 2)]
    x, norm = drawn(3, 6, dtype=torch.float64, seed=2), kernels.FORMS[name]
    torch.testing.assert_close(norm["c"](x, *parameters, 1e-5, x), norm["reference"](x, *parameters, 1e-5, x))


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        ("c_norm", [(2, 5), (4,), None]),
        ("c_norm", [(2, 5), (5,), (0,)]),
        ("c_add_norm", [(2, 5), (5,), (5,), (5,)]),
        ("c_gelu", [(2, 5), (4,)]),
        ("c_swiglu", [(2, 5)]),
    ],
)
def test_tensors_that_do_not_fit_one_another_are_refused_and_not_read(op, shapes):
    tensors = [None if shape is None else torch.zeros(shape) for shape in shapes]
    rest = {"c_gelu": [False], "c_swiglu": []}.get(op, [1e-5])
    with pytest.raises(ValueError, match=r"\[2, 5\]"):
        getattr(torch.ops.megacl, op)(*tensors, *rest)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gelu_of_products_of_another_width_is_pytorchs(dtype):
    x, weight, bias = drawn(3, 4), drawn(6, 4, seed=1), drawn(6, seed=2)
    gelu = kernels.FORMS["linear_gelu"]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        wide = [each.to(dtype) if dtype == torch.float64 else each for each in (x, weight, bias)]
        torch.testing.assert_close(gelu["c"](*wide), gelu["reference"](*wide), check_dtype=False, rtol=0.02, atol=0.02)


@contextlib.contextmanager
def threads_of(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def of_all_kernels(threads: int) -> list[torch.Tensor]:
    with threads_of(threads):
        qkv = drawn(3, 90, 6, 16)
        mixed = ATTENTION["c"](qkv, *tables(90, 4), None, 1, 0.25)
        x, bias = drawn(1000, 3000, seed=1), drawn(3000, seed=2)  # whose sums PyTorch shares out
        y = torch.ops.megacl.c_gelu(x, bias, False)
        gate_up = drawn(300, 70, seed=4)
        gated = torch.ops.megacl.c_swiglu(gate_up)
        total, weight, norm_bias = drawn(1000, 3000, seed=5), drawn(3000, seed=6), drawn(3000, seed=7)
        normed = torch.ops.megacl.c_norm(total, weight, norm_bias, 1e-5)[0]
        slopes = drawn(300, 70, seed=3).detach()
        nats = torch.ops.megacl.c_cross_entropy(slopes, torch.arange(300) % 70, 0.1, 1.0, True)
        turned = torch.ops.megacl.turned(slopes, None)
        return [
            mixed,
            y,
            gated,
            normed,
            *nats,
            slopes,
            turned,
            *torch.autograd.grad(
                [result.sin().sum() for result in (mixed, y, gated, normed)],
                [qkv, x, bias, gate_up, total, weight, norm_bias],
            ),
        ]


def test_the_number_of_threads_changes_no_bit():
    for one, two in zip(of_all_kernels(1), of_all_kernels(2), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (5, 1), (4, 2)])
@pytest.mark.parametrize("length", [1, 64, 65, 330])
@pytest.mark.parametrize("bounded", [False, True])
def test_a_head_that_several_threads_share_gives_the_bits_of_one_thread(heads, length, bounded):
    qkv = drawn(1, length, heads[0] + 2 * heads[1], 24, seed=length)
    bounds = documents(1, length, 0.01, seed=3) if bounded else None
    cos, sin = tables(length, 5)
    coming = drawn(1, length, heads[0], 24, seed=9).detach()
    found = []
    for threads in (1, 2, 3, 5, 16):
        with threads_of(threads):
            mixed = ATTENTION["c"](qkv, cos, sin, bounds, heads[1], 0.2)
            found.append((mixed.detach(), *torch.autograd.grad(mixed, qkv, coming)))
    for several in found[1:]:
        assert torch.equal(several[0], found[0][0])
        assert torch.equal(several[1], found[0][1])


# --------------------------------------------------------------------------------------------------------------- models


def test_norms_of_queries_and_keys_take_the_parts():
    def refuse(*_: Any) -> torch.Tensor:
        raise AssertionError("norms lie between the parts")

    ops = kernels.choose_kernels(device="cpu", half=False, compiled=False, overrides={})
    assert ops.rotary_attention is ATTENTION["c"]
    shape: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}
    model = build_model(ModelConfig(**shape, qk_norm="rms_norm"), seed=0)
    model.use(kernels.Kernels(**{**vars(ops), "rotary_attention": refuse}))
    assert model(torch.zeros(1, 4, dtype=torch.long)).isfinite().all()


@pytest.mark.parametrize("how", ["full", "selective"])
def test_selective_checkpointing_attends_once_and_full_twice(how, monkeypatch):
    shape: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_layers": 3, "num_attention_heads": 2}
    model = build_model(ModelConfig(**shape), seed=0)
    model.use(kernels.choose_kernels(device="cpu", half=False, compiled=False, overrides={}))
    tokens = torch.arange(10).view(2, 5)
    calls: list[str] = []
    run = c_attention._run
    monkeypatch.setattr(c_attention, "_run", lambda name, *rest: (calls.append(name), run(name, *rest)))

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(model(tokens, tokens)[0], list(model.parameters())))

    whole = gradients()
    calls.clear()
    model.checkpointing = dict.fromkeys(range(3), how)
    for again, before in zip(gradients(), whole, strict=True):
        assert torch.equal(again, before)
    assert calls.count("attention_forward") == (3 if how == "selective" else 6)


# ------------------------------------------------------------------------------------------------------------ operators


def operators() -> list[tuple[Any, tuple[Any, ...]]]:
    qkv, bounds = drawn(2, 5, 4, 8), torch.tensor([0, 3, 5, 10], dtype=torch.int32)
    by_place = tables(5, 2)
    by_token = tuple(table.view(2, 1, 5, 2) for table in tables(10, 2))
    x, bias = drawn(5, 7, seed=1), drawn(7, seed=2)
    ours = torch.ops.megacl
    return [
        (ours.c_attention, (qkv, *by_place, None, 1, 0.3)),
        (ours.c_attention, (qkv, *by_token, bounds, 1, 0.3)),
        (
            ours.c_attention_backward,
            (
                drawn(2, 5, 2, 8).detach(),
                qkv.detach(),
                *by_place,
                None,
                qkv.detach()[:, :, :2],
                drawn(2, 5, 2).detach(),
                1,
                0.3,
            ),
        ),
        (ours.c_gelu, (x, bias, False)),
        (ours.c_gelu_backward, (drawn(5, 7, seed=3).detach(), x.detach(), bias.detach(), True)),
        (ours.c_swiglu, (drawn(3, 2, 10),)),
        (ours.c_swiglu_backward, (drawn(2, 5, 3, seed=3).detach().permute(2, 0, 1), drawn(3, 2, 10).detach())),
        (ours.c_norm, (x, bias, bias, 1e-5)),
        (ours.c_norm, (x, bias, None, 1e-5)),
        (ours.c_add_norm, (x, drawn(7, 5, seed=4).detach().t().requires_grad_(), bias, bias, 1e-5)),
        (ours.c_add_norm, (x, x.detach(), bias, None, 1e-5)),
        (ours.c_norm_backward, (x.detach(), x.detach(), x.detach(), bias.detach(), drawn(5, 2, seed=3).detach())),
        (ours.c_norm_backward, (x.detach(), None, x.detach(), bias.detach(), drawn(5, 1, seed=3).detach())),
        (ours.c_cross_entropy, (x.detach(), torch.tensor([0, 6, kernels.IGNORED, 3, 3]), 0.1, 1.0, True)),
        (ours.turned, (x.detach(), torch.tensor(0.5))),
    ]


@pytest.mark.parametrize("operator", range(15))
def test_pytorchs_own_check_of_operators_passes(operator):
    function, arguments = operators()[operator]
    torch.library.opcheck(function.default, arguments)


@pytest.mark.parametrize("bounded", [False, True])
def test_attention_goes_through_torch_compile_as_a_whole_graph(bounded):
    _, arguments = operators()[bounded]
    torch._dynamo.reset()
    compiled = torch.compile(ATTENTION["c"], fullgraph=True, backend="aot_eager")
    for form in (compiled, ATTENTION["c"]):
        mixed = form(*arguments)
        (gradient,) = torch.autograd.grad(mixed.sin().sum(), arguments[0])
        if form is compiled:
            first = mixed, gradient
    assert torch.equal(first[0], mixed)
    assert torch.equal(first[1], gradient)


def test_shapes_are_known_without_computing():
    with FakeTensorMode() as mode:
        qkv, cos, sin = (mode.from_tensor(x) for x in (drawn(2, 5, 4, 8), *tables(5, 2)))
        mixed = ATTENTION["c"](qkv, cos, sin, None, 1, 0.3)
        (gradient,) = torch.autograd.grad(mixed.sum(), qkv)
    assert (mixed.shape, gradient.shape) == ((2, 5, 2, 8), (2, 5, 4, 8))


def test_second_derivatives_are_refused():
    qkv, x = drawn(2, 5, 3, 8), drawn(5, 7, seed=1)
    mixed = ATTENTION["c"](qkv, *tables(5, 2), None, 1, 0.3)
    y = torch.ops.megacl.c_gelu(x, drawn(7, seed=2).detach(), False)
    gated = torch.ops.megacl.c_swiglu(gate_up := drawn(3, 10))
    normed, _ = torch.ops.megacl.c_norm(total := drawn(5, 7, seed=3), drawn(7, seed=4), None, 1e-5)
    for result, by in ((mixed, qkv), (y, x), (gated, gate_up), (normed, total)):
        (gradient,) = torch.autograd.grad(result.sin().sum(), by, create_graph=True)
        with pytest.raises(RuntimeError, match="has no second derivative"):
            torch.autograd.grad(gradient.sum(), by)


# ---------------------------------------------------------------------------------------------------------- the library

# Each build takes some seconds, so that those which build twice, or show less, are among the long ones.


def choice(cache: Path, **environment: str) -> str:
    """What a process says of its attention."""
    code = (
        "from megacl import kernels\n"
        "print(*kernels.choices_of_kernels(device='cpu', half=False, compiled=False, overrides={}), sep='\\n')\n"
    )
    there = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "XDG_CACHE_HOME": str(cache), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=there, check=True, capture_output=True, text=True)
    return next(line for line in done.stdout.splitlines() if "'rotary_attention'" in line)


def compiler(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_it_is_built_once_and_then_found(tmp_path):
    log = tmp_path / "log"
    counted = compiler(tmp_path / "counted", f'echo "$@" >>{log}; exec cc "$@"')
    for _ in range(2):
        assert "implementation='c'" in choice(tmp_path / "cache", CC=counted)
    assert log.read_text().count("-shared") == 1
    (built,) = (tmp_path / "cache" / "megacl").iterdir()  # and nothing of the building is left
    assert built.suffix == ".so"


@pytest.mark.long
def test_another_compiler_builds_its_own(tmp_path):
    other = compiler(tmp_path / "other", 'case "$1" in --version) echo other;; *) exec cc "$@";; esac')
    choice(tmp_path / "cache")
    choice(tmp_path / "cache", CC=other)
    assert len(list((tmp_path / "cache" / "megacl").iterdir())) == 2


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            'case "$1" in --version) exit 0;; esac; echo "x.c:1: error: no such option" >&2; exit 1',
            "error: no such option",
        ),
        ("exit 3", "status 3"),
    ],
)
def test_a_compiler_that_fails_leaves_pytorchs_ops_and_is_named(body, said, tmp_path):
    failing = compiler(tmp_path / "failing", body)
    line = choice(tmp_path / "cache", CC=failing)
    assert "implementation='apart'" in line
    assert f"{failing} failed: " in line
    assert said in line
    assert not list(tmp_path.glob("cache/megacl/*"))


@pytest.mark.parametrize(
    ("environment", "said"),
    [({"CC": "cc 'x"}, "CC=cc 'x is no command"), ({"XDG_CACHE_HOME": "somewhere"}, "there is no home directory")],
)
def test_an_environment_that_names_nothing_usable_leaves_pytorchs_ops(environment, said, tmp_path):
    line = choice(tmp_path, **environment)
    assert "implementation='apart'" in line
    assert said in line


@pytest.mark.long
def test_a_library_that_is_damaged_is_named(tmp_path):
    choice(tmp_path)
    (built,) = (tmp_path / "megacl").iterdir()
    built.write_bytes(b"no library")
    assert f"{built}: " in choice(tmp_path)


@pytest.mark.long
def test_an_empty_name_of_a_compiler_means_cc(tmp_path):
    assert "implementation='c'" in choice(tmp_path, CC="")


def test_the_first_call_does_not_wait_for_pytorchs_compiler():
    code = (
        "import sys, torch\n"
        "from megacl.kernels import FORMS\n"
        "x = torch.ones(1, 2, 3, 4, requires_grad=True)\n"
        "FORMS['rotary_attention']['c'](x, *torch.ones(2, 2, 1), None, 1, 0.5).sum().backward()\n"
        "y = torch.ones(2, 4, requires_grad=True)\n"
        "FORMS['linear_gelu']['c'](y, torch.ones(3, 4)).sum().backward()\n"
        "targets = torch.zeros(2, dtype=torch.int64)\n"
        "FORMS['linear_cross_entropy']['c'](y, torch.ones(3, 4), targets, chunk=2, z_loss=0.0)[0].backward()\n"
        "FORMS['swiglu']['c'](y).sum().backward()\n"
        "FORMS['layer_norm']['c'](y, torch.ones(4), torch.ones(4), 1e-5, y)[0].sum().backward()\n"
        "sys.exit('torch._dynamo' in sys.modules)\n"
    )
    assert status_of(code) == 0


def test_without_a_compiler_pytorchs_ops_run(tmp_path):
    line = choice(tmp_path / "cache", CC=f"{tmp_path}/none")
    assert f"implementation='apart', why='no C compiler: there is no {tmp_path}/none'" in line


def test_a_cache_that_cannot_be_written_leaves_pytorchs_ops(tmp_path):
    (tmp_path / "cache").write_text("a file")
    line = choice(tmp_path / "cache")
    assert "implementation='apart'" in line
    assert "Not a directory" in line


def test_its_threads_are_pytorchs():
    code = (
        "from megacl.kernels import c_library\n"
        "c_library.load()\n"
        "names = {line.split()[-1].rsplit('/')[-1] for line in open('/proc/self/maps')}\n"
        "print(sum(name.startswith(('libgomp', 'libomp', 'libiomp')) for name in names))\n"
    )
    there = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=there, check=True, capture_output=True, text=True)
    assert int(done.stdout) == 1
