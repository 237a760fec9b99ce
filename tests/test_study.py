"""Studies: what is refused before anything is trained, what is trained once, and what the folder holds at the end."""

import copy
import json
import re
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Prepared
from runs import command_line, last_state, metrics, tensors
from studies import SCHEDULE, study_of, write_study

from megacl.checkpoint import checkpoint_path
from megacl.configfile import from_tree
from megacl.study import run_study
from megacl.study_config import load_study, study_tree
from megacl.study_tree import build_tree
from megacl.trainer import train

DONE = ["results.json", "results.md", "report.html"]


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in [*DONE, "study.yaml"]}


# ---------------------------------------------------------------------------------------------- a study that is done


@dataclass(frozen=True)
class Finished:
    folder: Path
    study: dict[str, Any]
    data: Path

    @property
    def results(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "results.json").read_text())
        return found

    def run_dirs(self, arm: str) -> list[Path]:
        """The last run directory of an arm, a seed each."""
        return [self.folder / "runs" / path[-1] for path in self.results["arms"][arm]["runs"]]


@pytest.fixture(scope="module")
def finished(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("studies")
    data = folder / "data"
    for name, source in prepared.sources.items():
        shutil.copytree(source, data / name)
    tree = study_of(prepared)
    tree["base"]["sources"] = {name: {"path": str(data / name)} for name in prepared.sources}
    assert run_study(write_study(folder / "small.yaml", tree), folder / "small", jobs=2) == "done"
    return Finished(folder / "small", tree, data)


def test_what_arms_have_in_common_is_trained_once_for_each_seed(finished):
    runs = sorted(path.parent.name + "/" + path.name[:-7] for path in (finished.folder / "runs").glob("*/*"))
    assert runs == [f"seed-{seed}/{phase}" for seed in (0, 1) for phase in ("english", "german-0", "german-25")]
    arms = finished.results["arms"]
    assert [path[0] for path in arms["replay-0"]["runs"]] == [path[0] for path in arms["replay-25"]["runs"]]


def test_an_arm_ends_bitwise_as_one_run_with_all_of_its_phases(finished, tmp_path):
    phases = [{"name": name, **finished.study["phases"][name]} for name in ("english", "german-25")]
    whole = from_tree({**finished.study["base"], "run_dir": str(tmp_path / "whole"), "seed": 1, "phases": phases})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the study's runs, of which there were two at a time
    train(whole)
    torch.set_num_threads(threads)
    assert last_state(finished.run_dirs("replay-25")[1]) == last_state(tmp_path / "whole")


def test_the_results_are_the_means_and_deviations_of_what_the_runs_recorded(finished):
    for arm in ("replay-0", "replay-25"):
        found = finished.results["arms"][arm]
        ends = [metrics(run, "evaluation")[-1]["sources"] for run in finished.run_dirs(arm)]
        starts = [metrics(run, "evaluation")[0]["sources"] for run in finished.run_dirs(arm)]
        assert found["tokens"] == 10 * 12 * 32
        for source in ("english", "german"):
            losses = [end[source]["loss"] for end in ends]
            assert found["sources"][source]["loss"]["values"] == losses
            assert found["sources"][source]["loss"]["mean"] == pytest.approx(statistics.fmean(losses))
            assert found["sources"][source]["loss"]["deviation"] == pytest.approx(statistics.stdev(losses))
            rises = [end[source]["loss"] - start[source]["loss"] for end, start in zip(ends, starts, strict=True)]
            assert found["sources"][source]["rise"]["values"] == pytest.approx(rises)
    (difference,) = [each for each in finished.results["differences"] if each["source"] == "german"]
    losses = [arm["sources"]["german"]["loss"]["values"] for arm in finished.results["arms"].values()]
    assert difference["values"] == [a - b for a, b in zip(*losses, strict=True)]


def test_each_bar_says_whether_it_is_held_and_a_control_whether_it_fails_as_it_must(finished):
    bars = finished.results["bars"]
    assert [(bar["state"], bar["as_meant"]) for bar in bars] == [("held", True), ("not held", True), ("held", True)]
    page = (finished.folder / "results.md").read_text()
    assert "not held, as it must be" in page
    assert "2.34 \\| 1.75" in page


def test_the_folder_alone_gives_the_same_results_again_without_data_and_elsewhere(finished, tmp_path):
    finished.data.rename(finished.data.with_name("gone"))
    try:
        before = contents(finished.folder)
        assert run_study(str(finished.folder / "study.yaml"), finished.folder) == "done"
        assert contents(finished.folder) == before
        moved = shutil.copytree(finished.folder, tmp_path / "moved")
        finished.folder.rename(finished.folder.with_name("away"))
        try:
            assert run_study(str(moved / "study.yaml"), moved) == "done"
        finally:
            finished.folder.with_name("away").rename(finished.folder)
        assert contents(moved) == before
    finally:
        finished.data.with_name("gone").rename(finished.data)


def test_the_page_says_what_was_found_what_was_asked_and_how_it_was_made(finished):
    page = (finished.folder / "report.html").read_text()
    assert "Does replay keep &lt;English&gt;?" in page
    assert "2 of 2 bars held · 1 of 1 controls fail as they must · budget: seconds" in page
    assert page.count('<tr class="good">') == 3
    loss = finished.results["arms"]["replay-25"]["sources"]["german"]["loss"]
    assert f'<td class="number">{loss["mean"]:.3f} ± {loss["deviation"]:.3f}</td>' in page
    assert "loss(&quot;replay-0&quot;, &quot;german&quot;) &lt; 0.1" in page
    assert "torch 2" in page
    assert not re.search(r"""(?:src|href)=["']https?:""", page.partition("Made anew")[0])
    figures = {f"figure-{kind}-{index}" for kind in ("end", "way") for index in (0, 1)}
    assert figures == set(re.findall(r'id="(figure-[a-z]+-[0-9])"', page))


def test_the_curves_are_means_over_seeds_where_all_were_evaluated(finished):
    page = (finished.folder / "report.html").read_text()
    data = re.search(r'id="figure-way-0">(.*?)</script>', page)
    lines = {trace["name"]: trace for trace in json.loads(data[1])["data"] if trace.get("name")}
    ends = json.loads(re.search(r'id="figure-end-0">(.*?)</script>', page)[1])
    assert ends["layout"]["yaxis"]["categoryarray"] == ["replay-25", "replay-0"]  # Plotly counts from below
    assert ends["layout"]["yaxis"]["dtick"] == 1  # a label an arm, however many there are
    records = [metrics(run, "evaluation") for run in finished.run_dirs("replay-0")]
    ends = [seed[-1]["sources"]["english"]["loss"] for seed in records]
    assert lines["replay-0"]["x"] == [0, 6 * 12 * 32, 10 * 12 * 32]
    assert lines["replay-0"]["y"][-1] == pytest.approx(statistics.fmean(ends))


def test_another_study_is_kept_out_of_the_folder(finished, tmp_path, capsys):
    path = write_study(tmp_path / "other.yaml", {**finished.study, "name": "other"})
    status, _, err = command_line(capsys, "study", path, "--out", str(finished.folder))
    assert status == 2
    assert "holds the study 'small', and this is 'other'" in err


def test_a_run_that_fails_ends_the_study_with_its_status_and_its_last_line(prepared, tmp_path, capsys):
    tree = study_of(prepared, seeds=[0], bars=[])
    tree["phases"]["english"]["schedule"] = {"kind": "constant", "max_lr": 1e30}
    tree["base"]["optimizer"] = {"max_grad_norm": None}
    path = write_study(tmp_path / "bad.yaml", tree)
    status, _, err = command_line(capsys, "study", path, "--out", str(tmp_path / "bad"), "--jobs", "1")
    last = err.rstrip().splitlines()[-1]
    assert status == 1
    assert last.startswith("RunFailedError: run seed-0/english-")
    assert "DivergedError: step" in last
    assert not (tmp_path / "bad" / "results.json").exists()
    assert not list((tmp_path / "bad" / "runs").glob("*/german*"))


# ---------------------------------------------------------------------------------------------- what is refused


def at(tree: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The tree with another value at "arms.replay-0.phases"."""
    tree = copy.deepcopy(tree)
    *keys, last = path.split("/")
    place: Any = tree
    for key in keys:
        place = place[int(key) if isinstance(place, list) else key]
    place[last] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("seeds", [0, 1, 0], "seeds names 0 twice"),
        ("seeds", [], "seeds is empty"),
        ("seeds", [-1], "seeds[0] is -1"),
        ("sedes", [0], "sedes is not a setting; did you mean seeds?"),
        ("arms", {}, "arms is empty"),
        ("arms/replay-0/phases", [], "arms.replay-0.phases is empty"),
        ("arms/replay-0/phases", ["english", "german"], "arms.replay-0.phases[1] is 'german', which is not in phases"),
        ("arms/replay-0/phases", ["english", "german-0", "english"], "arms.replay-0.phases names 'english' twice"),
        ("arms/replay-0/phases", ["english"], "phases.german-0 is in no arm"),
        ("arms/replay-0/seeds", [7], "arms.replay-0.seeds names 7, which is not in the study's seeds"),
        ("arms/replay-0/set", {"seed": 3}, "arms.replay-0.set.seed is given, which the study sets"),
        ("base/run_dir", "x", "base.run_dir is given, which the study sets"),
        ("base/sequence_length", 3, "arm 'replay-0': sequence_length is not a setting; did you mean seq_length?"),
        ("arms/replay-25/set", {"optimizer": {"beta1": 2}}, "arm 'replay-25': optimizer.beta1 is 2"),
        ("phases/german-25/replay/share", 1.5, "phases.german-25.replay.share is 1.5"),
        ("phases/german-25/name", "x", "phases.german-25.name is given"),
        ("phases/english/mixture", {"englich": 1}, "arm 'replay-0': phases[0].mixture names 'englich'"),
        ("phases/english/replay", {"share": 0.5}, "arm 'replay-0': phases[0].replay has nothing to replay"),
        ("phases/german-0/replay", {"share": 0.5, "from": {"x": 1}}, "arm 'replay-0': phases[1].replay.from names 'x'"),
        ("bars/0/holds", 'loss("replay-5", "german") < 1', "bars[0] (German is learned) names arm 'replay-5'"),
        ("bars/0/holds", 'loss("replay-0", "germen") < 1', "names source 'germen', which is not in base.sources"),
        ("bars/0/holds", "loss < 1", "bars[0].holds has loss; there may be"),
        ("arms/replay-0/release", {"anneal": 0}, "arms.replay-0.release.anneal is 0"),
        (
            "arms/replay-0/merge",
            {"last": 3, "every_steps": 2},
            "arm 'replay-0': merge is of 3 checkpoints, 2 steps apart, up to the end of phase 'german-0', which has 4",
        ),
        (
            "arms/replay-0/merge",
            {"last": 2, "every_steps": 2},
            "merge begins at step 2 of phase 'german-0', whose schedule, cosine, holds no constant rate",
        ),
        (
            "arms/replay-0/release",
            {"anneal": 400, "at": 5},
            "arm 'replay-0': release is at step 5 of phase 'german-0', which has 4",
        ),
        (
            "arms/replay-0/release",
            {"anneal": 400},
            "arm 'replay-0': release is at step 4 of phase 'german-0', whose schedule, cosine, holds no constant rate",
        ),
        ("base/sources/german/path", "/nowhere", "arm 'replay-0': "),
        ("base/model/vocab_size", 64, "arm 'replay-0': model.vocab_size is 64; it must be at least the tokenizer's"),
        ("phases/german-0/when_exhausted", "stop", "arm 'replay-0': phase 'german-0' ends after step"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_trained(prepared, tmp_path, capsys, path, value, words):
    tree = at(study_of(prepared), path, value)
    if value == "stop":
        tree["phases"]["german-0"].update(steps=100_000, schedule={**SCHEDULE, "warmup": "99990 steps"})
    file = write_study(tmp_path / "study.yaml", tree)
    status, out, err = command_line(capsys, "study", file, "--out", str(tmp_path / "out"))
    assert status == 2, err
    assert words in err
    assert len(err.splitlines()) == 1
    assert not out
    assert not (tmp_path / "out" / "runs").exists()
    assert not (tmp_path / "out" / "study.yaml").exists()


def test_two_arms_of_one_name_are_found_in_the_file(prepared, tmp_path, capsys):
    text = yaml.safe_dump(study_of(prepared), sort_keys=False).replace("  replay-25:", "  replay-0:")
    (tmp_path / "study.yaml").write_text(text)
    status, _, err = command_line(capsys, "study", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out"))
    assert (status, len(err.splitlines())) == (2, 1)
    assert "the key 'replay-0' stands twice" in err


def test_a_study_is_started_once_and_not_on_every_rank(prepared, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    file = write_study(tmp_path / "study.yaml", study_of(prepared))
    status, _, err = command_line(capsys, "study", file, "--out", str(tmp_path / "out"))
    assert (status, len(err.splitlines())) == (2, 1)
    assert "this is one of 4 ranks" in err


# ---------------------------------------------------------------------------------------------- the tree


def test_a_study_read_from_its_own_folder_is_the_same_study(prepared, tmp_path):
    tree = study_of(prepared)
    model = {"model": tree["base"].pop("model")}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(model))
    tree["base"] = [str(tmp_path / "model.yaml"), {"seq_length": 7}, tree["base"]]
    study = load_study(write_study(tmp_path / "study.yaml", tree))
    assert study.base["seq_length"] == 32
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(study_tree(study)))
    again = load_study(str(tmp_path / "again.yaml"))
    assert again == study
    assert [n.key for n in build_tree(again, tmp_path).nodes] == [n.key for n in build_tree(study, tmp_path).nodes]


def keys_of(prepared: Prepared, tmp_path: Path, **changes: Any) -> dict[tuple[str, int], list[str]]:
    study = load_study(write_study(tmp_path / "study.yaml", study_of(prepared, **changes)))
    tree = build_tree(study, tmp_path / "out")
    return {place: [node.key for node in path] for place, path in tree.paths.items()}


def test_phases_are_shared_only_between_arms_of_equal_settings(prepared, tmp_path):
    arms = {
        "replay-0": {"phases": ["english", "german-0"]},
        "same": {"phases": ["english", "german-25"], "set": {"optimizer": {"beta2": 0.95}, "seq_length": 32}},
        "other": {"phases": ["english", "german-25"], "set": {"optimizer": {"beta2": 0.99}}},
        "watched": {"phases": ["english", "german-25"], "set": {"logging": {"every_steps": 3}}},
    }
    keys = keys_of(prepared, tmp_path, arms=arms, bars=[])
    assert keys["same", 0][0] == keys["replay-0", 0][0]
    assert keys["same", 0] == keys["watched", 0]  # how a run is watched changes nothing in it
    assert not {*keys["other", 0]} & {*keys["same", 0]}
    assert not {*keys["same", 0]} & {*keys["same", 1]}


def test_a_setting_spelled_out_at_its_default_makes_no_other_run(prepared, tmp_path):
    spelled = study_of(prepared)
    spelled["base"] |= {"optimizer": {"beta1": 0.9}, "boundaries": "ignore", "cache": None, "stability": {"skip": 0}}
    spelled["phases"]["english"]["temperature"] = 1.0
    assert keys_of(prepared, tmp_path, **spelled) == keys_of(prepared, tmp_path)


def test_the_same_phase_after_another_one_is_another_run(prepared, tmp_path):
    arms = {
        "one": {"phases": ["english", "german-0", "german-25"]},
        "two": {"phases": ["english", "german-25", "german-0"]},
    }
    keys = keys_of(prepared, tmp_path, arms=arms, bars=[])
    assert keys["one", 0][0] == keys["two", 0][0]
    assert not {*keys["one", 0][1:]} & {*keys["two", 0][1:]}


def test_a_merge_makes_its_trunk_save_what_it_needs_and_nothing_else_does(prepared, tmp_path):
    arms = {
        "replay-0": {"phases": ["english", "german-0"]},
        "replay-25": {"phases": ["english", "german-25"]},
        "merged": {"phases": ["english"], "merge": {"last": 3, "every_steps": 2}},
        "more": {"phases": ["english"], "merge": {"last": 2, "every_steps": 3, "shape": "mean"}},
    }
    changed = at(study_of(prepared, arms=arms), "phases/english/schedule", {"kind": "constant", "max_lr": 1e-3})
    changed = at(changed, "base/checkpoint", {"every_steps": 5, "keep_every": 10})
    study = load_study(write_study(tmp_path / "study.yaml", changed))
    tree = build_tree(study, tmp_path / "out")
    trunk, release = tree.paths["merged", 0]
    trunk.config.check()
    assert tree.paths["replay-0", 0][0] is trunk
    assert (trunk.config.checkpoint.every_steps, trunk.config.checkpoint.keep_last) == (1, None)
    assert tree.paths["replay-0", 0][1].config.checkpoint.every_steps == 5
    assert release.command()[3:] == [
        *("release", str(trunk.run_dir), "--out", str(release.run_dir)),
        *("--merge", "2,4,6", "--shape", "linear"),
    ]


def test_an_arm_may_have_fewer_seeds_than_the_study(prepared, tmp_path):
    tree = at(study_of(prepared), "arms/replay-25/seeds", [1])
    study = load_study(write_study(tmp_path / "study.yaml", tree))
    assert [(arm, seed) for arm, seed in build_tree(study, tmp_path).paths] == [
        ("replay-0", 0),
        ("replay-0", 1),
        ("replay-25", 1),
    ]


# ---------------------------------------------------------------------------------------------- releases


def weights_of(run_dir: Path, step: int) -> dict[str, Any]:
    return tensors(checkpoint_path(run_dir, step))


@pytest.mark.long
def test_arms_that_end_in_a_release_are_made_off_the_trunk_that_goes_on_in_another_arm(prepared, tmp_path):
    constant = {"kind": "constant", "max_lr": 5e-3}
    per_step = 12 * 32
    tree = study_of(
        prepared,
        seeds=[0],
        phases={
            "trunk": {"mixture": {"english": 1}, "steps": 6, "schedule": constant},
            "on": {"mixture": {"german": 1}, "steps": 2, "schedule": {"kind": "constant", "max_lr": "last"}},
        },
        arms={
            "trunk": {"phases": ["trunk", "on"]},
            "released": {"phases": ["trunk"], "release": {"anneal": 2 * per_step, "at": 4, "shape": "cosine"}},
            "merged": {"phases": ["trunk"], "merge": {"last": 3, "every_steps": 2, "shape": "mean"}},
        },
        bars=[
            {"claim": "tokens", "holds": 'tokens("released") <= tokens("merged")'},
            {"claim": "a mean of early weights is worse than the last", "holds": 'rise("merged", "english") > 0'},
        ],
    )
    out = tmp_path / "out"
    assert run_study(write_study(tmp_path / "study.yaml", tree), out, jobs=2) == "done"
    results = json.loads((out / "results.json").read_text())
    assert {name: arm["tokens"] for name, arm in results["arms"].items()} == {
        "trunk": 8 * per_step,
        "released": 6 * per_step,
        "merged": 6 * per_step,
    }
    trunk, merged = (out / "runs" / name for name in results["arms"]["merged"]["runs"][0])
    kept = [weights_of(trunk, step) for step in (2, 4, 6)]
    for name, tensor in weights_of(merged, 6).items():
        np.testing.assert_allclose(tensor, sum(each[name] for each in kept) / 3, rtol=1e-5, atol=1e-7)
    loss = results["arms"]["merged"]["sources"]["english"]["loss"]["values"]
    assert loss == [metrics(merged, "evaluation")[-1]["sources"]["english"]["loss"]]
    assert [bar["state"] for bar in results["bars"]] == ["held", "held"]
