"""Prefix wiring on tiled images, resampled or unpadded with newlines, and preferences."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from bridgework.errors import DataError, SpecError
from bridgework.models import (
    ConcatConfig,
    LanguageConfig,
    LoRAConfig,
    MLPConfig,
    PrefixVLMConfig,
    ResamplerConfig,
    ViTConfig,
)
from bridgework.models import base as freezing
from bridgework.models import tiles as tiling
from bridgework.models.prefix_vlm import PrefixVLM
from bridgework.system import IGNORE, IMAGE, Layout
from tests.models.examples import LLAVA, pixels, stirred

GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
TINY = LLAVA.tiny()
KINDS = {
    "resample": replace(TINY, bridge=ResamplerConfig().tiny(), grids=GRIDS),
    "patches": replace(TINY, grids=GRIDS),
    "unpad": replace(TINY, grids=GRIDS, tiles="unpad"),
}
LAYOUTS = [
    Layout(2, 1, 64, 20),
    Layout(0, 0, 32, 32),
    Layout(1, 2, 17, 64),
]  # the first and last have padding
SQUARES = [1 + layout.columns * layout.rows for layout in LAYOUTS]


def build(kind: str, **language: Any) -> PrefixVLM:
    torch.manual_seed(0)
    spec = KINDS[kind]
    spec = replace(spec, language=replace(cast(LanguageConfig, spec.language), **language))
    return stirred(spec.build()).eval()


def row(kind: str, before: list[int], images: list[int], after: list[int]) -> Tensor:
    places = [IMAGE] * sum(KINDS[kind].num_image_tokens(LAYOUTS[image]) for image in images)
    return torch.tensor([[*before, *places, *after]])


def ones(ids_BT: Tensor) -> Tensor:
    return torch.ones_like(ids_BT, dtype=torch.bool)


def squares() -> list[Tensor]:
    return list(pixels(sum(SQUARES)).split(SQUARES))


def logits(model: PrefixVLM, ids_BT: Tensor, images: list[int], **given: Any) -> Tensor:
    shown = torch.cat([squares()[image] for image in images])
    layouts_N4 = torch.tensor([LAYOUTS[image] for image in images])
    out: Tensor = model(ids_BT, ones(ids_BT), pixels=shown, layouts=layouts_N4, **given).logits_BTV
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_padded_batch_of_images_of_other_shapes_matches_single_samples(kind: str) -> None:
    model, rows = build(kind), [row(kind, [5], [0, 1], [6]), row(kind, [7, 8], [2], [9, 10])]
    longest = max(r.shape[1] for r in rows)
    ids_BT = torch.cat(
        [torch.cat([r, torch.zeros(1, longest - r.shape[1], dtype=torch.int64)], 1) for r in rows]
    )
    attention_BT = torch.stack([torch.arange(longest) < r.shape[1] for r in rows])
    cut = {"pixels": torch.cat(squares()), "layouts": torch.tensor(LAYOUTS)}
    together_BTV = model(ids_BT, attention_BT, **cut).logits_BTV
    for own, images, out, real in zip(rows, ([0, 1], [2]), together_BTV, attention_BT, strict=True):
        torch.testing.assert_close(out[real], logits(model, own, images)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "sees"), [("resample", False), ("unpad", False), ("patches", True)]
)
def test_padding_is_looked_at_only_where_it_is_neither_masked_nor_cut(
    kind: str, sees: bool
) -> None:
    """The features of padded patches are noise in one of the two; tokens must not tell."""
    model, ids_BT = build(kind), row(kind, [5], [0], [6])
    layouts_N4 = torch.tensor(LAYOUTS[:1])
    seen_SPF = model.vision(squares()[0])
    noise_SPF = seen_SPF.masked_fill(~tiling.patch_mask(layouts_N4, 16).unsqueeze(-1), 9.0)
    assert not torch.equal(seen_SPF, noise_SPF)
    one, other = (
        model(ids_BT, ones(ids_BT), features=given, layouts=layouts_N4).logits_BTV
        for given in (seen_SPF, noise_SPF)
    )
    assert torch.equal(one, other) != sees


@pytest.mark.parametrize("kind", KINDS)
def test_generation_and_continuations_see_the_tiles(kind: str) -> None:
    model, ids_BT = build(kind), row(kind, [5], [0, 2], [6])
    shown, layouts_N4 = (
        torch.cat([squares()[0], squares()[2]]),
        torch.tensor([LAYOUTS[0], LAYOUTS[2]]),
    )
    rest_CR = torch.tensor([[3, 4], [7, 8]])
    behind_CRV = model.continuations(ids_BT, rest_CR, model.vision(shown), layouts=layouts_N4)
    for rest, behind in zip(rest_CR, behind_CRV, strict=True):
        whole_BTV = logits(model, torch.cat([ids_BT, rest.unsqueeze(0)], dim=1), [0, 2])
        torch.testing.assert_close(behind, whole_BTV[0, -3:-1], atol=1e-5, rtol=1e-5)
    (new,) = model.generate(
        ids_BT, ones(ids_BT), shown, layouts=layouts_N4, max_new_tokens=1, do_sample=False
    )
    assert new.item() == logits(model, ids_BT, [0, 2])[0, -1].argmax()


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_only_batch_runs_the_same_modules_and_leaves_zero_gradients(kind: str) -> None:
    model, called = build(kind), list[str]()
    freezing.set_trainable(model, {"bridge.*": 1.0} | ({"tiles.*": 1.0} if kind == "unpad" else {}))
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    logits(model, row(kind, [5], [1], [6]), [1])
    with_image, ids_BT = list(called), torch.tensor([[5, 6, 7]])
    called.clear()
    out_BTV = model(ids_BT, ones(ids_BT)).logits_BTV
    assert called == with_image
    out_BTV.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and not p.grad.any() for p in trained)


def test_places_are_those_of_the_largest_grid_in_the_check_of_the_context() -> None:
    with pytest.raises(SpecError, match="an image takes 2880 tokens"):
        replace(LLAVA, grids=((2, 2),))
    assert KINDS["unpad"].pixels.grids == GRIDS and TINY.pixels.grids == ()


@pytest.mark.parametrize(
    "changes",
    [{"vision": replace(ViTConfig(), select="all")}, {"bridge": ConcatConfig(), "tiles": "unpad"}],
    ids=["cls", "fewer"],
)
def test_vectors_that_lie_in_no_grid_are_refused(changes: dict[str, Any]) -> None:
    language = replace(cast(LanguageConfig, LLAVA.language), context=4096)
    with pytest.raises(SpecError, match="tiles need a square grid of patches"):
        PrefixVLMConfig(
            **{"vision": ViTConfig(), "bridge": MLPConfig(), "language": language, "grids": GRIDS}
            | changes
        )


def test_places_and_tiles_that_differ_are_refused() -> None:
    ids_BT = torch.cat([row("unpad", [5], [0], [6]), torch.tensor([[IMAGE]])], dim=1)
    with pytest.raises(DataError, match="image places in its ids"):
        logits(build("unpad"), ids_BT, [0])


# --- preferences -----------------------------------------------------------------------------------------------------

ANSWERS = frozenset({"preference"})


def test_likelihoods_are_summed_over_answers_and_the_reference_has_no_adapters() -> None:
    model = build("resample", lora=LoRAConfig(rank=2, alpha=8))
    rows = [row("resample", [5], [0], last) for last in ([6, 7, 8], [6, 9, 10])]
    ids_BT = torch.cat(rows)
    labels_BT = ids_BT.masked_fill(ids_BT == IMAGE, IGNORE)
    labels_BT[:, 0] = IGNORE
    cut = {"pixels": torch.cat([squares()[0]] * 2), "layouts": torch.tensor([LAYOUTS[0]] * 2)}
    out = model(ids_BT, ones(ids_BT), labels_BT, **cut, requested=ANSWERS)
    nats_BT = model(ids_BT, ones(ids_BT), **cut).logits_BTV[:, :-1].log_softmax(-1)
    spoken_B = nats_BT[:, -3:].gather(-1, ids_BT[:, -3:].unsqueeze(-1)).squeeze(-1).sum(1)
    torch.testing.assert_close(torch.cat([out.chosen_B, out.rejected_B]), spoken_B)
    assert out.chosen_B.requires_grad and not out.chosen_reference_B.requires_grad
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    base = model(ids_BT, ones(ids_BT), labels_BT, **cut, requested=ANSWERS)
    assert torch.equal(base.chosen_B, out.chosen_reference_B) and torch.equal(
        base.rejected_B, out.rejected_reference_B
    )


def test_preferences_want_adapters_labels_and_pairs() -> None:
    ids_BT = torch.tensor([[5, 6], [5, 7]])
    with pytest.raises(SpecError, match="adapters"):
        build("resample")(ids_BT, ones(ids_BT), ids_BT, requested=ANSWERS)
    with pytest.raises(DataError, match="no labels"):
        build("resample")(ids_BT, ones(ids_BT), requested=ANSWERS)
    with pytest.raises(DataError, match="got 1 rows"):
        build("resample")(ids_BT[:1], ones(ids_BT[:1]), ids_BT[:1], requested=ANSWERS)
