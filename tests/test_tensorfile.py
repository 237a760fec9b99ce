"""Files of tensors: what safetensors' own reader finds in them is what was written."""

import errno
import math
import os
import tempfile
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from megacl.tensorfile import DTYPES, FileFacts, TensorWriter

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
NAMES = st.text(min_size=1, max_size=20).filter(lambda name: name.isprintable() and name != "__metadata__")
ENTRIES = st.dictionaries(NAMES, st.tuples(st.sampled_from([*DTYPES]), SHAPES), max_size=6)


def values(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any bits but for bool's, NaNs included."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    size = math.prod(shape) * dtype.itemsize
    return torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())


@settings(max_examples=60, deadline=None)
@given(ENTRIES, st.dictionaries(NAMES, st.text(max_size=10), max_size=2), st.integers(0, 2**32))
def test_the_reader_of_safetensors_finds_names_dtypes_shapes_and_bits(
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str], seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        written = {name: values(*entry, seed + index) for index, (name, entry) in enumerate(entries.items())}
        with TensorWriter(path, entries, metadata) as file:
            for name in file.names:
                file.write(name, written[name])
            facts = file.close()
        content = path.read_bytes()
        assert facts == FileFacts(len(content), xxhash.xxh3_128(content).hexdigest())
        with safe_open(path, framework="pt") as opened:
            assert {*opened.keys()} == {*entries}
            assert (opened.metadata() or {}) == metadata
            for name, tensor in written.items():
                read = opened.get_tensor(name)
                assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
                assert bits(read) == bits(tensor)


def test_a_tensor_that_is_no_block_of_memory_is_written_row_by_row(tmp_path: Path) -> None:
    across = torch.arange(12.0).reshape(3, 4).t()
    with TensorWriter(tmp_path / "x", {"x": (torch.float32, (4, 3))}) as file:
        file.write("x", across)
        file.close()
    with safe_open(tmp_path / "x", framework="pt") as opened:
        assert torch.equal(opened.get_tensor("x"), across)


def test_a_tensor_out_of_turn_in_another_dtype_or_shape_or_a_missing_one_is_refused(tmp_path: Path) -> None:
    entries = {"half": (torch.bfloat16, (3,)), "long": (torch.int64, (2,))}
    with TensorWriter(tmp_path / "x", entries) as file:
        assert file.names == ["long", "half"]
        for name, tensor in {
            "half": torch.zeros(3, dtype=torch.bfloat16),
            "long": torch.zeros(2),
            "other": torch.zeros(2, dtype=torch.int64),
        }.items():
            with pytest.raises(ValueError, match="due is long"):
                file.write(name, tensor)
        with pytest.raises(ValueError, match="due is long"):
            file.write("long", torch.zeros(1, 2, dtype=torch.int64))
        file.write("long", torch.zeros(2, dtype=torch.int64))
        with pytest.raises(ValueError, match="half was not written"):
            file.close()
        file.write("half", torch.zeros(3, dtype=torch.bfloat16))
        with pytest.raises(ValueError, match="due is the file's end"):
            file.write("half", torch.zeros(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="no such tensor"):
        TensorWriter(tmp_path / "y", {"x": (torch.complex128, ())})
    assert not (tmp_path / "y").exists()


def test_what_the_disk_refuses_keeps_its_number(tmp_path: Path) -> None:
    full = {"x": (torch.float32, (8,))}
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(FileExistsError):
        TensorWriter(tmp_path / "full", full)
    with pytest.raises(FileNotFoundError):
        TensorWriter(tmp_path / "nowhere" / "x", full)


def test_a_file_beyond_the_limit_on_size_is_refused_by_its_number(tmp_path: Path) -> None:
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        with TensorWriter(tmp_path / "x", {"x": (torch.float32, (1024,))}) as file:
            refused = pytest.raises(OSError, match=os.strerror(errno.EFBIG))
            with refused:
                file.write("x", torch.zeros(1024))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
