"""Files of torch.save are opened without running what stands in them."""

import argparse
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from megacl.convert.pickled import Opaque, PickledFiles, load
from megacl.errors import ConversionError


class Attack:
    """Pickled, it asks whoever loads it to call a function with an argument."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "name"), [(Path.touch, "getattr"), (exec, "exec"), (pickle.loads, "loads"), (np.load, "numpy.load")]
)
def test_a_malicious_pickle_is_refused_by_name_and_not_run(tmp_path, function, name):
    file = tmp_path / "weights.pt"
    torch.save({"weight": torch.ones(2), "more": Attack(function, f"open('{tmp_path}/run', 'w')")}, file)
    with pytest.raises(ConversionError, match=f"it names \\S*{name}, which megacl does not load"):
        PickledFiles().open(file)
    assert not (tmp_path / "run").exists()


def test_a_module_that_torch_blocks_is_refused_too(tmp_path):
    import os

    file = tmp_path / "weights.pt"
    torch.save({"more": Attack(os.system, f"touch {tmp_path}/run")}, file)
    with pytest.raises(ConversionError, match=r"it names (posix|os)\.system"):
        PickledFiles().open(file)
    assert not (tmp_path / "run").exists()


def test_state_of_generators_and_arguments_is_passed_over(tmp_path):
    file = tmp_path / "state.pt"
    state = {
        "np_rng_state": np.random.RandomState(1).get_state(),
        "scalar": np.float64(1.5),
        "args": argparse.Namespace(num_layers=3, where=Path("x")),
        "module": {"weight": torch.arange(6.0)},
    }
    torch.save(state, file)
    found = PickledFiles().open(file)
    assert found["args"].num_layers == 3
    assert isinstance(found["np_rng_state"][1], Opaque)
    assert isinstance(found["scalar"], Opaque)
    assert torch.equal(found["module"]["weight"], torch.arange(6.0))


def test_files_of_old_torch_are_read(tmp_path):
    file = tmp_path / "old.pt"
    torch.save({"weight": torch.arange(6.0)}, file, _use_new_zipfile_serialization=False)
    assert torch.equal(PickledFiles().tensor(file, ("weight",)), torch.arange(6.0))


@pytest.mark.parametrize("content", [b"", b"no such thing", b"PK\x03\x04 broken"])
def test_a_damaged_file_is_one_line(tmp_path, content):
    file = tmp_path / "damaged.pt"
    file.write_bytes(content)
    with pytest.raises(ConversionError, match=re.escape(str(file))) as error:
        load(file, file)
    assert "\n" not in str(error.value)


def test_a_truncated_file_is_one_line(tmp_path):
    file = tmp_path / "cut.pt"
    torch.save({"weight": torch.randn(1000)}, file)
    file.write_bytes(file.read_bytes()[:-700])
    with pytest.raises(ConversionError, match=r"cut\.pt: cannot be read"):
        PickledFiles().open(file)
