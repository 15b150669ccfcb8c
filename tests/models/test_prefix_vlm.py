"""Prefix wiring against its definition, the bare language model and transformers' LLaVA."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from bridgework.errors import DataError, SpecError
from bridgework.losses.language_modeling import language_modeling
from bridgework.models import EfficientNetConfig, LinearConfig, MLPConfig, ViTConfig, base
from bridgework.models.prefix_vlm import PrefixVLM
from bridgework.system import IGNORE, IMAGE
from tests.models.examples import LLAVA, PICTURE, build, ids, labels, padded, pixels

POOLED = frozenset({"pooled"})
PLACE = 319  # an id that no test uses as text


def ones(ids_BT: Tensor) -> Tensor:
    return torch.ones_like(ids_BT, dtype=torch.bool)


def logits(model: PrefixVLM, ids_BT: Tensor, pixels_N3SS: Tensor | None) -> Tensor:
    return cast(Tensor, model(ids_BT, ones(ids_BT), pixels=pixels_N3SS).logits_BTV)


def llava_of(model: PrefixVLM) -> Any:
    """transformers' LLaVA with the weights of `model`; a linear projector is an MLP whose second half does nothing."""
    tower: Any = model.vision.tower
    spec: Any = model.vision.config
    linear = model.bridge.depth == 1
    config = LlavaConfig(
        vision_config=tower.config.to_dict(),
        text_config=model.language.config.to_dict(),
        image_token_index=PLACE,
        image_seq_length=spec.tokens,
        projector_hidden_act="linear" if linear else "gelu",
        vision_feature_layer=spec.layer,
        vision_feature_select_strategy="full" if spec.kind == "siglip" else "default",
    )
    theirs = LlavaForConditionalGeneration(config).eval()
    theirs.model.vision_tower.load_state_dict(tower.state_dict())
    theirs.model.language_model.load_state_dict(model.language.model.state_dict())
    theirs.lm_head.load_state_dict(model.language.lm_head.state_dict())
    state = model.bridge.state_dict()
    if linear:
        state |= {"linear_2.weight": torch.eye(32), "linear_2.bias": torch.zeros(32)}
    theirs.model.multi_modal_projector.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("bridge", [LinearConfig(), MLPConfig()], ids=["linear", "mlp"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_logits_loss_and_gradients_are_those_of_transformers_llava(
    kind: Any, bridge: LinearConfig | MLPConfig
) -> None:
    model = build(ViTConfig(kind=kind), bridge)
    theirs = llava_of(model)
    rows = [ids(PICTURE, 5, 6, PICTURE, 7), ids(1, 2, PICTURE, 8, 9)]
    ids_BT, attention_BT = padded(rows, "right", 0), padded([ones(r) for r in rows], "right", False)
    labels_BT = padded([labels(r) for r in rows], "right", IGNORE)
    pixels_N3SS, look = pixels(3), model.vision.config.pixels
    mean_311, std_311 = torch.tensor(look.mean).view(3, 1, 1), torch.tensor(look.std).view(3, 1, 1)

    ours = model(ids_BT, attention_BT, labels_BT, pixels_N3SS)
    loss = language_modeling(ours.logits_BTV, labels_BT).sum() / (labels_BT[:, 1:] != IGNORE).sum()
    loss.backward()
    expected = theirs(
        input_ids=ids_BT.masked_fill(ids_BT == IMAGE, PLACE),
        attention_mask=attention_BT.long(),
        pixel_values=(pixels_N3SS / 255 - mean_311) / std_311,
        labels=labels_BT,
    )
    expected.loss.backward()

    torch.testing.assert_close(
        ours.logits_BTV[attention_BT], expected.logits[attention_BT], atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)
    for name, parameter in model.bridge.named_parameters():
        other = theirs.model.multi_modal_projector.get_parameter(name)
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-5, rtol=1e-4)


def test_text_embeddings_around_an_image_are_the_language_models_own() -> None:
    model = build()
    ids_BT = ids(5, 6, PICTURE, 7, 8)
    embeds_BTD = model.embed(ids_BT, pixels(1))
    text_BT = ids_BT != IMAGE
    assert torch.equal(embeds_BTD[text_BT], model.language.get_input_embeddings()(ids_BT[text_BT]))
    assert embeds_BTD.shape == (1, 4 + 16, 32)


def test_images_fill_their_places_in_order_across_rows() -> None:
    model, pixels_N3SS = build(), pixels(3)
    rows = [ids(PICTURE, 5, PICTURE), ids(6, PICTURE, 7)]
    ids_BT = padded(rows, "right", 0)
    embeds_BTD = model.embed(ids_BT, pixels_N3SS)
    each_NPD = torch.cat([model.bridge(model.vision(p.unsqueeze(0))) for p in pixels_N3SS])
    torch.testing.assert_close(embeds_BTD[ids_BT == IMAGE], each_NPD.flatten(0, 1))


def test_the_order_of_images_matters_to_the_answer() -> None:
    model, pixels_N3SS, ids_BT = build(), pixels(2), ids(PICTURE, 5, PICTURE, 6)
    assert not torch.allclose(
        logits(model, ids_BT, pixels_N3SS), logits(model, ids_BT, pixels_N3SS.flip(0))
    )


def test_an_image_first_or_last_gives_the_same_embeddings_in_another_order() -> None:
    model, pixels_N3SS = build(), pixels(1)
    first, last = (model.embed(i, pixels_N3SS)[0] for i in (ids(PICTURE, 5, 6), ids(5, 6, PICTURE)))
    assert torch.equal(first[:16], last[2:]) and torch.equal(first[16:], last[:2])


@pytest.mark.parametrize(("images", "places"), [(2, 1), (1, 2), (0, 1), (1, 0)])
def test_images_and_places_that_differ_in_number_are_refused(images: int, places: int) -> None:
    ids_BT = ids(5, *[PICTURE] * places, 6)
    given = pixels(images) if images else None
    with pytest.raises(
        DataError, match=f"{places * 16} image places in its ids, and {images} images of 16 tokens"
    ):
        build()(ids_BT, ones(ids_BT), pixels=given)


def test_cached_features_stand_in_for_pixels() -> None:
    model, pixels_N3SS, ids_BT = build(), pixels(2), ids(PICTURE, 5, PICTURE, 6)
    from_features = model(ids_BT, ones(ids_BT), features=model.vision(pixels_N3SS)).logits_BTV
    assert torch.equal(from_features, logits(model, ids_BT, pixels_N3SS))


def test_features_of_another_tower_are_refused() -> None:
    ids_BT = ids(PICTURE, 5)
    with pytest.raises(DataError, match=r"Got \(4, 1280\) per image; expected \(16, 32\)"):
        build()(ids_BT, ones(ids_BT), features=torch.zeros(1, 4, 1280))


def test_pixels_and_features_together_are_refused() -> None:
    ids_BT = ids(PICTURE, 5)
    with pytest.raises(DataError, match="both pixels and cached features"):
        build()(ids_BT, ones(ids_BT), pixels=pixels(1), features=torch.zeros(1, 16, 32))


@pytest.mark.parametrize(
    "nothing",
    [
        {},
        {"pixels": torch.zeros(0, 3, 32, 32, dtype=torch.uint8)},
        {"features": torch.zeros(0, 16, 32)},
    ],
    ids=["absent", "pixels", "features"],
)
def test_text_only_batch_is_the_bare_language_model_and_leaves_zero_gradients(
    nothing: dict[str, Tensor],
) -> None:
    model = build()
    base.set_trainable(model, {"bridge.*": 1.0})
    ids_BT = ids(5, 6, 7, 8)
    ours = model(ids_BT, ones(ids_BT), ids_BT, **nothing)
    assert torch.equal(ours.logits_BTV, model.language(ids_BT).logits)
    loss = language_modeling(ours.logits_BTV, ids_BT).sum()
    torch.testing.assert_close(loss / 3, model.language(ids_BT, labels=ids_BT).loss)
    loss.backward()
    for parameter in model.bridge.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


@pytest.mark.parametrize("images", [0, 2])
def test_every_batch_runs_the_same_modules_in_the_same_order(images: int) -> None:
    """Keeps the collectives of ZeRO-3 in step when one rank's batch has no image."""
    model, called = build(), list[str]()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    traces = []
    for count in (1, images):
        called.clear()
        ids_BT = ids(5, *[PICTURE] * count, 6)
        model(ids_BT, ones(ids_BT), pixels=pixels(count) if count else None)
        traces.append(list(called))
    assert traces[0] == traces[1] and "vision.tower.embeddings" in traces[0]


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_batch_matches_single_samples(side: str) -> None:
    model, pixels_N3SS = build(), pixels(3)
    rows = [ids(PICTURE, 5, 6, PICTURE, 7), ids(1, 2, PICTURE, 8, 9), ids(3, 4)]
    images = [pixels_N3SS[:2], pixels_N3SS[2:], None]
    attention_BT = padded([ones(r) for r in rows], side, False)
    batch_BTV = model(padded(rows, side, 0), attention_BT, pixels=pixels_N3SS).logits_BTV
    for row, image, together, real in zip(rows, images, batch_BTV, attention_BT, strict=True):
        torch.testing.assert_close(
            together[real], logits(model, row, image)[0], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("side", "expected"), [("left", [0, 0, 0, 1, 2]), ("right", [0, 1, 2, 2, 2])]
)
def test_positions_count_real_tokens(side: str, expected: list[int]) -> None:
    """Rotary positions are relative, so logits would not tell; learned ones, as OPT's, would be off."""
    model, seen = build(), list[Tensor]()
    model.language.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["position_ids"]), with_kwargs=True
    )
    row = ids(5, 6, 7)
    longer = torch.ones(1, 5, dtype=torch.bool)
    model(padded([row, ids(1, 2, 3, 4, 5)], side, 0), padded([ones(row), longer], side, False))
    assert seen[0][0].tolist() == expected


