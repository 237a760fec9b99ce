"""What a run starts from: a checkpoint of megacl's, or a model of other software in place, opened as if it were one.

    tree = completed(load_tree(paths, overrides))        # the model and tokenizer of the folder, where it names none
    parent = open_start(config.start_from, warn)         # with a lineage that begins with the conversion
    parent = begin_with(parent, config, tokenizer)       # with rows for the tokens that the run's tokenizer adds

Nothing is written: weights go into the engine one tensor at a time, from the files that they are in. Such a model has
no optimizer's state, and of what it has seen is known only what a lineage beside it says.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megacl.checkpoint import Checkpoint, RunState, find_checkpoint, open_checkpoint
from megacl.config import RunConfig
from megacl.config_data import TokenizerConfig
from megacl.configfile import checked, from_tree, to_tree, tree_of_arguments
from megacl.convert.conversion import converted
from megacl.convert.detect import READERS, known_format, open_model
from megacl.convert.opened import OpenedModel
from megacl.data.tokenizer import HUGGING_FACE_FILE, SENTENCEPIECE_FILE, Tokenizer, load_tokenizer
from megacl.engine.gathering import Stored
from megacl.errors import ConfigError
from megacl.lineage import Lineage
from megacl.vocabulary import ROWS_MULTIPLE, ExtendedModel, plan_extension

_DEFAULT_LENGTH = 2048
"""Of a model of which nobody says how long its sequences were; a run that starts from it says its own."""


@dataclass(frozen=True)
class ForeignModel(Checkpoint):
    """A model of other software, as a checkpoint at step 0 of a run that has no phases."""

    opened: OpenedModel

    def __reduce__(self) -> tuple[Any, ...]:
        # Its files are read where it arrives, but not hashed again.
        return _reopened, (self.path, self.state, self.lineage, self.config)

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; ConfigError where none lies beside the weights."""
        if self.opened.tokenizer is None:
            raise ConfigError(f"{self.path}: no tokenizer lies beside the weights; put the model's own there.")
        return load_tokenizer(self.opened.tokenizer)

    @property
    def has_moments(self) -> bool:
        """Whether there are Adam's moments: there are none."""
        return False

    def load_weights(self) -> Callable[[str], Tensor]:
        """A function from a parameter's name to its whole fp32 tensor on the CPU."""
        return lambda name: self.opened.read(name).float()

    def stored_state(self) -> Callable[[str], Mapping[str, Stored | Tensor]]:
        """What `load_state` gives: nothing of it lies in a file as it is."""
        return self.load_state()

    def load_state(self) -> Callable[[str], dict[str, Tensor]]:
        """A function from a parameter's name to its "weight"; there are no moments."""
        load = self.load_weights()
        return lambda name: {"weight": load(name)}


def _reopened(path: Path, state: RunState, lineage: Lineage, config: RunConfig) -> ForeignModel:
    return ForeignModel(path, state, lineage, config, open_model(path))


def tokenizer_of(parent: Checkpoint, tokenizer: Tokenizer) -> Tokenizer | None:
    """A model's own tokenizer, to compare a run's with; None where none lies beside a model of other software.

    Such a folder may have it in two forms: then it is the one that the run's is, or extends.
    """
    if not isinstance(parent, ForeignModel):
        return parent.tokenizer()
    if parent.opened.tokenizer is None:
        return None
    folder = parent.opened.tokenizer.parent
    files = [parent.opened.tokenizer, folder / HUGGING_FACE_FILE, folder / SENTENCEPIECE_FILE]
    known = [load_tokenizer(file) for file in dict.fromkeys(files) if file.is_file()]
    return next((each for each in known if tokenizer.matches(each.fingerprint)), known[0])


def foreign_format(reference: str) -> str | None:
    """The format of a model of other software at a path; None where there is none, or where it is megacl's."""
    found = known_format(Path(reference))
    return None if found == "megacl" else found


