"""The vocabulary over ranks: its embedding and its loss against those of one process in fp64."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from megacl.kernels import IGNORED, reference
from megacl.parallel.ranks import Ranks
from megacl.parallel.tensor import gather
from megacl.parallel.vocabulary import VocabularyParallelEmbedding, linear_cross_entropy
from tests.ranks import arranged, run_on_ranks

# (tokens, vocabulary, chunk, z_loss, what logits are multiplied by, part of the targets that is ignored)
CASES = [
    (1, 4, 1, 0.0, 1.0, 0.0),
    (23, 44, 7, 0.0, 1.0, 0.3),
    (23, 44, 100, 0.1, 1.0, 0.3),
    (9, 12, 4, 1e-3, 1e4, 0.3),
    (5, 8, 2, 0.1, 1.0, 1.0),
    (0, 8, 2, 0.1, 1.0, 0.0),
]


def draw(case: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, vocab, _, _, factor, ignored = CASES[case]
    rng = np.random.Generator(np.random.Philox(case))
    x_ND = torch.from_numpy(factor * rng.normal(size=(tokens, 6))).to(dtype)
    weight_VD = torch.from_numpy(rng.normal(size=(vocab, 6))).to(dtype)
    targets_N = torch.from_numpy(rng.integers(0, vocab, tokens))
    targets_N[torch.from_numpy(rng.random(tokens) < ignored)] = IGNORED
    return x_ND, weight_VD, targets_N


def loss_of_own_rows(ranks: Ranks, case: int, dtype: torch.dtype) -> list[Any]:
    """The three sums, and the gradients of 3 x the first, the weight's made whole."""
    ranks = arranged(ranks, ranks.world_size, 1)
    _, _, chunk, z_loss, _, _ = CASES[case]
    x_ND, weight_VD, targets_N = draw(case, dtype)
    x_ND.requires_grad_()
    own_RD = weight_VD.chunk(ranks.tp_size)[ranks.tp_rank].clone().requires_grad_()
    sums = linear_cross_entropy(x_ND, own_RD, targets_N, chunk=chunk, z_loss=z_loss, ranks=ranks)
    dx_ND, down_RD = torch.autograd.grad(3 * sums[0], [x_ND, own_RD])
    assert (dx_ND.dtype, down_RD.dtype) == (dtype, dtype)
    with torch.no_grad():
        alone = linear_cross_entropy(x_ND, own_RD, targets_N, chunk=chunk, z_loss=z_loss, ranks=ranks)
    torch.testing.assert_close(alone, sums, rtol=0, atol=0)
    dweight_VD = torch.cat(gather(down_RD, ranks.tp_group))
    return [value.detach().to(torch.float64).numpy() for value in (sums, dx_ND, dweight_VD)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_loss_is_the_definitions_with_its_gradients(ranks, dtype, case):
    x_ND, weight_VD, targets_N = (value.double() if value.is_floating_point() else value for value in draw(case, dtype))
    x_ND.requires_grad_()
    weight_VD.requires_grad_()
    _, _, chunk, z_loss, _, _ = CASES[case]
    sums = reference.linear_cross_entropy(x_ND, weight_VD, targets_N, chunk=chunk, z_loss=z_loss)
    expected = [sums, *torch.autograd.grad(3 * sums[0], [x_ND, weight_VD])]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    outcomes = run_on_ranks(ranks, loss_of_own_rows, case, dtype)
    for outcome in outcomes:
        for ours, value in zip(outcome, expected, strict=True):
            size = float(value.detach().abs().max()) if value.numel() else 0.0
            np.testing.assert_allclose(ours, value.detach().numpy(), rtol=tolerance, atol=tolerance * size)
        np.testing.assert_array_equal(outcome[0], outcomes[0][0])


def embed_own_rows(ranks: Ranks) -> tuple[Any, Any]:
    ranks = arranged(ranks, ranks.world_size, 1)
    embedding, tokens_BT = plain_embedding()
    parallel = VocabularyParallelEmbedding(embedding, ranks)
    x_BTD = parallel(tokens_BT)
    x_BTD.square().sum().backward()
    assert parallel.weight.grad is not None
    return x_BTD.detach().numpy(), torch.cat(gather(parallel.weight.grad, ranks.tp_group)).numpy()


def plain_embedding() -> tuple[nn.Embedding, torch.Tensor]:
    weight_VD = torch.linspace(-1, 1, 36).view(12, 3)
    return nn.Embedding(12, 3, _weight=weight_VD), torch.tensor([[0, 11, 5, 6], [6, 6, 1, 2]])


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_embedding_is_the_plain_one_forward_and_backward(ranks):
    embedding, tokens_BT = plain_embedding()
    x_BTD = embedding(tokens_BT)
    x_BTD.square().sum().backward()
    for theirs, gradient in run_on_ranks(ranks, embed_own_rows):
        np.testing.assert_array_equal(theirs, x_BTD.detach().numpy())
        np.testing.assert_array_equal(gradient, embedding.weight.grad.numpy())
