"""Near duplicates against the exact similarity of all pairs; no held-out document is in training, not even nearly."""

import hashlib
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from folders import contents, documents_of, small_tokenizer, write_lines
from hypothesis import given
from hypothesis import strategies as st

from megacl.data.dedup import DedupReport, dedup_documents
from megacl.data.generations import changing
from megacl.data.manifest import read_manifest
from megacl.data.near import PERMUTATIONS, band_rows, is_near, shingles, sign
from megacl.data.prepare import prepare
from megacl.data.tokenizer import Tokenizer
from megacl.data.verify import verify_source
from megacl.errors import ConfigError

VALIDATION = 0.3


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(400)]
    return [" ".join(draw.choices(words, k=draw.randint(60, 150))) for _ in range(120)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, texts) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), texts[:40])


def jaccard(one: str, other: str) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def edited(text: str, seed: int) -> str:
    """The text with another end: about 0.9 of its shingles, and another hash."""
    words = text.split()
    return " ".join([*words[: len(words) - 3], f"ending {seed}"])


def is_held_out(text: str) -> bool:
    return int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) / 2**64 < VALIDATION


def make(path: Path, texts: list[str], tokenizer: Tokenizer, **more) -> Path:
    file = write_lines(path.with_suffix(".jsonl"), texts)
    settings = {"validation": VALIDATION, "workers": 1, "block_bytes": 20_000, **more}
    prepare([str(file)], tokenizer=tokenizer, out=path, **settings)
    return path


def dedup(folder: Path, **settings) -> DedupReport:
    with changing(folder) as state:
        return dedup_documents(state, **settings)


# ---------------------------------------------------------------------------------------------- signatures


def test_a_text_is_its_runs_of_five_words_whatever_their_case_and_punctuation():
    assert shingles("The quick, brown fox -- jumps OVER it.") == {
        "the quick brown fox jumps", "quick brown fox jumps over", "brown fox jumps over it",
    }  # fmt: skip
    assert shingles("Only four words here") == {"only four words here"}
    assert shingles("!?") == {"!?"}
    assert shingles("日本語の文章") == {"日 本 語 の 文", "本 語 の 文 章"}
    assert jaccard("你好世界今天天气很好" * 2, "你好世界今天天气很好" * 2 + "吗") > 0.8


@given(overlap=st.integers(0, 200), seed=st.integers(0, 9))
def test_signatures_agree_in_about_the_part_that_texts_share(overlap, seed):
    words = [f"{seed}w{number}" for number in range(404)]
    one, other = " ".join(words[:204]), " ".join(words[200 - overlap : 404 - overlap])
    a, b = sign([one, other])
    assert a.shape == (PERMUTATIONS,)
    exact = jaccard(one, other)
    assert abs((a == b).mean() - exact) <= 5 * np.sqrt(max(exact * (1 - exact), 0.005) / PERMUTATIONS)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 1.0])
def test_bands_are_as_long_as_they_can_be_while_99_in_100_pairs_at_the_threshold_share_one(threshold):
    def recall(rows: int) -> float:
        return 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows)

    rows = band_rows(threshold)
    assert recall(rows) >= 0.99
    assert rows == 32 or all(recall(more) < 0.99 for more in range(rows + 1, 33))


@pytest.mark.parametrize(
    ("crowd_of_a_band", "crowd_class", "found"), [(64, 2, False), (63, 2, True), (64, 0, True), (64, 1, False)]
)
def test_a_document_is_compared_with_64_of_a_band_and_64_of_other_folders(crowd_of_a_band, crowd_class, found):
    draw, rows = np.random.default_rng(0), band_rows(0.9)
    base = draw.integers(0, 2**32, PERMUTATIONS, np.uint32)
    crowds = []
    for first in range(0, PERMUTATIONS - rows + 1, rows):
        count = crowd_of_a_band if first == 0 else 64
        crowd = draw.integers(0, 2**32, (count, PERMUTATIONS), np.uint32)
        crowd[:, first : first + rows] = base[first : first + rows]
        crowds.append(crowd)
    signatures = np.concatenate([*crowds, [base, base]])
    classes = np.full(len(signatures), crowd_class, np.uint8)
    classes[-2:] = 2
    assert is_near(signatures, classes, 0.9).tolist() == [*[False] * (len(signatures) - 1), found]


def test_near_duplicates_are_found_among_hundreds_of_documents_with_the_same_boilerplate():
    draw = random.Random(0)
    menu = [f"item {number}" for number in range(110)]
    own = [[f"word{draw.randrange(10**9)}" for _ in range(50)] for _ in range(400)]
    texts = [" ".join([*menu, *words]) for words in own]
    copies = [" ".join([*menu, *words[:-5], "and", "another", "end"]) for words in own[::8]]
    assert jaccard(texts[0], texts[1]) > 0.6
    assert jaccard(texts[0], copies[0]) > 0.9
    gone = is_near(sign([*texts, *copies]), np.full(450, 2, np.uint8), 0.85)
    assert gone.tolist() == [False] * 400 + [True] * 50


@given(data=st.data(), count=st.integers(0, 25))
def test_nothing_that_stays_is_near_to_what_stays_before_it(data, count):
    # Signatures that differ from one of three in few places or in many, so that bands are shared and pairs are clear.
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    signatures = draw.integers(0, 2**32, (3, PERMUTATIONS), np.uint32)[draw.integers(0, 3, count)]
    for signature in signatures:
        changed = draw.permutation(PERMUTATIONS)[: draw.choice([0, 3, 100])]
        signature[changed] = draw.integers(0, 2**32, len(changed))
    classes = np.array(data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)), np.uint8)
    gone = is_near(signatures, classes, 0.8)
    expected, stayed = np.zeros(count, np.bool_), []
    for index in sorted(range(count), key=lambda index: classes[index]):
        rivals = [other for other in stayed if classes[index] == 2 or (classes[index] == 1 and classes[other] == 1)]
        expected[index] = any((signatures[other] == signatures[index]).mean() >= 0.8 for other in rivals)
        if not expected[index]:
            stayed.append(index)
    assert gone.tolist() == expected.tolist()


