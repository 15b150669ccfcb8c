"""MED in its three modes: visibility, shared modules, rows, generation and ranking."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize
from transformers.generation.streamers import BaseStreamer

from bridgework.errors import DataError, SpecError, WeightsError
from bridgework.losses import Contrastive, LanguageModeling, Matching
from bridgework.models import (
    BlipViTConfig,
    EfficientNetConfig,
    MEDConfig,
    MEDTextConfig,
    MomentumConfig,
    base,
)
from bridgework.models.blip_med import MED
from bridgework.system import IGNORE
from tests.models.med_examples import CLS, PAD, SEP, TINY, build, left, pairs, spec

POOLED, MATCH = frozenset({"pooled"}), frozenset({"match"})


def count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


# --- what sees what --------------------------------------------------------------------------------------------------


def test_a_text_alone_does_not_depend_on_the_image() -> None:
    model = build()
    ids, attention, _, pixels = pairs()
    one, other = (
        model(ids, attention, pixels=p, requested=POOLED) for p in (pixels, pixels.flip(0))
    )
    assert torch.equal(one.text_BD, other.text_BD) and not torch.allclose(
        one.image_BD, other.image_BD
    )


def test_text_encoded_with_an_image_depends_on_it_and_on_every_token() -> None:
    model = build()
    ids, attention, _, pixels = pairs((6, 6))
    seen = model.vision(pixels)
    odds = model.match(ids, attention, seen)
    assert not torch.allclose(model.match(ids, attention, seen.flip(0)), odds)
    for place in range(1, 6):  # the first is [ENC], whatever the data put there
        changed = ids.clone()
        changed[:, place] = (changed[:, place] + 1) % 250
        assert not torch.isclose(model.match(changed, attention, seen), odds, atol=1e-6).any(), (
            place
        )
    changed = ids.clone()
    changed[:, 0] = 5
    assert torch.equal(model.match(changed, attention, seen), odds)


def test_decoded_tokens_do_not_depend_on_later_ones() -> None:
    model = build()
    ids, attention, labels, pixels = pairs((6, 6))
    logits = model(ids, attention, labels, pixels).logits_BTV
    for place in range(1, 6):
        changed = ids.clone()
        changed[:, place] = (changed[:, place] + 1) % 250
        other = model(changed, attention, labels, pixels).logits_BTV
        torch.testing.assert_close(other[:, :place], logits[:, :place])
        assert not torch.allclose(other[:, place], logits[:, place])


def test_the_three_modes_begin_with_rows_of_their_own() -> None:
    model = build()
    ids, attention, labels, pixels = pairs()
    outputs = model(ids, attention, labels, pixels, requested=POOLED | MATCH | {"logits"})
    sum(
        o.float().sum() for o in (outputs.text_BD, outputs.match_B3C, outputs.logits_BTV)
    ).backward()
    rows = model.text.embeddings.word_embeddings.weight.grad
    assert (
        rows[CLS].any() and rows[model.config.text.dec].any() and rows[model.config.text.enc].any()
    )
    model.zero_grad()
    model(ids, attention, pixels=pixels, requested=POOLED).text_BD.sum().backward()
    assert not model.text.embeddings.word_embeddings.weight.grad[260:].any()


def test_padding_on_either_side_changes_nothing() -> None:
    model = build()
    ids, attention, labels, pixels = pairs()
    moved = (
        left(ids, attention, PAD),
        left(attention, attention, False),
        left(labels, attention, IGNORE),
    )
    requested = POOLED | {"logits"}
    right, other = (
        model(ids, attention, labels, pixels, requested=requested),
        model(*moved, pixels, requested=requested),
    )
    torch.testing.assert_close(other.text_BD, right.text_BD)
    torch.testing.assert_close(other.logits_BTV[moved[1]], right.logits_BTV[attention])
    for row, length in enumerate((5, 7, 4, 6)):
        alone = model(
            ids[row : row + 1, :length],
            attention[row : row + 1, :length],
            None,
            pixels[row : row + 1],
        )
        torch.testing.assert_close(
            alone.logits_BTV[0], right.logits_BTV[row, :length], atol=1e-5, rtol=1e-5
        )
    seen = model.vision(pixels)
    torch.testing.assert_close(model.match(*moved[:2], seen), model.match(ids, attention, seen))


def test_an_efficientnet_gives_the_images_one_vector() -> None:
    vision = EfficientNetConfig(image_size=64, grid=1, weights=None)
    torch.manual_seed(0)
    model = replace(TINY, vision=vision).build().eval()
    ids, attention, labels, _ = pairs()
    features = torch.randn(len(ids), 1, vision.feature_width)
    requested = POOLED | MATCH | {"logits"}
    outputs = model(ids, attention, labels, features=features, requested=requested)
    expected = normalize(model.heads.vision(features[:, 0]), dim=-1)
    torch.testing.assert_close(outputs.image_BD, expected)
    other = model(ids, attention, labels, features=features.flip(0), requested=requested)
    assert not torch.allclose(other.logits_BTV, outputs.logits_BTV)
    with pytest.raises(SpecError, match=r"model\.vision\.grid: one vector .* Got 2; expected 1"):
        replace(TINY, vision=replace(vision, grid=2))


# --- what is shared --------------------------------------------------------------------------------------------------


def test_the_decoder_is_the_encoder_but_for_its_self_attention() -> None:
    model = build()
    writer, reader = model.writer.bert, model.text
    assert writer.embeddings is reader.embeddings
    for own, other in zip(writer.encoder.layer, reader.encoder.layer, strict=True):
        assert own.crossattention is other.crossattention
        assert own.intermediate is other.intermediate and own.output is other.output
        assert own.attention is not other.attention
        assert not torch.equal(own.attention.self.query.weight, other.attention.self.query.weight)
    assert model.writer.cls.predictions.decoder.weight is reader.embeddings.word_embeddings.weight


def test_its_parameters_are_those_of_the_encoder_and_one_more_self_attention() -> None:
    model = build()
    attention = sum(count(layer.attention) for layer in model.text.encoder.layer)
    assert count(model.decoder) == attention
    assert count(model) == count(model.vision) + count(model.text) + attention + count(model.heads)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len({id(p) for p in model.parameters()}), "no parameter has two names"


def test_each_part_is_named_by_its_glob() -> None:
    model = build("contrast", "match", "caption", momentum=MomentumConfig(queue=0))
    learning = base.set_trainable(model, {"decoder.*": 1.0, "heads.*": 0.5})
    own = {name for name in learning if name.startswith("decoder.")}
    assert own and all(".attention." in name for name in own)
    assert {name.split(".")[1] for name in set(learning) - own} == {
        "vision", "text", "match", "transform", "bias", "temperature",
    }  # fmt: skip


def test_shared_modules_learn_from_encoding_and_from_decoding() -> None:
    model = build()
    ids, attention, labels, pixels = pairs()
    shared = model.text.encoder.layer[0].crossattention.self.value.weight
    parts = []
    for want in ("match", "logits"):
        model.zero_grad()
        torch.manual_seed(0)
        outputs = model(ids, attention, labels, pixels, requested=frozenset({want}))
        (Matching()(outputs) if want == "match" else LanguageModeling()(outputs)).sum().backward()
        parts.append(shared.grad.clone())
    model.zero_grad()
    torch.manual_seed(0)
    outputs = model(ids, attention, labels, pixels, requested=frozenset({"match", "logits"}))
    (Matching()(outputs) + LanguageModeling()(outputs)).sum().backward()
    torch.testing.assert_close(shared.grad, parts[0] + parts[1])


def test_a_model_has_the_parts_of_its_tasks() -> None:
    parts = {
        ("contrast", "match", "caption"): {"vision", "text", "decoder", "heads"},
        ("contrast", "match"): {"vision", "text", "heads"},
        ("caption",): {"vision", "decoder", "heads"},
        ("answer",): {"vision", "text", "decoder", "heads"},
    }
    for tasks, own in parts.items():
        assert {name for name, _ in build(*tasks).named_children()} == own


def test_blip_base_has_the_size_of_the_release_without_a_byte_of_memory() -> None:
    with torch.device("meta"):
        captioner = MEDConfig(
            vision=BlipViTConfig(image_size=384), text=MEDTextConfig(), tasks=("caption",)
        ).build()
    tied = 30_524 * 768
    assert (
        count(captioner) + tied == 247_414_076
    )  # the hub's number for Salesforce/blip-image-captioning-base


# --- losses ----------------------------------------------------------------------------------------------------------


def test_smoothed_labels_cost_nine_tenths_of_the_true_one_and_a_tenth_of_the_mean() -> None:
    model = build()
    ids, attention, labels, pixels = pairs()
    outputs = model(ids, attention, labels, pixels)
    logp = log_softmax(outputs.logits_BTV[:, :-1], dim=-1)
    targets = labels[:, 1:]
    true = logp.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    expected = -(0.9 * true + 0.1 * logp.mean(-1)).masked_fill(targets == IGNORE, 0).sum(1)
    torch.testing.assert_close(
        LanguageModeling(label_smoothing=0.1)(outputs), expected, atol=1e-4, rtol=1e-5
    )


def test_prompt_tokens_cost_nothing() -> None:
    model = build("caption")
    ids, attention, labels, pixels = pairs((7, 7), asked=3)
    loss = LanguageModeling()
    assert loss.count(labels).tolist() == [3, 3]
    outputs = model(ids, attention, labels, pixels)
    outputs.logits_BTV.retain_grad()
    loss(outputs).sum().backward()
    touched = outputs.logits_BTV.grad.abs().sum(-1) > 0
    assert touched.tolist() == [[False] * 3 + [True] * 3 + [False]] * 2


def test_matching_judges_each_sample_with_its_own_and_two_negatives() -> None:
    model = build()
    ids, attention, labels, pixels = pairs()
    outputs = model(ids, attention, labels, pixels, requested=MATCH)
    odds = outputs.match_B3C[..., 1] - outputs.match_B3C[..., 0]
    seen = model.vision(pixels)
    torch.testing.assert_close(odds[:, 0], model.match(ids, attention, seen), atol=1e-5, rtol=1e-5)
    every = torch.stack(
        [model.match(ids, attention, seen[[i] * 4]) for i in range(4)], dim=1
    )  # text by image
    for row in range(4):
        others = [i for i in range(4) if i != row]
        assert torch.isclose(every[row, others], odds[row, 1], atol=1e-5).any()
        assert torch.isclose(every[others, row], odds[row, 2], atol=1e-5).any()


def test_pooled_vectors_are_of_length_one_and_fit_plain_contrast() -> None:
    model = build()
    ids, attention, labels, pixels = pairs()
    outputs = model(ids, attention, labels, pixels, requested=POOLED)
    states = model.text(input_ids=ids, attention_mask=attention.long()).last_hidden_state
    torch.testing.assert_close(outputs.text_BD, normalize(model.heads.text(states[:, 0]), dim=-1))
    torch.testing.assert_close(
        outputs.image_BD, normalize(model.heads.vision(model.vision(pixels)[:, 0]), dim=-1)
    )
    torch.testing.assert_close(
        Contrastive(temperature=None)(outputs), Contrastive(temperature=0.07)(outputs)
    )


# --- writing and ranking ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["caption", "answer"])
def test_greedy_writing_is_the_argmax_of_the_forward(task: Any) -> None:
    model = build(task)
    ids, attention, _, pixels = pairs()
    prompt = (left(ids, attention, PAD), left(attention, attention, False))
    new = model.generate(*prompt, pixels, max_new_tokens=3, do_sample=False, pad_token_id=PAD)
    for row, length in enumerate((5, 7, 4, 6)):
        said = ids[row : row + 1, :length]
        for token in new[row]:
            grown = torch.cat([said, token.view(1, 1)], dim=1)
            labels = grown.clone()
            labels[:, :length] = IGNORE
            real = torch.ones_like(grown, dtype=torch.bool)
            logits = model(grown, real, labels, pixels[row : row + 1]).logits_BTV[0, -2]
            assert int(logits[:260].argmax()) == int(token)  # [DEC] and [ENC] are never said
            said = grown


@pytest.mark.parametrize("task", ["caption", "answer"])
def test_continuations_are_the_logits_of_the_forward(task: Any) -> None:
    model = build(task)
    ids, _, _, pixels = pairs((4,))
    rest = torch.randint(0, 250, (5, 3), generator=torch.Generator().manual_seed(2))
    logits = model.continuations(ids, rest, model.vision(pixels))
    rows = torch.cat([ids.expand(5, -1), rest], dim=1)
    labels = rows.clone()
    labels[:, :4] = IGNORE
    real = torch.ones_like(rows, dtype=torch.bool)
    whole = model(rows, real, labels, pixels.expand(5, -1, -1, -1)).logits_BTV
    torch.testing.assert_close(logits, whole[:, 3:-1], atol=1e-5, rtol=1e-5)


def test_beam_search_finds_the_likeliest_of_all_candidates() -> None:
    model = build("answer")
    ids, attention, _, pixels = pairs((4,))
    seen = model.vision(pixels)
    how: dict[str, Any] = {
        "num_beams": 60,
        "length_penalty": 0.0,
        "early_stopping": False,
        "do_sample": False,
    }
    written = model.generate(
        ids, attention, pixels, max_new_tokens=3, eos_token_id=SEP, pad_token_id=PAD, **how
    )
    others = torch.randint(
        0, 250, (40, written.shape[1]), generator=torch.Generator().manual_seed(0)
    )
    rest = torch.cat([others, written])
    labels = rest.masked_fill(rest == PAD, IGNORE)
    logp = model.continuations(ids, rest, seen).log_softmax(-1)
    full = logp.gather(-1, rest.unsqueeze(-1)).squeeze(-1).masked_fill(labels == IGNORE, 0).sum(1)
    assert int(full.argmax()) == len(rest) - 1


def test_nucleus_draws_from_the_smallest_set_that_has_the_mass() -> None:
    model = build("caption")
    ids, pixels = torch.tensor([[CLS]]), pairs((4,)).pixels
    with torch.no_grad():
        model.heads.bias[:5] += 3.0  # so that the nucleus is not most of the vocabulary
    chances = model.continuations(ids, ids, model.vision(pixels))[0, 0, :260].softmax(-1)
    ordered, order = chances.sort(descending=True)
    size = int((ordered.cumsum(0) < 0.5).sum()) + 1
    nucleus = set(order[:size].tolist())
    torch.manual_seed(0)
    many = torch.ones(2_000, 1, dtype=torch.bool)
    drawn = model.generate(
        ids.expand(2_000, 1), many, features=model.vision(pixels).expand(2_000, -1, -1),
        do_sample=True, top_p=0.5, top_k=0, max_new_tokens=1, pad_token_id=PAD,
    )  # fmt: skip
    assert set(drawn[:, 0].tolist()) == nucleus and size < 200


def test_streamer_gets_new_tokens_without_the_prompt() -> None:
    class Listener(BaseStreamer):
        def __init__(self) -> None:
            self.heard: list[int] = []

        def put(self, value: Tensor) -> None:
            self.heard += value.flatten().tolist()

        def end(self) -> None:
            self.heard.append(-1)

    model, listener = build("caption"), Listener()
    ids, attention, _, pixels = pairs((3,))
    new = model.generate(
        ids,
        attention,
        pixels,
        streamer=listener,
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=PAD,
    )
    assert listener.heard == [*new[0].tolist(), -1]


# --- from one MED to another -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tasks", [("caption",), ("answer",), ("contrast", "match"), ("contrast", "match", "caption")]
)
def test_weights_of_pretraining_are_adopted_by_every_other_model(tasks: Any) -> None:
    source = build("contrast", "match", "caption", momentum=MomentumConfig(queue=8))
    model = build(*tasks, seed=3)
    model.load_state_dict(model.adopt(source.state_dict()))
    ids, attention, labels, pixels = pairs()
    if "contrast" in tasks:
        seen = source.vision(pixels)
        torch.testing.assert_close(
            model.embed_texts(ids, attention), source.embed_texts(ids, attention)
        )
        torch.testing.assert_close(
            model.match(ids, attention, seen), source.match(ids, attention, seen)
        )
    if "caption" in tasks:
        expected = source(ids, attention, labels, pixels).logits_BTV
        torch.testing.assert_close(model(ids, attention, labels, pixels).logits_BTV, expected)
    if "answer" in tasks:
        states = model.decoder.state_dict()
        shared = "encoder.layer.0.intermediate.dense.weight"
        assert torch.equal(states[shared], source.text.state_dict()[shared])


def test_weights_of_another_image_size_keep_their_cls_position() -> None:
    source = build("caption")
    larger = replace(spec("caption"), vision=replace(TINY.vision, image_size=64)).build()
    state = larger.adopt(source.state_dict())
    name = "vision.tower.embeddings.position_embedding"
    before = source.state_dict()[name]
    assert state[name].shape == (1, 65, 32) and torch.equal(state[name][:, 0], before[:, 0])
    grid = before[:, 1:].transpose(1, 2).reshape(1, 32, 4, 4)
    resized = torch.nn.functional.interpolate(
        grid, size=(8, 8), mode="bicubic", align_corners=False
    )
    torch.testing.assert_close(state[name][:, 1:], resized.flatten(2).transpose(1, 2))
    larger.load_state_dict(state)


def test_weights_of_another_wiring_are_not_adopted() -> None:
    with pytest.raises(WeightsError, match=r"lack decoder\.embeddings"):
        build("caption").adopt(
            {k: v for k, v in build().state_dict().items() if k.startswith("vision.")}
        )


# --- what is refused -------------------------------------------------------------------------------------------------


def test_tasks_that_do_not_go_together_are_refused() -> None:
    for tasks, message in (
        ((), "one or more"),
        (("caption", "answer"), "either"),
        (("match",), "need the vectors"),
    ):
        with pytest.raises(SpecError, match=message):
            replace(TINY, tasks=tasks)
    with pytest.raises(SpecError, match=r"vision\.width 64 must be text\.width 32"):
        replace(spec("answer"), vision=replace(TINY.vision, width=64))


def test_an_output_that_no_task_gives_is_refused() -> None:
    ids, attention, labels, pixels = pairs()
    with pytest.raises(
        SpecError, match=r"Got \['pooled'\]; expected 'logits'\. Fix: change model\.tasks"
    ):
        build("caption")(ids, attention, labels, pixels, requested=POOLED)
    with pytest.raises(
        SpecError, match=r"Got \['momentum'\].* change model\.tasks, or add a momentum encoder"
    ):
        build()(ids, attention, labels, pixels, requested=frozenset({"momentum"}))


def test_images_that_are_not_one_a_row_are_refused() -> None:
    model = build()
    ids, attention, labels, pixels = pairs()
    with pytest.raises(DataError, match="Got 4 samples and 3 images"):
        model(ids, attention, labels, pixels[:3])
    with pytest.raises(DataError, match="Got neither pixels nor cached features"):
        model(ids, attention, labels)
    with pytest.raises(DataError, match="come from another vision tower"):
        model(ids, attention, labels, features=torch.zeros(4, 16, 32))


def test_tiny_keeps_every_choice() -> None:
    full = MEDConfig(
        vision=BlipViTConfig(image_size=384, norm_eps=1e-5), text=MEDTextConfig(), tasks=("contrast",),
        momentum=MomentumConfig(decay=0.9, alpha=0.3, ramp=100),
    )  # fmt: skip
    tiny = full.tiny()
    assert tiny.tasks == ("contrast",) and tiny.vision.norm_eps == 1e-5
    assert tiny.text.dropout == 0.0  # a draw of dropout would differ with the number of workers
    assert tiny.momentum == MomentumConfig(decay=0.9, alpha=0.3, ramp=4, queue=64)
    assert isinstance(tiny.build(), MED) and tiny.image_tokens == 0 and tiny.context == 512
