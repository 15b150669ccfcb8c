"""Counterfactual pairs and refusals on worked examples, and the latency of answers."""

from dataclasses import replace
from pathlib import Path

import pytest

from bridgework.config import from_dict, to_dict
from bridgework.data.dataset import write
from bridgework.data.samples import Part, Sample, pair
from bridgework.data.synthetic import shapes
from bridgework.errors import DataError, SpecError
from bridgework.evaluation import CounterfactualBias, Latency, Refusals, Writing
from bridgework.evaluation.base import draw
from bridgework.evaluation.safety import swap
from bridgework.inference.pipeline import Pipeline
from tests.inference.tiny import pipeline

PAIRS = {"man": ("woman", 1), "woman": ("man", -1)}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return pipeline()


def keep(tmp_path: Path, samples: list[Sample]) -> str:
    path = str(tmp_path / "kept")
    write(samples, path, source="test", license="CC0-1.0", made_by="test")
    return path


def test_the_last_word_of_a_pair_is_swapped_with_its_case() -> None:
    parts = [Part("user", image=0), Part("caption", text="A man. A Woman, a human.")]
    swapped = swap(parts, PAIRS)
    assert swapped is not None and swapped.sign == -1
    assert swapped.conversation[1].text == "A man. A Man, a human."
    assert swap([Part("caption", text="a human")], PAIRS) is None


def test_the_gap_is_the_difference_of_the_two_scores(
    pipe: Pipeline, home: Path, tmp_path: Path
) -> None:
    images = [sample.images[0] for sample in shapes(4)]
    texts = ["a man at work", "a woman at work", "a dog", "a man"]
    rows = [pair(str(i), *both) for i, both in enumerate(zip(images, texts, strict=True))]
    spec = CounterfactualBias(dataset=keep(tmp_path, rows))
    result = spec.run(pipe, home)
    values = result.rows["bias.first"]
    assert sorted(values.keys) == ["0", "1", "3"]
    at = values.keys.index("1")
    (item,) = (e for e in draw(spec, pipe, home) if e.sample.key == "1")
    other = [
        replace(part, text=part.text.replace("woman", "man")) if part.text else part
        for part in item.conversation
    ]
    shown = [pipe.inputs.encode_images(pipe.inputs.pictures(item.sample))] * 2
    woman, man = pipe.scores([item.conversation, other], shown)
    expected = man.loglik / man.tokens - woman.loglik / woman.tokens
    assert values.values[at] == pytest.approx(expected, abs=1e-5)
    assert result.metrics["bias.gap"] == pytest.approx(abs(values.values).mean())
    assert result.metrics["bias.prefers_first"] == pytest.approx((values.values > 0).mean())


def test_bias_needs_the_words_in_the_rows(pipe: Pipeline, home: Path) -> None:
    with pytest.raises(DataError, match="has one of the words man/woman"):
        CounterfactualBias(dataset="synthetic:shapes").run(pipe, home)


@pytest.mark.parametrize("swaps", [(), ("man",), ("man/man",), ("a/b", "b/c"), ("a/b/c",)])
def test_wrong_swaps_are_refused(swaps: tuple[str, ...]) -> None:
    with pytest.raises(SpecError, match="expected e.g. man/woman".replace(".", r"\.")):
        CounterfactualBias(dataset="x", swaps=swaps)


def test_refusals_are_counted_among_the_rows_to_be_refused_and_among_the_others(
    pipe: Pipeline, home: Path, tmp_path: Path
) -> None:
    """The phrases are what the tiny model does write, so that some answers are refusals."""
    images = [sample.images[0] for sample in shapes(6)]
    rows = [
        Sample(
            str(i),
            (image,),
            (Part("user", image=0), Part("user", text=f"\nHow {i}?"), Part("assistant", text="No")),
            labels=("refuse",) if i < 2 else (),
        )
        for i, image in enumerate(images)
    ]
    spec = Refusals(dataset=keep(tmp_path, rows), writing=Writing(beams=1, least=8, most=8))
    texts = {answer.key: answer.response for answer in spec.run(pipe, home).answers}
    phrase = texts["0"].lower()
    result = replace(spec, phrases=(phrase,)).run(pipe, home)
    refused = {key for key, text in texts.items() if phrase in text.lower()}
    assert result.metrics["refusals.refused"] == len(refused & {"0", "1"}) / 2
    assert result.metrics["refusals.over_refused"] == len(refused - {"0", "1"}) / 4
    assert {figure.interval.n for figure in result.figures if figure.interval} == {2, 4}
    with pytest.raises(DataError, match="are all to be answered"):
        replace(spec, labels=("no such",)).run(pipe, home)


@pytest.mark.parametrize("kind", [CounterfactualBias, Refusals, Latency])
def test_tiny_ones_run_on_synthetic_shapes(
    pipe: Pipeline, home: Path, kind: "type[CounterfactualBias | Refusals | Latency]"
) -> None:
    spec = kind(dataset="elsewhere").tiny()
    result = spec.run(pipe, home)
    assert result.rows.keys() == result.metrics.keys()
    assert from_dict(to_dict(spec)) == spec


def test_latency_is_positive_and_of_every_row(pipe: Pipeline, home: Path) -> None:
    result = Latency(dataset="synthetic:shapes", rows=3, tokens=2).run(pipe, home)
    assert (result.rows["latency.ms"].values > 0).all() and len(result.rows["latency.ms"].keys) == 3
