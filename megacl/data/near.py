"""Near duplicates: documents of nearly the same words, found by MinHash, without comparing each with each.

    signatures = sign(["some text", "another text"])          # uint32 [2, 128]
    gone = is_near(signatures, classes, threshold=0.8)      # bool [2]

A text is the set of its runs of five words (its shingles); case and punctuation do not count, and in scripts without
spaces each letter is a word. Two texts are as similar as the part of all their shingles that both have (Jaccard). A
signature is 128 numbers, and the part of them that two texts share estimates their similarity: at 0.8 with a standard
error of 0.035 (Broder 1997, "On the resemblance and containment of documents"). Only texts that agree in all numbers of
one of the signature's bands are compared; bands are as long as they can be while 99 in 100 pairs at the threshold share
one. The signatures come from rensa, a MinHash in Rust.

Where thousands of texts that are no duplicates have much in common, a page's menu, say, they agree in a band all the
same, and comparing each with each would take time that grows with the square of their number. So a text is compared
with the first 64 that agree with it in a band, of each band; duplicates that agree in some other band as well, in which
fewer texts do, are found all the same.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megacl.data.shard_list import Mask
from megacl.errors import LaunchError

Signatures = npt.NDArray[np.uint32]
"""[documents, PERMUTATIONS]."""

PERMUTATIONS = 128
SHINGLE_WORDS = 5
_SEED = 1
_RECALL = 0.99
_COMPARED = 64

# Thai to Khmer, kana, the Chinese characters, Hangul: scripts in which a space does not end a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_UNSPACED_LETTER = re.compile(rf"[{_UNSPACED}]")
_WORD = re.compile(r"\w+")
_WORD_OR_LETTER = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+")  # at half the speed


def shingles(text: str) -> set[str]:
    """The runs of five words in a text; of fewer words all of them, and without any the text itself."""
    words = (_WORD_OR_LETTER if _UNSPACED_LETTER.search(text) else _WORD).findall(text.lower())
    if len(words) < SHINGLE_WORDS:
        return {" ".join(words) or text}
    return set(map(" ".join, zip(*(words[start:] for start in range(SHINGLE_WORDS)), strict=False)))


def sign(texts: Sequence[str]) -> Signatures:
    """The signatures of some texts. LaunchError if rensa is not installed."""
    minhash = load_minhash()
    found = minhash.digests_from_token_sets([list(shingles(text)) for text in texts], PERMUTATIONS, _SEED)
    return np.array(found, np.uint32).reshape(len(texts), PERMUTATIONS)


def load_minhash() -> Any:
    """rensa's MinHash; LaunchError if it is not installed."""
    try:
        from rensa import RMinHash
    except ImportError:
        raise LaunchError(
            "near duplicates need rensa, which is not installed; run `pip install 'megacl[dedup]'`."
        ) from None
    return RMinHash


def band_rows(threshold: float) -> int:
    """How many numbers of a signature make a band for a threshold in (0, 1]."""
    rows = [r for r in range(1, 33) if 1 - (1 - threshold**r) ** (PERMUTATIONS // r) >= _RECALL]
    return max(rows, default=1)


def is_near(signatures: Signatures, classes: npt.NDArray[np.uint8], threshold: float) -> Mask:
    """Which documents are near to one that comes before them and stays: bool [documents].

    signatures: of all documents; may be mapped. classes: [documents]; a smaller class comes before a larger one, and
    inside a class documents come in their order. Documents of class 0 always stay, and have no say over those of class
    1. Memory: about 50 bytes a document, and 1 KB for each one that shares a band with another.
    """
    rows = band_rows(threshold)
    bands = PERMUTATIONS // rows
    suspect = np.zeros(len(classes), np.bool_)
    for band in range(bands):
        suspect |= _shared(_keys(signatures, band, rows))
    numbers = np.flatnonzero(suspect)
    numbers = numbers[np.argsort(classes[numbers], kind="stable")]
    chosen = signatures[numbers]
    keys = np.stack([_keys(chosen, band, rows) for band in range(bands)])
    shared = np.stack([_shared(each) for each in keys])
    gone = np.zeros(len(classes), np.bool_)
    gone[numbers] = _greedy(chosen, keys.T, shared.T, classes[numbers], threshold)
    return gone


def _keys(signatures: Signatures, band: int, rows: int) -> npt.NDArray[np.uint64]:
    """One number for the values of a band, [documents]."""
    keys = np.zeros(len(signatures), np.uint64)
    for column in range(band * rows, band * rows + rows):
        keys = (keys ^ signatures[:, column]) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys


def _shared(keys: npt.NDArray[np.uint64]) -> Mask:
    """Which of the numbers stand there more than once: bool [N]."""
    order = np.argsort(keys)
    same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
    found = np.zeros(len(keys), np.bool_)
    found[order[same]] = found[order[same + 1]] = True
    return found


def _greedy(
    signatures: Signatures,
    keys: npt.NDArray[np.uint64],
    shared: Mask,
    classes: npt.NDArray[np.uint8],
    threshold: float,
) -> Mask:
    """Which documents, in order of precedence, are near to one that stayed and shares a band; [N], [N, bands]."""
    gone = np.zeros(len(signatures), np.bool_)
    stayed: defaultdict[tuple[bool, int, int], list[int]] = defaultdict(list)  # whether of class 0, a band, its key
    for index, kind in enumerate(classes.tolist()):
        bands = np.flatnonzero(shared[index])
        own = list(zip(bands.tolist(), keys[index, bands].tolist(), strict=True))
        rivals = [[], [False], [False, True]][kind]
        met = {other for foreign in rivals for key in own for other in stayed.get((foreign, *key), ())}
        alike = (signatures[list(met)] == signatures[index]).mean(axis=1) if met else np.empty(0)
        if (alike >= threshold - 1e-9).any():
            gone[index] = True
            continue
        for key in own:
            if len(bucket := stayed[kind == 0, *key]) < _COMPARED:
                bucket.append(index)
    return gone
