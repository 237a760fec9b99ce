"""Who saw documents: every phase against a reading of all its samples, token by token, whatever it replays and how."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import command_line
from streams import begin, finish, phase_config

from megacl.data.generations import Change, FolderState, changing, open_state, publish_generation
from megacl.data.manifest import TokenizerRecord
from megacl.data.remove import Wanted, find_documents, remove_documents
from megacl.data.shard_list import ShardList
from megacl.data.shards import join_documents, write_shard
from megacl.data.source import Source, open_source
from megacl.errors import DataError
from megacl.lineage import Lineage, save_lineage
from megacl.saw import Sighting, who_saw

EOS = 0


class Folder:
    """A data folder in which every token but EOS stands once, so that a sample's tokens say what it saw."""

    def __init__(self, path: Path, seed: int, first_token: int) -> None:
        self.path, self.draw, self.token, self.hash = path, random.Random(seed), first_token, 2**63
        self.documents: dict[int, list[int]] = {}
        record = TokenizerRecord(file="tokenizer.model", fingerprint=f"{seed:064x}", vocab_size=2**20, eos_id=EOS)
        path.mkdir()
        (path / "tokenizer.model").write_bytes(b"stands for a tokenizer")
        self._append(FolderState(path, path.name, "uint32", record, 0.0, (), ShardList.concat([])))

    def grow(self) -> None:
        """One generation more."""
        self._append(open_state(self.path))

    def _append(self, state: FolderState) -> None:
        work, rows = self.path / "work", []
        work.mkdir()
        for shard in range(3):
            tokens, hashes = [], []
            for _ in range(12):
                length = self.draw.choice([1, 2, 5, 17, 40])
                tokens.append(np.array([*range(self.token, self.token + length), EOS], np.uint32))
                hashes.append(self.hash)
                self.documents[self.hash] = tokens[-1][:-1].tolist()
                self.token, self.hash = self.token + length, self.hash + 1
            documents = join_documents(tokens, "uint32", text_bytes=[9] * 12, hashes=hashes)
            rows.append(write_shard(work / f"{shard}-train.arrow", documents, split="train"))
        publish_generation(state, work, Change(made_by="prepare", settings={}, added=ShardList.of_rows(rows)))


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Folder:
    folder = Folder(tmp_path_factory.mktemp("data") / "ours", 1, 1)
    folder.grow()
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Folder:
    return Folder(tmp_path_factory.mktemp("data") / "other", 2, 500_000)


@pytest.fixture(scope="module")
def sources(ours, other) -> dict[str, Source]:
    return {
        "old": open_source(ours.path, 1),
        "new": open_source(ours.path, 2, since=1),
        "all": open_source(ours.path, 2),
        "windowed": replace(open_source(ours.path, 2), window=2),
        "other": open_source(other.path),
    }


PHASES: list[tuple[str, dict[str, Any]]] = [
    ("one-source", {"mixture": {"old": 1}}),
    ("new-and-other", {"mixture": {"new": 1, "other": 3}, "seq_length": 8}),
    ("all-more-than-once", {"mixture": {"all": 1}, "steps": 40}),
    ("windowed", {"mixture": {"windowed": 1}}),
    ("replays", {"mixture": {"other": 1}, "replay": {"share": 0.5}}),
    ("replays-cut-anew", {"mixture": {"other": 1}, "replay": {"share": 0.5}, "seq_length": 20}),
    (
        "replays-in-another-order",
        {"mixture": {"other": 1}, "replay": {"share": 0.5, "policy": "uniform"}, "seq_length": 24},
    ),
    (
        "replays-a-source",
        {"mixture": {"other": 1}, "replay": {"share": 0.25, "from_sources": {"old": 1, "new": 2}}},
    ),
    ("packed", {"mixture": {"old": 2, "other": 1}, "packing": "best_fit"}),
    ("replays-packed", {"mixture": {"other": 1}, "replay": {"share": 0.5, "from": {"packed": 1}}}),
]


@pytest.fixture(scope="module")
def lineages(sources) -> list[tuple[Lineage, list[np.ndarray]]]:
    """After each phase of a run: the lineage, and the tokens of all samples of each of its phases."""
    lineage, tokens, found = Lineage(), [], []
    for name, settings in PHASES:
        settings = {"steps": 12, **settings}
        cut = {"seq_length": settings.pop("seq_length", 16), "packing": settings.pop("packing", "cut")}
        phase = phase_config(name, **settings)
        stream = begin(lineage, phase, sources, **cut, batch=6)
        lineage = finish(lineage, stream)
        tokens = [*tokens, stream.read(np.arange(stream.record.budget_samples))]
        found.append((lineage, tokens))
    return found


