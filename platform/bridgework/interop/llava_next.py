"""The prefix wiring with unpadded tiles to and from transformers' `LlavaNextForConditionalGeneration` (LLaVA 1.6)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bridgework.data.tiling import layout_of
from bridgework.errors import SpecError, WeightsError
from bridgework.interop.parts import expect, greedy, holding, image_word, parameters, renamed
from bridgework.losses import Captioning
from bridgework.models import MLP, LanguageConfig, PrefixVLM, ViTConfig
from bridgework.models.vision import VIT_FIELDS, normalise
from bridgework.system import IMAGE, Stage

ARCHITECTURES = ("LlavaNextForConditionalGeneration",)
PARTS = {  # ours -> transformers'
    "vision.tower.": "model.vision_tower.",
    "bridge.": "model.multi_modal_projector.",
    "tiles.newline": "model.image_newline",
    "language.model.": "model.language_model.",
    "language.lm_head.": "lm_head.",
}
WANTED: Mapping[str, Any] = {
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_select_strategy": "default",
}


def spec(config: Any) -> PrefixVLM:
    """The wiring of a LlavaNextConfig. Raises WeightsError for what it cannot be."""
    expect(config, WANTED)
    vision = config.vision_config
    if vision.model_type != "clip_vision_model" or not isinstance(config.vision_feature_layer, int):
        raise WeightsError(
            f"this LLaVA-NeXT reads layer {config.vision_feature_layer} of a {vision.model_type}, "
            "and only one layer of a clip_vision_model is read"
        )
    numbers = {ours: getattr(vision, theirs) for ours, theirs in VIT_FIELDS.items()}
    side = vision.image_size
    return PrefixVLM(
        vision=ViTConfig(kind="clip", layer=config.vision_feature_layer, act=vision.hidden_act, **numbers),
        bridge=MLP(depth=2),
        language=LanguageConfig.of(config.text_config, config.name_or_path or "bytes"),
        grids=tuple((wide // side, high // side) for high, wide in config.image_grid_pinpoints),
        tiles="unpad",
    )


def config(model: PrefixVLM) -> Any:
    """The LlavaNextConfig of a wiring. Raises SpecError where transformers has none."""
    from transformers import LlavaNextConfig

    vision, language, side = model.vision, model.language, model.pixels.size
    fits = isinstance(vision, ViTConfig) and (vision.kind, vision.select) == ("clip", "patch")
    if not fits or model.bridge != MLP(depth=2) or model.tiles != "unpad" or not model.grids:
        raise SpecError("transformers' LLaVA-NeXT is a CLIP ViT, an MLP of two matrices, grids, and tiles='unpad'")
    numbers = {theirs: getattr(vision, ours) for ours, theirs in VIT_FIELDS.items()}
    return LlavaNextConfig(
        vision_config=numbers | {"hidden_act": getattr(vision, "act", None) or "quick_gelu"},
        text_config=language.config().to_dict(),
        vision_feature_layer=getattr(vision, "layer", -2),
        image_grid_pinpoints=[[rows * side, columns * side] for columns, rows in model.grids],
        image_seq_length=model.image_tokens,
        image_token_index=image_word(language),
        tie_word_embeddings=language.tied,
        **WANTED,
    )


def names(model: PrefixVLM) -> Mapping[str, str]:
    """Our parameters -> transformers', one to one."""
    return {name: renamed(name, PARTS) for name in parameters(model)}


def stage(model: PrefixVLM) -> Stage:
    """A stage that holds the weights."""
    return holding(model, "instruct", (Captioning(),), "v1")


def outputs(ours: Any, theirs: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Both sides' image tokens, logits and greedy ids for a random text with a wide and a narrow image in it."""
    model, generator = spec(theirs.config), torch.Generator().manual_seed(0)
    look, side = model.pixels, model.pixels.size
    cut = [layout_of(2 * side, side, look), layout_of(side // 2 + 1, side, look)]
    counts = [1 + layout.columns * layout.rows for layout in cut]
    tiles = torch.randint(0, 256, (sum(counts), 3, side, side), dtype=torch.uint8, generator=generator)
    word = theirs.config.image_token_index
    row = [1, *[IMAGE] * model.places(cut[0]), 2, *[IMAGE] * model.places(cut[1]), 3, 4]
    ids = torch.tensor([[token + 1 if token == word else token for token in row]])
    layouts = torch.tensor(cut)
    own = {"ids": ids, "attention": torch.ones_like(ids, dtype=torch.bool), "pixels": tiles, "layouts": layouts}
    shown = {
        "pixel_values": pad_sequence(normalise(tiles, look).split(counts), batch_first=True),
        "image_sizes": torch.tensor([[layout.height, layout.width] for layout in cut]),
    }
    other = {"input_ids": ids.masked_fill(ids == IMAGE, word), "attention_mask": torch.ones_like(ids), **shown}
    features = theirs.get_image_features(**shown).pooler_output
    return {
        "features": (ours.tiles(ours.images(tiles, None), layouts), torch.cat([*features])),
        "logits": (ours(**own).logits_BTV, theirs(**other).logits),
        "greedy": greedy(ours, theirs, own, other),
    }
