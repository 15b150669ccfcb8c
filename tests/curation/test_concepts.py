"""Concept balance: enough rows of every noun phrase, none too many (LLaVA's appendix)."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from bridgework.curation.concepts import Concepts, phrases
from bridgework.curation.runner import make
from bridgework.data.dataset import open_dataset
from bridgework.data.samples import Part, Sample, pair
from bridgework.errors import SpecError
from tests.curation.models import decided, judged
from tests.curation.support import flags, written

IMAGE = next(flags()).images[0]
NOUNS = ("dog", "cat", "boat", "tree", "house", "river", "bridge", "horse", "train", "garden")


def rows(*texts: str) -> list[Sample]:
    return [pair(f"row-{number}", IMAGE, text) for number, text in enumerate(texts)]


def kept(samples: list[Sample], home: Path, **fields: Any) -> set[str]:
    spec = Concepts(**fields)
    verdicts = decided(spec, samples, judged(spec, samples, home))
    return {
        sample.key for sample, verdict in zip(samples, verdicts, strict=True) if verdict.samples
    }


def skewed() -> list[Sample]:
    """300 captions of one to three nouns: the first stands in most of them, the last in a few."""
    draws = random.Random(0)
    weights = [2.0**-place for place in range(len(NOUNS))]
    return rows(
        *(
            "a {} near the {} by the {}".format(*draws.choices(NOUNS, weights, k=3))
            for _ in range(300)
        )
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "A young boy in a red shirt near the New York skyline",
            ["young boy", "red shirt", "new york skyline"],
        ),
        ("the dog and the dog", ["dog"]),
        ("red and blue", []),
        ("two cats", ["cats"]),
        ("it isn't raining", []),
        ("a house\nred boat", ["house", "red boat"]),
        ("  ", []),
    ],
)
def test_a_noun_phrase_is_adjectives_and_nouns_and_ends_in_a_noun(
    text: str, found: list[str]
) -> None:
    assert phrases(text) == found


def test_a_phrase_of_fewer_than_three_rows_contributes_nothing(home: Path) -> None:
    samples = rows(*["a dog"] * 3, *["a cat"] * 2, "a boat", "a dog and a boat", "running")
    assert kept(samples, home) == {"row-0", "row-1", "row-2", "row-6"}
    assert kept(samples, home, rarest=2) == {f"row-{n}" for n in (0, 1, 2, 3, 4, 5, 6)}
    whys = [v.why for v in decided(Concepts(), samples, judged(Concepts(), samples, home))]
    assert Counter(whys) == {"kept": 4, "only rare phrases": 3, "no noun phrase": 1}


def test_rare_phrases_keep_all_their_rows_and_common_ones_as_many_as_they_may(home: Path) -> None:
    samples = skewed()
    stay = kept(samples, home, most=20)
    named = {
        sample.key: {noun for noun in NOUNS if noun in sample.text.split()} for sample in samples
    }
    of = {noun: {key for key, nouns in named.items() if noun in nouns} for noun in NOUNS}
    rare = {noun for noun, keys in of.items() if 3 <= len(keys) <= 20}
    common = {noun for noun, keys in of.items() if len(keys) > 20}
    assert rare and common
    assert all(of[noun] <= stay for noun in rare)
    assert all(len(of[noun] & stay) >= 20 for noun in common)
    assert (
        len(stay)
        <= sum(min(20, len(keys)) for keys in of.values() if len(keys) >= 3)
        < len(samples)
    )


def test_a_phrase_that_no_other_helps_adds_exactly_its_most(home: Path) -> None:
    samples = rows(*["a dog"] * 250)
    assert len(kept(samples, home)) == 100
    assert len(kept(samples, home, most=7)) == 7


def test_the_subset_is_random_and_the_same_for_a_seed_in_any_order(home: Path) -> None:
    samples = skewed()
    first = kept(samples, home, most=20)
    assert kept(samples[::-1], home, most=20) == first
    assert kept(samples, home, most=20, seed=1) != first
    shares = Counter(
        key for seed in range(60) for key in kept(rows(*["a dog"] * 40), home, most=10, seed=seed)
    )
    assert len(shares) == 40 and max(shares.values()) < 30 and fmean(shares.values()) == 15


def test_a_rarer_phrase_is_named_before_a_common_one(home: Path) -> None:
    samples = rows(*["a dog"] * 5, *["a dog near the boat"] * 3)
    spec = Concepts()
    verdicts = decided(spec, samples, judged(spec, samples, home))
    assert [v.note for v in verdicts] == ["dog (8 rows)"] * 5 + ["boat (3 rows)"] * 3
    assert [v.samples[0].provenance["concepts.phrase"] for v in verdicts] == ["dog"] * 5 + [
        "boat"
    ] * 3


def test_texts_of_a_conversation_and_rows_without_a_text_are_read_too(home: Path) -> None:
    talk = Sample(
        "t",
        (IMAGE,),
        (Part("user", image=0), Part("user", text="a dog?"), Part("assistant", text="a cat")),
    )
    bare = Sample("bare", (IMAGE,), (Part("caption", image=0),))
    assert judged(Concepts(), [talk, bare], home) == [{"phrases": ["dog", "cat"]}, {"phrases": []}]


def test_a_balanced_dataset_knows_its_phrases_and_counts(home: Path, tmp_path: Path) -> None:
    source = written(tmp_path / "source", rows(*["a dog"] * 20, "a boat"))
    made = make(
        Concepts(most=5), [source], str(tmp_path / "made"), home=home, say=lambda text: None
    )
    assert made.rows == 5 and made.parameters["tagger"].startswith("textblob ")
    assert made.parameters["counts"] == {
        "enough rows of its phrases": 15,
        "kept": 5,
        "only rare phrases": 1,
    }
    told = [sample.provenance for sample in open_dataset(str(tmp_path / "made")).samples()]
    assert all(one["concepts.phrase"] == "dog" and one["concepts.rows"] == "20" for one in told)


@pytest.mark.parametrize("make_one", [lambda: Concepts(rarest=0), lambda: Concepts(most=0)])
def test_a_balance_of_nothing_is_refused(make_one: Callable[[], Concepts]) -> None:
    with pytest.raises(SpecError, match=r"at least 1\. Got"):
        make_one()