def save_run(run: Path, lineage: Lineage, checkpoints: dict[int, Lineage] | None = None) -> None:
    run.mkdir(parents=True)
    save_lineage(lineage, run)
    for step, each in (checkpoints or {}).items():
        path = run / "checkpoints" / f"step-{step:08d}"
        path.mkdir(parents=True)
        save_lineage(each, path)
        (path / "manifest.json").write_text("{}")


def look(folder: Folder, hashes: list[int], roots: list[Path]) -> tuple[list[Sighting], list[str]]:
    with changing(folder.path) as state:
        matches = find_documents(state, Wanted(np.array(hashes, np.uint64)), 1)
        return who_saw(state, matches, roots)


@pytest.mark.parametrize("count", [1, 3, 25])
def test_each_phase_saw_what_a_reading_of_all_its_tokens_finds(tmp_path, ours, lineages, count):
    lineage, tokens = lineages[-1]
    save_run(tmp_path / "runs" / "deep" / "run", lineage)
    for seed in range(6):
        hashes = random.Random(seed).sample(sorted(ours.documents), count)
        sightings, problems = look(ours, hashes, [tmp_path])
        assert problems == []
        expected, step = [], 0
        for phase, read in zip(lineage.phases, tokens, strict=True):
            gone = [np.isin(read, ours.documents[code]).any(axis=1) for code in hashes]
            seen = np.any(gone, axis=0)
            if seen.any():
                first = step + int(np.argmax(seen)) // 6 + 1
                expected.append((phase.name, first, int(seen.sum()), sum(int(each.any()) for each in gone)))
            step += len(read) // 6
        assert [(each.phase, each.first_step, each.samples, each.documents) for each in sightings] == expected
        assert all(each.run == str(tmp_path / "runs/deep/run") and each.phase_run == "test" for each in sightings)
    assert {name for name, *_ in expected} >= {"all-more-than-once"}


def test_checkpoints_hold_the_documents_from_the_sample_on_that_saw_them(tmp_path, ours, sources, lineages):
    lineage, (tokens, *_) = lineages[0]
    stream = begin(
        Lineage(), phase_config("one-source", {"old": 1}, 12), {"old": sources["old"]}, seq_length=16, batch=6
    )
    partial = {step: finish(Lineage(), stream, samples=6 * step) for step in range(1, 13)}
    save_run(tmp_path / "runs" / "run", lineage, partial)
    save_run(tmp_path / "runs" / "later", lineages[3][0], {5: lineages[3][0]})
    for code in sorted(ours.documents)[:20:3]:
        sightings, _ = look(ours, [code], [tmp_path / "runs"])
        seen = np.isin(tokens, ours.documents[code]).any(axis=1)
        mine = [each for each in sightings if each.phase == "one-source"]
        if not seen.any():
            assert mine == []
            continue
        first = int(np.argmax(seen)) // 6 + 1
        names = [f"{tmp_path}/runs/run@{step}" for step in range(1, 13)]
        later, run = sorted(mine, key=lambda each: each.run)
        assert (run.first_step, run.before, run.holding) == (first, (*names[: first - 1],), (*names[first - 1 :],))
        assert (later.first_step, later.before, later.holding) == (first, (), (f"{tmp_path}/runs/later@5",))


def test_what_a_run_passed_over_is_seen_by_none_but_the_checkpoints_that_learned_from_it(tmp_path, ours, sources):
    """It goes back from step 6 to step 2, having been stopped at step 5, whose checkpoint stays; 12 steps in all."""
    stream = begin(
        Lineage(), phase_config("one-source", {"old": 1}, 12), {"old": sources["old"]}, seq_length=16, batch=6
    )
    tokens = stream.read(np.arange(72))
    passed_over = {2: (), 4: ((18, 24),), 5: ((18, 24),), 6: ((12, 36),), 9: ((12, 36),), 12: ((12, 36), (60, 66))}
    partial = {step: finish(Lineage(), stream, 6 * step, lost) for step, lost in passed_over.items()}
    save_run(tmp_path / "runs" / "run", partial[12], partial)
    kinds = set()
    for code in sorted(ours.documents):
        saw = np.isin(tokens, ours.documents[code]).any(axis=1)
        learned = {step: saw[: 6 * step].copy() for step in passed_over}
        for step, lost in passed_over.items():
            for first, end in lost:
                learned[step][first:end] = False
        sightings, problems = look(ours, [code], [tmp_path / "runs"])
        assert problems == []
        holding = {name for each in sightings for name in each.holding}
        assert holding == {f"{tmp_path}/runs/run@{step}" for step, hits in learned.items() if hits.any()}
        main = [each.samples for each in sightings if f"{tmp_path}/runs/run@12" in each.holding]
        assert main == ([learned[12].sum()] if learned[12].any() else [])
        kinds.add((learned[5].any(), learned[12].any()))
    assert kinds == {(False, False), (True, False), (False, True), (True, True)}


