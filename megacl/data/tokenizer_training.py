"""Training a SentencePiece model on raw documents; tools/train_tokenizer.py is its command line.

tokenizer = train_tokenizer(["raw/"], Path("tokenizer.model"), 32000)
larger = extend_tokenizer(Path("tokenizer.model"), ["german/"], Path("larger.model"), pieces=4000)
"""

import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import sentencepiece

from megacl.data import boundaries
from megacl.data.documents import read_documents
from megacl.data.forms.reading import Reading
from megacl.data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer, record_extension
from megacl.errors import DataError
from megacl.publish import disk_errors, publish_bytes

_LINE_CHARACTERS = 4000
# Unigram sums its statistics a thread at a time: another number of threads would train another model.
_THREADS = 4
_SPACE = "\u2581"
_WORD = rf"{_SPACE}+(?={_SPACE}[^{_SPACE}\s])|{_SPACE}?[^{_SPACE}\s]+|{_SPACE}+|\s"
"""A word with the space in front of it, more spaces, or the end of a line, as SentencePiece spells a space."""


def train_tokenizer(
    inputs: Sequence[str],
    out: Path,
    vocab_size: int,
    model_type: Literal["bpe", "unigram"] = "bpe",
    field: str = "text",
) -> Tokenizer:
    """Trains a SentencePiece model on raw documents and publishes it at `out`, whose name must end with .model.

    The same inputs give the same bytes. Nothing is normalised and bytes stand in for characters without a piece of
    their own, so text comes back byte for byte; digits are split, so numbers are read digit by digit. Ids: 0 unknown,
    1 BOS, 2 EOS. inputs: as for prepare. SentencePiece holds all text in memory: give it a sample of up to some GB.
    DataError for what is wrong with the inputs, or a vocab_size that they cannot fill.
    """
    if out.suffix != ".model":
        raise DataError(f"{out}: the name of a SentencePiece model must end with .model.")
    content = _train(out, read_documents(inputs, Reading(field=field)), vocab_size, model_type)
    with disk_errors(out, "the tokenizer"):
        out.parent.mkdir(parents=True, exist_ok=True)
    publish_bytes(out, content, "the tokenizer")
    return load_tokenizer(out)


def _train(out: Path, documents: Iterator[str], vocab_size: int, model_type: Literal["bpe", "unigram"]) -> bytes:
    """The SentencePiece model of documents, as its file's content; out: its name in errors."""
    lines = _TrainingLines(documents)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * _LINE_CHARACTERS,
            num_threads=_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        if lines.failure is not None:
            raise lines.failure from None
        reason = str(error).rpartition("] ")[2].strip() or "there is no text in the inputs"
        raise DataError(f"{out}: SentencePiece cannot train with vocab_size {vocab_size}: {reason}") from None
    return model.getvalue()


def extend_tokenizer(base_path: Path, inputs: Sequence[str], out: Path, pieces: int, field: str = "text") -> Tokenizer:
    """Publishes at `out` the tokenizer of `base_path` with so many more pieces, and the record that it extends it.

    The new pieces are those, the most frequent first, that BPE trained on the inputs has and the base has not. They
    stand behind the base's own, in the order in which they are merged, so that what the base merges comes first, and
    old text is hardly cut another way. The base is a SentencePiece BPE model (.model), or a tokenizer.json with BPE.
    inputs, field: as for train_tokenizer. DataError where the base is another one, out is named otherwise, or the
    inputs do not fill so many pieces.
    """
    base = load_tokenizer(base_path)
    if out.suffix != base.file.suffix:
        raise DataError(f"{out}: the name must end with {base.file.suffix}, as that of {base.file} does.")
    more = _more_of_sentencepiece if isinstance(base, SentencePieceTokenizer) else _more_of_hugging_face
    with tempfile.TemporaryDirectory() as folder:
        content = more(base, read_documents(inputs, Reading(field=field)), pieces, Path(folder))
    with disk_errors(out, "the tokenizer"):
        out.parent.mkdir(parents=True, exist_ok=True)
    publish_bytes(out, content, "the tokenizer")
    return record_extension(base_path, out)


