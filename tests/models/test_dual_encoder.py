"""Dual encoder: outputs, gradients and bounds of the temperature."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from bridgework.data.collate import Batch, Row, collate
from bridgework.errors import DataError, SpecError
from bridgework.losses import Contrastive
from bridgework.models import (
    CLIPTextConfig,
    DualEncoderConfig,
    EfficientNetConfig,
    ModifiedResNetConfig,
    ViTConfig,
    base,
)
from bridgework.models.dual_encoder import DualEncoder
from bridgework.system import Layout
from bridgework.training.step import GradCacheBatch, TrainingModule
from tests.models.examples import pixels

VIT = DualEncoderConfig(vision=ViTConfig(layer=-1, select="cls"), text=CLIPTextConfig()).tiny()
RESNET = DualEncoderConfig(
    vision=ModifiedResNetConfig(), text=CLIPTextConfig(), embed=1024, project_image=False
).tiny()
WIRINGS = pytest.mark.parametrize("spec", [VIT, RESNET], ids=["vit", "resnet"])
END = 259


def build(spec: DualEncoderConfig = VIT) -> DualEncoder:
    torch.manual_seed(0)
    model = spec.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.heads.logit_scale.fill_(math.log(1 / 0.07))
    return model.eval()


def inputs(samples: int, spec: DualEncoderConfig = VIT) -> dict[str, Tensor]:
    """Texts of 4 to 9 tokens, each with an image."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 256, (samples, 9), generator=generator)
    lengths = torch.randint(4, 10, (samples,), generator=generator)
    attention = torch.arange(9) < lengths.unsqueeze(1)
    ids = ids.masked_fill(~attention, END).scatter(1, lengths.unsqueeze(1) - 1, END)
    return {"ids": ids, "attention": attention, "pixels": pixels(samples, spec.pixels.size)}


def batches(samples: int, micro: int) -> list[Batch]:
    given = inputs(samples)
    rows = [
        Row(0, i, str(i), 0, ids[real].tolist(), ids[real].tolist(), image[None].numpy())
        for i, (ids, real, image) in enumerate(
            zip(given["ids"], given["attention"], given["pixels"], strict=True)
        )
    ]
    return [collate(rows[i : i + micro], pad_id=END) for i in range(0, samples, micro)]


@WIRINGS
def test_outputs_are_projected_towers_and_embeddings_have_length_one(
    spec: DualEncoderConfig,
) -> None:
    model, given = build(spec), inputs(3, spec)
    outputs = model(**given)
    features = model.vision(given["pixels"])
    image = (
        features[:, 0]
        if spec is RESNET
        else features[:, 0] @ model.heads.get_parameter("image.weight").T
    )
    text = model.text(given["ids"], given["attention"]) @ model.heads.text.weight.T
    torch.testing.assert_close((outputs.image_BD, outputs.text_BD), (image, text))
    embedded = model.embed_images(features), model.embed_texts(given["ids"], given["attention"])
    torch.testing.assert_close(embedded, (normalize(image, dim=-1), normalize(text, dim=-1)))
    cached = model(ids=given["ids"], attention=given["attention"], features=features.half())
    torch.testing.assert_close(cached.image_BD, image, atol=1e-2, rtol=1e-2)


@WIRINGS
def test_globs_name_the_towers_and_the_heads(spec: DualEncoderConfig) -> None:
    names = {name for name, _ in build(spec).named_parameters()}
    assert {name.split(".")[0] for name in names} == {"vision", "text", "heads"}
    heads = {name for name in names if name.startswith("heads.")}
    assert heads == {"heads.logit_scale", "heads.text.weight"} | (
        {"heads.image.weight"} if spec is VIT else set()
    )
    assert (spec.image_tokens, spec.num_image_tokens(Layout(0, 0, 9, 9)), spec.instruction) == (
        0,
        0,
        None,
    )
    assert (spec.context, spec.tokenizer, spec.pretrained) == (77, "bytes", ())


def test_new_projections_have_the_spread_of_the_release() -> None:
    torch.manual_seed(0)
    wide = replace(VIT, embed=2048).build()
    for head in (wide.heads.get_parameter("image.weight"), wide.heads.text.weight):
        assert math.isclose(head.detach().std(), 32**-0.5, rel_tol=0.05)


