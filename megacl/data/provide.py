"""Makes what a configuration names and what is not there yet: the tokenizer, and the sources that give documents.

So that one command leads from raw text to a trained model: `megacl train recipe/demo.yaml` trains the tokenizer and
prepares the shards first. Whatever exists already is used as it is.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from megacl.config_data import SourceConfig, TokenizerConfig
from megacl.configfile import find_shipped
from megacl.data.prepare import prepare
from megacl.data.tokenizer import load_tokenizer
from megacl.data.tokenizer_training import train_tokenizer
from megacl.errors import ConfigError


def missing_sources(sources: Mapping[str, SourceConfig]) -> list[str]:
    """The names of the sources that have documents to be prepared from, and are not prepared."""
    return [
        name
        for name, source in sources.items()
        if source.documents is not None and not (Path(source.path) / "manifest.json").exists()
    ]


def provide_sources(
    tokenizer: TokenizerConfig | None, sources: Mapping[str, SourceConfig], say: Callable[[str], None]
) -> None:
    """Trains the tokenizer and prepares the sources that are missing. Raises DataError as those do.

    say: called with a line before each piece of work.
    """
    if tokenizer is not None and tokenizer.train is not None and not Path(tokenizer.path).exists():
        training = tokenizer.train
        say(f"training tokenizer {tokenizer.path}: {training.model_type}, {training.vocab_size} pieces")
        documents = [find_shipped(path) for path in training.documents]
        Path(tokenizer.path).parent.mkdir(parents=True, exist_ok=True)
        train_tokenizer(documents, Path(tokenizer.path), training.vocab_size, training.model_type)
    for name in missing_sources(sources):
        source = sources[name]
        assert source.documents is not None
        if tokenizer is None:
            raise ConfigError(
                f"sources.{name} is to be prepared from documents, which needs a tokenizer; give tokenizer.path."
            )
        say(f"preparing source {name!r} in {source.path}")
        prepare(
            [find_shipped(path) for path in source.documents],
            tokenizer=load_tokenizer(tokenizer.path),
            out=Path(source.path),
            source=name,
            validation=source.validation,
        )
