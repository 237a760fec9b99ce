"""Runs that start from somebody else's model: a Pythia-shaped one in Hugging Face's files goes on in German."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Prepared
from runs import command_line, last_state, losses, metrics

from megacl.checkpoint import list_checkpoints, open_checkpoint
from megacl.configfile import from_tree
from megacl.convert.conversion import convert
from megacl.errors import ConfigError, DataError
from megacl.lineage import BranchRecord, ConversionRecord, load_lineage
from megacl.publish import sha256_of
from megacl.starting import completed, foreign_format, open_start
from megacl.trainer import train
from tests.test_guard import BACK
from tests.test_guard import train as train_wrongly

transformers = pytest.importorskip("transformers")
Capture = pytest.CaptureFixture[str]

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 640


@pytest.fixture(scope="module")
def pythia(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of transformers' own with the shape of a small Pythia, its weights drawn, and the tokenizer beside it."""
    folder = tmp_path_factory.mktemp("pythia")
    config = transformers.GPTNeoXConfig(
        vocab_size=ROWS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        initializer_range=0.05,
    )
    torch.manual_seed(5)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    shutil.copy(prepared.tokenizer, folder)
    return folder


def tree(prepared: Prepared, run_dir: Path, pythia: Path, **changes: Any) -> dict[str, Any]:
    """16 steps of German, from the folder, with neither model nor tokenizer named."""
    schedule = {"kind": "cosine", "max_lr": 5e-3, "warmup": "2 steps"}
    phase = {"name": "german", "mixture": {"german": 1}, "steps": 16, "schedule": schedule}
    settings = prepared.tree(run_dir, start_from=str(pythia), phases=[phase], **changes)
    if "model" not in changes:
        del settings["model"]
    return settings


