"""`megacl checkpoint`: what its verbs say and do."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Prepared
from runs import command_line, last_state
from safetensors.numpy import load_file

from megacl.checkpoint import list_checkpoints, mark_of, open_checkpoint, step_of, verify_checkpoint
from megacl.checkpoint_names import changing_names
from megacl.configfile import from_tree
from megacl.publish import alone_in, name_beside
from megacl.trainer import train

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints at 10, 12 (a phase's end), 15 and 20 (the other's)."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    train(from_tree(prepared.tree(run_dir, evaluation={"every_steps": 5, "sequences": 4})))
    return run_dir


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def steps(run_dir: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(run_dir)]


def test_list_says_where_each_checkpoint_stands_and_why_it_is_kept(copy: Path, capsys: Capture) -> None:
    assert command_line(capsys, "checkpoint", "keep", f"{copy}@10", "--as", "october")[0] == 0
    (copy / "checkpoints" / "step-00000015" / "lineage.json").write_text("{")
    (copy / "checkpoints" / "step-00000015" / "state.json").write_text("{")
    status, out, err = command_line(capsys, "checkpoint", "list", str(copy))
    assert (status, err) == (0, "")
    rows = [re.split(r"  +", line.strip()) for line in out.splitlines()]
    assert rows[0] == ["step", "phase", "tokens", "bytes", "mean loss", "names", "kept"]
    assert [row[:3] for row in rows[1:]] == [
        ["10", "english", f"{10 * 12 * 32:,}"],
        ["12", "english", f"{12 * 12 * 32:,}"],
        ["15", "?", "?"],
        ["20", "german", f"{20 * 12 * 32:,}"],
    ]
    assert [row[5:] for row in rows[1:]] == [
        ["october", "named october; last 2"],
        ["-", "phase end"],
        ["-", "cannot be read"],
        ["-", "newest; phase end; to go back to"],
    ]
    records = map(json.loads, (copy / "metrics.jsonl").read_text().splitlines())
    last = next(record for record in records if record["kind"] == "evaluation" and record["step"] == 20)
    losses = [result["loss"] for result in last["sources"].values()]
    assert rows[4][4] == f"{sum(losses) / len(losses):.4f}"
    weights = sum(file.stat().st_size for file in (copy / "checkpoints" / "step-00000010").iterdir())
    assert rows[1][3] == f"{weights:,}"


def test_verify_names_every_damaged_file_of_a_run(copy: Path, capsys: Capture) -> None:
    status, out, err = command_line(capsys, "checkpoint", "verify", str(copy), f"{copy}@german")
    assert (status, out.count("every file is as its manifest says"), err) == (0, 5, "")
    ten, twelve, fifteen, _ = list_checkpoints(copy)
    (ten / "lineage.json").unlink()
    (ten / "state.json").write_bytes(b"")
    (twelve / "manifest.json").unlink()
    weights = next(fifteen.glob("weights*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    status, out, err = command_line(capsys, "checkpoint", "verify", str(copy))
    assert status == 2
    assert f"{ten / 'lineage.json'}: missing\n" in out
    assert f"{ten / 'state.json'}: has 0 bytes of" in out
    assert f"{twelve / 'manifest.json'}: cannot be read" in out
    assert f"{weights}: its content has changed (XXH3)\n" in out
    assert out.count("every file is as its manifest says") == 1
    assert err.startswith("CheckpointError: 3 of 4 checkpoints are damaged; ")
    assert err.count("\n") == 1


def test_a_checkpoint_gets_a_name_once_it_is_verified_and_the_name_means_it(copy: Path, capsys: Capture) -> None:
    status, out, _ = command_line(capsys, "checkpoint", "keep", f"{copy}@english", "--as", "base-1")
    assert (status, out) == (0, f"{copy}@base-1 is step 12, and stays\n")
    assert command_line(capsys, "checkpoint", "keep", str(copy), "--as", "newest-1")[1].endswith(
        "is step 20, and stays\n"
    )
    lines = command_line(capsys, "lineage", f"{copy}@base-1")[1].splitlines()
    assert lines[-1] == f"{12 * 12 * 32:,} tokens in all"
    status, out, _ = command_line(capsys, "checkpoint", "forget", f"{copy}@base-1")
    assert (status, out) == (0, f"{copy}@base-1 was step 12; the name is free\n")
    status, _, err = command_line(capsys, "lineage", f"{copy}@base-1")
    assert status == 2
    assert "no checkpoint ends a phase 'base-1'; finished: english, german; named: newest-1." in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["keep", "{run}@10", "--as", "german"], "'german' is the name of a phase of {run}, whose end {run}@german"),
        (["keep", "{run}@11", "--as", "x"], "has no checkpoint at step 11"),
        (["keep", "{damaged}", "--as", "x"], "this checkpoint is damaged"),
        (["keep", "{alone}", "--as", "x"], "stands in no run directory"),
        (["forget", "{run}"], "it must be RUN@NAME"),
        (["forget", "{run}@x"], "none of its checkpoints has a name"),
        (["list", "{run}/checkpoints"], "no run directory, it has no config.yaml"),
        (["verify", "{run}/nothing"], "no such run or checkpoint"),
        (["prune", "{run}", "--keep-best", "1", "--source", "french"], "it has no evaluation of 'french'"),
        (["prune", "{run}", "--source", "german"], "give --keep-best too"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_changes_nothing(
    copy: Path, capsys: Capture, arguments: list[str], message: str
) -> None:
    damaged = copy / "checkpoints" / "step-00000015"
    alone = copy.parent / "step-00000020"
    shutil.copytree(copy / "checkpoints" / "step-00000020", alone)
    (damaged / "state.json").write_text("{}")
    places = {"run": copy, "damaged": damaged, "alone": alone}
    before = steps(copy)
    status, out, err = command_line(capsys, "checkpoint", *(each.format(**places) for each in arguments))
    assert (status, out) == (2, "")
    assert message.format(**places) in err
    assert err.count("\n") == 1
    assert steps(copy) == before
    assert not (copy / "checkpoints" / "names.json").exists()


def test_prune_says_what_goes_and_then_it_goes(copy: Path, capsys: Capture) -> None:
    status, out, _ = command_line(capsys, "checkpoint", "prune", str(copy), "--keep-last", "1", "--dry-run")
    assert status == 0
    assert out.startswith(f"would delete {copy}/checkpoints/step-00000010, ")
    assert steps(copy) == [10, 12, 15, 20]
    with alone_in(copy, "a test"):
        status, _, err = command_line(capsys, "checkpoint", "prune", str(copy), "--keep-last", "1")
    assert (status, steps(copy)) == (2, [10, 12, 15, 20])
    assert re.search(r"a run, which prunes its checkpoints itself, is at work there \(.*\); wait for it, or", err)
    status, out, _ = command_line(capsys, "checkpoint", "prune", str(copy), "--keep-last", "1")
    assert (status, steps(copy)) == (0, [12, 15, 20])
    assert out.splitlines()[-1].startswith(f"{copy}: 1 checkpoint(s), ")
    assert command_line(capsys, "checkpoint", "prune", str(copy))[1] == f"{copy}: 0 checkpoint(s), 0 bytes\n"


def test_prune_sweeps_what_a_kill_left(copy: Path, capsys: Capture) -> None:
    left = name_beside(copy / "checkpoints" / "step-00000005")
    left.mkdir()
    (left / "state.json").write_text("{}")
    command_line(capsys, "checkpoint", "prune", str(copy), "--dry-run")
    assert left.exists()
    assert command_line(capsys, "checkpoint", "prune", str(copy))[0] == 0
    assert not left.exists()


def test_a_checkpoint_gets_a_name_while_its_run_is_going_on(copy: Path, capsys: Capture) -> None:
    with alone_in(copy, "a test"):
        assert command_line(capsys, "checkpoint", "keep", f"{copy}@10", "--as", "october")[0] == 0
    assert command_line(capsys, "checkpoint", "prune", str(copy), "--keep-last", "1")[0] == 0
    assert steps(copy) == [10, 12, 15, 20]


def test_prune_says_what_it_could_not_do(copy: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "checkpoints" / ".step-00000003.0123456789abcdef.tmp").mkdir()
    prune = ("checkpoint", "prune", str(copy), "--keep-last", "1")
    with changing_names(copy):
        status, out, err = command_line(capsys, *prune)
    assert (status, out, steps(copy)) == (2, "", [10, 12, 15, 20])
    assert "a command that names or prunes checkpoints is at work there" in err

    def refuse(source: Path, to: Path) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr("os.rename", refuse)
        status, out, err = command_line(capsys, *prune)
    assert (status, out, steps(copy)) == (2, "", [10, 12, 15, 20])
    assert err.splitlines() == [
        f"warning: {copy}/checkpoints/step-00000010: cannot be deleted: Permission denied",
        f"DataError: {copy}: 1 checkpoint(s) cannot be deleted; each is named above.",
    ]
    assert not list((copy / "checkpoints").glob(".*.tmp"))


def test_prune_keeps_the_best_by_a_source(copy: Path, capsys: Capture) -> None:
    arguments = ["prune", str(copy), "--keep-last", "1", "--keep-best", "4", "--source", "english", "--dry-run"]
    assert command_line(capsys, "checkpoint", *arguments)[1].startswith(f"{copy}: 0 checkpoint(s)")
    out = command_line(capsys, "checkpoint", *arguments[:2], "--keep-last", "1", "--keep-every", "10", "--dry-run")[1]
    assert out == f"{copy}: 0 checkpoint(s), 0 bytes\n"


def test_prune_never_deletes_the_newest_good_checkpoint(copy: Path, capsys: Capture) -> None:
    for path in list_checkpoints(copy)[2:]:
        next(path.glob("weights*.safetensors")).write_bytes(b"")
    for path in list_checkpoints(copy)[1:2]:
        shutil.rmtree(path)
    status, _, err = command_line(capsys, "checkpoint", "prune", str(copy), "--keep-last", "1")
    assert (status, steps(copy)) == (0, [10, 15, 20])
    assert err.count("warning: passing over a damaged checkpoint") == 2


# ---------------------------------------------------------------------------------------------- diff


def test_diff_says_which_settings_state_history_and_tensors_differ(
    prepared: Prepared, run: Path, tmp_path: Path, capsys: Capture
) -> None:
    tree = prepared.tree(tmp_path / "other", evaluation={"sequences": 4})
    tree["optimizer"] = {"beta2": 0.99}
    tree["phases"] = [{**tree["phases"][0], "steps": 10}]
    train(from_tree(tree))
    capsys.readouterr()
    status, out, err = command_line(capsys, "checkpoint", "diff", f"{run}@10", str(tmp_path / "other"))
    assert (status, err) == (0, "")
    lines = [re.split(r"  +", line.strip()) for line in out.splitlines()]
    assert ["A: " + str(list_checkpoints(run)[0])] in lines
    assert ["optimizer.beta2", "0.95", "0.99"] in lines
    assert ["phases[0].steps", "12", "10"] in lines
    assert ["phases[1].name", "german", "-"] in lines
    assert ["phase_end", "False", "True"] in lines
    assert ["lineage: the first 0 entries are the same"] in lines
    assert any(line[0].startswith(f"B: phase 'english' of run other, {10 * 12 * 32:,} tokens") for line in lines)

    ours = tensors_of(list_checkpoints(run)[0])
    theirs = tensors_of(list_checkpoints(tmp_path / "other")[-1])
    assert [f"tensors: {len(ours)} compared, {len(ours)} differ"] in lines
    names = [f"exp_avg_sq.layers.{layer}.mlp.up.weight" for layer in (0, 1)]
    absolute = [np.abs(ours[name] - theirs[name]).max() for name in names]
    largest = [max(np.abs(ours[name]).max(), np.abs(theirs[name]).max()) for name in names]
    relative = max(one / other for one, other in zip(absolute, largest, strict=True))
    row = next(line for line in lines if line[0] == "exp_avg_sq.layers.*.mlp.up.weight")
    assert row[1:] == ["2", "2", f"{max(absolute):.3g}", f"{relative:.3g}"]


def test_of_a_checkpoint_and_its_copy_nothing_differs(copy: Path, run: Path, capsys: Capture) -> None:
    out = command_line(capsys, "checkpoint", "diff", f"{run}@10", f"{copy}@10")[1].splitlines()
    compared = len(tensors_of(list_checkpoints(run)[0]))
    assert out[2:] == [
        "config: the same",
        "state: the same",
        "lineage: the same, 1 entries",
        f"tensors: {compared} compared, 0 differ",
    ]


def test_diff_names_tensors_that_one_of_them_lacks_and_shapes_that_differ(
    prepared: Prepared, run: Path, tmp_path: Path, capsys: Capture
) -> None:
    tree = prepared.tree(tmp_path / "other", evaluation={"sequences": 4})
    tree["model"] |= {"hidden_size": 16, "num_layers": 3}
    tree["phases"] = [{**tree["phases"][0], "steps": 3}]
    train(from_tree(tree))
    capsys.readouterr()
    status, out, _ = command_line(capsys, "checkpoint", "diff", str(run), str(tmp_path / "other"))
    assert status == 0
    assert "tensors: embed.weight is [640, 32] in A and [640, 16] in B\n" in out
    alone = next(line for line in out.splitlines() if "in B alone" in line)
    assert re.match(r"tensors: \d+ in B alone: \S*layers\.2\.", alone)


def tensors_of(checkpoint: Path) -> dict[str, np.ndarray]:
    return {name: value for file in checkpoint.glob("*.safetensors") for name, value in load_file(file).items()}


# ---------------------------------------------------------------------------------------------- export


def test_exported_weights_are_a_checkpoint_that_stands_alone(
    prepared: Prepared, run: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "english"
    status, said, _ = command_line(capsys, "checkpoint", "export", f"{run}@english", str(out))
    (twelve,) = (path for path in list_checkpoints(run) if step_of(path) == 12)
    sizes = [sum(file.stat().st_size for file in path.iterdir()) for path in (out, twelve)]
    assert (status, said) == (0, f"{out}: the weights of {twelve}, {sizes[0]:,} bytes of {sizes[1]:,}\n")
    assert sizes[0] < sizes[1] * 0.4
    assert verify_checkpoint(out) == []
    assert mark_of(open_checkpoint(out)) == mark_of(open_checkpoint(twelve))
    ours, theirs = tensors_of(out), tensors_of(twelve)
    assert set(ours) == {name for name in theirs if not name.startswith("exp_avg")}
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert command_line(capsys, "checkpoint", "export", str(run), str(out))[::2] == (
        2,
        f"ConfigError: {out}: is there already; name another folder.\n",
    )

    found = [json.loads(command_line(capsys, "evaluate", str(each), "--json")[1])["sources"] for each in (out, twelve)]
    assert found[0] == found[1]
    continued = []
    for name, start in (("a", str(out)), ("b", f"{run}@english")):
        tree = prepared.tree(tmp_path / name, start_from=start, evaluation={"sequences": 2})
        tree["phases"] = [{**tree["phases"][1], "steps": 4, "optimizer_state": "reset"}]
        train(from_tree(tree))
        continued.append(last_state(tmp_path / name))
    assert continued[0] == continued[1]


def test_an_export_that_cannot_be_made_as_it_is_meant_is_refused_in_one_line_and_leaves_nothing(
    run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    inside = tmp_path / "file" / "out"
    status, _, said = command_line(capsys, "checkpoint", "export", f"{run}@english", str(inside))
    assert (status, said.count("\n")) == (2, 1)
    assert said.startswith(f"DataError: {inside}: cannot write a checkpoint: not a directory.")

    def copy_wrongly(source: Path, copy: Path) -> None:
        copy.write_bytes(source.read_bytes()[:-1] + b"!")

    monkeypatch.setattr(shutil, "copyfile", copy_wrongly)
    status, _, said = command_line(capsys, "checkpoint", "export", f"{run}@english", str(tmp_path / "out"))
    assert (status, said.count("\n")) == (2, 1)
    assert "its copy is not as the manifest says" in said
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_release_and_a_run_that_keeps_moments_begin_anew_from_exported_weights(
    prepared: Prepared, tmp_path: Path, capsys: Capture
) -> None:
    schedule = {"kind": "constant", "max_lr": 5e-3, "warmup": "1 steps"}
    tree = prepared.tree(tmp_path / "trunk", evaluation={"sequences": 2}, checkpoint={"every_steps": 4})
    tree["phases"] = [{**tree["phases"][0], "steps": 12, "schedule": schedule}]
    train(from_tree(tree))
    out = tmp_path / "weights"
    assert command_line(capsys, "checkpoint", "export", f"{tmp_path / 'trunk'}@8", str(out))[0] == 0
    release = ["release", str(out), "--anneal", "1500", "--out", str(tmp_path / "released")]
    status, said, _ = command_line(capsys, *release, "--dry-run")
    assert status == 0
    (line,) = [line for line in said.splitlines() if "optimizer" in line and line.startswith("warning:")]
    assert line.endswith(f"and {out} has no optimizer's state: it begins anew")
    assert command_line(capsys, *release)[0] == 0
    assert open_checkpoint(list_checkpoints(tmp_path / "released")[-1]).lineage.phases[-1].optimizer_state == "new"
