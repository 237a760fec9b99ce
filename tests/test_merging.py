"""Merging in the place of decaying: the arithmetic against SGD by hand, the files against safetensors' own."""

import hashlib
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from runs import WEIGHTS, tensors
from safetensors.numpy import save_file

from megacl.checkpoint_files import read_index, write_manifest, write_tensors
from megacl.errors import CheckpointError
from megacl.merging import decay_over, merge_files, merge_weights
from megacl.tensorfile import facts_of

decays = st.lists(st.floats(0, 1), min_size=1, max_size=20).map(lambda decay: sorted(decay, reverse=True))


@given(decays)
def test_coefficients_are_parts_of_one_and_give_each_interval_its_weight(decay: list[float]) -> None:
    coefficients = merge_weights(decay)
    assert len(coefficients) == len(decay) + 1
    assert min(coefficients) >= 0
    assert math.fsum(coefficients) == pytest.approx(1, abs=1e-15)
    for number, weight in enumerate(decay, start=1):  # interval i is in every checkpoint from i on
        assert math.fsum(coefficients[number:]) == pytest.approx(weight, abs=1e-15)


@pytest.mark.parametrize("decay", [[], [1.5], [0.5, 0.6], [0.5, -0.1]])
def test_what_is_no_decay_is_refused(decay: list[float]) -> None:
    with pytest.raises(ValueError, match="never rise"):
        merge_weights(decay)


def test_weights_are_means_of_the_decay_over_the_steps_of_each_interval() -> None:
    by_hand = [(1 - 1 / 6 + 1 - 2 / 6 + 1 - 3 / 6 + 1 - 4 / 6) / 4, (1 - 5 / 6 + 0) / 2]
    assert decay_over("linear", [10, 14, 16]) == pytest.approx(by_hand, rel=1e-15)
    assert merge_weights(decay_over("linear", [0, 1, 2, 3])) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert decay_over("1-sqrt", [0, 1, 2], floor=0.5) == pytest.approx([0.5 + 0.5 * (1 - math.sqrt(0.5)), 0.5])
    assert decay_over("exponential", [0, 1, 2], floor=0.01) == pytest.approx([0.1, 0.01])


@example("linear", [5, 5, 1], 0, 0.9999999999999999)
@given(
    st.sampled_from(["linear", "cosine", "1-sqrt", "exponential"]),
    st.lists(st.integers(1, 50), min_size=1, max_size=8),
    st.integers(0, 10**6),
    st.floats(0.01, 1),
)
def test_every_shape_over_any_intervals_is_a_decay(shape: str, lengths: list[int], first: int, floor: float) -> None:
    steps = [*itertools.accumulate(lengths, initial=first)]
    decay = decay_over(shape, steps, floor=floor)
    assert floor <= decay[-1]
    assert min(merge_weights(decay)) >= 0
    alone = decay_over(shape, [*range(first, first + sum(lengths) + 1)], floor=floor)
    mean = math.fsum(weight * length for weight, length in zip(decay, lengths, strict=True))
    assert mean == pytest.approx(math.fsum(alone), rel=1e-12)


@pytest.mark.parametrize(
    ("shape", "steps", "floor"),
    [("linear", [3], 0.0), ("linear", [3, 3], 0.0), ("linear", [1, 2], 1.5), ("exponential", [1, 2], 0.0)],
)
def test_what_no_decay_can_be_laid_over_is_refused(shape: str, steps: list[int], floor: float) -> None:
    with pytest.raises(ValueError, match=r"they must ascend|it must lie"):
        decay_over(shape, steps, floor=floor)


# ---------------------------------------------------------------------------------------------- against SGD


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt", "exponential"])
def test_on_a_linear_loss_merging_is_sgd_with_a_decayed_rate(shape: str) -> None:
    """The loss of step t is g_t . theta: its gradient is g_t wherever theta stands."""
    rng = np.random.default_rng(1)
    gradients = rng.normal(size=(24, 5))
    theta, decayed = np.ones(5), np.ones(5)
    path = [theta]
    for step, gradient in enumerate(gradients, start=1):
        theta = theta - 0.1 * gradient
        path.append(theta)
        decayed = decayed - 0.1 * decay_over(shape, [*range(25)], floor=0.05)[step - 1] * gradient
    coefficients = merge_weights(decay_over(shape, [*range(25)], floor=0.05))
    assert np.dot(coefficients, path) == pytest.approx(decayed, rel=1e-13)


def test_checkpoints_at_intervals_stand_for_a_rate_that_is_the_decays_mean_in_each() -> None:
    rng = np.random.default_rng(2)
    gradients, edges = rng.normal(size=(20, 3)), [0, 3, 11, 20]
    path = np.concatenate([np.zeros((1, 3)), -0.1 * np.cumsum(gradients, axis=0)])
    weights = decay_over("linear", edges)
    decayed = np.zeros(3)
    for weight, (first, end) in zip(weights, itertools.pairwise(edges), strict=True):
        decayed -= 0.1 * weight * gradients[first:end].sum(axis=0)
    assert np.dot(merge_weights(weights), path[edges]) == pytest.approx(decayed, rel=1e-13)


def quadratic(rate: float, steps: int = 16) -> tuple[float, float]:
    """(gap to the sum along the path, gap to SGD that really decays), as parts of |theta_0|, on theta' H theta / 2."""
    rng = np.random.default_rng(3)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    hessian = basis @ np.diag([1.0, 0.7, 0.5, 0.2, 0.1, 0.05]) @ basis.T
    theta = decayed = start = rng.normal(size=6)
    weights = decay_over("linear", [*range(steps + 1)])
    path, summed = [theta], start
    for weight in weights:
        gradient = hessian @ theta
        summed = summed - rate * weight * gradient
        theta = theta - rate * gradient
        path.append(theta)
        decayed = decayed - rate * weight * (hessian @ decayed)
    merged = np.dot(merge_weights(weights), path)
    length = float(np.linalg.norm(start))
    return float(np.linalg.norm(merged - summed)) / length, float(np.linalg.norm(merged - decayed)) / length