def test_the_scale_begins_at_one_over_007_and_is_never_above_100() -> None:
    model, given = VIT.build(), inputs(4)
    scale = model.heads.logit_scale
    torch.testing.assert_close(model(**given).logit_scale, torch.full((4,), 1 / 0.07))
    alike = torch.ones(4, 4) + 0.3 * torch.eye(
        4
    )  # pairs that match, all near each other: more scale, less loss
    optimizer = torch.optim.SGD([scale], lr=1e3)
    for _ in range(3):
        optimizer.zero_grad()
        outputs = replace(model(**given), image_BD=alike, text_BD=alike)
        Contrastive(temperature=None)(outputs).sum().backward()
        assert (
            scale.grad is not None and scale.grad < 0
        )  # at the limit too: it is not cut off from learning
        optimizer.step()
        assert scale.detach().exp() > 100
        with torch.no_grad():
            scale.clamp_(*model.limits["heads.logit_scale"])  # as the engine does after every step
        assert scale.detach().exp() <= 100 + 1e-4


def test_micro_batches_in_two_passes_are_the_batch() -> None:
    """Sums and gradients of towers, heads and scale, by training's own step; naive micro-batches differ."""
    model = build()
    step = TrainingModule(model, (Contrastive(temperature=None),))
    (whole,), parts = batches(8, 8), batches(8, 3)

    def gradient(sums: list[Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        for value in sums:
            value.sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected_sum = step(whole)
    expected = gradient([expected_sum])
    shares = [step.share(part) for part in parts]
    sums = [
        step(part, GradCacheBatch(shares, [len(part.keys) for part in parts], own))
        for own, part in enumerate(parts)
    ]
    torch.testing.assert_close(torch.stack(sums).sum(0), expected_sum)
    found = gradient(sums)
    assert found.keys() == expected.keys() and "heads.logit_scale" in found
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    naive = gradient([step(part) for part in parts])
    assert not torch.allclose(
        naive["heads.text.weight"], expected["heads.text.weight"], rtol=1e-2, atol=1e-3
    )


def test_a_batch_of_pairs_is_learned_by_heart() -> None:
    model, given = VIT.build(), inputs(8)
    base.set_trainable(model, {"*": 1.0})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), eps=1e-6)
    losses = []
    for _ in range(25):
        loss = Contrastive(temperature=None)(model(**given)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    model.eval()
    alike = (
        model.embed_images(model.vision(given["pixels"]))
        @ model.embed_texts(given["ids"], given["attention"]).T
    )
    assert alike.argmax(1).tolist() == list(range(8))


def test_the_loss_is_that_of_transformers() -> None:
    """(CE + CE of the transpose) / 2 over logits with the model's own scale."""
    outputs = build()(**inputs(6))
    logits = (
        outputs.logit_scale[0]
        * normalize(outputs.image_BD, dim=-1)
        @ normalize(outputs.text_BD, dim=-1).T
    )
    own = torch.arange(6)
    expected = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(Contrastive(temperature=None)(outputs).mean(), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": ViTConfig()}, r"Got 576\. Fix: set vision\.select=cls"),
        ({"vision": EfficientNetConfig(grid=2)}, r"Got 4\."),
        ({"project_image": False, "embed": 64}, "Got 64; expected 32"),
    ],
)
def test_towers_that_give_no_single_vector_of_the_width_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        replace(VIT, **changes)


def test_images_and_texts_that_do_not_pair_up_are_refused() -> None:
    model, given = build(), inputs(3)
    texts = {name: given[name] for name in ("ids", "attention")}
    with pytest.raises(DataError, match="Got 3 samples and 2 images"):
        model(**texts, pixels=given["pixels"][:2])
    with pytest.raises(DataError, match="Got neither pixels nor cached features"):
        model(**texts)
    with pytest.raises(DataError, match="come from another vision tower"):
        model(**texts, features=torch.zeros(3, 1, 64))
    with pytest.raises(SpecError, match=r"Got \['logits'\]; expected 'pooled'"):
        model(**given, requested=frozenset({"logits"}))


@WIRINGS
def test_tiny_keeps_choices_that_affect_shapes(spec: DualEncoderConfig) -> None:
    assert (spec.vision.tokens, spec.project_image) == (1, spec is VIT)
    assert spec.tiny().build()(**inputs(2, spec)).image_BD.shape == (2, 32)