def test_runs_on_a_copy_of_the_folder_are_found_and_runs_on_other_data_are_not(tmp_path, ours, other, lineages):
    lineage, _ = lineages[0]
    (phase,) = lineage.phases
    elsewhere = tuple(replace(source, path="/gone/elsewhere") for source in phase.sources)
    save_run(tmp_path / "runs" / "copy", Lineage(phases=(replace(phase, sources=elsewhere),)))
    every = sorted(ours.documents)
    assert [each.phase for each in look(ours, every, [tmp_path / "runs"])[0]] == ["one-source"]
    assert look(other, sorted(other.documents), [tmp_path / "runs"]) == ([], [])


def test_what_cannot_be_told_is_said(tmp_path, lineages):
    folder = Folder(tmp_path / "ours", 1, 1)  # the same data as in the fixture
    folder.grow()
    save_run(tmp_path / "runs" / "run", lineages[0][0])
    save_run(tmp_path / "runs" / "broken", Lineage())
    (tmp_path / "runs" / "broken" / "lineage.json").write_text("{")
    first, second = sorted(folder.documents)[:2]
    with changing(folder.path) as state:
        remove_documents(state, find_documents(state, Wanted(np.array([first], np.uint64)), 1), purge=True)
    sightings, problems = look(folder, [second], [tmp_path / "runs"])
    assert sightings == []
    assert len(problems) == 2
    assert all("what it saw cannot be told: " in line and "\n" not in line for line in problems)
    assert "not JSON" in problems[0]
    assert "purged from the disk earlier" in problems[1]
    with pytest.raises(DataError, match=r"absent: no such folder; name one that holds runs"):
        look(folder, [second], [tmp_path / "absent"])


def test_the_command_says_who_saw_the_documents_before_it_removes_them(tmp_path, capsys, ours, lineages):
    folder = Folder(tmp_path / "ours", 1, 1)
    folder.grow()
    save_run(tmp_path / "runs" / "run", lineages[0][0], {12: lineages[0][0]})
    hashes = tmp_path / "hashes.txt"
    hashes.write_text("".join(f"{code:016x}\n" for code in sorted(ours.documents)[:2]))
    arguments = ["data", "remove", str(folder.path), "--hashes", str(hashes), "--runs", str(tmp_path / "runs")]
    status, out, _ = command_line(capsys, *arguments, "--dry-run", "--json")
    tree = json.loads(out)
    assert (status, tree["documents"], tree["removed"], tree["problems"]) == (0, 2, None, [])
    assert [(each["phase"], each["holding"]) for each in tree["seen"]] == [
        ("one-source", [f"{tmp_path}/runs/run@12"])
    ]  # fmt: skip
    save_run(tmp_path / "runs" / "broken", Lineage())
    (tmp_path / "runs" / "broken" / "lineage.json").write_text("{")
    status, _, err = command_line(capsys, *arguments, "--purge")
    assert (status, err.count("\n")) == (2, 1)
    assert f"{tmp_path}/runs/broken: what it saw cannot be told: " in err
    assert "Nothing was removed, since after a purge nobody can tell. Mend or move the run" in err
    assert open_source(folder.path).generation == 2
    shutil.rmtree(tmp_path / "runs" / "broken")
    status, out, _ = command_line(capsys, *arguments, "--purge")
    assert status == 0
    assert "2 documents of generation 2 (0 held out)" in out
    assert f"{tmp_path}/runs/run@12" in out
    assert "generation 3 is without them" in out
    assert "generations that cannot be read any more: 1, 2" in out
    status, _, err = command_line(capsys, "data", "remove", str(folder.path))
    assert (status, err) == (2, "ConfigError: name the documents to remove: --documents, --hashes or --matching.\n")
