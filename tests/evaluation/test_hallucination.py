"""POPE and CHAIR on worked examples: what is asked, and what answers and captions are worth."""

import random
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from bridgework.config import from_dict, override, to_dict
from bridgework.data.dataset import write
from bridgework.data.samples import Box, Part, Sample
from bridgework.data.synthetic import shapes
from bridgework.errors import DataError, SpecError
from bridgework.evaluation import CHAIR, POPE, Writing
from bridgework.evaluation.base import about_image
from bridgework.evaluation.hallucination import (
    absent,
    binary_metrics,
    chair_metrics,
    mentioned,
    objects_in,
    parse_yes_no,
    truth_of,
)
from bridgework.evaluation.statistics import EvaluatedRows, RowValues
from bridgework.inference.pipeline import Pipeline
from tests.inference.tiny import pipeline

GREEDY = Writing(beams=1, most=5)


def numbered_rows(count: int) -> EvaluatedRows:
    """Return rows with an image each."""
    names = tuple(str(i) for i in range(count))
    return EvaluatedRows(names, names)


def means(figures: Mapping[str, RowValues]) -> dict[str, float]:
    return {name: rows.mean for name, rows in figures.items()}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return pipeline()


def test_the_figures_are_those_of_scikit_learn() -> None:
    draw = random.Random(0)
    truth, said = ([draw.random() < share for _ in range(50)] for share in (0.5, 0.7))
    found = means(binary_metrics(numbered_rows(50), said, truth))
    precision, recall, f1, _ = precision_recall_fscore_support(truth, said, average="binary")
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx(
        (precision, recall, f1)
    )
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, said))
    assert found["yes"] == sum(said) / 50 and found["always_yes"] == sum(truth) / 50
    assert means(binary_metrics(numbered_rows(4), [False] * 4, [True, False] * 2)) == {
        "accuracy": 0.5, "precision": 0.0, "recall": 0.0, "f1": 0.0, "yes": 0.0, "always_yes": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "yes"),
    [("Yes", True), ("yes, there is a dog. It is not big.", True), ("No.", False), ("There is no dog", False),
     ("I don't see one", False), ("It is not", False), ("Nothing", True), ("a dog", True)],
)  # fmt: skip
def test_an_answer_is_read_as_in_the_paper(text: str, yes: bool) -> None:
    """What does not say no in its first sentence says yes: POPE's own rule."""
    assert parse_yes_no(text) is yes


def asked(key: str, image: bytes, question: str, answer: str) -> Sample:
    said = (
        Part("user", image=0),
        Part("user", text=f"\n{question}"),
        Part("assistant", text=answer),
    )
    return Sample(key, (image,), said)


def kept(tmp_path: Path, samples: list[Sample]) -> str:
    write(samples, str(tmp_path / "kept"), source="test", license="CC0-1.0", made_by="test")
    return str(tmp_path / "kept")


def test_rows_that_are_questions_are_asked_as_they_are(
    pipe: Pipeline, home: Path, tmp_path: Path
) -> None:
    images = [sample.images[0] for sample in shapes(4)]
    answers = ["Yes.", "no", "No, it is not.", "yes"]
    rows = [
        asked(f"q{i}", images[i], f"Is there a thing {i}?", answer)
        for i, answer in enumerate(answers)
    ]
    assert [truth_of(row) for row in rows] == [True, False, False, True]
    assert truth_of(asked("w", images[0], "What?", "Nothing")) is None
    metrics = POPE(dataset=kept(tmp_path, rows), rows=9, writing=GREEDY).run(pipe, home).metrics
    said = [
        parse_yes_no(
            pipe.generate(row.parts[:2], [images[i]], min_new_tokens=1, max_new_tokens=5).text
        )
        for i, row in enumerate(rows)
    ]
    expected = means(binary_metrics(numbered_rows(4), said, [True, False, False, True]))
    assert metrics == {f"pope.{name}": pytest.approx(value) for name, value in expected.items()}


def boxed(key: str, image: bytes, *names: str) -> Sample:
    boxes = tuple(Box(0, (0.0, 0.0, 1.0, 1.0), name) for name in names)
    return Sample(key, (image,), (Part("caption", image=0),), boxes=boxes)


SCENES = [("dog", "cat"), ("dog", "bowl"), ("dog", "cat", "mat"), ("bus",)]


@pytest.fixture
def scenes(tmp_path: Path) -> str:
    return kept(
        tmp_path,
        [boxed(f"s{i}", s.images[0], *SCENES[i], SCENES[i][0]) for i, s in enumerate(shapes(4))],
    )


