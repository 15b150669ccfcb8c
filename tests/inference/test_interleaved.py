"""The cross-attention wiring behind the one interface: END is judged, written and read as a token of its own."""

from dataclasses import replace

import pytest
import torch

from bridgework.data.samples import Part
from bridgework.data.synthetic import shapes
from bridgework.inference.pipeline import Pipeline
from bridgework.recipes import flamingo

SAMPLES = [sample for sample, _ in zip(shapes(), range(4), strict=False)]
IMAGES = [sample.images[0] for sample in SAMPLES]


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    stage = flamingo.system().tiny()["train"]
    torch.manual_seed(0)
    model = stage.model.build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((0.5 if "alpha" in name else 0.1) * torch.randn_like(parameter))
    return Pipeline(model.eval(), replace(stage, data=replace(stage.data, max_tokens=512)))


def test_score_of_an_answer_includes_its_end_token(pipe: Pipeline) -> None:
    said = "a red disc"
    document = [Part("caption", image=0), Part("caption", text=said)]
    [score] = pipe.scores([document], [[IMAGES[0]]])
    assert score.tokens == len(said) + 1
    assert pipe.log_likelihoods(IMAGES[0], [said, "a square"])[0] == pytest.approx(
        score.loglik, abs=1e-4
    )
    assert pipe.loglik([SAMPLES[0]])[0] < 0


def test_a_better_image_changes_the_ranking_and_all_candidates_are_ranked(pipe: Pipeline) -> None:
    ranked = pipe.rank(IMAGES[0], ["one", "two", "three"])
    assert {r.candidate for r in ranked} == {"one", "two", "three"}
    assert [r.score for r in ranked] == sorted((r.score for r in ranked), reverse=True)


def test_an_end_stops_the_text(pipe: Pipeline) -> None:
    document = [Part("user", image=0), Part("user", text="What is it?")]
    free = pipe.generate(document, [IMAGES[0]], max_new_tokens=4)
    assert (free.completion_tokens, free.finish_reason) == (4, "length")
    last: list[torch.Tensor] = []
    hook = pipe.model.extra.head.register_forward_pre_hook(
        lambda _, given: last.append(given[0][0, -1])
    )
    kept = pipe.model.extra.head.weight.detach().clone()
    pipe.generate(document, [IMAGES[0]], max_new_tokens=1)
    hook.remove()
    pipe.model.extra.head.weight.data[0] = 1e2 * last[0]
    ended = pipe.generate(document, [IMAGES[0]], max_new_tokens=4)
    pipe.model.extra.head.weight.data.copy_(kept)
    assert (ended.text, ended.completion_tokens, ended.finish_reason) == ("", 1, "stop")


def test_image_embeddings_are_the_frozen_towers_features(pipe: Pipeline) -> None:
    seen_NPF = pipe.inputs.features(IMAGES)
    embedded_ND = pipe.embed_images(seen_NPF)
    torch.testing.assert_close(embedded_ND, torch.nn.functional.normalize(seen_NPF.mean(1), dim=-1))
