"""Tokenizers: SentencePiece models and Hugging Face tokenizer.json files behind one small interface.

    tokenizer = load_tokenizer("tokenizer.model")       # or a tokenizer.json, or a folder that holds one of the two
    tokenizer.encode(["some text"])                     # [uint32 array]; no BOS, no EOS
    tokenizer.fingerprint                               # SHA-256 of what save writes: shards record who made them

Text is data: what looks like a control token inside a document ("<s>", "<|im_start|>") comes out as ordinary pieces,
unless encode is asked to look for them; EOS always does, so that a document can never end another one. The one
character that a SentencePiece model does not bring back is U+2581, which it uses to write a space.

Where it is known that no token lies across a place (data/boundaries.py), texts are encoded by units, each distinct one
once (data/units.py): the same ids, several times as fast. This is so for SentencePiece's BPE models that normalise
nothing, and for Hugging Face files that split text as GPT-2, Llama 3, Qwen 2, o200k or Tekken do. All others are given
whole texts. Texts of more than 2^20 characters go through either in parts.

EOS is the one that a SentencePiece model declares. A Hugging Face tokenizer.json does not: it is the eos_token of the
tokenizer_config.json beside it, else the only one of its added tokens that is known to end documents. Where the file
alone would not tell, a copy of it marks that token with a key "eos", so the fingerprint depends on which it is.

A tokenizer may extend another one: more pieces behind it, every earlier id unchanged. Then data that the smaller one
prepared stays valid. `record_extension` checks this and writes it down beside the file, FILE.extends.json.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece

from megacl.data import boundaries
from megacl.data.units import UnitEncoder, WholeEncoder
from megacl.errors import DataError
from megacl.publish import publish_bytes, publish_text, sha256_of

SENTENCEPIECE_FILE = "tokenizer.model"
HUGGING_FACE_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"

_SPACE = "\u2581"
"""How a SentencePiece model writes a space."""

_EOS_NAMES = (
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
)


class Tokenizer(ABC):
    """Text to ids and back. Ids are below vocab_size."""

    file_name: str
    """What the tokenizer's file is called inside a data folder or a run directory."""

    vocab_size: int
    eos_id: int

    def __init__(self, file: Path) -> None:
        self.file = file
        self._content = file.read_bytes()
        """What a copy of the file holds."""
        self.extends = _read_extends(file)
        """Fingerprints of the tokenizers that this one extends."""

    def __getstate__(self) -> dict[str, Any]:
        """What travels to another process, which needs no file: not what is made of it."""
        return {name: value for name, value in vars(self).items() if name not in ("_model", "_encode", "_later")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._model = self._build()

    @abstractmethod
    def _build(self) -> Any:
        """The library's own object, of what the file holds."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of a copy of the file, as save makes it."""
        return hashlib.sha256(self._content).hexdigest()

    def encode(self, texts: Iterable[str], *, control: bool = False) -> list[npt.NDArray[np.uint32]]:
        """The ids of each text, uint32 [length]: no BOS, no EOS, and nothing in a text is read as a control token.

        control: names of control tokens in a text become those tokens, all but EOS, which only ends documents; what
        stands between two of them is encoded as a text of its own. The arrays may share memory and may be read-only.
        Many texts at once take less time than few.
        """
        if not control or not self._control_ids:
            return self._encode(texts)
        parts = [self._control_names.split(text) for text in texts]  # text, name, text, name, ..., text
        plain = iter(self._encode(part for each in parts for part in each[::2]))
        return [
            np.concatenate(
                [
                    np.array([self._control_ids[part]], np.uint32) if index % 2 else next(plain)
                    for index, part in enumerate(each)
                ]
            )
            for each in parts
        ]

    @cached_property
    def _control_ids(self) -> dict[str, int]:
        pieces = enumerate(self.pieces())
        return {name: index for index, (name, kind) in pieces if kind == "control" and index != self.eos_id and name}

    @cached_property
    def _control_names(self) -> re.Pattern[str]:
        longest_first = sorted(self._control_ids, key=len, reverse=True)  # the first alternative that fits is taken
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @property
    @abstractmethod
    def _encode(self) -> Callable[[Iterable[str]], list[npt.NDArray[np.uint32]]]:
        """What encodes texts in which no control token is looked for."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """The text of ids; control tokens such as EOS add nothing to it. ValueError for an id beyond vocab_size."""

    @abstractmethod
    def spell(self, text: str) -> list[int]:
        """The ids of a text that stands inside of a longer one: with no space put in front."""

    @abstractmethod
    def pieces(self) -> list[tuple[str, str]]:
        """What every id means, from 0: (piece, kind)."""

    def matches(self, fingerprint: str) -> bool:
        """Whether tokens made by the tokenizer of that fingerprint mean the same here: it, or one that it extends."""
        return fingerprint == self.fingerprint or fingerprint in self.extends

    def save(self, folder: Path) -> Path:
        """Publishes a copy of the tokenizer's file, and of what it extends, in a folder; returns the copy's path."""
        copy = folder / self.file_name
        publish_bytes(copy, self._content, "the tokenizer")
        if self.extends:
            _write_extends(copy, self.extends)
        return copy

    def _check_ids(self, ids: Sequence[int] | npt.NDArray[Any]) -> list[int]:
        found = np.asarray(ids, np.int64)
        if found.size and not 0 <= int(found.min()) <= int(found.max()) < self.vocab_size:
            raise ValueError(f"ids must lie in [0, {self.vocab_size}), but they reach {found.min()} to {found.max()}")
        ids_of_python: list[int] = found.tolist()
        return ids_of_python


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model."""

    file_name = SENTENCEPIECE_FILE

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        try:
            self._model = self._build()
        except RuntimeError:
            raise DataError(f"{file}: not a SentencePiece model, or damaged. Copy it again.") from None
        self.vocab_size = self._model.vocab_size()
        self.eos_id = self._model.eos_id()
        if self.eos_id < 0:
            raise DataError(
                f"{file}: the model has no end-of-sentence piece, which must end every document. "
                "Train one that has: tools/train_tokenizer.py"
            )

    def _build(self) -> Any:
        return _load_sentencepiece(self._content)

    @cached_property
    def _encode(self) -> Callable[[Iterable[str]], list[npt.NDArray[np.uint32]]]:
        # One thread: prepare runs a process a core.
        def encode_whole(texts: list[str], model: Any = self._model) -> list[npt.NDArray[np.uint32]]:
            return [ids.view(np.uint32) for ids in model.encode(texts, num_threads=1, return_type="numpy")]

        adds_space, later = boundaries.adds_space_in_front(self._content), self._later
        cuts = boundaries.of_sentencepiece(self._model)
        if cuts is None:
            # A space at the beginning, which some models remove, stays when it is written in their own way.
            return WholeEncoder(
                encode_whole, lambda texts: encode_whole([re.sub("^ ", _SPACE, text) for text in texts], later)
            )
        encode_units = UnitEncoder(cuts, partial(later.encode, num_threads=1))  # lists: units are short
        front = " " if adds_space else ""
        return lambda texts: encode_units((text and front + text).replace(_SPACE, " ") for text in texts)

    @cached_property
    def _later(self) -> Any:
        """What encodes the later parts of a text that was cut."""
        if not boundaries.adds_space_in_front(self._content):
            return self._model
        return _load_sentencepiece(boundaries.without_space_in_front(self._content))

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        return str(self._model.decode(self._check_ids(ids)))

    def spell(self, text: str) -> list[int]:
        ids: list[int] = self._later.encode(text.replace(" ", _SPACE))
        return ids

    def pieces(self) -> list[tuple[str, str]]:
        model = self._model
        kinds = {"byte": model.is_byte, "control": model.is_control, "unknown": model.is_unknown}
        return [
            (model.id_to_piece(index), next((kind for kind, is_kind in kinds.items() if is_kind(index)), "text"))
            for index in range(self.vocab_size)
        ]


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json of the Hugging Face `tokenizers` package."""

    file_name = HUGGING_FACE_FILE

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        try:
            tree = json.loads(self._content)
            added = {entry["content"]: entry for entry in tree.get("added_tokens") or []}
            if "model" not in tree:
                raise ValueError("it has no model")
            marked = next((name for name, entry in added.items() if entry.get("eos")), None)
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise DataError(f"{file}: not a tokenizer.json, or damaged ({error}). Copy it again.") from None
        known = [name for name in _EOS_NAMES if name in added]
        eos = marked or _configured_eos(file, added) or _only_eos(file, known)
        if not marked and known != [eos]:
            added[eos]["eos"] = True  # added tokens may have keys that `tokenizers` does not know, the file may not
            self._content = json.dumps(tree, ensure_ascii=False).encode()
        try:
            # Some files list EOS as an ordinary added token, which would be found inside of texts.
            added[eos]["special"] = True
            self._tree = tree
            self._model = self._build()
        except Exception as error:  # `tokenizers` raises the base class itself
            raise DataError(f"{file}: not a tokenizer.json, or damaged ({error}). Copy it again.") from None
        self.eos_id = int(added[eos]["id"])
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1

    def _build(self) -> Any:
        return _load_hugging_face(self._tree)

    @cached_property
    def _encode(self) -> Callable[[Iterable[str]], list[npt.NDArray[np.uint32]]]:
        encode = partial(_encode_hugging_face, self._model)
        cuts = boundaries.of_hugging_face(self._tree)
        if cuts is None:
            return WholeEncoder(encode, partial(_encode_hugging_face, self._later))
        return UnitEncoder(cuts, lambda units: encode([str(unit, "utf-8") for unit in units]))

    @cached_property
    def _later(self) -> Any:
        """What encodes the later parts of a text that was cut."""
        return _load_hugging_face(boundaries.without_prefix(self._tree))

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        return str(self._model.decode(self._check_ids(ids), skip_special_tokens=True))

    def spell(self, text: str) -> list[int]:
        return _encode_hugging_face(self._later, [text])[0]

    def pieces(self) -> list[tuple[str, str]]:
        special = {index for index, token in self._model.get_added_tokens_decoder().items() if token.special}
        names = {index: name for name, index in self._model.get_vocab(with_added_tokens=True).items()}
        return [(names.get(index, ""), "control" if index in special else "text") for index in range(self.vocab_size)]


def _configured_eos(file: Path, added: Container[str]) -> str | None:
    """The eos_token of the tokenizer_config.json beside a tokenizer.json, one of its added tokens; None if it has none.

    It is a string, or an object with the string as its content.
    """
    config = file.with_name(CONFIG_FILE)
    try:
        eos = json.loads(config.read_bytes()).get("eos_token")
        eos = eos["content"] if isinstance(eos, dict) else eos
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, KeyError):
        raise DataError(f"{config}: not a {CONFIG_FILE}, or damaged. Copy it again, or take it away.") from None
    if eos is not None and (not isinstance(eos, str) or eos not in added):
        raise DataError(
            f"{config}: its eos_token {eos!r} is not among the added tokens of {file.name}. Copy both files from one "
            "place."
        )
    return eos


def _only_eos(file: Path, known: Sequence[str]) -> str:
    """The one of a file's added tokens that is known to end documents; DataError if there is none, or several."""
    if not known:
        raise DataError(
            f"{file}: no end-of-text token among its added tokens, which must end every document; known names are "
            f"{', '.join(_EOS_NAMES)}. Put a {CONFIG_FILE} with its eos_token beside it."
        )
    if len(known) > 1:
        raise DataError(
            f"{file}: {' and '.join(known)} may each be the token that ends documents. Put the model's {CONFIG_FILE}, "
            'or one with {"eos_token": "..."}, beside it.'
        )
    return known[0]


def _load_sentencepiece(content: bytes) -> Any:
    model = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(content)
    return model


def _load_hugging_face(tree: dict[str, Any]) -> Any:
    import tokenizers  # takes a while, and most runs use SentencePiece

    model = tokenizers.Tokenizer.from_str(json.dumps(tree))
    model.encode_special_tokens = True
    model.no_truncation()
    model.no_padding()
    return model


def _encode_hugging_face(model: Any, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in model.encode_batch_fast(texts, add_special_tokens=False)]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a .model (SentencePiece) or .json (Hugging Face) file, or a folder's tokenizer.model or tokenizer.json.

    DataError: it is missing, damaged, of another form, has no EOS, or the folder holds both files.
    """
    file = Path(path)
    if file.is_dir():
        present = [name for name in (SENTENCEPIECE_FILE, HUGGING_FACE_FILE) if (file / name).is_file()]
        if len(present) != 1:
            found = "both" if present else "neither"
            raise DataError(
                f"{path}: the folder holds {found} of {SENTENCEPIECE_FILE} and {HUGGING_FACE_FILE}; name one file."
            )
        file /= present[0]
    kinds = {".model": SentencePieceTokenizer, ".json": HuggingFaceTokenizer}
    if file.suffix not in kinds:
        raise DataError(
            f"{path}: not a tokenizer's name: a SentencePiece model ends with .model, "
            "a Hugging Face one is called tokenizer.json."
        )
    try:
        return kinds[file.suffix](file)
    except OSError as error:
        raise DataError(
            f"{path}: the tokenizer cannot be read: {error.strerror}. Check the name; "
            "tools/train_tokenizer.py trains one."
        ) from None


# ---------------------------------------------------------------------------------------------- extension


def _extends_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.extends.json")


def _read_extends(file: Path) -> tuple[str, ...]:
    record = _extends_file(file)
    try:
        tree = json.loads(record.read_text(encoding="utf-8"))
        own, extends = tree["tokenizer"], tuple(tree["extends"])
    except FileNotFoundError:
        return ()
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f"{record}: not a record of an extension, or damaged. Write it again: tools/extend_tokenizer.py"
        ) from None
    # A record that stayed beside a file which was replaced says nothing about the new one.
    if own != sha256_of(file):
        raise DataError(
            f"{record}: it was written for another {file.name}. Write it again with tools/extend_tokenizer.py, or "
            "delete it."
        )
    return extends


def _write_extends(file: Path, extends: Sequence[str]) -> None:
    publish_text(_extends_file(file), extension_record(file.read_bytes(), extends), "the record of an extension")


def extension_record(content: bytes, extends: Sequence[str]) -> str:
    """What stands in FILE.extends.json beside a tokenizer's file of that content.

    extends: fingerprints of the tokenizers that it extends.
    """
    tree = {"tokenizer": hashlib.sha256(content).hexdigest(), "extends": list(extends)}
    return json.dumps(tree, indent=2) + "\n"


def record_extension(base_path: str | Path, extended_path: str | Path) -> Tokenizer:
    """Records beside the extended tokenizer that it extends the base (and what that extends), and returns it.

    DataError unless every id of the base means the same piece in the extended one and EOS has the same id.
    """
    base, extended = load_tokenizer(base_path), load_tokenizer(extended_path)
    where = f"{extended.file}: it does not extend {base.file}"
    if type(base) is not type(extended):
        raise DataError(f"{where}: one is a SentencePiece model, the other is not. Extend a tokenizer in its own form.")
    if base.eos_id != extended.eos_id:
        raise DataError(f"{where}: EOS is {base.eos_id} there and {extended.eos_id} here. Keep its id.")
    ours = extended.pieces()
    for index, piece in enumerate(base.pieces()):
        if index >= len(ours) or ours[index] != piece:
            here = repr(ours[index][0]) if index < len(ours) else "beyond the end"
            raise DataError(
                f"{where}: id {index} is {piece[0]!r} there and {here} here. Add pieces behind the base's own."
            )
    _write_extends(extended.file, sorted({*extended.extends, *base.extends, base.fingerprint}))
    return load_tokenizer(extended.file)
