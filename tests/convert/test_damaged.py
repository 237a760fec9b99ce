"""Damaged files of any foreign format end in one line, whatever was damaged, and never in a traceback of ours."""

import random
import shutil

import pytest
from litgpt_layout import write_litgpt
from megatron_layout import CORE, write_megatron, write_torch_dist
from neox_layout import write_neox
from whole_models import random_llama, random_model

from megacl.convert.detect import open_model
from megacl.errors import MegaclError


def torch_files(folder, whole):
    return write_megatron(folder, whole, names=CORE, tensor_parallel=2)


def sequential(folder, whole):
    return write_neox(folder, whole, sequential=True)


def flip(content, draw):
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def cut(content, draw):
    return content[: draw.randrange(len(content))]


def overwrite(content, draw):
    begin = draw.randrange(len(content))
    noise = draw.randbytes(40)
    return content[:begin] + noise + content[begin + len(noise) :]


def read_all(folder):
    """Reads every tensor; returns what it ended with, if it is one of our errors."""
    try:
        opened = open_model(folder)
        for name in opened.shapes:
            opened.read(name)
    except MegaclError as error:
        return error


@pytest.mark.parametrize("rounds", [3, pytest.param(100, marks=pytest.mark.long)], ids=["a few rounds", "many rounds"])
@pytest.mark.parametrize("write", [write_neox, sequential, torch_files, write_torch_dist, write_litgpt])
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, write, rounds):
    neox = write in (write_neox, sequential)
    source = write(tmp_path / "source", random_model(layers=1) if neox else random_llama(layers=1))
    files = [file.relative_to(source) for file in sorted(source.rglob("*")) if file.is_file()]
    draw = random.Random(7)
    for _ in range(rounds):
        copy = shutil.copytree(source, tmp_path / "copy")
        file = copy / draw.choice(files)
        content = file.read_bytes()
        file.write_bytes(draw.choice([flip, cut, overwrite])(content, draw) if content else b"x")
        error = read_all(copy)
        assert error is None or "\n" not in str(error)
        shutil.rmtree(copy)
