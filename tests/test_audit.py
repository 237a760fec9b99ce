"""`megacl lineage MODEL --verify`: what holds, and each thing that does not, by name."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import Prepared
from runs import OPTIMIZER, WEIGHTS, command_line

from megacl.checkpoint import checkpoint_path, open_checkpoint
from megacl.configfile import from_tree, load
from megacl.data.stream import PhaseStream, open_recorded
from megacl.errors import DataError
from megacl.lineage import Lineage, load_lineage, save_lineage
from megacl.tensorfile import facts_of
from megacl.trainer import train

Capture = pytest.CaptureFixture[str]


@dataclass(frozen=True)
class House:
    """A parent that learned English, and a child that learns German and replays English, on data of their own."""

    prepared: Prepared
    english: Path
    german: Path
    parent: Path
    child: Path


@pytest.fixture(scope="module")
def house(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> House:
    folder = tmp_path_factory.mktemp("house")
    sources = {name: Path(shutil.copytree(path, folder / name)) for name, path in prepared.sources.items()}
    here = replace(prepared, sources=sources)
    tree = here.tree(folder / "parent")
    english, german = tree["phases"]
    train(from_tree({**tree, "phases": [english]}))
    tree = here.tree(folder / "child", start_from=f"{folder / 'parent'}@english")
    del tree["sources"]["english"]
    train(from_tree({**tree, "phases": [german]}))
    return House(here, sources["english"], sources["german"], folder / "parent", folder / "child")


def verify(capsys: Capture, model: object) -> tuple[int, list[str], list[str]]:
    """(exit status, what holds, what does not)."""
    capsys.readouterr()  # what runs said before
    status, out, err = command_line(capsys, "lineage", str(model), "--verify")
    assert err.count("\n") == (status != 0)
    lines = out.splitlines()
    bad = [line for line in lines if line.startswith(("missing", "changed"))]
    if status:
        assert f"{len(bad)} are missing or changed" in err
    return status, [line for line in lines if line.startswith("ok")], bad


@contextlib.contextmanager
def changed(file: Path, old: bytes | None = None, new: bytes = b"") -> Iterator[None]:
    """A file in which `old` became `new`, or, without these, a bit in its last byte another; put right afterwards."""
    content = file.read_bytes()
    wrong = content[:-1] + bytes([content[-1] ^ 1]) if old is None else content.replace(old, new, 1)
    assert wrong != content
    try:
        file.write_bytes(wrong)
        yield
    finally:
        file.write_bytes(content)


@contextlib.contextmanager
def away(path: Path) -> Iterator[None]:
    """A file or folder that is not there; put back afterwards."""
    path.rename(path.with_name("elsewhere"))
    try:
        yield
    finally:
        path.with_name("elsewhere").rename(path)


@contextlib.contextmanager
def signed(checkpoint: Path, lineage: Lineage) -> Iterator[None]:
    """A checkpoint with another lineage, and a manifest that agrees."""
    manifest = checkpoint / "manifest.json"
    before = [(file, file.read_bytes()) for file in (manifest, checkpoint / "lineage.json")]
    save_lineage(lineage, checkpoint)
    sign(checkpoint)
    try:
        yield
    finally:
        for file, content in before:
            file.write_bytes(content)


def sign(checkpoint: Path) -> None:
    tree = json.loads((checkpoint / "manifest.json").read_text())
    for name, facts in tree["files"].items():
        facts.update(size=(checkpoint / name).stat().st_size, xxh3_128=facts_of(checkpoint / name).digest)
    (checkpoint / "manifest.json").write_text(json.dumps(tree, indent=1) + "\n")


def shard_of(source: Path) -> Path:
    return min(source.glob("train-*.arrow"))


def test_a_history_that_holds_is_said_to_thing_by_thing(house: House, capsys: Capture) -> None:
    status, good, bad = verify(capsys, house.child)
    lineage = load_lineage(house.child)
    ids = [own[:12] for own in lineage.ids]
    prints = [phase.sources[0].fingerprint[:12] for phase in lineage.phases]
    assert (status, bad) == (0, [])
    mark = lineage.events[0].checkpoint
    starts = [
        f"checkpoint {checkpoint_path(house.child, 8)}: its files are as in its manifest",
        f"phase 'english' of run parent, id {ids[0]}",
        f"the branch after phase 'english', id {ids[1]}",
        f"phase 'german' of run child, id {ids[2]}",
        f"{house.child}/lineage.json",
        "phase 'german' replays phase 'english'",
        f"source 'english', fingerprint {prints[0]}: generation 1 of {house.english}",
        f"source 'german', fingerprint {prints[1]}: generation 1 of {house.german}",
        f"checkpoint parent@12 of the branch after phase 'english': {checkpoint_path(house.parent, 12)}, "
        f"lineage {mark.id[:12]}, weights {mark.weights[:12]}",
    ]
    assert len(good) == len(starts)
    for line, start in zip(good, starts, strict=True):
        assert line.startswith(f"ok        {start}")


@pytest.mark.parametrize("place", ["@5", "@german", "/checkpoints/step-00000005"])
def test_earlier_checkpoints_are_verified_likewise(house: House, capsys: Capture, place: str) -> None:
    status, good, bad = verify(capsys, f"{house.child}{place}")
    assert (status, len(good), bad) == (0, 9, [])
    assert verify(capsys, f"{house.parent}@5")[0] == 0


def test_a_number_changed_in_a_lineage_is_named_with_its_entry(house: House, capsys: Capture) -> None:
    file = checkpoint_path(house.child, 8) / "lineage.json"
    own = load_lineage(house.child).ids[0][:12]
    with changed(file, b'"seed": 0', b'"seed": 1'):
        status, _, bad = verify(capsys, house.child)
    assert status == 2
    assert bad == [
        f"changed   checkpoint {file.parent}: {file}: its content has changed (XXH3)",
        f"changed   phase 'english' of run parent, id {own}: it does not match",
    ]
    with changed(
        house.child / "lineage.json", b'"kind": "branch",\n   "after": 1', b'"kind": "branch",\n   "after": 0'
    ):
        status, _, bad = verify(capsys, house.child)
    assert status == 2
    assert f"changed   {house.child}/lineage.json: the branch at the beginning does not match its id" in bad


def test_a_changed_lineage_is_no_ones_to_go_on_from_though_its_manifest_agrees(
    house: House, tmp_path: Path, capsys: Capture
) -> None:
    checkpoint = Path(shutil.copytree(checkpoint_path(house.parent, 12), tmp_path / "alone"))
    text = (checkpoint / "lineage.json").read_text()
    (checkpoint / "lineage.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    sign(checkpoint)
    tree = house.prepared.tree(tmp_path / "run", start_from=str(checkpoint))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**tree, "phases": tree["phases"][1:]}))
    for arguments in (("lineage", str(checkpoint)), ("train", str(tmp_path / "run.yaml"))):
        status, _, err = command_line(capsys, *arguments)
        assert status == 2
        assert err.startswith(
            f"CheckpointError: {checkpoint}/lineage.json: phase 'english' of run parent does not match"
        )
        assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
    status, _, bad = verify(capsys, checkpoint)
    assert (status, len(bad)) == (2, 1)


def test_a_history_written_anew_is_found_out_by_the_checkpoint_that_it_branched_from(
    house: House, capsys: Capture
) -> None:
    """All ids agree with one another, and all hashes: only the parent does not."""
    lineage = load_lineage(house.child)
    other = Lineage(phases=(replace(lineage.phases[0], seed=1),))
    branch = replace(lineage.events[0], checkpoint=replace(lineage.events[0].checkpoint, id=other.id))
    with signed(checkpoint_path(house.child, 8), other.with_event(branch).with_phase(lineage.phases[1])):
        status, _, bad = verify(capsys, house.child)
    assert status == 2
    parent = checkpoint_path(house.parent, 12)
    assert bad == [
        f"changed   {house.child}/lineage.json: it tells another history than {checkpoint_path(house.child, 8)}",
        f"changed   checkpoint parent@12 of the branch after phase 'english': {parent}: its lineage has id "
        f"{lineage.ids[0][:12]}, and {other.id[:12]} is recorded",
    ]


@pytest.mark.parametrize("source", ["english", "german"])
def test_shards_that_are_gone_or_changed_by_a_bit_are_named_with_source_and_fingerprint(
    house: House, capsys: Capture, source: str
) -> None:
    record = {each.name: each for each in load_lineage(house.child).sources.values()}[source]
    shard = shard_of(getattr(house, source))
    name = f"source '{source}', fingerprint {record.fingerprint[:12]}: {shard}"
    with away(shard):
        status, _, bad = verify(capsys, house.child)
    assert (status, len(bad)) == (2, 1)
    assert bad[0].startswith(f"missing   {name}: the shard is missing")
    with changed(shard):
        status, _, bad = verify(capsys, house.child)
    assert (status, len(bad)) == (2, 1)
    assert bad[0].startswith(f"changed   {name}: ")


def test_sources_that_are_gone_or_other_data_now_are_named(house: House, capsys: Capture) -> None:
    record = load_lineage(house.child).phases[0].sources[0]
    with away(house.english):
        status, _, bad = verify(capsys, house.child)
        assert (status, len(bad)) == (2, 1)
        assert bad[0].startswith(
            f"missing   the model's history reads source 'english', fingerprint {record.fingerprint[:12]}"
        )
        assert str(house.english) in bad[0]
        shutil.copytree(house.german, house.english)
        status, _, bad = verify(capsys, house.child)
        shutil.rmtree(house.english)
    assert (status, len(bad)) == (2, 1)
    assert bad[0].startswith(f"changed   {house.english}: generation 1 has fingerprint")
    assert "source 'english'" in bad[0]


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, "config.yaml", "lineage.json"])
def test_a_changed_parent_is_named(house: House, capsys: Capture, name: str) -> None:
    file = checkpoint_path(house.parent, 12) / name
    with changed(file):
        status, _, bad = verify(capsys, house.child)
    assert status == 2
    expected = f"checkpoint parent@12 of the branch after phase 'english': {file.parent}: {file}"
    assert bad[0] == f"changed   {expected}: its content has changed (XXH3)"
    with away(file):
        status, _, bad = verify(capsys, house.child)
    assert status == 2
    assert bad[0] == f"missing   {expected}: missing"


def test_a_parent_with_other_weights_is_named_though_its_manifest_agrees(house: House, capsys: Capture) -> None:
    parent = checkpoint_path(house.parent, 12)
    with changed(parent / WEIGHTS), signed(parent, load_lineage(parent)):
        status, _, bad = verify(capsys, house.child)
    assert (status, len(bad)) == (2, 1)
    assert "its weights have SHA-256" in bad[0]


def test_a_parent_that_is_not_there_cannot_be_checked_which_is_said(house: House, capsys: Capture) -> None:
    with away(house.parent):
        status, out, _ = command_line(capsys, "lineage", str(house.child), "--verify")
    assert status == 0
    assert "unchecked checkpoint parent@12 of the branch after phase 'english': it is not found here" in out
    assert out.endswith(f"{house.child}: 8 things hold, and 1 could not be checked\n")


def test_a_parent_is_found_beside_its_child_wherever_both_were_moved(
    house: House, tmp_path: Path, capsys: Capture
) -> None:
    for run in (house.parent, house.child):
        shutil.copytree(run, tmp_path / run.name)
    with away(house.parent):
        _, good, _ = verify(capsys, tmp_path / "child")
    assert f"branch after phase 'english': {checkpoint_path(tmp_path / 'parent', 12)}" in good[-1]


def test_a_replay_of_a_phase_that_never_was_is_named(house: House, capsys: Capture) -> None:
    lineage = load_lineage(house.child)
    replay = lineage.phases[1].replay
    assert replay is not None
    other = replace(lineage.phases[1], replay=replace(replay, from_=(replace(replay.from_[0], phase="latin"),)))
    with signed(checkpoint_path(house.child, 8), lineage.with_phase(other)):
        status, _, bad = verify(capsys, house.child)
    assert status == 2
    assert bad == ["missing   phase 'german' replays phase 'latin', and 0 phases before it have that name"]


def test_a_checkpoint_without_a_readable_lineage_is_named_and_no_traceback(house: House, capsys: Capture) -> None:
    file = checkpoint_path(house.child, 8) / "lineage.json"
    with changed(file, b"{", b"["):
        status, _, bad = verify(capsys, house.child)
    assert (status, len(bad)) == (2, 2)
    assert "it is not JSON" in bad[1]
    with away(file):
        status, _, bad = verify(capsys, house.child)
    assert (status, len(bad)) == (2, 2)
    status, out, err = command_line(capsys, "lineage", str(house.child / "nothing"), "--verify")
    assert (status, out) == (2, "")
    assert "no such run or checkpoint" in err
    status, _, err = command_line(capsys, "lineage", str(house.child), "--verify", "--json")
    assert (status, err.count("\n")) == (2, 1)


def test_a_source_that_was_moved_holds_where_the_configuration_names_its_new_place(
    house: House, tmp_path: Path, capsys: Capture
) -> None:
    moved = Path(shutil.copytree(house.english, tmp_path / "moved"))
    tree = house.prepared.tree(tmp_path / "next", start_from=str(house.child))
    tree["sources"]["english"] = {"path": str(moved)}
    tree["phases"] = [{**tree["phases"][0], "name": "again", "steps": 3}]
    train(from_tree(tree))
    with away(house.english):
        status, good, bad = verify(capsys, tmp_path / "next")
    assert (status, bad) == (0, [])
    assert any(f"generation 1 of {moved}" in line for line in good)
    named = [line.split()[2] for line in good if line.startswith("ok        checkpoint ") and "@" in line]
    assert named == ["parent@12", "child@8"]


def test_of_a_source_on_a_store_the_list_of_shards_is_checked(house: House, tmp_path: Path, capsys: Capture) -> None:
    stored = Path(shutil.copytree(house.english, tmp_path / "stored"))
    tree: dict[str, Any] = house.prepared.tree(
        tmp_path / "run", cache={"path": str(tmp_path / "cache"), "size": "1 MB"}
    )
    tree["sources"] = {"english": {"path": f"file://{stored}"}}
    tree["phases"] = [{**tree["phases"][0], "steps": 3}]
    train(from_tree(tree))
    status, good, bad = verify(capsys, tmp_path / "run")
    assert (status, bad) == (0, [])
    assert any(line.endswith("shards; each is checked when it is fetched") for line in good)
    with away(stored / "shards.arrow"):
        status, _, bad = verify(capsys, tmp_path / "run")
    assert (status, len(bad)) == (2, 1)
    assert "source 'english', fingerprint" in bad[0]


@pytest.mark.parametrize("replay", [{"share": 0.25}, {"share": 0.25, "from_sources": {"english": 1}}])
@pytest.mark.parametrize("packing", ["cut", "best_fit"])
def test_a_replay_whose_shards_or_folder_are_gone_is_one_line_with_source_and_fingerprint(
    house: House, tmp_path: Path, capsys: Capture, replay: dict[str, Any], packing: str
) -> None:
    parent = tmp_path / "parent"
    tree = house.prepared.tree(parent, packing=packing)
    train(from_tree({**tree, "phases": [{**tree["phases"][0], "steps": 3}]}))
    tree = house.prepared.tree(tmp_path / "run", packing=packing, start_from=str(parent))
    if "from_sources" not in replay:
        del tree["sources"]["english"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**tree, "phases": [{**tree["phases"][1], "replay": replay}]}))
    fingerprint = load_lineage(parent).phases[0].sources[0].fingerprint[:12]
    gone = [shard_of(house.english)]
    if "from_sources" not in replay:
        gone.append(house.english)
    for missing in gone:
        file = str(tmp_path / "run.yaml")
        for words in (("train", file), ("train", file, "--dry-run"), ("data", "plan", file)):
            with away(missing):
                status, _, err = command_line(capsys, *words)
            assert status == 2
            line = err.splitlines()[-1]
            assert line.startswith("DataError: "), err
            assert "source 'english', fingerprint " + fingerprint in line
            assert str(missing) in line
    assert not (tmp_path / "run").exists()


def test_a_shard_that_goes_while_it_is_replayed_is_named_with_source_and_fingerprint(
    house: House, tmp_path: Path
) -> None:
    lineage = load_lineage(house.child)
    stream = PhaseStream(lineage, open_recorded)
    samples = np.arange(lineage.phases[-1].samples)
    fingerprint = lineage.phases[0].sources[0].fingerprint[:12]
    with away(shard_of(house.english)), pytest.raises(DataError) as caught:
        stream.read(samples)
    assert str(caught.value).startswith(
        f"reading source 'english', fingerprint {fingerprint}: {shard_of(house.english)}"
    )


def test_a_branch_off_the_middle_of_a_phase_holds(house: House, tmp_path: Path, capsys: Capture) -> None:
    tree = house.prepared.tree(tmp_path / "fork", start_from=f"{house.parent}@5")
    train(from_tree({**tree, "phases": [{**tree["phases"][1], "steps": 3}]}))
    lineage = load_lineage(tmp_path / "fork")
    assert lineage.ids[0] == open_checkpoint(checkpoint_path(house.parent, 5)).lineage.id
    assert lineage.ids[0] != load_lineage(house.parent).id
    status, good, bad = verify(capsys, tmp_path / "fork")
    assert (status, bad) == (0, [])
    assert f"checkpoint parent@5 of the branch after phase 'english': {checkpoint_path(house.parent, 5)}" in good[-1]


# ---------------------------------------------------------------------------------------------- releases and merges


@pytest.fixture(scope="module")
def trunk(house: House) -> Path:
    """A trunk at a constant rate, with a checkpoint every 3 steps; its runs and releases lie beside it."""
    run_dir = house.parent.parent / "trunk"
    tree = house.prepared.tree(run_dir, checkpoint={"every_steps": 3, "keep_last": None})
    constant = {"kind": "constant", "max_lr": 1e-3}
    phases = [{"name": "trunk", "mixture": {"english": 1}, "steps": 9, "schedule": constant}]
    train(from_tree({**tree, "phases": phases}))
    return run_dir


def checkpoints_in(good: list[str]) -> list[str]:
    """RUN@STEP of the other checkpoints that were found to hold, and where each was named."""
    return [line.split()[2] + " " + line.split()[5] for line in good if line.split()[1] == "checkpoint" and "@" in line]


def test_histories_hold_through_an_annealed_release_while_the_trunk_goes_on(
    house: House, trunk: Path, capsys: Capture
) -> None:
    out = trunk.with_name("annealed")
    arguments = ["release", f"{trunk}@6", "--anneal", str(3 * 12 * 32), "--out", str(out)]
    assert command_line(capsys, *arguments)[0] == 0
    status, good, bad = verify(capsys, out)
    assert (status, bad, checkpoints_in(good)) == (0, [], ["trunk@6 branch"])
    tree = house.prepared.tree(trunk, checkpoint={"every_steps": 3, "keep_last": None})
    more = [load([str(trunk / "config.yaml")]).phases[0], from_tree(tree).phases[1]]
    train(replace(load([str(trunk / "config.yaml")]), phases=tuple(more), sources=from_tree(tree).sources))
    for model in (out, trunk, f"{trunk}@trunk", f"{trunk}@3"):
        assert verify(capsys, model)[::2] == (0, [])
    assert checkpoints_in(verify(capsys, out)[1]) == ["trunk@6 branch"]


def test_histories_hold_through_a_merge_and_what_is_trained_on_from_it_and_from_the_trunk(
    house: House, trunk: Path, capsys: Capture
) -> None:
    merged, after, other = (trunk.with_name(name) for name in ("merged", "after", "other"))
    assert command_line(capsys, "release", f"{trunk}@9", "--merge", "last:3", "--out", str(merged))[0] == 0
    status, good, bad = verify(capsys, merged)
    three = [f"trunk@{step} merge" for step in (3, 6, 9)]
    assert (status, bad, checkpoints_in(good)) == (0, [], three)
    for run, start, steps in ((after, merged, 3), (other, f"{trunk}@6", 4)):
        tree = house.prepared.tree(run, start_from=str(start))
        train(from_tree({**tree, "phases": [{**tree["phases"][1], "steps": steps}]}))
    status, good, bad = verify(capsys, after)
    assert (status, bad, checkpoints_in(good)) == (0, [], [*three, "merged@9 branch"])
    status, good, bad = verify(capsys, other)
    assert (status, bad, checkpoints_in(good)) == (0, [], ["trunk@6 branch"])
    with changed(checkpoint_path(trunk, 3) / WEIGHTS):
        status, good, bad = verify(capsys, after)
        assert verify(capsys, other)[0] == 0, "which has nothing to do with it"
    assert (status, len(bad)) == (2, 1)
    assert bad[0].startswith("changed   checkpoint trunk@3 of the merge after phase 'trunk': ")
    assert checkpoints_in(good) == [*three[1:], "merged@9 branch"]
    with away(merged):
        status, out, _ = command_line(capsys, "lineage", str(after), "--verify")
    assert status == 0
    assert "unchecked checkpoint merged@9 of the branch" in out