# ---------------------------------------------------------------------------------------------- folders


def test_what_stays_holds_no_pair_that_is_near_and_what_goes_is_near_to_something(tmp_path, texts, tokenizer):
    every = [*texts, *(edited(text, seed) for seed, text in enumerate(texts[::3])), *texts[:5]]
    folder = make(tmp_path / "web", every, tokenizer)
    report = dedup(folder, near=0.7)
    found = documents_of(folder)
    left = [*found["validation"], *found["train"]]
    pairs = [jaccard(left[i], left[j]) for i in range(len(left)) for j in range(i)]
    assert max(pairs) < 0.6
    assert len(left) == len(texts) == report.of - report.train - report.held_out
    for text in {*every} - {*left}:
        assert max(jaccard(text, other) for other in left) > 0.8
    state = read_manifest(folder).generations[-1]
    assert (state.made_by, state.settings, state.removed_documents) == ("dedup", {"near": 0.7}, 45)
    assert verify_source(folder) == []
    before = contents(folder)
    assert dedup(folder, near=0.7).generation is None
    assert contents(folder) == before


def test_no_held_out_document_is_in_training_not_even_nearly_within_and_across_sources(tmp_path, texts, tokenizer):
    held_out = [text for text in texts if is_held_out(text)]
    # Copies of held-out documents that their hashes put into training, before and behind the originals.
    planted = [next(t for t in (edited(text, k) for k in range(99)) if not is_held_out(t)) for text in held_out]
    tests = make(tmp_path / "tests", [f"{text} of another source" for text in texts[:60]], tokenizer, validation=0.9)
    foreign = documents_of(tests)["validation"]
    near_foreign = [next(t for t in (edited(text, k) for k in range(99)) if not is_held_out(t)) for text in foreign]
    copies = [text for text in foreign if not is_held_out(text)]
    web = make(
        tmp_path / "web", [*planted[::2], *near_foreign, *texts[60:], *planted[1::2], *copies, *held_out], tokenizer
    )
    assert set(planted) <= set(documents_of(web)["train"])
    for settings in ({"workers": 1}, {"workers": 3}):
        out = tmp_path / f"web of {settings['workers']}"
        shutil.copytree(web, out)
        dedup(out, near=0.8, against=[tests], **settings)
    assert contents(tmp_path / "web of 1") == contents(tmp_path / "web of 3")
    found = documents_of(tmp_path / "web of 1")
    before = documents_of(web)
    for text in found["train"]:
        assert all(jaccard(text, other) < 0.8 for other in [*before["validation"], *foreign])
    assert not {*planted, *near_foreign, *copies} & set(found["train"])
    assert set(found["validation"]) == set(before["validation"])
    assert sorted(found["train"]) == sorted(text for text in texts[60:] if not is_held_out(text))


def test_exact_duplicates_go_and_copies_of_what_another_folder_holds_out(tmp_path, texts, tokenizer):
    tests = make(tmp_path / "tests", texts[:40], tokenizer, validation=0.9)
    folder = make(tmp_path / "web", [*texts[20:80], *texts[50:90], edited(texts[100], 0), texts[100]], tokenizer)
    report = dedup(folder, exact=True, against=[tests], dry_run=True)
    assert report.generation is None
    report = dedup(folder, exact=True, against=[tests])
    foreign = set(documents_of(tests)["validation"])
    left = [*dict.fromkeys([*texts[20:90], edited(texts[100], 0), texts[100]])]
    expected = {
        "train": sorted(text for text in left if not is_held_out(text) and text not in foreign),
        "validation": sorted(text for text in left if is_held_out(text)),
    }
    assert {split: sorted(found) for split, found in documents_of(folder).items()} == expected
    assert report.train + report.held_out == 102 - len(expected["train"]) - len(expected["validation"])
    assert read_manifest(folder).generations[-1].settings == {"exact": True, "against": f"{tests}@1"}


@pytest.mark.parametrize("near", [0.0, 1.5, None])
def test_what_a_duplicate_is_must_be_said(tmp_path, texts, tokenizer, near):
    folder = make(tmp_path / "web", texts[:30], tokenizer, validation=0)
    with pytest.raises(ConfigError, match=r"--exact, or --near SIMILARITY|near is .*; it must lie in \(0, 1\]"):
        dedup(folder, near=near)


def test_signatures_are_found_again_after_an_interruption(tmp_path, texts, tokenizer, monkeypatch):
    from megacl.data import dedup as module

    folder = make(tmp_path / "web", [*texts, *texts[:3]], tokenizer)
    signed = []
    sign_one = module._Signer.__call__

    def sign_and_count(self, shard):
        if len(signed) == 4:
            raise KeyboardInterrupt
        signed.append(shard.signatures.name)
        sign_one(self, shard)

    monkeypatch.setattr(module._Signer, "__call__", sign_and_count)
    with pytest.raises(KeyboardInterrupt):
        dedup(folder, near=0.8)
    monkeypatch.setattr(
        module._Signer, "__call__", lambda self, shard: (signed.append(shard.signatures.name), sign_one(self, shard))
    )
    assert dedup(folder, near=0.8).generation == 2
    assert len(signed) == len(set(signed)) == read_manifest(folder).generations[0].shards
