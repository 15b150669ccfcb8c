"""Captions against people's: the scores held against plain loops, and which captions belong to an image."""

from collections import Counter
from dataclasses import replace
from math import exp, log, sqrt
from pathlib import Path

import pytest
import sacrebleu
import torch

from bridgework.config import from_dict, override, to_dict
from bridgework.data.dataset import write
from bridgework.data.samples import Part, Sample, pair
from bridgework.data.synthetic import shapes
from bridgework.errors import DataError, SpecError
from bridgework.evaluation import Captions, Writing
from bridgework.evaluation.base import about_image, draw_images
from bridgework.evaluation.captioning import bleu4, captions_by_image, cider
from bridgework.inference.pipeline import Pipeline
from tests.inference.tiny import PROMPT, pipeline

DATASET = "synthetic:shapes"
SAID = ["a dog runs on grass", "two people ride a red bus", "a cat"]
PEOPLE = [
    ["A dog is running on the grass.", "a brown dog runs"],
    ["Two people ride a bus.", "a red bus with people in it", "people on a big red bus"],
    ["the cat sleeps on a chair", "a cat"],
]


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return pipeline()


def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.lower().replace(".", "").split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def cider_by_hand(said: list[str], people: list[list[str]]) -> float:
    """Equations 1 to 4 of arXiv:1411.5726, with what makes it CIDEr-D (its 7): clipping, and a penalty on length."""
    total = 0.0
    for text, told in zip(said, people, strict=True):
        for n in (1, 2, 3, 4):
            document = Counter(
                gram for texts in people for gram in {g for t in texts for g in grams(t, n)}
            )

            def weighed(
                text: str, n: int = n, document: Counter[tuple[str, ...]] = document
            ) -> dict[object, float]:
                found = grams(text, n)
                return {
                    g: count * (log(len(people)) - log(max(1, document[g])))
                    for g, count in found.items()
                }

            own = weighed(text)
            for other in told:
                theirs = weighed(other)
                dot = sum(min(own[g], theirs[g]) * theirs[g] for g in own.keys() & theirs.keys())
                length = sqrt(sum(v * v for v in own.values())) * sqrt(
                    sum(v * v for v in theirs.values())
                )
                longer = sum(grams(text, 2).values()) - sum(grams(other, 2).values())
                total += (
                    10
                    * (dot / length if length else 0.0)
                    * exp(-(longer**2) / 72)
                    / (4 * len(told))
                )
    return total / len(said)


def test_cider_is_that_of_the_paper() -> None:
    assert cider(SAID, PEOPLE).mean() == pytest.approx(cider_by_hand(SAID, PEOPLE))
    assert cider(SAID, PEOPLE).mean() > 1 > cider([*SAID[1:], SAID[0]], PEOPLE).mean()


def test_bleu_is_sacrebleus_on_the_words_alone_with_as_many_captions_as_there_are() -> None:
    said = ["a dog runs on the green grass", "two people ride a red bus"]
    told = [["a dog runs on the grass", "the dog runs"], ["two people ride a big red bus"]]
    expected = (
        sacrebleu.corpus_bleu(
            said, [[t[0] for t in told], [told[0][1], None]], tokenize="none"
        ).score
        / 100
    )
    assert bleu4(said, told).mean() == pytest.approx(expected) and 0 < expected < 1
    punctuated = ["A dog runs, on the green grass!", "Two people ride a red bus."]
    assert bleu4(punctuated, told).mean() == pytest.approx(expected)
    assert bleu4(told[0][:1], [told[0]]).mean() == pytest.approx(1.0)


def test_case_punctuation_and_typewritten_apostrophes_do_not_count() -> None:
    plain = [["it's a dog's bowl"], ["they don't run"]]
    said = ["It\u2019s a dog\u2019s bowl!", "They don't run..."]
    assert cider(said, plain) == pytest.approx([10.0, 10.0])


def test_empty_captions_score_zero() -> None:
    assert not cider(["", ""], PEOPLE[:2]).any() and not bleu4(["", ""], PEOPLE[:2]).any()


def test_the_captions_of_an_image_are_those_of_all_rows_that_show_it(tmp_path: Path) -> None:
    one, two = (sample.images[0] for sample in shapes(2))
    said = (Part("user", image=0), Part("user", text="What?"), Part("assistant", text="A thing."))
    rows = [
        pair("a", one, "first"),
        pair("b", two, "other"),
        Sample(
            "c",
            (one,),
            (
                Part("caption", image=0),
                Part("caption", text="second"),
                Part("caption", text="third"),
            ),
        ),
        Sample("d", (two,), said),
        Sample("e", (two,), (Part("caption", image=0),), labels=("dog",)),
    ]
    assert list(captions_by_image(rows).values()) == [
        ["first", "second", "third"],
        ["other", "A thing."],
    ]