def _more_of_sentencepiece(base: Tokenizer, documents: Iterator[str], pieces: int, folder: Path) -> bytes:
    content = base.file.read_bytes()
    if not boundaries.merges_by_score(content):
        raise DataError(_not_bpe(base))
    (folder / "new.model").write_bytes(_train(folder / "new.model", documents, base.vocab_size + pieces, "bpe"))
    known = {piece for piece, _ in base.pieces()}
    trained = load_tokenizer(folder / "new.model").pieces()
    new = [piece for piece, kind in trained if kind == "text" and piece not in known]
    # A letter that the base spells in bytes goes before the pieces that it is part of: a tokenizer.json of the model
    # merges tokens alone.
    with_letters = {each: None for piece in new for each in (*piece, piece) if each not in known}
    return boundaries.with_pieces(content, _enough([*with_letters], pieces, base))


def _more_of_hugging_face(base: Tokenizer, documents: Iterator[str], pieces: int, folder: Path) -> bytes:
    import tokenizers  # takes a while, and most runs use SentencePiece

    tree = json.loads(base.save(folder).read_bytes())
    if tree["model"].get("type") != "BPE":
        raise DataError(_not_bpe(base))
    # Added tokens are found before texts are cut and spelled in bytes: they would be trained on as they stand.
    bare = {**tree, "added_tokens": [], "post_processor": None}
    if tree.get("pre_tokenizer") is None:  # SentencePiece's models, which learn no pieces beyond a word or a line
        bare["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": _WORD}, "behavior": "Isolated", "invert": False}
    trained = tokenizers.Tokenizer.from_str(json.dumps(bare))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=base.vocab_size + pieces,
        initial_alphabet=[piece for piece in tree["model"]["vocab"] if len(piece) == 1],
        show_progress=False,
    )
    trained.train_from_iterator(documents, trainer)
    new: dict[str, tuple[str, str] | None] = {}
    known = {piece for piece, _ in base.pieces()}
    for first, second in json.loads(trained.to_str())["model"]["merges"]:
        # A half that is in neither is a character that the base spells in bytes.
        new |= {half: None for half in (first, second) if half not in known and half not in new}
        if first + second not in known:
            new.setdefault(first + second, (first, second))
    in_order = _enough([*new], pieces, base)
    old = tree["model"]["merges"]
    as_text = bool(old) and isinstance(old[0], str)
    added = [pair for piece in in_order if (pair := new[piece]) is not None]
    old += [" ".join(pair) if as_text else list(pair) for pair in added]
    # Where an added token is no entry of the vocabulary, `tokenizers` numbers it behind all that are.
    tree["model"]["vocab"] |= {entry["content"]: entry["id"] for entry in tree.get("added_tokens") or []}
    tree["model"]["vocab"] |= {piece: base.vocab_size + index for index, piece in enumerate(in_order)}
    return json.dumps(tree, ensure_ascii=False).encode()


def _not_bpe(base: Tokenizer) -> str:
    return (
        f"{base.file}: pieces are added to BPE alone; extend another tokenizer with its own software, and record it: "
        "tools/extend_tokenizer.py BASE EXTENDED"
    )


def _enough(new: list[str], pieces: int, base: Tokenizer) -> list[str]:
    if len(new) < pieces:
        raise DataError(f"the documents give {len(new)} pieces that {base.file} has not; ask for no more.")
    return new[:pieces]


class _TrainingLines:
    """Documents as the lines that SentencePiece's trainer takes, cut where they are longer than it takes.

    The trainer turns whatever its iterator raises into a RuntimeError of its own: `failure` keeps the original.
    """

    def __init__(self, documents: Iterator[str]) -> None:
        self.documents = documents
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for document in self.documents:
                for line in document.split("\n"):
                    for start in range(0, len(line), _LINE_CHARACTERS):
                        yield line[start : start + _LINE_CHARACTERS]
        except BaseException as error:
            self.failure = error
            raise
