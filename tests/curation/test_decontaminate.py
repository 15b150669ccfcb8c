"""Decontaminate: rows that stand in an evaluation dataset go, and the reason names the dataset."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps

from bridgework.curation.decontaminate import Decontaminate, Match, NgramIndex
from bridgework.curation.runner import Decision, make
from bridgework.data.dataset import open_dataset
from bridgework.data.samples import Part, Sample, pair
from bridgework.errors import DataError, SpecError
from tests.curation.support import embedder, file, flags, scenes, written

SCENES = scenes(60)
WORDS = [first + last for first in "bdfgklmnprst" for last in ("ad", "en")]


def sentence(seed: int, length: int = 16) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(length))


def asked(key: str, image: bytes, question: str, answer: str) -> Sample:
    return Sample(
        key,
        (image,),
        (Part("user", image=0), Part("user", text=question), Part("assistant", text=answer)),
    )


@pytest.fixture
def against(tmp_path: Path) -> tuple[str, str]:
    """Two evaluation datasets: 10 pairs, and 10 questions with their answers."""
    pairs = [pair(f"eval-{i}", file(SCENES[i]), sentence(i)) for i in range(10)]
    questions = [
        asked(f"question-{i}", file(SCENES[i]), f"{sentence(i, 9)}?", sentence(-i - 1, 3))
        for i in range(10, 20)
    ]
    return written(tmp_path / "pairs-test", pairs), written(tmp_path / "vqa-test", questions)


def decided(curation: Decontaminate, samples: Sequence[Sample], home: Path) -> list[Decision]:
    facts = curation.judge(home)(samples)
    return list(curation.decide(lambda: iter(list(zip(samples, facts, strict=True)))))


def test_planted_contamination_is_found_and_its_dataset_named(
    against: tuple[str, str], home: Path, tmp_path: Path
) -> None:
    clean = [pair(f"clean-{i}", file(SCENES[i]), sentence(1000 + i)) for i in range(20, 50)]
    shouted = sentence(4).upper().replace(" ", ",  ")
    dirty = [
        pair("encoded", file(SCENES[3], "JPEG", quality=50), "a caption of its own"),
        pair(
            "resized",
            file(SCENES[12].resize((64, 48), Image.Resampling.LANCZOS)),
            "a caption of its own",
        ),
        pair("quoted", file(SCENES[50]), f"As they say: {shouted}!"),
        asked("asked", file(SCENES[51]), f"{sentence(15, 9)}?", sentence(-16, 3)),
    ]
    innocent = [
        pair("mirrored", file(ImageOps.mirror(SCENES[3])), "a caption of its own"),
        pair("partly quoted", file(SCENES[52]), " ".join(sentence(5).split()[:9])),  # 2 of 9 runs
    ]
    samples = random.Random(0).sample([*clean, *dirty, *innocent], 36)
    dest = str(tmp_path / "made")
    made = make(
        Decontaminate(against=against), [written(tmp_path / "source", samples)], dest, home=home
    )
    assert {s.key for s in samples} - {s.key for s in open_dataset(dest).samples()} == {
        s.key for s in dirty
    }
    pairs_test, vqa_test = against
    assert made.parameters["counts"] == {
        "kept": 32,
        f"picture in {pairs_test}": 1,
        f"picture in {vqa_test}": 1,
        f"text in {pairs_test}": 1,
        f"text in {vqa_test}": 1,
    }
    digests = [open_dataset(place).manifest.digest for place in against]
    assert made.parameters["against"] == " ".join(digest[:16] for digest in digests)


def test_the_note_names_the_evaluation_row(against: tuple[str, str], home: Path) -> None:
    samples = [
        pair("same", file(SCENES[7]), "x"),
        pair("encoded", file(SCENES[7], "JPEG", quality=30), "x"),
        pair("quoted", file(SCENES[50]), sentence(4)),
    ]
    same, encoded, quoted = decided(Decontaminate(against=against), samples, home)
    assert (
        same.note == "eval-7: the same file"
        and encoded.note.startswith("eval-7: ")
        and "bits off" in encoded.note
    )
    assert quoted.note == "eval-4: 100% of its runs of 8 words"


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"by": "bytes"}, ["same"]),
        ({"by": "perceptual"}, ["same", "encoded"]),
        ({"by": "perceptual", "distance": 16}, ["same", "encoded"]),
    ],
)
def test_pictures_are_compared_as_asked(
    fields: dict[str, Any], found: list[str], against: tuple[str, str], home: Path
) -> None:
    samples = [
        pair("same", file(SCENES[7]), "x"),
        pair("encoded", file(SCENES[7], "JPEG", quality=60), "x"),
        pair("mirrored", file(ImageOps.mirror(SCENES[7])), "x"),
    ]
    told = decided(Decontaminate(against=against, **fields), samples, home)
    assert [s.key for s, v in zip(samples, told, strict=True) if not v.samples] == found


def test_model_finds_images_with_similar_embeddings(against: tuple[str, str], home: Path) -> None:
    """A model of two steps sees little difference: what the threshold does is what is held here."""
    samples = [
        pair("encoded", file(SCENES[7], "JPEG", quality=60), "x"),
        pair("flag", next(flags()).images[0], "x"),
    ]
    spec = Decontaminate(against=against, by="embedding", model=str(embedder(home)), similarity=0.5)
    facts = spec.judge(home)(samples)
    (near, far) = (Match(*fact["image"]) for fact in facts)
    assert (
        near.key == "eval-7" and near.how is not None and far.how is not None and near.how > far.how
    )

    def dropped(similarity: float) -> list[bool]:
        curation = replace(spec, similarity=similarity)
        return [not v.samples for v in curation.decide(lambda: zip(samples, facts, strict=True))]

    assert dropped((near.how + far.how) / 2) == [True, False]
    assert dropped(min(1.0, max(far.how - 0.01, 0.01))) == [True, True]


def test_one_image_of_a_document_is_enough(against: tuple[str, str], home: Path) -> None:
    images = (file(SCENES[50]), file(SCENES[5], "JPEG", quality=60))
    document = Sample(
        "d",
        images,
        (Part("caption", image=0), Part("caption", text="and"), Part("caption", image=1)),
    )
    (verdict,) = decided(Decontaminate(against=against), [document], home)
    assert verdict.why == f"picture in {against[0]}" and verdict.note.startswith("eval-5")


def test_another_overlap_reuses_the_annotations(
    against: tuple[str, str], home: Path, tmp_path: Path
) -> None:
    half = pair("half", file(SCENES[50]), " ".join(sentence(4).split()[:12]))  # 5 of its 9 runs
    (strict,) = decided(Decontaminate(against=against, overlap=0.5), [half], home)
    (loose,) = decided(Decontaminate(against=against, overlap=0.6), [half], home)
    assert strict.note == "eval-4: 56% of its runs of 8 words" and loose.samples == (half,)


# --- runs of words, against a comparison of every two texts ----------------------------------------------------------


def test_text_matches_the_row_with_the_largest_overlap() -> None:
    rows = [sentence(i, 5 + i % 9) for i in range(40)]
    runs = NgramIndex(4, [(text, Match(0, str(i), None)) for i, text in enumerate(rows)])
    for seed in range(200):
        draw = random.Random(seed)
        one, other = (draw.choice(rows).split() for _ in range(2))
        text = " ".join([*one[draw.randrange(3) :], *other[: draw.randrange(len(other))]])
        shares = [share(text, row, 4) for row in rows]
        found = runs(text)
        if max(shares) == 0:
            assert found is None
        else:
            assert found is not None and (found.key, found.how) == (
                str(shares.index(max(shares))),
                round(max(shares), 4),
            )


def share(text: str, row: str, length: int) -> float:
    def cut(text: str) -> set[tuple[str, ...]]:
        told = text.split()
        return {tuple(told[i:][:length]) for i in range(len(told) - length + 1)}

    return len(cut(text) & cut(row)) / len(cut(row)) if cut(row) else 0.0


def test_ngrams_of_a_common_prompt_do_not_count() -> None:
    prompt = "answer the question with a single word or phrase please"
    rows = [(f"{sentence(i, 12)} {prompt}", Match(0, str(i), None)) for i in range(30)]
    runs = NgramIndex(8, rows)
    assert runs(prompt) is None
    found = runs(rows[3][0])
    assert found is not None and (found.key, found.how) == ("3", 1.0)


def test_short_evaluation_text_matches_nothing() -> None:
    assert NgramIndex(8, [("a dog", Match(0, "k", None))])("look, a dog") is None


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"against": ()}, "at least one evaluation dataset"),
        ({"run": 0}, "run is at least 1"),
        ({"overlap": 1.5}, r"overlap in \(0, 1\]. Got 8 and 1.5"),
        ({"by": "embedding"}, "needs model=ARTIFACT"),
    ],
)
def test_conflicting_fields_are_rejected(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Decontaminate(**{"against": ("vqa-test",), **fields})


def test_missing_evaluation_dataset_raises_before_annotation(home: Path, tmp_path: Path) -> None:
    source = written(tmp_path / "source", [pair("k", file(SCENES[0]), "x")])
    with pytest.raises(DataError, match="dataset 'vqa-tset' not found"):
        make(Decontaminate(against=("vqa-tset",)), [source], str(tmp_path / "made"), home=home)
    assert not (tmp_path / "made.judged").exists()