def keep(tmp_path: Path, samples: list[Sample]) -> str:
    write(samples, str(tmp_path / "kept"), source="test", license="CC0-1.0", made_by="test")
    return str(tmp_path / "kept")


def test_every_image_is_captioned_once_and_held_against_all_its_captions(
    pipe: Pipeline, home: Path, tmp_path: Path
) -> None:
    samples = list(shapes(4))
    again = [
        replace(s, key=f"{s.key}-again", parts=(s.parts[0], Part("caption", text="a drawing")))
        for s in samples
    ]
    path = keep(tmp_path, [*samples, *again])
    writing = Writing(beams=1, least=3, most=8)
    metrics = Captions(dataset=path, rows=9, writing=writing).run(pipe, home).metrics
    items = draw_images(Captions(dataset=path, rows=9), pipe, home)
    order = list(
        dict.fromkeys(item.sample.images[0] for item in items)
    )  # the rows' order, each image once
    asked = [Part("user", image=0), Part("user", text=f"\n{PROMPT}")]
    said = [
        pipe.generate(asked, [image], min_new_tokens=3, max_new_tokens=8).text for image in order
    ]
    told = [[next(s.text for s in samples if s.images[0] == image), "a drawing"] for image in order]
    both = [sorted(texts) for texts in told]  # the order of an image's captions does not count
    assert len(order) == 4 and about_image(pipe, None) == asked
    assert metrics == {
        "captions.cider": pytest.approx(cider(said, both).mean()),
        "captions.cider_of_others": pytest.approx(cider([*said[1:], said[0]], both).mean()),
        "captions.bleu4": pytest.approx(bleu4(said, both).mean()),
    }


@pytest.mark.parametrize(
    "writing", [Writing(beams=3, most=6), Writing(top_p=0.9, most=6), Writing(beams=1, most=6)]
)
def test_captions_match_pipeline_row_by_row(pipe: Pipeline, writing: Writing) -> None:
    images = [sample.images for sample in shapes(3)]
    asked = [about_image(pipe, ("Say what you see.",))] * 3
    how = {"temperature": 1.0, "top_p": 0.9} if writing.top_p else {"beams": writing.beams}
    alone = [
        pipe.generate(
            asked[0], shown, min_new_tokens=1, max_new_tokens=6, seed=5 * 1_000_003 + row, **how
        ).text
        for row, shown in enumerate(images)
    ]
    assert writing.run(pipe, asked, images, seed=5) == alone


def test_captions_have_no_dropout_and_training_mode_is_restored(home: Path) -> None:
    pipe, images = pipeline(), [sample.images for sample in shapes(3)]
    for layer in pipe.model.language.model.layers:
        layer.self_attn.attention_dropout = 0.9
    writing = Writing(beams=1, least=6, most=6)
    expected = writing.run(pipe, [about_image(pipe, None)] * 3, images)
    pipe.model.train()
    assert writing.run(pipe, [about_image(pipe, None)] * 3, images) == expected
    assert pipe.model.training and pipe.model.language.training
    torch.manual_seed(0)
    loud = pipe.generate_batch(
        [about_image(pipe, None)] * 3, images, [0] * 3, min_new_tokens=6, max_new_tokens=6
    )
    assert loud != expected  # or the test could not tell


def test_images_without_captions_are_skipped(pipe: Pipeline, home: Path, tmp_path: Path) -> None:
    bare = [Sample(s.key, s.images, (Part("caption", image=0),), labels=("x",)) for s in shapes(3)]
    with pytest.raises(DataError, match=r"no row of .* has one image"):
        Captions(dataset=keep(tmp_path, bare)).run(pipe, home)
    with pytest.raises(DataError, match="one image with a caption"):
        Captions(dataset=keep(tmp_path / "one", [*bare, *list(shapes(4))[3:]])).run(pipe, home)


def test_its_fields_are_dotted_paths_and_wrong_ones_are_refused() -> None:
    spec = override(
        Captions(dataset=DATASET), {"writing.beams": "5", "writing.top_p": "0.9", "rows": "20"}
    )
    assert (
        spec.writing == Writing(beams=5, top_p=0.9, least=5, most=20)
        and from_dict(to_dict(spec)) == spec
    )
    assert spec.tiny().dataset == DATASET and spec.tiny().writing.beams == 2
    for wrong in ({"beams": 0}, {"top_p": 0.0}, {"least": 5, "most": 4}):
        with pytest.raises(SpecError, match="writing: beams is at least 1"):
            Writing(**wrong)
    with pytest.raises(SpecError, match="compares images"):
        Captions(dataset=DATASET, rows=1)
