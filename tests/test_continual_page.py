"""docs/continual.md: the files that it has its reader write are configurations of the steps that it speaks of."""

import re
from pathlib import Path

import pytest

from megacl.config import RunConfig
from megacl.configfile import load_arguments

PAGE = Path(__file__).resolve().parents[1] / "docs" / "continual.md"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The page's files by name, written into the working directory."""
    blocks = re.findall(r"^```yaml\n# (\S+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for name, text in blocks:
        Path(name).write_text(text, encoding="utf-8")
    return dict(blocks)


def steps(config: RunConfig) -> list[int]:
    return [config.steps_of(phase) for phase in config.phases]


def test_the_files_of_the_page_are_configurations_that_its_commands_can_train(files: dict[str, str]) -> None:
    commands = re.findall(
        r"^    megacl train (base[^#\n]*?)\s*(?:#.*)?$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    arguments = {tuple(command.replace(" --dry-run", "").split()) for command in commands}
    assert {name for each in arguments for name in each} == {*files}
    for each in arguments:
        load_arguments(each)
    assert steps(load_arguments(["base.yaml"])) == [390]
    assert steps(load_arguments(["base.yaml", "update.yaml"])) == [195]
    assert steps(load_arguments(["base.yaml", "union.yaml"])) == [585]
    month = load_arguments(["base.yaml", "month.yaml"])
    assert month.phases[0] == load_arguments(["base.yaml"]).phases[0], "a run's phases that are over stay as they are"
    assert steps(month) == [390, 195]