@pytest.fixture(scope="module")
def german(prepared: Prepared, pythia: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, to its end."""
    run_dir = tmp_path_factory.mktemp("runs") / "german"
    assert train(from_tree(completed(tree(prepared, run_dir, pythia)))) == "done"
    return run_dir


def test_an_opened_model_travels_to_another_process(pythia: Path) -> None:
    before = open_start(str(pythia), pytest.fail)
    after = pickle.loads(pickle.dumps(before))
    name = "layers.0.attention.qkv.weight"
    assert torch.equal(before.load_weights()(name), after.load_weights()(name))
    assert after.lineage.id == before.lineage.id


def test_a_folder_of_transformers_goes_on_in_german(german: Path, pythia: Path) -> None:
    start, end = metrics(german, "evaluation")
    assert start["at"] == "start"
    assert end["sources"]["german"]["loss"] < start["sources"]["german"]["loss"] - 0.5
    config = open_checkpoint(list_checkpoints(german)[-1]).config
    assert config.model.form == "gpt_neox"
    assert config.model.vocab_size == ROWS
    assert config.tokenizer is not None
    assert config.tokenizer.path == str(pythia / "tokenizer.model")


def test_it_begins_with_the_loss_that_transformers_has(german: Path, pythia: Path, prepared: Prepared) -> None:
    from megacl.data.source import open_source
    from megacl.evaluate import evaluate_sources
    from megacl.parallel.ranks import Ranks

    model = transformers.AutoModelForCausalLM.from_pretrained(pythia).eval()

    class Theirs:
        """As much of an engine as an evaluation asks for."""

        vocab_size = ROWS

        def nats(self, tokens: Any, targets: Any) -> float:
            with torch.no_grad():
                logits = model(torch.from_numpy(tokens)).logits
            flat = torch.from_numpy(targets).flatten()
            return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), flat, reduction="sum"))

    sources = {"german": open_source(prepared.sources["german"])}
    found = evaluate_sources(Theirs(), Ranks(), sources, seq_length=32, micro_batch_size=8, sequences=8)  # type: ignore[arg-type]
    ours = metrics(german, "evaluation")[0]["sources"]["german"]["loss"]
    assert ours == pytest.approx(found["german"].loss, rel=1e-6)


def test_its_history_begins_with_the_conversion(german: Path, pythia: Path, capsys: Capture) -> None:
    lineage = load_lineage(german)
    (conversion,) = lineage.events
    assert isinstance(conversion, ConversionRecord)
    assert (conversion.after, conversion.from_, conversion.to, conversion.name) == (0, "hf", "megacl", pythia.name)
    assert conversion.files["model.safetensors"] == sha256_of(pythia / "model.safetensors")
    assert [phase.name for phase in lineage.phases] == ["german"]
    assert lineage.phases[0].optimizer_state == "new"
    status, out, _ = command_line(capsys, "lineage", str(german), "--verify")
    assert status == 0, out
    status, out, _ = command_line(capsys, "evaluate", str(german))
    assert status == 0
    assert out.count("german") > 1


def test_it_trains_as_from_the_model_converted_into_a_checkpoint(
    german: Path, pythia: Path, prepared: Prepared, tmp_path: Path
) -> None:
    convert(pythia, tmp_path / "checkpoint", to="megacl")
    assert foreign_format(str(tmp_path / "checkpoint")) is None
    settings = completed(tree(prepared, tmp_path / "run", pythia))
    train(from_tree({**settings, "start_from": str(tmp_path / "checkpoint")}))
    assert losses(tmp_path / "run") == losses(german)
    assert last_state(tmp_path / "run") == last_state(german)
    assert [type(event) for event in load_lineage(tmp_path / "run").events] == [ConversionRecord, BranchRecord]


def test_a_resume_is_exact(german: Path, pythia: Path, prepared: Prepared, tmp_path: Path) -> None:
    settings = completed(tree(prepared, tmp_path / "run", pythia))
    assert train_wrongly(settings, {}, stop_after=3) == "stopped"
    assert len(losses(tmp_path / "run")) == 3
    assert train(from_tree(completed(tree(prepared, tmp_path / "run", pythia)))) == "done"
    assert losses(tmp_path / "run") == losses(german)
    assert last_state(tmp_path / "run") == last_state(german)


def test_a_run_that_went_wrong_before_its_first_checkpoint_goes_back_to_the_folder(
    pythia: Path, prepared: Prepared, tmp_path: Path
) -> None:
    broken = {2: "broken", 3: "broken", 4: "broken"}
    settings = completed(tree(prepared, tmp_path / "run", pythia, **BACK))
    assert train_wrongly(settings, broken) == "done"
    (back,) = metrics(tmp_path / "run", "go_back")
    assert back["to_step"] is None
    (phase,) = load_lineage(tmp_path / "run").phases
    assert phase.passed_over == ((0, 4 * 12),)
    assert phase.tokens == 12 * 12 * 32


def test_a_dry_run_says_what_it_starts_from(pythia: Path, prepared: Prepared, tmp_path: Path, capsys: Capture) -> None:
    import yaml

    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree(prepared, tmp_path / "run", pythia)))
    status, out, err = command_line(capsys, "train", str(file), "--dry-run")
    assert (status, err) == (0, "")
    assert f"goes on from {pythia}: 0 phases, 0 tokens" in out
    assert f"conversion  from hf to megacl, of {pythia.name}" in out
    assert not (tmp_path / "run").exists()
    status, out, err = command_line(capsys, "data", "plan", str(file))
    assert (status, err) == (0, "")


def test_the_recipe_can_be_trained(pythia: Path, prepared: Prepared, tmp_path: Path, capsys: Capture) -> None:
    data = [f"sources.{name}.path={path}" for name, path in prepared.sources.items()]
    small = ["seq_length=32", "global_batch_size=64", "phases[0].tokens=1e6"]
    recipe = ["recipe/somebody-elses.yaml", f"start_from={pythia}", *data, *small, f"run_dir={tmp_path / 'run'}"]
    status, out, err = command_line(capsys, "train", *recipe, "--dry-run", "--ranks", "4", "--device", "cuda")
    assert (status, err) == (0, "")
    assert "phases[0] german: 999,424 tokens = 488 steps x 64 sequences x 32" in out
    assert "replay: 1/4 of all samples, from english" in out


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({}, None),
        ({"rotary_pct": 0.25, "num_kv_heads": None, "parallel_residual": True}, None),
        ({"num_layers": 3}, r"model.num_layers is 3, and in .* it is 2"),
        ({"rotary_pct": 0.5}, r"model.rotary_pct is 0.5, and in .* it is 0.25"),
        ({"vocab_size": 704}, r"model.vocab_size is 704, and in .* it is 640"),
    ],
    ids=str,
)
def test_a_model_section_must_agree_with_the_folder(
    model: dict[str, Any], said: str | None, pythia: Path, prepared: Prepared, tmp_path: Path
) -> None:
    config = from_tree(completed(tree(prepared, tmp_path / "run", pythia, model=model)))
    if said is None:
        assert train(config) == "done"
    else:
        with pytest.raises(ConfigError, match=said):
            train(config)
        assert not (tmp_path / "run").exists()


def test_a_start_that_is_not_there_is_named_where_nothing_else_says_what_the_model_is(
    german: Path, pythia: Path, prepared: Prepared, tmp_path: Path
) -> None:
    gone = tmp_path / "nowhere"
    with pytest.raises(ConfigError, match=rf"start_from is '{gone}', where no model lies .*; put it right\.$"):
        completed(tree(prepared, tmp_path / "run", gone))
    with pytest.raises(ConfigError, match=f"goes on without it: megacl train {german / 'config.yaml'}"):
        completed(tree(prepared, german, gone))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"replay": {"share": 0.25}}, "nothing to replay: .* name prepared sources in replay.from_sources"),
        ({"replay": {"share": 0.25, "from": {"pile": 1}}}, "'pile', .* Name prepared sources in replay.from_sources"),
        ({"schedule": {"kind": "constant", "max_lr": "last"}}, "goes on with the last phase's rate, .* give a number"),
        ({"continues": True, "mixture": {}}, "continues is true, .* give a mixture"),
    ],
    ids=str,
)
def test_what_needs_a_history_is_refused(
    changes: dict[str, Any], said: str, pythia: Path, prepared: Prepared, tmp_path: Path
) -> None:
    settings = completed(tree(prepared, tmp_path / "run", pythia))
    settings["phases"] = [{**settings["phases"][0], **changes}]
    with pytest.raises(ConfigError, match=said):
        train(from_tree(settings))
    assert not (tmp_path / "run").exists()


def test_named_sources_are_replayed_beside(pythia: Path, prepared: Prepared, tmp_path: Path) -> None:
    settings = completed(tree(prepared, tmp_path / "run", pythia))
    settings["phases"][0] |= {"replay": {"share": 0.25, "from_sources": {"english": 1}}, "steps": 4}
    assert train(from_tree(settings)) == "done"
    (phase,) = load_lineage(tmp_path / "run").phases
    assert phase.replay is not None
    assert phase.replay.samples == 4 * 12 // 4


def test_a_tokenizer_in_two_forms_is_either(pythia: Path, prepared: Prepared, tmp_path: Path) -> None:
    """As Llama's folders have it: transformers reads one file, and the data was prepared with the other."""
    both = tmp_path / "both"
    convert(pythia, both, to="hf")
    assert (both / "tokenizer.json").is_file()
    assert (both / "tokenizer.model").is_file()
    settings = completed(tree(prepared, tmp_path / "run", both))
    assert settings["tokenizer"] == {"path": str(both / "tokenizer.json")}
    settings["tokenizer"] = {"path": str(prepared.tokenizer)}
    settings["phases"][0]["steps"] = 4
    assert train(from_tree(settings)) == "done"


def test_data_of_another_tokenizer_is_refused(pythia: Path, prepared: Prepared, tmp_path: Path) -> None:
    from megacl.data.tokenizer_training import train_tokenizer

    other = tmp_path / "other"
    shutil.copytree(pythia, other)
    train_tokenizer([str(prepared.documents["german"])], other / "tokenizer.model", 500)
    with pytest.raises(DataError, match="was prepared with tokenizer"):
        train(from_tree(completed(tree(prepared, tmp_path / "run", other))))
    settings = completed(tree(prepared, tmp_path / "run", other, tokenizer={"path": str(prepared.tokenizer)}))
    with pytest.raises(DataError, match=r"has tokenizer .* use the model's own, or one that extends it"):
        train(from_tree(settings))
