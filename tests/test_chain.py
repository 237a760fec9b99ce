"""A chain file: which jobs it makes, which waits for which, what is refused, what is left to do after a failure."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Prepared
from runs import command_line

from megacl.configfile import from_tree, shipped
from megacl.errors import ConfigError
from megacl.slurm.chain import ChainJob, left_to_do, plan_chain
from megacl.slurm.chain_config import load_chain
from megacl.trainer import train


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    schedule = {"kind": "cosine", "max_lr": 1e-3}
    run = {
        "run_dir": "runs/demo",
        "sources": {"english": {"path": "data/english"}, "german": {"path": "data/german"}},
        "seq_length": 32,
        "global_batch_size": 4,
        "model": {"vocab_size": 640, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2},
        "phases": [
            {"name": "english", "mixture": {"english": 1}, "steps": 2, "schedule": schedule},
            {"name": "german", "mixture": {"german": 1}, "steps": 2, "schedule": schedule},
        ],
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    return tmp_path


def prepare(language: str, **changes: Any) -> dict[str, Any]:
    return {"inputs": [f"raw/{language}"], "tokenizer": "t.model", "out": f"data/{language}", **changes}


# In an order that nobody would write, so that the order of the jobs is the paths' doing.
STEPS: dict[str, Any] = {
    "page": {"report": {"runs": ["runs/demo", "runs/october"], "out": "report.html"}},
    "hf": {"convert": {"source": "runs/october", "out": "exports/october", "options": ["--dtype", "bfloat16"]}},
    "quality": {"evaluate": {"run": "runs/demo"}},
    "october": {"release": {"run": "runs/demo@german", "out": "runs/october", "anneal": "5%", "min_lr": 1e-5}},
    "model": {"train": ["run.yaml", "seed=3"]},
    "english": {"prepare": prepare("english", tasks=3, at_once=2)},
    "german": {"prepare": prepare("german", options=["--field", "content"])},
}


def plan(steps: dict[str, Any], **changes: Any) -> list[ChainJob]:
    Path("chain.yaml").write_text(yaml.safe_dump({"folder": "chain", "steps": steps, **changes}, sort_keys=False))
    return plan_chain(load_chain("chain.yaml"))


def after(jobs: list[ChainJob]) -> dict[str, set[str]]:
    return {job.name: set(job.after) for job in jobs}


@pytest.mark.usefixtures("here")
def test_jobs_follow_from_what_steps_read_and_make_whatever_their_order_in_the_file() -> None:
    jobs = plan(STEPS)
    assert after(jobs) == {
        "english.tasks": set(),
        "english.merge": {"english.tasks"},
        "german": set(),
        "model.english": {"english.merge", "german"},
        "model.german": {"model.english"},
        "quality.english": {"model.english"},
        "quality.german": {"model.german"},
        "october": {"model.german"},
        "hf": {"october"},
        "page": {"model.german", "october"},
    }
    names = [job.name for job in jobs]
    assert all(names.index(first) < names.index(job.name) for job in jobs for first in job.after)


def test_each_job_is_a_command_of_megacls(here: Path) -> None:
    jobs = {job.name: job for job in plan(STEPS)}
    words = {name: " ".join(job.command) for name, job in jobs.items()}
    assert words["english.tasks"] == "prepare raw/english --tokenizer t.model --out data/english"
    assert (jobs["english.tasks"].array, jobs["english.tasks"].at_once) == ((1, 2, 3), 2)
    assert words["english.merge"] == "data merge data/english"
    assert words["german"] == "prepare raw/german --tokenizer t.model --out data/german --field content"
    assert words["model.english"] == "train --until-phase english"
    assert words["quality.german"] == f"evaluate runs/demo@german --out {here}/runs/demo/evaluations/german.json"
    assert words["october"] == "release runs/demo@german --out runs/october --anneal 5% --min-lr 1e-05"
    assert words["hf"] == "convert runs/october exports/october --to hf --dtype bfloat16"
    assert words["page"] == "report runs/demo runs/october --out report.html"
    config = jobs["model.german"].config
    assert config is not None
    assert config.seed == 3


@pytest.mark.usefixtures("here")
def test_after_adds_what_the_paths_do_not_say() -> None:
    steps = {
        "model": {"train": ["run.yaml"], "after": ["english"]},
        "english": {"prepare": prepare("other", tasks=2)},
        "late": {"report": {"runs": ["elsewhere"], "out": "r.html"}, "after": ["model.english", "all"]},
        "all": {"evaluate": {"run": "runs/demo"}},
    }
    found = after(plan(steps))
    assert found["model.english"] == {"english.merge"}
    assert found["model.german"] == {"model.english"}
    assert found["late"] == {"model.english", "all.english", "all.german"}


@pytest.mark.usefixtures("here")
def test_a_step_has_the_chains_settings_of_the_cluster_under_its_own() -> None:
    steps = {"one": {"train": ["run.yaml"], "cluster": {"nodes": 4, "environment": {"A": "2"}}}}
    job = plan(steps, cluster={"time": "1:00:00", "nodes": 2, "environment": {"A": "1", "B": "1"}})[0]
    assert job.cluster == {"time": "1:00:00", "nodes": 4, "environment": {"A": "2", "B": "1"}}


HELD_OUT = ["--validation", "0.2"]
TRAIN = {"train": ["run.yaml"]}
REPORT = {"report": {"runs": ["r"], "out": "r.html"}}


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ({}, "steps is empty"),
        ({"a b": TRAIN}, "steps.'a b' is no name for a step"),
        ({"a": {}}, "steps.a says nothing to do; give it exactly one of prepare, train"),
        ({"a": {**TRAIN, **REPORT}}, "steps.a has train and report"),
        ({"a": {**TRAIN, "after": ["b"]}, "bb": REPORT}, "steps.a.after names 'b', which is no step"),
        ({"a": {"tain": ["run.yaml"]}}, "steps.a.tain is not a setting; did you mean steps.a.train?"),
        ({"a": {"train": []}}, "steps.a.train is []"),
        ({"a": {"train": ["no.yaml"]}}, "steps.a: no.yaml: no such file"),
        ({"a": {"train": ["run.yaml", "seq_length=x"]}}, "steps.a: seq_length is 'x'"),
        ({"a": TRAIN, "b": {"train": ["run.yaml", "seed=1"]}}, "steps.a and steps.b both make"),
        ({"a": {"prepare": prepare("x")}, "b": {"prepare": prepare("x", tasks=4)}}, "both make"),
        ({"a": {**REPORT, "after": ["b"]}, "b": {**TRAIN, "after": ["a"]}}, "a waits for b.german"),
        ({"a": {**REPORT, "after": ["a"]}}, "these steps wait for one another: a waits for a"),
        ({"a": {"release": {"run": "r", "out": "o"}}}, "steps.a.release takes either anneal or merge"),
        ({"a": {"release": {"run": "r", "out": "o", "anneal": 1e6, "shape": "mean"}}}, "steps.a.release.shape is mean"),
        ({"a": {"release": {"run": "r", "out": "o", "anneal": 1e6, "shape": "bent"}}}, "steps.a.release.shape"),
        ({"a": {"prepare": prepare("x", tasks=0)}}, "steps.a.prepare.tasks is 0"),
        ({"a": {"report": {"runs": [], "out": "x"}}}, "steps.a.report.runs is []"),
    ],
)
def test_what_is_wrong_with_a_chain_is_said_in_one_line(here: Path, steps: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        plan(steps)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_done_is_left_out_and_what_follows_on_what_is_not_is_made_again(
    prepared: Prepared, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "run.yaml").write_text(yaml.safe_dump(prepared.tree(Path("runs/demo"), global_batch_size=2)))
    steps = {
        "words": {"prepare": prepare("words", inputs=[str(prepared.documents["german"])], tasks=2, options=HELD_OUT)},
        "model": {"train": ["run.yaml"], "after": ["words"]},
        "quality": {"evaluate": {"run": "runs/demo"}},
        "page": {"report": {"runs": ["runs/demo"], "out": "report.html"}},
    }
    steps["words"]["prepare"]["tokenizer"] = str(prepared.tokenizer)
    jobs = plan(steps)
    before = {job.name: job.command for job in jobs}
    assert left_to_do(jobs, {}) == jobs

    command = jobs[0].command
    assert command_line(capsys, *command, "--task", "2/2", "--workers", "1")[0] == 0
    assert left_to_do(jobs, before)[0].array == (1,)
    assert left_to_do(jobs, {})[0].array == (1, 2)  # nothing is known of how they were made
    assert command_line(capsys, *command, "--task", "1/2", "--workers", "1")[0] == 0
    assert [job.name for job in left_to_do(jobs, before)] == [job.name for job in jobs[1:]]
    assert left_to_do(jobs, before)[0].after == ()
    assert command_line(capsys, "data", "merge", "data/words")[0] == 0
    assert [job.name for job in left_to_do(jobs, before)] == [job.name for job in jobs[2:]]

    train(from_tree(prepared.tree(here / "runs/demo", global_batch_size=2)), until_phase="english")
    assert [job.name for job in left_to_do(jobs, before)] == [
        "model.german", "quality.english", "quality.german", "page",
    ]  # fmt: skip
    Path("runs/demo/evaluations").mkdir()
    for name in ("english", "german"):
        Path(f"runs/demo/evaluations/{name}.json").touch()
    Path("report.html").touch()
    assert [job.name for job in left_to_do(jobs, before)] == ["model.german", "quality.german", "page"]
    train(from_tree(prepared.tree(here / "runs/demo", global_batch_size=2)))
    assert left_to_do(jobs, before) == []
    changed = {**before, "page": ("report", "runs/other", "--out", "report.html")}
    assert [job.name for job in left_to_do(jobs, changed)] == ["page"]


def test_a_conversion_or_a_release_over_something_else_is_refused(here: Path) -> None:
    jobs = plan({name: STEPS[name] for name in ("october", "hf")})
    before = {job.name: job.command for job in jobs}
    Path("runs/october/jobs").mkdir(parents=True)  # of an earlier submission
    assert left_to_do(jobs, {}) == jobs
    Path("exports/october").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"steps\.hf: .*exports/october is there, and this step did not make it"):
        left_to_do(jobs, {})
    Path("runs/october/config.yaml").touch()
    with pytest.raises(ConfigError, match=r"steps\.october: .*runs/october/config.yaml is there"):
        left_to_do(jobs[:1], {})
    assert [job.name for job in left_to_do(jobs[:1], before)] == ["october"]  # it goes on


@pytest.mark.parametrize("path", sorted((shipped("configs") / "chain").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_chain_that_comes_with_megacl_is_read_and_laid_out(path: Path) -> None:
    assert len(plan_chain(load_chain(f"chain/{path.name}"))) > 5
