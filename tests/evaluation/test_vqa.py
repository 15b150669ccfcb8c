"""VQA accuracy on worked examples, and by whose answers and with which words a model is judged."""

from itertools import combinations
from pathlib import Path
from statistics import fmean

import pytest

from bridgework.config import from_dict, override, to_dict
from bridgework.data.dataset import write
from bridgework.data.samples import Part, Sample
from bridgework.data.synthetic import shapes
from bridgework.errors import SpecError
from bridgework.evaluation import VQA, Writing
from bridgework.evaluation.vqa import agreement, normalize
from bridgework.inference.pipeline import Pipeline
from bridgework.system import Scoring
from tests.inference.tiny import PROMPT, pipeline


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return pipeline()


@pytest.mark.parametrize(
    ("written", "compared"),
    [
        ("The dog", "dog"),
        ("A dog.", "dog"),
        ("two", "2"),
        ("none", "0"),
        ("10,000", "10000"),
        ("3.5 miles.", "3.5 miles"),
        ("yes!", "yes"),
        ("black/white", "black white"),
        ("black / white", "black  white".replace("  ", " ")),
        ("isnt", "isn't"),
        ("he'dve", "he'd've"),
        ("Dont know", "don't know"),
        (" red\nand\tblue ", "red and blue"),
        ("t-shirt", "t shirt"),
        ("its", "its"),
    ],
)
def test_an_answer_is_compared_as_the_official_evaluation_writes_it(
    written: str, compared: str
) -> None:
    assert normalize(written) == compared == normalize(compared)


@pytest.mark.parametrize(
    ("agree", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_the_accuracy_of_ten_people_is_the_official_one(agree: int, expected: float) -> None:
    people = ["red"] * agree + ["blue"] * (10 - agree)
    nines = [nine.count("red") for nine in combinations(people, 9)]
    assert (
        agreement("red", people)
        == pytest.approx(fmean(min(1, n / 3) for n in nines))
        == pytest.approx(expected)
    )


def test_people_and_model_are_read_alike() -> None:
    assert (
        agreement("Two.", ["2"] * 4 + ["three"] * 6)
        == agreement("2", ["the two"] * 4 + ["3"] * 6)
        == 1.0
    )
    assert agreement("Yes", ["yes"] * 10) == 1.0  # the official code compares these as they stand
    assert agreement("a red", ["red"]) == 1.0 and agreement("blue", ["red"]) == 0.0


def asked(key: str, image: bytes, question: str, answers: tuple[str, ...], answer: str) -> Sample:
    said = (
        Part("user", image=0),
        Part("user", text=f"\n{question}"),
        Part("assistant", text=answer),
    )
    return Sample(key, (image,), said, labels=answers)


def kept(tmp_path: Path, answers: list[tuple[str, ...]]) -> str:
    rows = [
        asked(f"q{i}", sample.images[0], f"What is it, {i}?", own, own[0])
        for i, (sample, own) in enumerate(zip(shapes(len(answers)), answers, strict=True))
    ]
    write(rows, str(tmp_path / "vqa"), source="test", license="CC0-1.0", made_by="test")
    return str(tmp_path / "vqa")


def test_the_model_writes_its_answer_to_the_row_s_question(
    pipe: Pipeline, home: Path, tmp_path: Path
) -> None:
    image = [sample.images[0] for sample in shapes(3)]
    writing = Writing(beams=1, most=6)
    questions = [
        [Part("user", image=0), Part("user", text=f"Q: What is it, {i}? A:")] for i in range(3)
    ]
    said = [
        pipe.generate(q, [image[i]], min_new_tokens=1, max_new_tokens=6).text
        for i, q in enumerate(questions)
    ]
    people = [(said[0], said[0], "x", "y"), ("x",) * 4, (said[2],) * 4]
    path = kept(tmp_path, people)
    metrics = (
        VQA(dataset=path, rows=5, writing=writing, prompts=("Q: {} A:",)).run(pipe, home).metrics
    )
    expected = [agreement(text, own) for text, own in zip(said, people, strict=True)]
    assert expected[0] == pytest.approx((1 / 3 + 1 / 3 + 2 / 3 + 2 / 3) / 4) and expected[2] == 1.0
    assert metrics["vqa.accuracy"] == pytest.approx(fmean(expected))
    assert metrics["vqa.most_common"] == pytest.approx(fmean(agreement("x", own) for own in people))


def test_vocabulary_gives_its_most_likely_answer(
    pipe: Pipeline, home: Path, tmp_path: Path
) -> None:
    words, people = (
        ("red", "a blue thing", "7"),
        [("red",) * 3, ("7",) * 4, ("a blue thing",) * 4, ("nothing",) * 4],
    )
    path = kept(tmp_path, people)
    metrics = (
        VQA(dataset=path, rows=9, vocabulary=words, prompts=("{} Answer:",)).run(pipe, home).metrics
    )
    right = []
    for i, (sample, own) in enumerate(zip(shapes(4), people, strict=True)):
        said = [Part("user", image=0), Part("user", text=f"What is it, {i}? Answer:")]
        nats = {
            w: pipe.scores([[*said, Part("assistant", text=w)]], [sample.images])[0].loglik
            for w in words
        }
        right.append(agreement(max(nats, key=lambda w: nats[w]), own))
    assert metrics["vqa.accuracy"] == pytest.approx(fmean(right))


def test_a_vocabulary_is_scored_as_the_evaluation_says(
    pipe: Pipeline, home: Path, tmp_path: Path
) -> None:
    words = ("red", "a blue thing that is very long", "7")
    path = kept(tmp_path, [(word,) * 10 for word in words] * 2)
    for scoring in (
        Scoring(prior=False),
        Scoring(prior=False, per_token=True),
        Scoring(prior=True),
    ):
        spec = VQA(dataset=path, rows=9, vocabulary=words, prompts=("{} Answer:",), scoring=scoring)
        right = []
        for i, sample in enumerate(shapes(6)):
            said = [Part("user", image=0), Part("user", text=f"What is it, {i}? Answer:")]
            scores = {}
            for word in words:
                answered = [*said, Part("assistant", text=word)]
                [given] = pipe.scores([answered], [sample.images])
                [blank] = pipe.scores([answered], [[pipe.inputs.mean_square()]])
                nats = given.loglik - (blank.loglik if scoring.prior else 0.0)
                scores[word] = nats / (given.tokens if scoring.per_token else 1)
            right.append(max(scores, key=lambda word: scores[word]) == words[i % 3])
        assert spec.run(pipe, home).metrics["vqa.accuracy"] == pytest.approx(fmean(right))


def test_pair_is_asked_as_in_training_and_scored_by_its_labels(pipe: Pipeline, home: Path) -> None:
    spec = VQA(dataset="synthetic:shapes").tiny()
    (sample,) = shapes(1)
    assert spec.run(pipe, home).metrics.keys() == {"vqa.accuracy", "vqa.most_common"}
    seen = pipe.inputs.ask(sample)
    assert seen[1].text == f"\n{PROMPT}"


def test_its_fields_are_dotted_paths_and_wrong_ones_are_refused() -> None:
    spec = override(VQA(dataset="x"), {"vocabulary": "yes,no", "writing.most": "3"})
    assert spec.vocabulary == ("yes", "no") and from_dict(to_dict(spec)) == spec
    with pytest.raises(SpecError, match="at least 1"):
        VQA(dataset="x", rows=0)
