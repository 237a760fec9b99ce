"""A tokenizer as the files that transformers' AutoTokenizer loads, with the same ids.

A tokenizer.json is written as it is. A SentencePiece model is written as it is too, as tokenizer.model, and where it is
BPE that normalises nothing, as megacl trains them and Llama's and Mistral's are, as a tokenizer.json beside it: pieces
become the vocabulary, and every way to make a piece of two others a merge, the higher its score the earlier. Where two
ways to split one piece meet in a text, SentencePiece takes the left one and tokenizers the earlier merge, so the result
is compared with the model on texts of all pieces, of pairs, of runs and of all of Unicode, and not written where one
differs. Other models go as tokenizer.model alone.

What stands beside the tokenizer (tokenizer_config.json and the like) goes along; where there is none it is made: the
end-of-text token also begins a text, as it did while the model was trained, and nothing is added to texts by itself.
"""

import itertools
import json
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacl.convert.opened import OpenedModel
from megacl.data.boundaries import adds_space_in_front, message_fields, of_sentencepiece
from megacl.data.tokenizer import (
    CONFIG_FILE,
    HUGGING_FACE_FILE,
    SENTENCEPIECE_FILE,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    extension_record,
    load_tokenizer,
)
from megacl.errors import DataError

GENERATION_FILE = "generation_config.json"
BESIDE = (CONFIG_FILE, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", GENERATION_FILE)
"""Files that say more about a tokenizer, and go where it goes."""

_SPACE = "\u2581"
_PIECE, _TYPE = 1, 3  # fields of a SentencePiece model, and of a piece
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # types of pieces
_RANDOM_TEXTS = 1000


@dataclass(frozen=True)
class TokenizerFiles:
    """What is written of a tokenizer, and what the configuration of a model says of it."""

    files: Mapping[str, bytes]
    bos_id: int | None
    eos_id: int | list[int] | None
    generation: Mapping[str, Any]
    """The content of generation_config.json."""
    notes: tuple[str, ...] = ()


NO_TOKENIZER = TokenizerFiles({}, None, None, {"_from_model_config": True})
"""Of a model that has none."""


def copy_beside(tokenizer: Path, folder: Path) -> list[Path]:
    """Copies what stands beside a tokenizer's file into a folder; returns the copies."""
    there = [name for name in BESIDE if (tokenizer.parent / name).is_file()]
    return [Path(shutil.copyfile(tokenizer.parent / name, folder / name)) for name in there]


def tokenizer_files(model: OpenedModel) -> TokenizerFiles:
    """The files of a model's tokenizer, which it must have. DataError where it cannot be read."""
    assert model.tokenizer is not None
    tokenizer, folder = load_tokenizer(model.tokenizer), model.tokenizer.parent
    files = {name: (folder / name).read_bytes() for name in BESIDE if (folder / name).is_file()}
    notes: tuple[str, ...] = ()
    content = tokenizer.file.read_bytes()
    if isinstance(tokenizer, HuggingFaceTokenizer):
        files[HUGGING_FACE_FILE] = _without_mark(content)
        other = folder / SENTENCEPIECE_FILE
        if model.format == "hf" and other.is_file():  # some readers want it: llama.cpp's converter does
            files[SENTENCEPIECE_FILE] = other.read_bytes()
    else:
        assert isinstance(tokenizer, SentencePieceTokenizer)
        files[SENTENCEPIECE_FILE] = content
        tree = as_tokenizer_json(tokenizer)
        if tree is None:
            notes = (
                f"{tokenizer.file.name} has no tokenizer.json of the same ids: encode with SentencePiece itself, since "
                "AutoTokenizer makes one of its own, whose ids may be others",
            )
        else:
            files[HUGGING_FACE_FILE] = json.dumps(tree, ensure_ascii=False).encode()
    if tokenizer.extends:
        record = extension_record(files[tokenizer.file_name], tokenizer.extends)
        files[f"{tokenizer.file_name}.extends.json"] = record.encode()
    if CONFIG_FILE not in files:
        config = _config(tokenizer, model.seq_length, fast=HUGGING_FACE_FILE in files)
        files[CONFIG_FILE] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    generation = _object(folder / GENERATION_FILE, files.pop(GENERATION_FILE, b"{}"))
    bos, eos = _special_ids(tokenizer, _object(folder / CONFIG_FILE, files[CONFIG_FILE]), generation)
    generation = generation or {"_from_model_config": True, "bos_token_id": bos, "eos_token_id": eos}
    return TokenizerFiles(files, bos, eos, generation, notes)


def _object(file: Path, content: bytes) -> dict[str, Any]:
    """The JSON object that a file beside a tokenizer holds. DataError where it holds none."""
    try:
        tree = json.loads(content)
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise DataError(f"{file}: it is not a JSON object. Copy it again, or take it away.")
    return tree


def _config(tokenizer: Tokenizer, seq_length: int | None, *, fast: bool) -> dict[str, Any]:
    """The tokenizer_config.json of a tokenizer that has none."""
    names = [name for name, _ in tokenizer.pieces()]
    config: dict[str, Any] = {
        "bos_token": names[tokenizer.eos_id],
        "eos_token": names[tokenizer.eos_id],
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": seq_length or 2**31,
    }
    if fast:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(tokenizer, SentencePieceTokenizer):
        config["unk_token"] = names[_unknown(tokenizer)]
    return config


def _without_mark(content: bytes) -> bytes:
    """A tokenizer.json without the mark that megacl puts at the token that ends documents; see data/tokenizer.py."""
    tree = json.loads(content)
    marked = [entry for entry in tree.get("added_tokens") or [] if entry.pop("eos", None)]
    return json.dumps(tree, ensure_ascii=False).encode() if marked else content


def _special_ids(
    tokenizer: Tokenizer, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> tuple[int | None, int | list[int]]:
    """The ids that begin and end texts: as generation_config.json has them, else tokenizer_config.json, else EOS."""
    names = {name: index for index, (name, _) in enumerate(tokenizer.pieces())}

    def find(which: str) -> Any:
        token = config.get(f"{which}_token")
        known = names.get(str(token.get("content") if isinstance(token, dict) else token))
        return generation.get(f"{which}_token_id", known)

    eos = find("eos")
    return find("bos"), tokenizer.eos_id if eos is None else eos


def _unknown(tokenizer: SentencePieceTokenizer) -> int:
    return next(index for index, (_, kind) in enumerate(tokenizer.pieces()) if kind == "unknown")


# ---------------------------------------------------------------------------------------------- SentencePiece


def as_tokenizer_json(tokenizer: SentencePieceTokenizer) -> dict[str, Any] | None:
    """The tree of a tokenizer.json that gives the same ids as a SentencePiece model, or None where it is not exact."""
    import sentencepiece
    import tokenizers

    content = tokenizer.file.read_bytes()
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    types = _types(content)
    if of_sentencepiece(model) is None or set(types) - {_NORMAL, _UNKNOWN, _CONTROL, _BYTE}:
        return None
    tree = _tree(tokenizer, model, types, adds_space=adds_space_in_front(content))
    built = tokenizers.Tokenizer.from_str(json.dumps(tree, ensure_ascii=False))
    built.encode_special_tokens = True
    probes = [*_probes([model.id_to_piece(index) for index, kind in enumerate(types) if kind == _NORMAL])]
    meant = model.encode(probes, num_threads=1)
    found = [encoding.ids for encoding in built.encode_batch_fast(probes, add_special_tokens=False)]
    return tree if found == meant else None


def _types(content: bytes) -> list[int]:
    """The type of every piece of a SentencePiece model."""
    pieces = (value for number, value, _ in message_fields(content) if number == _PIECE and isinstance(value, bytes))
    return [
        int(next((inner for field, inner, _ in message_fields(piece) if field == _TYPE), _NORMAL)) for piece in pieces
    ]


def _tree(tokenizer: SentencePieceTokenizer, model: Any, types: list[int], *, adds_space: bool) -> dict[str, Any]:
    pieces = [model.id_to_piece(index) for index in range(len(types))]
    normal = {piece: index for index, (piece, kind) in enumerate(zip(pieces, types, strict=True)) if kind == _NORMAL}
    merges = []
    for piece, index in normal.items():
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [(model.get_score(index), pair) for pair in halves if pair[0] in normal and pair[1] in normal]
    merges.sort(key=lambda each: (-each[0], -len(each[1][0])))
    special = [index for index, kind in enumerate(types) if kind in (_UNKNOWN, _CONTROL)]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    front = [{"type": "Prepend", "prepend": _SPACE}] if adds_space else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if adds_space else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": pieces[index], **plain} for index in special],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*front, {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[_unknown(tokenizer)],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": [list(pair) for _, pair in merges],
        },
    }


def _probes(pieces: list[str]) -> Iterator[str]:
    """Texts on which two tokenizers of these pieces would differ, were they to differ."""
    words = [piece.replace(_SPACE, " ") for piece in pieces]
    yield from words
    draw = random.Random(0)
    for _ in range(_RANDOM_TEXTS):
        yield "".join(draw.choices(words, k=draw.randint(2, 12)))
    singles = [word for word in words if len(word) == 1]
    for character in singles:
        yield from (character * length for length in (2, 3, 5, 8, 33))
    for first, second in itertools.islice(itertools.product(singles, repeat=2), _RANDOM_TEXTS):
        yield (first + second) * 7 + first
    for start in range(1, 0x30000, 64):
        yield "".join(map(chr, (code for code in range(start, start + 64) if not 0xD800 <= code <= 0xDFFF)))
