"""Runs start from any format that is read, where it lies; a folder without a tokenizer takes the one that is named."""

from pathlib import Path

import pytest
from conftest import Prepared
from litgpt_layout import write_litgpt
from neox_layout import write_neox
from whole_models import padded, random_model

from megacl.configfile import from_tree
from megacl.errors import ConfigError
from megacl.lineage import ConversionRecord, load_lineage
from megacl.starting import completed
from megacl.trainer import train


@pytest.mark.parametrize(("write", "format"), [(write_litgpt, "litgpt"), (write_neox, "gpt-neox")])
def test_a_run_starts_from_other_formats(write, format, prepared: Prepared, tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", padded(random_model(), 640))
    settings = prepared.tree(tmp_path / "run", start_from=str(folder), tokenizer={"path": str(prepared.tokenizer)})
    del settings["model"]
    settings["phases"] = [{**settings["phases"][0], "steps": 2}]
    settings["phases"][0]["schedule"] = {"kind": "constant", "max_lr": 1e-3}
    assert train(from_tree(completed(settings))) == "done"
    (conversion,) = load_lineage(tmp_path / "run").events
    assert isinstance(conversion, ConversionRecord)
    assert conversion.from_ == format
    assert conversion.files
    settings["tokenizer"]["new_rows"] = "mean"
    settings["run_dir"] = str(tmp_path / "another")
    with pytest.raises(ConfigError, match="no tokenizer lies beside the model"):
        train(from_tree(completed(settings)))
