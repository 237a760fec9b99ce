"""Studies keep to the generations of their sources that they began with, and compare no others."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Prepared, write_documents
from runs import command_line
from studies import study_of, write_study

from megacl.data.prepare import prepare
from megacl.data.tokenizer import load_tokenizer
from megacl.lineage import load_lineage

Capture = pytest.CaptureFixture[str]


def generations_of(out: Path, arm: str) -> dict[str, int]:
    run = json.loads((out / "results.json").read_text())["arms"][arm]["runs"][0][-1]
    return {source.name: source.generation for source in load_lineage(out / "runs" / run).phases[-1].sources}


def append_to(folder: Path, prepared: Prepared, documents: Path) -> None:
    texts = [json.loads(line)["text"][::-1] for line in prepared.documents["german"].read_text().splitlines()]
    new = [str(write_documents(documents, texts))]
    prepare(new, tokenizer=load_tokenizer(prepared.tokenizer), out=folder, validation=0.2)


@pytest.mark.long
def test_arms_are_trained_on_the_generation_with_which_their_study_began(
    prepared: Prepared, tmp_path: Path, capsys: Capture
) -> None:
    german = tmp_path / "german"
    shutil.copytree(prepared.sources["german"], german)
    tree = study_of(prepared, seeds=[0], bars=[])
    tree["base"]["sources"]["german"] = {"path": str(german)}
    one: dict[str, Any] = {**tree, "phases": {**tree["phases"]}, "arms": {"replay-0": tree["arms"]["replay-0"]}}
    del one["phases"]["german-25"]
    out = tmp_path / "out"

    def study(content: dict[str, Any]) -> tuple[int, str, str]:
        file = write_study(tmp_path / "study.yaml", content)
        return command_line(capsys, "study", file, "--out", str(out), "--jobs", "1")

    assert study(one)[0] == 0
    append_to(german, prepared, tmp_path / "new.jsonl")
    assert study(tree)[0] == 0
    assert generations_of(out, "replay-0")["german"] == generations_of(out, "replay-25")["german"] == 1
    assert yaml.safe_load((out / "study.yaml").read_text())["generations"][str(german)] == 1

    status, _, err = study({**tree, "generations": {str(german): 2}})
    assert (status, len(err.splitlines())) == (2, 1)
    assert f"generations.{german} is 2, and the study in {out} began with 1" in err

    (out / "study.yaml").unlink()  # nobody knows any more what it began with
    shutil.rmtree(next(out.glob("runs/seed-0/german-25-*")))
    status, _, err = study(tree)
    assert status == 2
    last = err.splitlines()[-1]
    assert f"source 'german' ({german}) has fingerprint" in last
    assert "of arm 'replay-0'" in last
    assert "of arm 'replay-25'" in last


def test_a_run_to_start_from_is_named_with_a_step(prepared: Prepared, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "trunk").mkdir()
    tree = study_of(prepared, bars=[])
    tree["base"]["start_from"] = str(tmp_path / "trunk")
    file = write_study(tmp_path / "study.yaml", tree)
    status, _, err = command_line(capsys, "study", file, "--out", str(tmp_path / "out"))
    assert (status, len(err.splitlines())) == (2, 1)
    assert f"start_from is {tmp_path / 'trunk'}, a run whose newest checkpoint may change" in err
    assert not (tmp_path / "out" / "runs").exists()