@pytest.mark.parametrize(
    "trains", [{"bridge.*": 1.0}, {"bridge.*": 1.0, "language.*": 0.1}], ids=["align", "instruct"]
)
def test_only_trainable_parameters_get_a_gradient_and_move(trains: dict[str, float]) -> None:
    model, ids_BT = build(), ids(PICTURE, 5, 6, 7)
    learning = base.set_trainable(model.train(), trains)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    language_modeling(
        model(ids_BT, ones(ids_BT), labels(ids_BT), pixels(1)).logits_BTV, labels(ids_BT)
    ).sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in learning), name
        assert torch.equal(parameter, before[name]) == (name not in learning), name


def test_a_trained_vision_tower_gets_gradients_through_the_bridge() -> None:
    model, ids_BT = build(), ids(PICTURE, 5, 6)
    base.set_trainable(model, {"vision.*": 1.0})
    logits(model, ids_BT, pixels(1)).sum().backward()
    read = [p for n, p in model.vision.tower.named_parameters() if "encoder.layers.1." in n]
    assert read and all(p.grad is not None for p in read)


def test_generation_is_greedy_decoding_of_the_forward() -> None:
    model, pixels_N3SS = build(), pixels(2)
    rows = [ids(1, PICTURE, 5), ids(1, 2, 3, PICTURE, 6)]
    attention_BT = padded([ones(r) for r in rows], "left", False)
    new_BT = model.generate(
        padded(rows, "left", 0), attention_BT, pixels_N3SS, max_new_tokens=4, do_sample=False
    )
    for row, image, new in zip(rows, pixels_N3SS, new_BT, strict=True):
        for token in new:
            expected = logits(model, row, image.unsqueeze(0))[0, -1].argmax()
            assert token == expected
            row = torch.cat([row, token.view(1, 1)], dim=1)