def test_on_a_quadratic_it_is_the_weighted_sum_along_the_trunk_and_a_decay_to_first_order() -> None:
    """To second order in x = rate x curvature, the gap to a decay is x^2 (sum_i (i - 1) w_i - sum_i<j w_i w_j)."""
    for rate in (0.2, 0.02, 0.002):
        assert quadratic(rate)[0] < 1e-14
    weights = decay_over("linear", [*range(17)])
    second = sum(number * weight for number, weight in enumerate(weights))
    second -= sum(a * b for a, b in itertools.combinations(weights, 2))
    for rate in (0.2, 0.02, 0.002):
        assert quadratic(rate)[1] < rate**2 * second  # the largest curvature is 1
    assert quadratic(0.002)[1] / quadratic(0.001)[1] == pytest.approx(4, rel=0.05)


# ---------------------------------------------------------------------------------------------- files


def write(folder: Path, number: int, shapes: dict[str, tuple[int, ...]], owners: int = 1) -> Path:
    """A folder with the files of a checkpoint's weights, dealt to so many owners."""
    rng = np.random.default_rng(number)
    values = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    state = {name: {"weight": torch.from_numpy(value)} for name, value in values.items()}
    path = folder / f"step-{number}"
    path.mkdir()
    dealt = [dict(list(state.items())[owner::owners]) for owner in range(owners)]
    write_manifest(path, [write_tensors(path, owner, owners, part) for owner, part in enumerate(dealt)])
    return path


SHAPES = {"embed.weight": (70, 16), "norm.weight": (16,), "head": (3, 5, 2)}


def test_a_merged_checkpoint_is_the_mean_however_many_files_each_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megacl.merging._CHUNK", 100)  # so that chunks end inside tensors
    paths = [write(tmp_path, number, SHAPES, owners=number + 1) for number in range(3)]
    (tmp_path / "merged").mkdir()
    contents = merge_files(paths, [0.25, 0.7, 0.05], tmp_path / "merged")
    held = [tensors(path) for path in paths]
    mean = {
        name: (
            0.25 * held[0][name].astype(np.float64)
            + 0.7 * held[1][name].astype(np.float64)
            + 0.05 * held[2][name].astype(np.float64)
        ).astype(np.float32)
        for name in SHAPES
    }
    np.testing.assert_equal(tensors(tmp_path / "merged"), mean)
    assert contents.weights == {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in mean.items()}
    file = tmp_path / "merged" / WEIGHTS
    assert contents.files == {WEIGHTS: facts_of(file)}


@given(decays)
def test_checkpoints_that_are_alike_merge_into_themselves(
    tmp_path_factory: pytest.TempPathFactory, decay: list[float]
) -> None:
    folder = tmp_path_factory.mktemp("alike")
    path = write(folder, 0, SHAPES)
    coefficients = merge_weights(decay)
    (folder / "merged").mkdir()
    contents = merge_files([path] * len(coefficients), coefficients, folder / "merged")
    assert (folder / "merged" / WEIGHTS).read_bytes() == (path / WEIGHTS).read_bytes()
    assert contents.weights_hash == read_index(path).weights_hash


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({**SHAPES, "norm.weight": (17,)}, r"norm.weight is \[17\], and in .*step-0 it is \[16\]; only"),
        ({"embed.weight": (70, 16)}, "norm.weight is no such tensor|head is no such tensor"),
        ({**SHAPES, "more": (1,)}, r"more is \[1\], and in .* it is no such tensor"),
    ],
)
def test_another_models_checkpoint_is_named_with_its_tensor(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    paths = [write(tmp_path, 0, SHAPES), write(tmp_path, 1, shapes)]
    with pytest.raises(CheckpointError, match=message):
        merge_files(paths, [0.5, 0.5], tmp_path)
    assert not (tmp_path / WEIGHTS).exists()


def test_files_that_are_no_weights_are_named(tmp_path: Path) -> None:
    whole, cut, half, text = (write(tmp_path, number, SHAPES) for number in range(4))
    (cut / WEIGHTS).write_bytes((cut / WEIGHTS).read_bytes()[:-4])
    save_file({name: np.zeros(shape, dtype=np.float16) for name, shape in SHAPES.items()}, half / WEIGHTS)
    (text / WEIGHTS).write_text("no tensors at all")
    for paths, message in (
        ([whole, cut], f"step-1/{WEIGHTS}: it is no whole safetensors file"),
        ([half, half], "step-2: .* is not fp32"),
        ([whole, text], f"step-3/{WEIGHTS}: it is no whole safetensors file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            merge_files(paths, [0.5, 0.5], tmp_path)


def test_memory_does_not_grow_with_the_model_or_the_number_of_checkpoints(tmp_path: Path) -> None:
    """96 MiB of weights, five times: what is resident grows by less than one of them has."""
    path = write(tmp_path, 0, {f"layers.{number}": (1024, 3072) for number in range(8)})
    script = (
        "import sys; from pathlib import Path; from megacl.merging import merge_files\n"
        "def read(key):\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith(key))\n"
        "before = read('VmRSS'); Path('/proc/self/clear_refs').write_text('5')\n"
        "merge_files([Path(sys.argv[1])] * 5, [0.2] * 5, Path(sys.argv[2]))\n"
        "print(read('VmHWM') - before)"
    )
    command = [sys.executable, "-c", script, str(path), str(tmp_path)]
    grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(grown) * 1024 < 64 * 2**20