@pytest.mark.parametrize("how", ["random", "popular", "adversarial"])
def test_boxes_give_as_many_questions_with_yes_as_with_no(
    pipe: Pipeline, home: Path, scenes: str, how: str
) -> None:
    spec = override(
        POPE(dataset=scenes, rows=9, objects=2), {"negatives": how, "prompts": "{} Short answer:"}
    )
    samples = [boxed(f"s{i}", s.images[0], *SCENES[i]) for i, s in enumerate(shapes(4))]
    questions = list(spec._questions(pipe, samples))
    assert Counter(q.truth for q in questions) == {True: 7, False: 7}
    for question in questions:
        image, text = question.conversation
        assert image.image == 0 and text.text is not None
        thing = text.text.removeprefix("\nIs there a ").removesuffix(" in the image? Short answer:")
        assert (thing in objects_in(question.sample)) is question.truth
    metrics = spec.run(pipe, home).metrics
    assert metrics["pope.always_yes"] == 0.5 and list(spec._questions(pipe, samples)) == questions


def test_popular_and_adversarial_objects_come_first() -> None:
    draw = random.Random(0)
    assert absent(SCENES, 3, "popular", draw)[:2] == ["dog", "cat"]
    assert (
        absent(SCENES, 1, "adversarial", draw)[0] == "cat"
    )  # beside a dog twice, a mat once, a bus never
    assert absent(SCENES, 1, "adversarial", draw)[-1] == "bus"
    assert sorted(absent(SCENES, 0, "random", draw)) == ["bowl", "bus", "mat"]


def test_a_dataset_without_objects_or_questions_is_refused(
    pipe: Pipeline, home: Path, tmp_path: Path
) -> None:
    image = next(shapes(1)).images[0]
    path = kept(tmp_path, [asked("w", image, "What?", "A dog.")])
    for spec in (POPE(dataset=path), CHAIR(dataset=path)):
        with pytest.raises(DataError, match="fields that this"):
            spec.run(pipe, home)
    only = kept(tmp_path / "yes", [asked("y", image, "Is it?", "Yes.")])
    with pytest.raises(DataError, match="of both yes and no"):
        POPE(dataset=only, writing=GREEDY).run(pipe, home)


def test_objects_are_named_by_any_of_their_words_one_or_several() -> None:
    words = {
        "dog": ("dog", "puppy"),
        "bus": ("bus",),
        "wine glass": ("wine glass",),
        "cat": ("cat",),
    }
    assert mentioned("Two Dogs by the buses.", words) == {"dog", "bus"}
    assert mentioned("a puppy, a wine glass and a category", words) == {"dog", "wine glass"}
    assert mentioned("", words) == set()


def test_chair_is_that_of_the_paper() -> None:
    here = [{"dog", "cat"}, {"bus"}, {"mat"}]
    found = means(chair_metrics(numbered_rows(3), [{"dog", "bus", "mat"}, {"bus"}, set()], here))
    assert found == {"instances": 2 / 4, "captions": 1 / 3, "recall": 2 / 4}
    assert means(chair_metrics(numbered_rows(3), [set(), set(), set()], here)) == {
        "instances": 0.0,
        "captions": 0.0,
        "recall": 0.0,
    }


def test_chair_finds_objects_in_generated_captions(
    pipe: Pipeline, home: Path, tmp_path: Path
) -> None:
    """A word that the model does write, by its synonym, and one that it does not."""
    images = [sample.images[0] for sample in shapes(2)]
    writing = Writing(beams=1, least=40, most=40)
    texts = writing.run(pipe, [about_image(pipe, None)] * 2, [[image] for image in images])
    written = next(iter(re.findall(r"[^\W_]+", texts[0].lower())))
    rows = [boxed("a", images[0], "dog"), boxed("b", images[1], "cat")]
    spec = CHAIR(
        dataset=kept(tmp_path, rows), rows=9, writing=writing, synonyms={"dog": (written,)}
    )
    said = [{"dog"} if written in re.findall(r"[^\W_]+", text.lower()) else set() for text in texts]
    expected = means(chair_metrics(numbered_rows(2), said, [{"dog"}, {"cat"}]))
    assert spec.run(pipe, home).metrics == {
        f"chair.{name}": value for name, value in expected.items()
    }
    assert expected["recall"] == 0.5 and "cat" not in "".join(texts)


@pytest.mark.parametrize("kind", [POPE, CHAIR])
def test_tiny_ones_run_on_synthetic_shapes(
    pipe: Pipeline, home: Path, kind: type[POPE] | type[CHAIR]
) -> None:
    spec = kind(dataset="coco").tiny()
    assert all(0.0 <= value <= 1.0 for value in spec.run(pipe, home).metrics.values())
    assert from_dict(to_dict(spec)) == spec


def test_wrong_fields_are_refused() -> None:
    with pytest.raises(SpecError, match="question holds"):
        POPE(dataset="x", question="Is there a dog?")
    with pytest.raises(SpecError, match="not allowed"):
        override(POPE(dataset="x"), {"negatives": "hard"})
    with pytest.raises(SpecError, match="at least 1"):
        CHAIR(dataset="x", rows=0)