def open_start(reference: str, warn: Callable[[str], None]) -> Checkpoint:
    """The model that `start_from` means: a verified checkpoint of megacl's, or a model in a format that is read.

    Raises CheckpointError where there is none or it is damaged, ConversionError where it is of a format that is known,
    and damaged or of an architecture that is not.
    """
    if foreign_format(reference) is None:
        return open_checkpoint(find_checkpoint(reference, warn))
    opened = open_model(Path(reference))
    config = RunConfig(
        run_dir=reference,
        model=opened.model,
        sources={},
        phases=(),
        seq_length=opened.seq_length or _DEFAULT_LENGTH,
        global_batch_size=1,
    )
    return ForeignModel(opened.path, RunState(), converted(opened, "megacl", opened.files), config, opened)


def begin_with(parent: Checkpoint, config: RunConfig, tokenizer: Tokenizer) -> Checkpoint:
    """The model that a run begins with: its parent, with rows for the tokens that the run's tokenizer adds, if any.

    Raises ConfigError where tokenizer.new_rows is set, and there are no new tokens.
    """
    new_rows = config.tokenizer.new_rows if config.tokenizer else None
    if new_rows is None:
        return parent
    before, rows_before = tokenizer_of(parent, tokenizer), parent.config.model.vocab_size
    if before is None:
        raise ConfigError(
            f"tokenizer.new_rows is {new_rows}, and no tokenizer lies beside the model of {parent.path}, which would "
            "say which tokens are new; put its own there, or leave new_rows out."
        )
    if tokenizer.vocab_size <= min(before.vocab_size, rows_before):
        raise ConfigError(
            f"tokenizer.new_rows is {new_rows}, and {tokenizer.file} has no tokens that the model of {parent.path} has "
            "not; leave it out."
        )
    extension = plan_extension(
        before,
        tokenizer,
        rows_before=rows_before,
        rows=config.model.vocab_size,
        new_rows=new_rows,
        after=len(parent.lineage.phases),
    )
    return ExtendedModel.of(parent, extension)


def load_run(arguments: Sequence[str]) -> RunConfig:
    """The checked configuration of a command line's arguments, `completed`. Raises ConfigError or ConversionError."""
    return from_tree(completed(tree_of_arguments(arguments)))


def completed(tree: dict[str, Any]) -> dict[str, Any]:
    """A configuration's tree with what the model of other software that it starts from says, where it does not.

    That is its shape, and its tokenizer. With tokenizer.new_rows the vocabulary has rows for all tokens of the larger
    one. Raises ConversionError as `open_start` does.
    """
    start, given = tree.get("start_from"), tree.get("model", {})
    if not isinstance(start, str) or not isinstance(given, dict):
        return tree
    if foreign_format(start) is None:
        _check_model_is_known(tree, start)
        return tree
    opened = open_model(Path(start))
    if tree.get("tokenizer") is None and opened.tokenizer is not None:
        tree = {**tree, "tokenizer": {"path": str(opened.tokenizer)}}
    model = to_tree(opened.model)
    if "vocab_size" not in given and tree.get("tokenizer") is not None:
        tokenizer = None
        with contextlib.suppress(ConfigError):  # said later, under the setting's whole name
            tokenizer = checked(tree["tokenizer"], TokenizerConfig)
        if tokenizer is not None and tokenizer.new_rows and tokenizer.train is None:
            tokens = load_tokenizer(tokenizer.path).vocab_size
            if tokens > opened.model.vocab_size:
                model["vocab_size"] = -(-tokens // ROWS_MULTIPLE) * ROWS_MULTIPLE
    return {**tree, "model": {**model, **given}}


def _check_model_is_known(tree: dict[str, Any], start: str) -> None:
    """Raises ConfigError where neither `start_from` nor a model section says what the model is."""
    if "model" in tree or READERS["megacl"].recognises(Path(start)):
        return
    stored = Path(str(tree.get("run_dir"))) / "config.yaml"
    more = f"; a run that has begun goes on without it: megacl train {stored}" if stored.is_file() else ""
    raise ConfigError(
        f"start_from is {start!r}, where no model lies that is known here, and no model section says what it is; put "
        f"it right{more}."
    )
