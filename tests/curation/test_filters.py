"""Filters: each limit drops what breaks it and nothing else, and the first that is broken is the reason."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bridgework.curation.filters import Filters
from bridgework.curation.runner import Decision, make
from bridgework.data.dataset import open_dataset
from bridgework.data.samples import Part, Sample, pair
from bridgework.errors import DataError, SpecError, WeightsError
from bridgework.inference.pipeline import Pipeline
from tests.curation.support import embedder, file, flags, scenes, written

SCENE = scenes(1)[0]


def picture(width: int, height: int, kind: str = "PNG", **how: Any) -> bytes:
    return file(SCENE.resize((width, height)), kind, **how)


def said(text: str, key: str = "k") -> Sample:
    return pair(key, picture(96, 72), text)


def shown(*images: bytes, key: str = "k") -> Sample:
    places = tuple(Part("caption", image=number) for number in range(len(images)))
    return Sample(key, images, (*places, Part("caption", text="a sunny street in the old town")))


def decided(curation: Filters, samples: Sequence[Sample], home: Path) -> list[Decision]:
    facts = curation.judge(home)(samples)
    return list(curation.decide(lambda: iter(list(zip(samples, facts, strict=True)))))


def dropped(home: Path, samples: Sequence[Sample], **limits: Any) -> dict[int, str]:
    """The rows that were dropped, by number, and why."""
    told = decided(Filters(**limits), samples, home)
    return {number: verdict.why for number, verdict in enumerate(told) if not verdict.samples}


# --- pictures --------------------------------------------------------------------------------------------------------


def test_min_side_is_of_the_shorter_side_of_the_smallest_image(home: Path) -> None:
    samples = [
        shown(picture(100, 60)),
        shown(picture(59, 100)),
        shown(picture(100, 100), picture(300, 59)),
        talk("x"),
    ]
    assert dropped(home, samples, min_side=60) == {1: "min_side", 2: "min_side"}


def test_max_aspect_is_of_the_longest_image_in_either_orientation(home: Path) -> None:
    samples = [
        shown(picture(90, 30)),
        shown(picture(30, 91)),
        shown(picture(50, 50), picture(160, 50)),
        talk("x"),
    ]
    assert dropped(home, samples, max_aspect=3) == {1: "max_aspect", 2: "max_aspect"}


def test_max_pixels_is_of_the_largest_image(home: Path) -> None:
    samples = [
        shown(picture(50, 40)),
        shown(picture(50, 41)),
        shown(picture(9, 9), picture(60, 40)),
        talk("x"),
    ]
    assert dropped(home, samples, max_pixels=2000) == {1: "max_pixels", 2: "max_pixels"}


def test_exif_rotation_is_applied_before_measuring(home: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    (told,) = Filters(min_side=1).judge(home)([shown(picture(90, 30, "JPEG", exif=exif))])
    assert told["side"] == 30 and told["aspect"] == 3.0 and told["pixels"] == 2700


def test_file_that_is_not_an_image_is_quarantined(home: Path) -> None:
    torn, sound = Filters(min_side=1).judge(home)([shown(b"<html>"), shown(picture(9, 9))])
    assert torn["bad"][0] == "not_an_image" and sound["side"] == 9


# --- texts -----------------------------------------------------------------------------------------------------------


def test_words_are_counted_without_punctuation(home: Path) -> None:
    samples = [
        said("One, two - three!"),
        said("four"),
        said("one two three four five"),
        shown(picture(9, 9)),
    ]
    assert dropped(home, samples, min_words=3) == {1: "min_words"}
    assert dropped(home, samples, max_words=4) == {2: "max_words", 3: "max_words"}
    assert dropped(home, [said("老街上的阳光")], max_words=5) == {
        0: "max_words"
    }  # each sign counts


def test_single_word_is_not_a_repetition_in_a_short_text(home: Path) -> None:
    samples = [said("dog"), said("a dog and a cat"), said("Sale! sale, SALE now")]
    assert dropped(home, samples, max_repetition=0.4) == {2: "max_repetition"}
    assert dropped(home, samples, max_repetition=0.39) == {1: "max_repetition", 2: "max_repetition"}


def test_listed_words_match_complete_words_in_any_case(home: Path, tmp_path: Path) -> None:
    samples = [
        said("an ASS in a field"), said("a glass of wine"), said("A blood-red sea"), said("bloody mess"),
        said("red, then blood"), said("Straße"),
    ]  # fmt: skip
    assert dropped(home, samples, words=("ass", "Blood Red")) == {0: "words", 2: "words"}
    (tmp_path / "list.txt").write_text("blood\n\nSTRASSE\n", encoding="utf-8")
    found = dropped(home, samples, words=("ass",), words_file=str(tmp_path / "list.txt"))
    assert found == {0: "words", 2: "words", 4: "words", 5: "words"}
    told = decided(Filters(words=("blood red",)), samples, home)
    assert told[2].note == "'blood red'"
    assert dropped(
        home, [said("a nude_girl_01.jpg picture"), said("a denuded hill")], words=("nude",)
    ) == {0: "words"}


def test_languages_keep_texts_with_a_certain_language(home: Path) -> None:
    samples = [
        said("a photo of a dog that runs along the beach"),
        said("ein Foto von einem Hund, der am Strand entlang läuft"),
        said("une photo d'un chien qui court sur la plage"),
        said("12 34"),
        Sample("mute", (picture(9, 9),), (Part("caption", image=0),)),
    ]
    assert dropped(home, samples, languages=("en",)) == {n: "languages" for n in (1, 2, 3)}
    assert dropped(home, samples, languages=("en", "fr"), min_language=0.6) == {
        n: "languages" for n in (1, 3)
    }
    kept, german, *_ = decided(Filters(languages=("en",)), samples, home)
    assert german.note.startswith("de 0.9") and kept.samples[0].provenance == {
        "filters.language": "en"
    }


# --- models ----------------------------------------------------------------------------------------------------------


def test_similarity_is_the_models_own_cosine(home: Path) -> None:
    folder = embedder(home)
    samples = [
        *list(flags())[:12],
        talk("no image"),
        Sample("mute", (picture(9, 9),), (Part("caption", image=0),)),
    ]
    pipeline = Pipeline.load(str(folder), "cpu")
    images_ND = pipeline.embed_images([s.images[0] for s in samples[:12]])
    cosines = (images_ND * pipeline.embed_texts([s.text for s in samples[:12]])).sum(1)
    limit = float(cosines.sort().values[5:7].mean())
    spec = Filters(min_similarity=limit, model=str(folder))
    told = decided(spec, samples, home)
    assert [v.why for v in told[12:]] == ["kept", "kept"]
    for verdict, cosine in zip(told, cosines.tolist(), strict=False):
        assert verdict.why == ("kept" if cosine >= limit else "min_similarity")
        if verdict.samples:
            assert float(verdict.samples[0].provenance["filters.similarity"]) == pytest.approx(
                cosine, abs=1e-4
            )
    assert {v.why for v in told} == {"kept", "min_similarity"}


@pytest.mark.parametrize("row", [True, False])
def test_a_linear_probe_scores_the_worst_image(row: bool, home: Path, tmp_path: Path) -> None:
    folder, probe = embedder(home), str(tmp_path / "probe.safetensors")
    images = [s.images[0] for s in list(flags())[:6]]
    embedded_ND = Pipeline.load(str(folder), "cpu").embed_images(images)
    weight_D = torch.linspace(-1, 1, embedded_ND.shape[1])
    save_file({"weight": weight_D[None] if row else weight_D, "bias": torch.tensor([0.25])}, probe)
    scores = (embedded_ND @ weight_D + 0.25).tolist()
    samples = [shown(image) for image in images] + [shown(images[0], images[1])]
    wanted = [*scores, min(scores[:2])]
    limit = sorted(scores)[3]
    facts = Filters(min_score=limit, model=str(folder), probe=probe).judge(home)(samples)
    assert [fact["score"] for fact in facts] == pytest.approx(wanted, abs=1e-4)
    told = dropped(home, samples, min_score=limit - 1e-3, model=str(folder), probe=probe)
    assert (
        told == {n: "min_score" for n, score in enumerate(wanted) if score < limit - 1e-3}
        and 3 <= len(told) <= 4
    )


def test_file_that_is_not_a_probe_of_the_model_is_rejected(home: Path, tmp_path: Path) -> None:
    folder, probe = str(embedder(home)), tmp_path / "probe.safetensors"
    spec = Filters(min_score=0.0, model=folder, probe=str(probe))
    save_file({"weight": torch.ones(3)}, probe)
    with pytest.raises(WeightsError, match=r"the probe does not fit the model\. Got 3 weights"):
        spec.judge(home)([said("x")])
    save_file({"weight": torch.ones(2, 3)}, probe)
    with pytest.raises(WeightsError, match=r"is not a linear probe. Got \{'weight': \(2, 3\)\}"):
        spec.judge(home)
    probe.write_bytes(b"pickle")
    with pytest.raises(WeightsError, match="is not a safetensors file"):
        spec.judge(home)


# --- together --------------------------------------------------------------------------------------------------------


def test_the_first_limit_in_the_order_of_the_fields_is_the_reason(
    home: Path, tmp_path: Path
) -> None:
    small = pair("small", picture(30, 100), "gore gore gore")
    limits: dict[str, Any] = {
        "words": ("gore",),
        "max_repetition": 0.5,
        "max_aspect": 2,
        "min_side": 50,
    }
    order = [field.name for field in fields(Filters) if field.name in limits]
    assert order == ["min_side", "max_aspect", "max_repetition", "words"]
    for name in order:
        assert dropped(home, [small], **limits) == {0: name}
        del limits[name]
        if not limits:
            break


def test_every_row_is_counted_once(home: Path, tmp_path: Path) -> None:
    samples = [pair(f"{n}", picture(40 + n, 80), "red dog " * (n % 4 + 1)) for n in range(40)]
    limits: dict[str, Any] = {"min_side": 50, "max_words": 6}
    made = make(
        Filters(**limits),
        [written(tmp_path / "source", samples)],
        str(tmp_path / "made"),
        home=home,
    )
    small = {n for n in range(40) if 40 + n < 50}
    long = {n for n in range(40) if 2 * (n % 4 + 1) > 6} - small
    assert made.parameters["counts"] == {
        "kept": 40 - len(small | long),
        "min_side": len(small),
        "max_words": len(long),
    }
    assert [s.key for s in open_dataset(str(tmp_path / "made")).samples()] == [
        str(n) for n in range(40) if n not in small | long
    ]


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({}, "needs a limit, .* e.g. min_side=200"),
        ({"min_similarity": 0.2}, "need model=ARTIFACT"),
        ({"min_side": 9, "model": "a/model"}, "need model=ARTIFACT, and no other limit"),
        ({"min_score": 5.0, "model": "a/model"}, "needs probe=FILE"),
        ({"min_words": 5, "max_words": 4}, "min_words is larger than max_words. Got 5 and 4"),
        ({"max_aspect": 0.5}, "max_aspect is the longer side by the shorter, at least 1; got 0.5"),
        ({"min_side": -5}, "min_side is a number of pixels, at least 1; got -5"),
        ({"max_pixels": 0}, "max_pixels is a number of pixels, at least 1; got 0"),
        ({"min_words": -1}, "min_words is a number of words, at least 0; got -1"),
        ({"max_words": -1}, "max_words is a number of words, at least 0; got -1"),
        ({"max_repetition": 7}, "max_repetition is a share of the words, from 0 to 1; got 7"),
        (
            {"languages": ("en",), "min_language": 50},
            "min_language is a probability, from 0 to 1; got 50",
        ),
        (
            {"min_similarity": 28.0, "model": "a/model"},
            "min_similarity is a cosine, from -1 to 1; got 28",
        ),
        (
            {"languages": ("en", "zhx")},
            r"languages are ISO 639 codes, e.g. en, .* 'zhx'; did you mean 'zh'\?",
        ),
        ({"languages": ("english",)}, "py3langid does not know 'english'; known: .*, de, .*, en,"),
        ({"languages": ()}, "languages is empty. Fix: give one or several, or leave it out"),
        ({"words": ()}, "words is empty"),
    ],
)
def test_limits_that_make_no_sense_are_refused(limits: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Filters(**limits)


def test_a_list_that_is_not_there_is_an_error(home: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file not/here\.txt"):
        Filters(words_file="not/here.txt").models(home)


def talk(text: str) -> Sample:
    return Sample("talk", (), (Part("user", text=text), Part("assistant", text="Yes, it is.")))