def test_pooled_vectors_are_means_of_bridge_tokens_and_of_caption_embeddings() -> None:
    model, pixels_N3SS = build(), pixels(3)
    rows = [ids(PICTURE, 5, 6, PICTURE), ids(PICTURE, 7, 8)]
    labels_BT = padded([labels(r) for r in rows], "right", IGNORE)
    attention_BT = padded([ones(r) for r in rows], "right", False)
    outputs = model(
        padded(rows, "right", 0), attention_BT, labels_BT, pixels_N3SS, requested=POOLED
    )
    tokens_NPD, embed = model.images(pixels_N3SS, None), model.language.get_input_embeddings()
    assert outputs.logits_BTV is None
    torch.testing.assert_close(outputs.image_BD[0], tokens_NPD[:2].flatten(0, 1).mean(0))
    torch.testing.assert_close(outputs.image_BD[1], tokens_NPD[2].mean(0))
    torch.testing.assert_close(outputs.text_BD[1], embed(torch.tensor([7, 8])).mean(0))


def test_pooling_a_sample_without_an_image_names_its_row() -> None:
    ids_BT = torch.cat([ids(PICTURE, 5), ids(*range(1, 18))])
    with pytest.raises(DataError, match="sample 1 of the batch has no image"):
        build()(ids_BT, ones(ids_BT), labels(ids_BT), pixels(1), requested=POOLED)


def test_an_output_that_the_wiring_does_not_give_is_refused() -> None:
    ids_BT = ids(5)
    with pytest.raises(SpecError, match="Got \\['match'\\]"):
        build()(ids_BT, ones(ids_BT), requested=frozenset({"match"}))


def test_bfloat16_towers_run_and_stay_close() -> None:
    model, ids_BT, pixels_N3SS = build(), ids(PICTURE, 5, 6), pixels(1)
    exact = logits(model, ids_BT, pixels_N3SS)
    rounded = logits(model.bfloat16(), ids_BT, pixels_N3SS)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.2, rtol=0.2)


def test_llava_1_5_has_its_published_size_without_a_byte_of_memory() -> None:
    with torch.device("meta"):
        model = LLAVA.build(pretrained=False)
    sizes = {
        name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()
    }
    assert sizes == {"vision": 303_507_456, "bridge": 20_979_712, "language": 6_738_415_616}
    assert LLAVA.image_tokens == 576 and LLAVA.context == 2048
    assert LLAVA.pretrained == ()


def test_only_towers_with_weights_are_brought_back_by_them() -> None:
    vision = replace(LLAVA.vision, weights="openai/clip-vit-large-patch14-336")
    assert replace(LLAVA, vision=vision).pretrained == ("vision.*",)
    assert replace(LLAVA, vision=EfficientNetConfig()).tiny().pretrained == ()


def test_a_context_that_an_image_fills_is_refused() -> None:
    with pytest.raises(SpecError, match="an image takes 576 tokens"):
        replace(LLAVA, language=replace(LLAVA.language, context=512))
