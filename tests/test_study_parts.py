"""A study done part by part, as an array of jobs does it."""

from pathlib import Path

import pytest
from conftest import Prepared
from runs import command_line
from studies import study_of, write_study

from megacl.study_config import load_study
from megacl.study_tree import build_tree


@pytest.fixture
def call(prepared: Prepared, tmp_path: Path) -> tuple[str, ...]:
    return ("study", write_study(tmp_path / "study.yaml", study_of(prepared)), "--out", str(tmp_path / "out"))


def test_parts_are_refused_out_of_turn_and_say_what_is_to_be_done_first(
    call: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = build_tree(load_study(call[1]), tmp_path / "out")
    first, second = (node.name for node in tree.paths["replay-25", 0])

    def refusal(*options: str) -> str:
        status, _, err = command_line(capsys, *call, *options)
        assert (status, len(err.splitlines())) == (2, 1)
        return err

    for part in ("results", first):
        assert "holds no plan of the study yet; --only plan makes it" in refusal("--only", part)
    assert not (tmp_path / "out").exists()
    assert command_line(capsys, *call, "--only", "plan")[0] == 0
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == [".lock", "study.yaml"]
    assert "6 runs of the study are not done, such as seed-0/english-" in refusal("--only", "results")
    assert f"run {second} goes on from {first}, which is not done" in refusal("--only", second)
    assert f"did you mean '{first}'?" in refusal("--only", first[:-1])
    assert "leave one of them out" in refusal("--only", first, "--jobs", "2")
