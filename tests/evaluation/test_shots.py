"""Captions and answers after examples, as Flamingo is judged: which examples, and the scores against plain loops."""

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch

from bridgework.config import from_dict, override, to_dict
from bridgework.data.dataset import write
from bridgework.data.samples import Part, Sample, pair
from bridgework.data.synthetic import shapes
from bridgework.errors import DataError, SpecError
from bridgework.evaluation import VQA, Captions, Writing
from bridgework.evaluation.base import draw
from bridgework.evaluation.captioning import bleu4, cider
from bridgework.evaluation.few_shot import Shots, pool_features
from bridgework.evaluation.vqa import agreement
from bridgework.inference.pipeline import Pipeline
from bridgework.recipes import flamingo

WRITING = Writing(beams=1, least=2, most=5)
CAPTION = ("Output:",)
QUESTION = ("Question: {} Answer:",)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    stage = flamingo.system().tiny()["train"]
    torch.manual_seed(0)
    model = stage.model.build(pretrained=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((0.5 if "alpha" in name else 0.1) * torch.randn_like(parameter))
    return Pipeline(model.eval(), stage)


def kept(path: Path, rows: list[Sample]) -> str:
    write(rows, str(path), source="test", license="CC0-1.0", made_by="test")
    return str(path)


def captioned(count: int) -> list[Sample]:
    return [
        pair(f"c{i}", sample.images[0], f"a picture {i}") for i, sample in enumerate(shapes(count))
    ]


def asked(count: int, first: int = 0) -> list[Sample]:
    rows = []
    for i, sample in enumerate(list(shapes(first + count))[first:], start=first):
        said = (
            Part("user", image=0),
            Part("user", text=f"\nHow many, {i}?"),
            Part("assistant", text=f"{i} things"),
        )
        rows.append(Sample(f"q{i}", sample.images, said, labels=(f"{i} things",) * 3 + ("none",)))
    return rows


def by_hand(
    pipe: Pipeline,
    shots: list[tuple[bytes, str, str]],
    image: bytes,
    question: str,
    shown: bool = True,
) -> str:
    """The answer after the examples, each written out as the paper prints it (A.2)."""
    parts: list[Part] = []
    for place, (_, text, answer) in enumerate(shots):
        parts += [Part("user", image=place)] * shown
        parts += [Part("user", text=text), Part("assistant", text=f" {answer}")]
    parts += [Part("user", image=len(shots) if shown else 0), Part("user", text=question)]
    images = [*(file for file, _, _ in shots if shown), image]
    return pipe.generate(parts, images, min_new_tokens=2, max_new_tokens=5).text


def nearest(pipe: Pipeline, image: bytes, others: list[bytes], count: int) -> list[bytes]:
    """By the cosine of the tower's features, the nearest last, never of the same picture."""
    free = [other for other in others if other != image]
    query, *rest = pool_features(pipe.inputs.features([image, *free]))
    order = sorted(range(len(free)), key=lambda i: float(query @ rest[i]))
    return [free[i] for i in order[-count:]]


@pytest.mark.parametrize("count", [1, 3])
def test_captions_after_examples_score_as_those_written_one_by_one(
    pipe: Pipeline, home: Path, tmp_path: Path, count: int
) -> None:
    rows = captioned(6)
    path, told = kept(tmp_path / "c", rows), {sample.images[0]: str(sample.text) for sample in rows}
    spec = Captions(dataset=path, rows=9, writing=WRITING, prompts=CAPTION,
                    shots=Shots(count=count, rows=9, select="rices"))  # fmt: skip
    metrics = spec.run(pipe, home).metrics
    order = [item.sample.images[0] for item in draw(spec, pipe, home)]
    said = []
    for image in order:
        shots = [
            (other, "Output:", told[other]) for other in nearest(pipe, image, list(told), count)
        ]
        said.append(by_hand(pipe, shots, image, "Output:"))
    people = [[told[image]] for image in order]
    assert len(order) == 6
    assert metrics == {
        "captions.cider": pytest.approx(cider(said, people).mean()),
        "captions.cider_of_others": pytest.approx(cider([*said[1:], said[0]], people).mean()),
        "captions.bleu4": pytest.approx(bleu4(said, people).mean()),
    }


@pytest.mark.parametrize("count", [0, 2])
def test_answers_after_examples_of_another_dataset_are_scored_by_ten_annotators(
    pipe: Pipeline, home: Path, tmp_path: Path, count: int
) -> None:
    judged, support = (
        kept(tmp_path / "judged", asked(4)),
        kept(tmp_path / "support", asked(7, first=4)),
    )
    shots = Shots(count=count, support=support, rows=7, seed=5)
    spec = VQA(dataset=judged, rows=4, writing=WRITING, prompts=QUESTION, shots=shots)
    assert spec.datasets == (judged, support)
    metrics = spec.run(pipe, home).metrics
    samples = [item.sample for item in draw(spec, pipe, home)]
    conversations, pictures = shots.ask(pipe, home, spec, samples)
    known = {
        f"Question: How many, {i}? Answer:": (row.images[0], f"{i} things")
        for i, row in enumerate(asked(11))
    }
    scores = []
    for sample, parts, files in zip(samples, conversations, pictures, strict=True):
        texts = [str(part.text) for part in parts if part.role == "user" and part.text]
        examples = [(known[text][0], text, known[text][1]) for text in texts[:-1]]
        question = next(text for text, (image, _) in known.items() if image == sample.images[0])
        assert texts[-1] == question and len(examples) == (count or 2)
        assert files == [*(file for file, _, _ in examples if count), sample.images[0]]
        assert all(int(answer.split()[0]) >= 4 for _, _, answer in examples)  # of the support alone
        said = by_hand(pipe, examples, sample.images[0], question, shown=bool(count))
        scores.append(agreement(said, sample.labels))
    assert metrics["vqa.accuracy"] == pytest.approx(fmean(scores))


def test_without_shots_two_examples_are_given_as_text_alone(
    pipe: Pipeline, home: Path, tmp_path: Path
) -> None:
    rows = captioned(5)
    spec = Captions(
        dataset=kept(tmp_path / "c", rows), rows=5, prompts=CAPTION, shots=Shots(count=0, rows=5)
    )
    assert spec.shots is not None
    conversations, pictures = spec.shots.ask(pipe, home, spec, rows)
    for sample, parts, files in zip(rows, conversations, pictures, strict=True):
        assert files == [sample.images[0]] and [
            part.image for part in parts if part.image is not None
        ] == [0]
        assert parts[-2:] == [Part("user", image=0), Part("user", text="Output:")]
        answers = [part.text for part in parts if part.role == "assistant"]
        assert len(set(answers)) == 2 and f" {sample.text}" not in answers


@pytest.mark.parametrize("select", ["rices", "random"])
def test_no_example_has_the_image_of_the_question(pipe: Pipeline, select: str) -> None:
    images = [sample.images[0] for sample in shapes(4)]
    support = [
        images[i] for i in (0, 1, 0, 2, 0, 3, 1)
    ]  # three rows of one picture: its five captions in COCO
    shots = Shots(count=3, rows=7, seed=1)
    shots = replace(shots, select="rices") if select == "rices" else shots
    chosen = shots.choose(pipe, images, support, "test")
    assert all(
        support[place] != image
        for image, places in zip(images, chosen, strict=True)
        for place in places
    )
    assert all(len(set(places)) == 3 for places in chosen)
    with pytest.raises(DataError, match="Got 7; expected enough for 5 examples"):
        replace(shots, count=5).choose(pipe, images, support, "test")


def test_examples_at_random_depend_on_the_seed_and_the_row_alone(pipe: Pipeline) -> None:
    images = [sample.images[0] for sample in shapes(12)]
    shots = Shots(count=4, rows=12)
    all_of_them = shots.choose(pipe, images[:6], images, "test")
    assert shots.choose(pipe, images[:3], images, "test") == all_of_them[:3]
    assert replace(shots, seed=1).choose(pipe, images[:6], images, "test") != all_of_them


def test_a_video_is_asked_about_after_videos(pipe: Pipeline, home: Path, tmp_path: Path) -> None:
    files = [sample.images[0] for sample in shapes(24)]
    rows = []
    for i in range(6):
        said = (
            *(Part("user", image=frame) for frame in range(3)),
            Part("user", text="\nWhat moves?"),
        )
        frames = tuple(files[3 * i : 3 * i + 3])
        parts = (*said, Part("assistant", text=f"thing {i}"))
        rows.append(Sample(f"v{i}", frames, parts, times_s=(0.0, 1.0, 2.0)))
    spec = VQA(dataset=kept(tmp_path / "v", rows), rows=6, writing=WRITING, prompts=QUESTION,
               shots=Shots(count=2, rows=6, select="rices"))  # fmt: skip
    metrics = spec.run(pipe, home).metrics
    assert spec.shots is not None
    samples = [item.sample for item in draw(spec, pipe, home)]
    _, pictures = spec.shots.ask(pipe, home, spec, samples)
    assert all(len(shown) == 3 and all(len(video) == 3 for video in shown) for shown in pictures)
    assert 0 <= metrics["vqa.accuracy"] <= 1


def test_shots_come_back_from_json_shrink_and_are_left_out_where_there_are_none() -> None:
    spec = Captions(dataset="coco", shots=Shots(count=32, support="coco-train", select="rices"))
    assert from_dict(to_dict(spec)) == spec and "shots" not in to_dict(Captions(dataset="coco"))
    tiny = spec.tiny().shots
    assert tiny == Shots(count=2, support="synthetic:shapes", rows=8, select="rices")
    changed = override(spec, {"shots.count": "8"})
    assert changed.shots is not None and changed.shots.count == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": -1}, "shots.count: got -1; expected 0 or more"),
        ({"count": 8, "rows": 8}, "above the 8 examples of a prompt"),
    ],
)
def test_shots_that_do_not_fit_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Shots(**changes)


def test_question_about_two_images_is_rejected_with_its_key(
    pipe: Pipeline, home: Path, tmp_path: Path
) -> None:
    one, two = captioned(2)
    said = (
        Part("user", image=0),
        Part("user", image=1),
        Part("user", text="\nWhich?"),
        Part("assistant", text="that"),
    )
    rows = [*asked(4), Sample("pair", (one.images[0], two.images[0]), said)]
    spec = VQA(
        dataset=kept(tmp_path / "two", rows), rows=5, prompts=QUESTION, shots=Shots(count=1, rows=5)
    )
    with pytest.raises(DataError, match=r"is about one image\. Got 2 in row pair"):
        spec.run(pipe, home)
