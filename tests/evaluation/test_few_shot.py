"""Few-shot prompts: which examples, where they stand, and what their order does not change."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from bridgework.config import from_dict, to_dict
from bridgework.data.catalog import resolve
from bridgework.data.dataset import open_dataset
from bridgework.data.samples import Part
from bridgework.data.synthetic import shapes
from bridgework.data.templates import prompt as written
from bridgework.data.tokenization import encode, load_tokenizer
from bridgework.errors import SpecError
from bridgework.evaluation.few_shot import (
    FewShot,
    ShotExample,
    example_orders,
    pool_features,
    prompt,
    rices,
)
from bridgework.inference.pipeline import Pipeline
from bridgework.recipes import flamingo
from bridgework.system import END, IMAGE

DATASET = "synthetic:shapes"
SHOTS = [ShotExample("Output:", "a disc."), ShotExample("Output:", "a square.")]


def read(shown: bool, shots: list[ShotExample] = SHOTS) -> str:
    """A prompt as the model reads it: <image> and <EOC> for the two ids that no tokenizer knows."""
    tokenizer = load_tokenizer("bytes")
    segments = written(prompt(shots, "Output:", images=shown), "interleaved", tokenizer)
    ids = encode(segments, tokenizer, image_tokens=1, max_tokens=512).ids[1:]
    names = {IMAGE: "<image>", END: "<EOC>"}
    return "".join(names[i] if i in names else tokenizer.decode([i]) for i in ids)


def test_a_prompt_is_the_papers_with_every_image_at_its_own_place() -> None:
    shown = "<image>Output: a disc.<EOC><image>Output: a square.<EOC><image>Output:"
    assert read(shown=True) == shown
    images = [part.image for part in prompt(SHOTS, "Output:") if part.image is not None]
    assert images == [0, 1, 2]


def test_without_shots_two_examples_are_text_only() -> None:
    assert read(shown=False) == "Output: a disc.<EOC>Output: a square.<EOC><image>Output:"


def test_rices_takes_the_nearest_the_nearest_last_and_never_the_query() -> None:
    generator = torch.Generator().manual_seed(0)
    all_SF = torch.nn.functional.normalize(torch.randn(20, 8, generator=generator), dim=-1)
    for query, chosen in enumerate(rices(all_SF, all_SF, 5, own=list(range(20)))):
        alike_S = all_SF @ all_SF[query]
        by_hand = [i for i in alike_S.argsort().tolist() if i != query][-5:]
        assert chosen == by_hand


def test_rices_over_another_support_may_take_any_of_it() -> None:
    all_SF = torch.eye(4)
    assert [chosen[-1] for chosen in rices(all_SF, all_SF, 2)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("shots", "count", "expected"), [(1, 6, 1), (2, 6, 2), (3, 6, 6), (4, 6, 6), (5, 1, 1)]
)
def test_an_ensemble_takes_different_orders_of_the_same_shots(
    shots: int, count: int, expected: int
) -> None:
    found = example_orders(list(range(shots)), count)
    assert len(found) == len({tuple(order) for order in found}) == expected
    assert all(sorted(order) == list(range(shots)) for order in found)


def test_the_orders_of_an_ensemble_do_not_depend_on_the_order_given() -> None:
    assert example_orders([3, 9, 1, 4], 6) == example_orders([9, 4, 3, 1], 6)
    assert example_orders([9, 4], 1) == [[9, 4]]


def pipeline() -> Pipeline:
    stage = flamingo.system().tiny()["train"]
    torch.manual_seed(0)
    model = stage.model.build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((0.5 if "alpha" in name else 0.1) * torch.randn_like(parameter))
    return Pipeline(model.eval(), stage)


@pytest.mark.parametrize("shots", [0, 2])
def test_the_evaluation_runs_and_its_ensemble_ignores_the_order_of_the_shots(
    shots: int, home: Path
) -> None:
    pipe, spec = pipeline(), FewShot(dataset=DATASET, shots=shots, orders=2, rows=5, candidates=3)
    metrics = spec.run(pipe, home).metrics
    assert set(metrics) == {"few_shot.accuracy", "few_shot.chance"}
    assert 0.0 <= metrics["few_shot.accuracy"] <= 1.0
    assert spec.run(pipe, home).metrics == metrics


def test_the_likelihood_of_a_candidate_depends_on_no_other_and_on_no_padding(home: Path) -> None:
    pipe = pipeline()
    images = torch.stack(
        list(pipe.inputs.features([sample.images[0] for sample in islice(shapes(), 3)]))
    )
    texts = ["a disc.", "a much longer answer about something else.", "x"]
    said = [[*prompt(SHOTS, "Output:"), Part("assistant", text=f" {text}")] for text in texts]
    together = [score.loglik for score in pipe.scores(said, [images] * 3)]
    turned = [score.loglik for score in pipe.scores(said[::-1], [images] * 3)][::-1]
    alone = [pipe.scores([one], [images])[0].loglik for one in said]
    assert together == pytest.approx(turned, abs=1e-3) and together == pytest.approx(
        alone, abs=1e-3
    )


def test_prompt_longer_than_training_rows_is_not_truncated(home: Path) -> None:
    pipe, spec = pipeline(), FewShot(dataset=DATASET, shots=3, rows=5, candidates=4)
    short = Pipeline(pipe.model, replace(pipe.stage, data=replace(pipe.stage.data, max_tokens=40)))
    assert spec.run(short, home).metrics == spec.run(pipe, home).metrics


def test_support_from_another_dataset_and_shots_at_random(home: Path) -> None:
    spec = FewShot(dataset=DATASET, support=DATASET, select="random", shots=1, rows=4, candidates=2)
    assert "few_shot.accuracy" in spec.run(pipeline(), home).metrics


def test_own_image_comes_after_the_nearest_pairs(home: Path) -> None:
    pipe, rows = pipeline(), list(islice(shapes(), 40))
    spec = FewShot(dataset=DATASET, shots=3, rows=24)
    parts, shown = spec.demonstrate(pipe, rows[7].images[0], home)
    said = {
        sample.images[0]: sample.text for sample in open_dataset(resolve(DATASET, home)).samples()
    }
    assert shown[-1] == rows[7].images[0] and len(shown) == 4
    assert [part.text for part in parts if part.role == "assistant"] == [
        f" {said[image]}" for image in shown[:3]
    ]
    query, *others = pool_features(pipe.inputs.features([shown[-1], *shown[:3]]))
    alike = [float(query @ other) for other in others]
    assert alike == sorted(alike)  # the nearest last
    assert pipe.generate(parts, shown, max_new_tokens=4).completion_tokens <= 4


def test_the_spec_comes_back_from_json_and_shrinks() -> None:
    spec = FewShot(dataset="coco", support="coco-train", shots=32, orders=6)
    assert from_dict(to_dict(spec)) == spec
    tiny = spec.tiny()
    assert (tiny.dataset, tiny.support, tiny.shots, tiny.orders) == (DATASET, DATASET, 2, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": -1}, "shots is 0"),
        ({"candidates": 1}, "expected 2 to rows"),
        ({"shots": 8, "rows": 8, "candidates": 2}, "few"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        FewShot(dataset=DATASET, **changes)
