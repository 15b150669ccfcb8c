"""Prefix wiring with a Q-Former, other towers and other language models, e.g. encoder-decoders."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from bridgework.errors import DataError, SpecError
from bridgework.losses.language_modeling import language_modeling
from bridgework.models import (
    ConcatConfig,
    EvaConfig,
    LanguageConfig,
    LinearConfig,
    PrefixVLMConfig,
    QFormerConfig,
    ResamplerConfig,
    base,
)
from bridgework.models.prefix_vlm import PrefixVLM
from bridgework.system import IGNORE, IMAGE, Layout
from tests.models.examples import FLAN_XL, LLAMA_7B, OPT_2_7B, PICTURE, build, padded, pixels
from tests.models.examples import ids as with_places

BLIP2 = PrefixVLMConfig(vision=EvaConfig(), bridge=QFormerConfig(), language=OPT_2_7B)
TELL = QFormerConfig(text=True)
QUERIES = 4  # of a tiny Q-Former
LANGUAGES = {"llama": LLAMA_7B, "opt": OPT_2_7B, "t5": FLAN_XL}


def ids(*row: int | str) -> Tensor:
    return with_places(*row, image_tokens=QUERIES)


def ones(ids_BT: Tensor) -> Tensor:
    return torch.ones_like(ids_BT, dtype=torch.bool)


def answer(ids_BT: Tensor, begin: int) -> Tensor:
    """Labels from the token `begin` on."""
    labels_BT = ids_BT.clone()
    labels_BT[:, :begin] = IGNORE
    return labels_BT


def instructions(rows: int, seed: int = 3) -> Tensor:
    return torch.randint(1, 300, (rows, 5), generator=torch.Generator().manual_seed(seed))


def loss(
    model: PrefixVLM, ids_BT: Tensor, attention_BT: Tensor, labels_BT: Tensor, pixels_N3SS: Tensor
) -> Tensor:
    return language_modeling(
        model(ids_BT, attention_BT, labels_BT, pixels_N3SS).logits_BTV, labels_BT
    )


# --- towers and bridges ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bridge",
    [QFormerConfig(), ConcatConfig(), ResamplerConfig(), LinearConfig()],
    ids=lambda b: type(b).__name__,
)
def test_every_bridge_fills_the_places_that_it_announces(bridge: Any) -> None:
    select: Any = "patch" if isinstance(bridge, ConcatConfig) else "all"
    spec = PrefixVLMConfig(vision=EvaConfig(select=select), bridge=bridge, language=LLAMA_7B).tiny()
    model = build(spec.vision, bridge)
    row = with_places(1, PICTURE, 5, image_tokens=spec.image_tokens)
    assert model.images(pixels(1), None).shape == (1, spec.image_tokens, 32)
    assert model(row, ones(row), pixels=pixels(1)).logits_BTV.shape == (
        1,
        spec.image_tokens + 2,
        320,
    )


def test_an_image_of_tiles_takes_the_places_of_each() -> None:
    assert BLIP2.num_image_tokens(Layout(0, 0, 640, 480)) == 32
    assert BLIP2.num_image_tokens(Layout(2, 3, 640, 480)) == 7 * 32


def test_blip2_has_its_published_sizes_without_a_byte_of_memory() -> None:
    with torch.device("meta"):
        model = BLIP2.build(pretrained=False)
    base.set_trainable(model, {"bridge.*": 1.0})
    assert base.count(model) == (
        107_133_696,
        985_949_440 + 2_651_596_800,
    )  # 107M in the paper's table 1
    assert BLIP2.image_tokens == 32 and BLIP2.instruction is None


def test_minigpt4_trains_one_matrix_of_its_published_size() -> None:
    vicuna_13b = replace(LLAMA_7B, width=5120, depth=40, heads=40, kv_heads=40, ffn=13_824)
    for language, size in ((LLAMA_7B, 3_149_824), (vicuna_13b, 3_937_280)):
        with torch.device("meta"):
            bridge = (
                PrefixVLMConfig(vision=EvaConfig(), bridge=QFormerConfig(), language=language)
                .build(pretrained=False)
                .bridge
            )
        assert (
            sum(p.numel() for n, p in bridge.named_parameters() if n.startswith("projection."))
            == size
        )


def test_only_parts_with_weights_are_brought_back_by_them() -> None:
    whole = "Salesforce/blip2-flan-t5-xxl"
    spec = replace(BLIP2, vision=EvaConfig(weights=whole), bridge=QFormerConfig(weights=whole))
    assert spec.pretrained == (
        "vision.*",
        "bridge.queries",
        "bridge.qformer.*",
        "bridge.ln_vision.*",
    )
    assert BLIP2.pretrained == () and spec.tiny().pretrained == ()


def test_a_frozen_bridge_with_a_trained_projection_moves_nothing_else() -> None:
    model, row = build(EvaConfig(), QFormerConfig()), ids(1, PICTURE, 5, 6)
    learning = base.set_trainable(model.train(), {"bridge.projection.*": 1.0})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss(model, row, ones(row), answer(row, 5), pixels(1)).sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert list(learning) == ["bridge.projection.weight", "bridge.projection.bias"]
    assert (
        not any(module.training for module in model.bridge.qformer.modules())
        and not model.vision.training
    )
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in learning), name


def test_images_of_a_batch_do_not_see_each_other() -> None:
    model = build(EvaConfig(), QFormerConfig())
    each = torch.cat([model.images(p.unsqueeze(0), None) for p in pixels(3)])
    torch.testing.assert_close(model.images(pixels(3), None), each, atol=1e-5, rtol=1e-5)


# --- instructions ----------------------------------------------------------------------------------------------------


def test_the_instruction_tokenizer_is_known_where_the_bridge_reads_text() -> None:
    assert replace(BLIP2, bridge=TELL).instruction == "google-bert/bert-base-uncased"
    assert replace(BLIP2, bridge=TELL).tiny().instruction == "bytes"


def test_every_image_hears_the_instruction_of_its_own_row() -> None:
    model, pixels_N3SS, heard_BI = build(EvaConfig(), TELL), pixels(3), instructions(2)
    rows = [ids(1, PICTURE, 5, PICTURE), ids(6, PICTURE, 7)]
    ids_BT = padded(rows, "right", 0)
    embeds_BTD = model.embed(ids_BT, pixels_N3SS, None, heard_BI)
    expected = torch.cat(
        [
            model.images(pixels_N3SS[:2], None, heard_BI[[0, 0]]),
            model.images(pixels_N3SS[2:], None, heard_BI[1:]),
        ]
    )
    torch.testing.assert_close(
        embeds_BTD[ids_BT == IMAGE], expected.flatten(0, 1), atol=1e-5, rtol=1e-5
    )
    assert not torch.allclose(embeds_BTD, model.embed(ids_BT, pixels_N3SS, None, heard_BI.flip(0)))
    assert not torch.allclose(embeds_BTD, model.embed(ids_BT, pixels_N3SS))


def test_identical_frames_give_copies_of_the_same_tokens_and_one_frame_is_an_image() -> None:
    model, heard_BI = build(EvaConfig(), TELL), instructions(1)
    frame = pixels(1)
    video = model.embed(ids(PICTURE, PICTURE, PICTURE), frame.expand(3, -1, -1, -1), None, heard_BI)
    image = model.embed(ids(PICTURE), frame, None, heard_BI)
    torch.testing.assert_close(video, image.repeat(1, 3, 1), atol=1e-5, rtol=1e-5)


def test_a_batch_without_images_runs_the_same_modules_and_leaves_zero_gradients() -> None:
    model, called = build(EvaConfig(), TELL), list[str]()
    base.set_trainable(model, {"bridge.*": 1.0})
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    traces = []
    for count in (1, 0):
        called.clear()
        row = ids(5, *[PICTURE] * count, 6)
        given = pixels(count) if count else None
        outputs = model(
            row,
            ones(row),
            row,
            given,
            instruction=instructions(1),
            instruction_attention=ones(instructions(1)),
        )
        traces.append(list(called))
    language_modeling(outputs.logits_BTV, row).sum().backward()
    assert traces[0] == traces[1] and "bridge.qformer.encoder.layer.0" in traces[0]
    assert not any(p.grad.any() for p in model.bridge.parameters() if p.grad is not None)


def test_images_that_the_rows_cannot_share_are_refused() -> None:
    ids_BT = torch.cat([ids(PICTURE, PICTURE), ids(PICTURE, 5, 6, 7, 8)])
    with pytest.raises(DataError, match=r"2 images do not share \[8, 4\] places"):
        build(EvaConfig(), TELL)(
            ids_BT, ones(ids_BT), pixels=pixels(2), instruction=instructions(2)
        )


# --- language models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES.values(), ids=LANGUAGES)
def test_only_answers_have_loss_whatever_ids_images_and_padding_have(
    language: LanguageConfig,
) -> None:
    model = build(EvaConfig(), QFormerConfig(), language)
    rows = [ids(1, PICTURE, 5, 6, 7, 8), ids(1, PICTURE, 5, 9)]
    ids_BT, attention_BT = padded(rows, "right", 0), padded([ones(r) for r in rows], "right", False)
    labels_BT = padded([answer(r, 6) for r in rows], "right", IGNORE)
    before = loss(model, ids_BT, attention_BT, labels_BT, pixels(2))
    padding = ids_BT.masked_fill(~attention_BT, 77)
    torch.testing.assert_close(loss(model, padding, attention_BT, labels_BT, pixels(2)), before)
    last = ids_BT.clone()
    last[0, -1] = 99
    moved = loss(model, last, attention_BT, labels_BT.where(labels_BT != 8, 99), pixels(2))
    assert moved[0] != before[0] and moved[1] == before[1]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("language", LANGUAGES.values(), ids=LANGUAGES)
def test_padded_batch_matches_single_samples(language: LanguageConfig, side: str) -> None:
    model, pixels_N3SS = build(EvaConfig(), QFormerConfig(), language), pixels(2)
    rows = [ids(1, PICTURE, 5, 6, 7, 8, 9), ids(1, PICTURE, 5, 9)]
    batch = [padded(given, side, fill) for given, fill in (
        (rows, 0), ([ones(r) for r in rows], False), ([answer(r, 6) for r in rows], IGNORE))]  # fmt: skip
    together = loss(model, *batch, pixels_N3SS)
    alone = [
        loss(model, r, ones(r), answer(r, 6), p[None])
        for r, p in zip(rows, pixels_N3SS, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("language", LANGUAGES.values(), ids=LANGUAGES)
def test_gradients_reach_the_bridge_through_a_frozen_language_model(
    language: LanguageConfig,
) -> None:
    model, row = build(EvaConfig(), QFormerConfig(), language), ids(1, PICTURE, 5, 6)
    base.set_trainable(model.train(), {"bridge.*": 1.0})
    loss(model, row, ones(row), answer(row, 5), pixels(1)).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("bridge."), name


@pytest.mark.parametrize("language", LANGUAGES.values(), ids=LANGUAGES)
def test_generation_is_greedy_decoding_of_the_forward(language: LanguageConfig) -> None:
    model, pixels_N3SS = build(EvaConfig(), TELL, language), pixels(2)
    rows, heard_BI = [ids(1, PICTURE, 5), ids(1, 2, 3, PICTURE, 6)], instructions(2)
    attention_BT = padded([ones(r) for r in rows], "left", False)
    new_BT = model.generate(
        padded(rows, "left", 0),
        attention_BT,
        pixels_N3SS,
        instruction=heard_BI,
        max_new_tokens=4,
        do_sample=False,
    )
    for row, image, heard, new in zip(rows, pixels_N3SS, heard_BI, new_BT, strict=True):
        begin = row.shape[1]
        for token in new:
            asked = torch.cat(
                [row, torch.zeros(1, 1, dtype=torch.long)], dim=1
            )  # a label, so that it is an answer
            outputs = model(
                asked, ones(asked), answer(asked, begin), image[None], instruction=heard[None]
            )
            assert token == outputs.logits_BTV[0, -2].argmax()
            row = torch.cat([row, token.view(1, 1)], dim=1)


@pytest.mark.parametrize("language", LANGUAGES.values(), ids=LANGUAGES)
def test_continuations_are_the_forward_of_each_candidate(language: LanguageConfig) -> None:
    model, prompt_1T = build(EvaConfig(), QFormerConfig(), language), ids(1, PICTURE, 5)
    rest_CR = torch.tensor([[7, 8, 9], [9, 4, 0]])
    together = model.continuations(prompt_1T, rest_CR, model.vision(pixels(1)))
    for rest, ours in zip(rest_CR, together, strict=True):
        row = torch.cat([prompt_1T, rest[None]], dim=1)
        theirs = model(row, ones(row), answer(row, prompt_1T.shape[1]), pixels(1)).logits_BTV[
            0, -4:-1
        ]
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_encoder_decoder_streams_its_generated_ids() -> None:
    """The token that starts its decoder belongs to neither."""
    heard: list[int] = []

    class Streamer(BaseStreamer):
        def put(self, value: Tensor) -> None:
            heard.extend(value.flatten().tolist())

        def end(self) -> None:
            heard.append(-1)

    model, row = build(EvaConfig(), QFormerConfig(), FLAN_XL), ids(1, PICTURE, 5)
    new_BT = model.generate(
        row, ones(row), pixels(1), streamer=Streamer(), max_new_tokens=4, do_sample=False
    )
    assert heard == [*new_BT[0].tolist(), -1] and new_BT.shape == (1, 4)


def test_loss_of_an_encoder_decoder_is_transformers_own_with_its_gradients() -> None:
    model = build(EvaConfig(), QFormerConfig(), FLAN_XL)
    row = ids(1, PICTURE, 5, 6, 7, 8)
    labels_BT = answer(row, 7)
    ours = loss(model, row, ones(row), labels_BT, pixels(1)).sum() / 2
    theirs = model.language(
        inputs_embeds=model.embed(row[:, :7], pixels(1)), labels=row[:, 7:]
    ).loss
    torch.testing.assert_close(ours, theirs)
    wanted = list(model.bridge.parameters())
    for own, other in zip(
        torch.autograd.grad(ours, wanted), torch.autograd.grad(theirs, wanted), strict=True
    ):
        torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-4)


def test_inputs_that_an_encoder_decoder_cannot_read_are_refused() -> None:
    model = build(EvaConfig(), QFormerConfig(), FLAN_XL)
    row = ids(1, 5, PICTURE, 6)
    with pytest.raises(DataError, match="an image comes after the first answer"):
        model(row, ones(row), answer(row, 1).masked_fill(row == IMAGE, IGNORE), pixels(1))
    with pytest.raises(DataError, match="needs labels"):
        model(row, ones(row), pixels=pixels(1))
    with pytest.raises(SpecError, match="Got \\['match'\\]"):
        model(row, ones(row), pixels=pixels(1), requested=frozenset({"match"}))


def test_embeddings_for_search_are_the_pooled_vectors_made_unit_length() -> None:
    model, row = build(EvaConfig(), QFormerConfig()), ids(PICTURE, 5, 6)
    labels_BT = answer(row, 4)
    outputs = model(row, ones(row), labels_BT, pixels(1), requested=frozenset({"pooled"}))
    normal = torch.nn.functional.normalize
    features = model.vision(pixels(1))
    torch.testing.assert_close(model.embed_images(features), normal(outputs.image_BD, dim=-1))
    torch.testing.assert_close(
        model.embed_texts(row, ones(row), labels_BT), normal(cast(Tensor, outputs.text_BD), dim=-1)
    )
