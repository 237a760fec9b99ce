"""The Triton kernels as operators: graphs, fake tensors and autograd take them as they take PyTorch's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from twins import DEVICE, as_tuple, drawn, needs_triton

from megacl import kernels

needs_triton()


def inputs_of(op: str) -> tuple[list[Any], dict[str, Any]]:
    match op:
        case "rms_norm":
            return [drawn(3, 8, seed=1), drawn(8, seed=2), 1e-5, drawn(3, 8, seed=3)], {}
        case "layer_norm":
            return [drawn(3, 8, seed=1), drawn(8, seed=2), drawn(8, seed=3), 1e-5, drawn(3, 8, seed=4)], {}
        case "rotary":
            angles = drawn(4, 2, seed=2).detach()
            return [drawn(2, 4, 3, 6, seed=1).transpose(1, 2).detach().requires_grad_(), angles.cos(), angles.sin()], {}
        case "swiglu":
            return [drawn(3, 8, seed=1)], {}
        case "linear_gelu":
            return [drawn(3, 4, seed=1), drawn(8, 4, seed=2), drawn(8, seed=3)], {}
        case "linear_cross_entropy":
            targets = torch.tensor([1, kernels.IGNORED, 5], device=DEVICE)
            return [drawn(3, 4, seed=1), drawn(6, 4, seed=2), targets], {"chunk": 2, "z_loss": 0.1}
    raise AssertionError(f"{op}: no inputs for it")


OPS = [op for op, forms in kernels.FORMS.items() if "triton" in forms]


def differentiated(op: Callable[..., Any], inputs: list[Any], options: dict[str, Any]) -> list[torch.Tensor]:
    results = as_tuple(op(*inputs, **options))
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    # of the sums of a loss only the first has a gradient; of the others' results it is as good as any
    return [*results, *torch.autograd.grad(sum(y[0].sin().sum() for y in results), wanted)]


@pytest.mark.parametrize("op", OPS)
def test_a_whole_graph_goes_through_torch_compile(op):
    inputs, options = inputs_of(op)
    form = kernels.FORMS[op]["triton"].load()
    torch._dynamo.reset()
    compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(
        differentiated(compiled, inputs, options), differentiated(form, inputs, options), strict=True
    ):
        assert torch.equal(ours, eager)


@pytest.mark.parametrize("op", OPS)
def test_shapes_dtypes_and_strides_are_known_without_computing(op):
    inputs, options = inputs_of(op)
    real = differentiated(kernels.FORMS[op]["triton"], inputs, options)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs]
        found = differentiated(kernels.FORMS[op]["triton"], fakes, options)
    for fake, value in zip(found, real, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (value.shape, value.dtype, value.stride())


def operators() -> list[tuple[Any, tuple[Any, ...]]]:
    """Every operator of ours, with arguments."""
    for op in OPS:
        kernels.FORMS[op]["triton"].load()
    x, residual, weight, bias = drawn(3, 8, seed=1), drawn(3, 8, seed=2), drawn(8, seed=3), drawn(8, seed=4)
    mean, scale = (drawn(3, seed=seed).detach().abs() for seed in (5, 6))
    turned, angles = drawn(2, 3, 4, 6, seed=7), drawn(4, 2, seed=8).detach()
    plain = [each.detach() for each in (x, weight, residual)]
    targets = torch.tensor([1, kernels.IGNORED, 2], device=DEVICE)
    by_columns = [each.detach().t().contiguous().t().requires_grad_() for each in (x, residual)]
    ours = torch.ops.megacl
    return [
        (ours.norm, (x, residual, weight, bias, 1e-5, torch.float32)),
        (ours.norm, (x, None, weight, None, 1e-5, torch.bfloat16)),
        (ours.norm_backward, (plain[0], plain[1], mean, scale, plain[2], plain[2], True)),
        (ours.rotary, (turned, angles, angles, False)),
        (ours.swiglu, (x,)),
        (ours.swiglu_backward, (plain[0], plain[2][:, :4])),
        (ours.bias_gelu, (x, bias, False)),
        (ours.bias_gelu_backward, (plain[0], plain[1], plain[2], True)),
        (ours.linear_cross_entropy, (x, residual, targets, 2, 0.1, torch.float32, True, True)),
        (ours.linear_cross_entropy, (plain[0], residual, targets, 2, 0.1, torch.bfloat16, False, True)),
        (ours.linear_cross_entropy, (*by_columns, targets, 2, 0.1, torch.float32, True, True)),
    ]


@pytest.mark.parametrize("operator", range(11))
def test_pytorchs_own_check_of_operators_passes(operator):
    function, arguments = operators()[operator]
    torch.library.opcheck(function.default, arguments)


def test_activation_checkpointing_computes_the_ops_again():
    gate_up = drawn(3, 8, seed=1)
    again = torch.utils.checkpoint.checkpoint(kernels.FORMS["swiglu"]["triton"], gate_up, use_reentrant=False)
    (gradient,) = torch.autograd.grad(again.sum(), gate_up)
    (expected,) = torch.autograd.grad(kernels.FORMS["swiglu"]["triton"](gate_up).sum(), gate_up)
    assert torch.equal(gradient, expected)
    assert gradient.device.type == DEVICE
