"""One interface to a trained model, held against plain loops over plain torch."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from bridgework import artifacts
from bridgework.data import templates
from bridgework.data.images import decode, load_image, to_square
from bridgework.data.samples import Part, Sample, pair
from bridgework.data.synthetic import shapes
from bridgework.data.tokenization import encode
from bridgework.errors import DataError, SpecError
from bridgework.inference.generation import Sampling
from bridgework.inference.pipeline import Pipeline
from bridgework.inference.preprocess import RememberingInputs
from bridgework.losses import Contrastive
from bridgework.models.lora import LoRAConfig, adapter_layers, disable_adapters, is_adapter
from bridgework.models.prefix_vlm import PrefixVLM
from bridgework.system import IGNORE, System, load
from tests.inference import tiny
from tests.inference.tiny import PROMPT, picture, pipeline

CAPTIONS = [
    "a red circle",
    "a blue square",
    "a much longer caption than the others, to be padded around",
    "a dog",
]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [
        replace(s, parts=(*s.parts[:1], Part("caption", text=c)))
        for s, c in zip(shapes(4), CAPTIONS, strict=True)
    ]


def loglik_alone(pipeline: Pipeline, sample: Sample) -> float:
    """A second way to `loglik`: one sample, no padding, from pixels, a loop over its tokens."""
    spec, data = pipeline.stage.model, pipeline.stage.data
    parts = templates.conversation(sample, [p for s in data.sources for p in s.prompts], 0)
    segments = templates.render(parts, data.template, pipeline.tokenizer)
    encoded = encode(
        segments, pipeline.tokenizer, image_tokens=spec.image_tokens, max_tokens=data.max_tokens
    )
    pixels = torch.from_numpy(np.stack([load_image(image, spec.pixels) for image in sample.images]))
    ids_1T = torch.tensor([encoded.ids])
    with torch.no_grad():
        logits_TV = pipeline.model(
            ids=ids_1T, attention=torch.ones_like(ids_1T).bool(), pixels=pixels
        ).logits_BTV[0]
    total = 0.0
    for t, label in enumerate(encoded.labels):
        if label != IGNORE:
            total += float(logits_TV[t - 1].double().log_softmax(-1)[label])
    return total


# --- judging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["plain", "v1", "chat"])
def test_loglik_of_a_batch_is_that_of_each_sample_alone(
    template: str, samples: list[Sample]
) -> None:
    pipe = pipeline(template)
    expected = [loglik_alone(pipe, s) for s in samples]
    assert pipe.loglik(samples) == pytest.approx(expected, rel=1e-5)
    assert pipe.loglik(samples[::-1]) == pytest.approx(expected[::-1], rel=1e-5)


def test_loglik_of_more_rows_than_a_forward_takes_keeps_their_order(samples: list[Sample]) -> None:
    pipe = pipeline()
    many = [samples[i % 4] for i in (0, 3, 1, 2) * 9]
    alone = {s.key: loglik for s, loglik in zip(samples, pipe.loglik(samples), strict=True)}
    assert pipe.loglik(many) == pytest.approx([alone[s.key] for s in many], rel=1e-5)


def test_text_and_two_images_are_scored_in_one_batch(samples: list[Sample]) -> None:
    pipe = pipeline()
    first, second = samples[0].images[0], samples[1].images[0]
    text = Sample("text", (), (Part("user", text="Hello?"), Part("assistant", text="Hello.")))
    shown = (
        Part("user", image=0),
        Part("user", text=" or "),
        Part("user", image=1),
        Part("assistant", text="Both."),
    )
    both = Sample("both", (first, second), shown)
    swapped = Sample("swapped", (second, first), shown)
    expected = [loglik_alone(pipe, s) for s in (both, swapped)]
    assert pipe.loglik([both, swapped]) == pytest.approx(expected, rel=1e-5)
    assert expected[0] != pytest.approx(expected[1], rel=1e-4)
    alone = pipe.scores([list(text.parts)], [()])[0]
    assert pipe.scores([list(both.parts), list(text.parts)], [both.images, ()])[
        1
    ].loglik == pytest.approx(alone.loglik)


def test_scores_count_the_stop_string(samples: list[Sample]) -> None:
    pipe = pipeline()
    [score] = pipe.scores([pipe.inputs.ask(samples[0])], [samples[0].images])
    assert score.tokens == len(CAPTIONS[0]) + 1  # bytes, and <|im_end|>


def test_cached_features_count_as_their_images(samples: list[Sample]) -> None:
    pipe = pipeline()
    conversations = [pipe.inputs.ask(s) for s in samples]
    features = pipe.inputs.features([s.images[0] for s in samples])
    assert pipe.scores(conversations, list(features.split(1))) == pipe.scores(
        conversations, [s.images for s in samples]
    )


def test_rank_is_likelihood_less_prior_computed_apart(samples: list[Sample]) -> None:
    pipe = pipeline()
    color = tuple(round(255 * m) for m in pipe.stage.model.pixels.mean)
    blank = png(Image.new("RGB", (32, 32), color))
    image = samples[0].images[0]
    expected = {
        c: loglik_alone(pipe, pair("x", image, c)) - loglik_alone(pipe, pair("x", blank, c))
        for c in CAPTIONS
    }
    ranked = pipe.rank(image, CAPTIONS)
    assert dict(ranked) == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert [r.candidate for r in ranked] == sorted(CAPTIONS, key=lambda c: -expected[c])


def test_prior_is_the_mean_over_the_references(samples: list[Sample]) -> None:
    pipe = pipeline()
    references = [s.images[0] for s in samples[1:]]
    image = samples[0].images[0]
    mean = [np.mean([loglik_alone(pipe, pair("x", r, c)) for r in references]) for c in CAPTIONS]
    assert pipe.log_prior(CAPTIONS, references=references).tolist() == pytest.approx(mean, rel=1e-5)
    ranked = dict(pipe.rank(image, CAPTIONS, references=references))
    expected = [
        loglik_alone(pipe, pair("x", image, c)) - m for c, m in zip(CAPTIONS, mean, strict=True)
    ]
    assert [ranked[c] for c in CAPTIONS] == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_image_is_encoded_once_for_all_candidates(samples: list[Sample]) -> None:
    pipe = pipeline()
    seen: list[int] = []
    pipe.model.vision.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    pipe.log_likelihoods(samples[0].images[0], CAPTIONS * 10)
    assert seen == [1]


def test_question_is_part_of_the_scored_input(samples: list[Sample]) -> None:
    pipe = pipeline()
    image = samples[0].images[0]
    assert torch.equal(
        pipe.log_likelihoods(image, CAPTIONS), pipe.log_likelihoods(image, CAPTIONS, PROMPT)
    )
    assert not torch.allclose(
        pipe.log_likelihoods(image, CAPTIONS),
        pipe.log_likelihoods(image, CAPTIONS, "Why?"),
        rtol=1e-4,
    )


def test_nothing_to_rank_is_an_error(samples: list[Sample]) -> None:
    with pytest.raises(DataError, match="nothing to rank"):
        pipeline().rank(samples[0].images[0], [])


def test_model_in_training_is_scored_in_eval_mode_and_restored(samples: list[Sample]) -> None:
    pipe = pipeline()
    pipe.model.bridge = nn.Sequential(pipe.model.bridge, nn.Dropout(0.5)).eval()
    expected = pipe.loglik(samples)
    pipe.model.train()
    assert pipe.loglik(samples) == expected
    assert pipe.model.training and pipe.model.bridge[-1].training


def comparing() -> Pipeline:
    """CLIP, at the size of a test."""
    stage = load("clip").tiny().stages[0]
    torch.manual_seed(0)
    return Pipeline(stage.model.build().eval(), stage)


def test_a_model_that_only_compares_ranks_by_nearness(samples: list[Sample]) -> None:
    pipe, image, texts = comparing(), samples[0].images[0], [sample.text for sample in samples]
    cosines = (pipe.embed_texts(texts) @ pipe.embed_images([image])[0]).tolist()
    best_first = sorted(zip(texts, cosines, strict=True), key=lambda pair: -pair[1])
    for ranked in (
        pipe.rank(image, texts),
        pipe.rank_answers([Part("user", image=0)], [image], texts),
    ):
        assert [r.candidate for r in ranked] == [text for text, _ in best_first]
        assert [r.score for r in ranked] == pytest.approx(
            [cosine for _, cosine in best_first], abs=1e-6
        )


def test_a_model_that_only_compares_is_asked_nothing_else(samples: list[Sample]) -> None:
    pipe, image = comparing(), samples[0].images[0]
    with pytest.raises(SpecError, match=r"reads no question\. Got 'What\?'.*complete captions"):
        pipe.rank(image, ["a", "b"], "What?")
    with pytest.raises(SpecError, match="reads no question"):
        pipe.rank_answers([Part("user", image=0), Part("user", text="What?")], [image], ["a", "b"])
    with pytest.raises(SpecError, match=r"compares texts with one image\. Got 2"):
        pipe.rank_answers(
            [Part("user", image=0), Part("user", image=1)], [image, image], ["a", "b"]
        )


def test_a_choice_is_the_answer_that_the_images_make_likelier(samples: list[Sample]) -> None:
    pipe, images = pipeline(), [sample.images[0] for sample in samples[:2]]
    asked = [
        Part("user", image=0),
        Part("user", text="\nor"),
        Part("user", image=1),
        Part("user", text="?"),
    ]
    choices = [sample.text for sample in samples]
    answered = [[*asked, Part("assistant", text=choice)] for choice in choices]
    blank = pipe.inputs.features([pipe.inputs.mean_square()] * 2)
    gains = [
        pipe.scores([one], [images])[0].loglik - pipe.scores([one], [blank])[0].loglik
        for one in answered
    ]
    ranked = pipe.rank_answers(asked, images, choices)
    assert [r.candidate for r in ranked] == [
        c for _, c in sorted(zip(gains, choices, strict=True), reverse=True)
    ]
    assert ranked[0].score == pytest.approx(max(gains), abs=1e-4)
    with pytest.raises(DataError, match="nothing to choose from"):
        pipe.rank_answers(asked, images, [])


# --- embedding -------------------------------------------------------------------------------------------------------


def test_embeddings_match_the_contrastive_loss(samples: list[Sample]) -> None:
    pipe = pipeline()
    batch = pipe.inputs.batch(
        [pipe.inputs.ask(s) for s in samples], [s.images for s in samples], answer=True
    )
    with torch.no_grad():
        outputs = pipe.model(**batch.inputs(), requested=frozenset({"pooled"}))
    images_ND = pipe.embed_images([s.images[0] for s in samples])
    texts_ND = pipe.embed_texts([s.text for s in samples])
    torch.testing.assert_close(images_ND, unit(outputs.image_BD), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(texts_ND, unit(outputs.text_BD), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(images_ND.norm(dim=1), torch.ones(4))
    loss = Contrastive(temperature=0.07)(outputs).mean()
    logits = images_ND @ texts_ND.T / 0.07
    target = torch.arange(len(samples))
    both_ways = (
        nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)
    ) / 2
    torch.testing.assert_close(loss, both_ways, rtol=1e-3, atol=1e-4)


def unit(vectors_ND: Tensor) -> Tensor:
    return vectors_ND.div(vectors_ND.norm(dim=1, keepdim=True))


# --- images ----------------------------------------------------------------------------------------------------------


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_picture_may_be_a_file_an_image_or_a_square(samples: list[Sample]) -> None:
    pipe = pipeline()
    data = samples[0].images[0]
    image = decode(data)
    a, b, c = pipe.inputs.features([data, image, to_square(image, pipe.stage.model.pixels)])
    assert torch.equal(a, b) and torch.equal(a, c)


def test_no_images_give_empty_features() -> None:
    assert pipeline().inputs.features([]).shape == (0, 16, 32)


@pytest.mark.parametrize("number", [0, 2])
def test_images_must_be_as_many_as_are_shown(number: int, samples: list[Sample]) -> None:
    pipe = pipeline()
    with pytest.raises(
        DataError, match=rf"shows images \[0\], counted from 0\. Got {number} images"
    ):
        pipe.inputs.batch([pipe.inputs.ask(samples[0])], [samples[0].images * number], answer=False)


# --- batch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "side"), [(True, "right"), (False, "left")])
def test_prompts_are_padded_on_the_left_and_answers_on_the_right(
    answer: bool, side: Literal["right", "left"], samples: list[Sample]
) -> None:
    pipe = pipeline()
    conversations = [
        pipe.inputs.ask(samples[0], ["Short?"]),
        pipe.inputs.ask(samples[0], ["A question that is longer?"]),
    ]
    batch = pipe.inputs.batch(conversations, [samples[0].images] * 2, answer=answer)
    edge = batch.attention_BT[:, 0 if side == "left" else -1]
    assert edge.tolist() == [False, True]
    assert bool((batch.labels_BT != IGNORE).any()) == answer


@pytest.mark.parametrize("template", ["plain", "v1", "chat"])
def test_prompt_is_the_beginning_of_a_training_row(template: str, samples: list[Sample]) -> None:
    pipe = pipeline(template)
    conversation = pipe.inputs.ask(samples[0])
    prompt, whole = (
        pipe.inputs.encode(conversation, answer=False),
        pipe.inputs.encode(conversation, answer=True),
    )
    shared = 0
    while shared < len(prompt.ids) and prompt.ids[shared] == whole.ids[shared]:
        shared += 1
    first_with_loss = next(t for t, label in enumerate(whole.labels) if label != IGNORE)
    assert shared == len(prompt.ids) <= first_with_loss
    assert whole.ids[shared:first_with_loss] in ([], pipe.tokenizer(" ").input_ids)


# --- artifacts -------------------------------------------------------------------------------------------------------


def test_loaded_model_scores_like_the_saved_one(tmp_path: Path, samples: list[Sample]) -> None:
    pipe = pipeline()
    system = System(name="toy", paper="", stages=(pipe.stage,))
    artifacts.save(tmp_path / "artifact", pipe.model.state_dict(), system=system, stage="align")
    loaded = Pipeline.load(str(tmp_path / "artifact"), device="cpu")
    assert isinstance(loaded.model, PrefixVLM)
    assert loaded.loglik(samples) == pipe.loglik(samples)
    assert loaded.inputs.device == torch.device("cpu")


def test_out_of_range_sampling_is_refused(samples: list[Sample]) -> None:
    pipe = pipeline()
    wrong = (
        Sampling(temperature=-1.0),
        Sampling(top_p=0.0),
        Sampling(top_p=1.5),
        Sampling(max_new_tokens=0),
    )
    for sampling in wrong:
        with pytest.raises(SpecError, match="max_new_tokens is at least 1"):
            pipe.generate(pipe.inputs.ask(samples[0]), samples[0].images, **sampling)


def test_ask_answers_as_generate_for_every_kind_of_image(tmp_path: Path) -> None:
    pipe, image = pipeline(), picture()
    path = tmp_path / "image.png"
    path.write_bytes(image)
    conversation = [Part("user", image=0), Part("user", text="\nWhat is this?")]
    expected = pipe.generate(conversation, [image], max_new_tokens=6).text
    sources = (path, str(path), image, io.BytesIO(image), Image.open(io.BytesIO(image)))
    for source in sources:
        assert pipe.ask(source, "What is this?", max_new_tokens=6) == expected


def test_ask_without_a_question_takes_the_question_of_the_training() -> None:
    pipe, image = pipeline(), picture()
    expected = pipe.generate(pipe.inputs.about(), [image], max_new_tokens=6).text
    assert pipe.ask(image, max_new_tokens=6) == expected


def test_ask_rejects_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for source in (tmp_path / "missing.png", "https://example.org/cat.png"):
        with pytest.raises(DataError, match=r"cannot be read.*give its local path"):
            pipeline().ask(source, "What is this?")


def test_a_question_is_needed_unless_there_is_exactly_one_image() -> None:
    inputs = pipeline().inputs
    assert inputs.question("Why?", 2)[-1] == Part("user", text="\nWhy?")
    assert inputs.question("Why?", 0) == [Part("user", text="Why?")]
    for images in (0, 2):
        with pytest.raises(DataError, match=f"nothing to ask. Got no question and {images} images"):
            inputs.question("", images)


def test_loaded_adapters_are_merged_unless_they_are_asked_for(tmp_path: Path) -> None:
    """Serving and evaluations then compute one matrix product instead of three."""
    plain = tiny.stage()
    language = replace(plain.model.language, lora=LoRAConfig(rank=2, alpha=4))
    stage = replace(plain, model=replace(plain.model, language=language))
    torch.manual_seed(0)
    model = stage.model.build(pretrained=False)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            nn.init.normal_(parameter, std=0.3)
    state = dict(model.named_parameters())
    artifacts.save(
        tmp_path / "a",
        state,
        system=System(name="tiny", paper="none", stages=(stage,)),
        stage="align",
    )
    merged = Pipeline.load(tmp_path / "a", "cpu")
    kept = Pipeline.load(tmp_path / "a", "cpu", adapters=True)
    assert [bool(adapter_layers(one.model)) for one in (merged, kept)] == [False, True]
    image = picture()
    found, expected = (one.log_likelihoods(image, CAPTIONS, PROMPT) for one in (merged, kept))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    without = Pipeline.load(tmp_path / "a", "cpu", adapters=True)
    with disable_adapters(without.model):
        assert not torch.allclose(without.log_likelihoods(image, CAPTIONS, PROMPT), found)


def test_remembering_inputs_read_every_image_once() -> None:
    pipe, images = pipeline(), [picture(seed) for seed in (0, 1, 0, 2)]
    expected = pipe.inputs.features(images)
    pipe.inputs = RememberingInputs(pipe.model, pipe.stage)
    read: list[int] = []
    pipe.model.vision.register_forward_hook(lambda module, args, out: read.append(len(out)))
    for _ in range(2):
        assert torch.equal(pipe.inputs.features(images), expected)
    assert torch.equal(pipe.inputs.features([picture(2), picture(3)])[:1], expected[3:])
    assert pipe.inputs.features([]).shape == (0, *expected.shape[1:])
    assert read == [3, 1]
