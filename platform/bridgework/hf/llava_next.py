"""PrefixVLM with unpadded tiles to and from `LlavaNextForConditionalGeneration` (LLaVA 1.6)."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bridgework.data.tiling import choose_grid
from bridgework.errors import SpecError, WeightsError
from bridgework.hf.common import (
    check_fields,
    compare_texts,
    image_token_id,
    image_tokens,
    language_special_ids,
    parameter_names,
    replace_prefix,
    tokens_beyond_windows,
    vit_config,
    weights_stage,
)
from bridgework.hf.llava import llava_processor
from bridgework.losses import LanguageModeling
from bridgework.models import LanguageConfig, MLPConfig, PrefixVLMConfig, ViTConfig
from bridgework.models.origin import Origin
from bridgework.models.vision import normalize
from bridgework.system import IMAGE, Stage

ARCHITECTURES = ("LlavaNextForConditionalGeneration",)
PARTS = {  # ours -> transformers'
    "vision.tower.": "model.vision_tower.",
    "bridge.": "model.multi_modal_projector.",
    "tiles.newline": "model.image_newline",
    "language.model.": "model.language_model.",
    "language.lm_head.": "lm_head.",
}
FIXED: Mapping[str, Any] = {
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_select_strategy": "default",
}


def model_config(config: Any, *, tied: bool | None = None) -> PrefixVLMConfig:
    """Return the model config of a LlavaNextConfig. Raises WeightsError for unsupported fields."""
    check_fields(config, FIXED)
    vision = config.vision_config
    if vision.model_type != "clip_vision_model" or not isinstance(config.vision_feature_layer, int):
        raise WeightsError(
            "LLaVA-NeXT: vision features not supported. Got layer "
            f"{config.vision_feature_layer} of a {vision.model_type}; "
            "expected one layer of a clip_vision_model"
        )
    side = vision.image_size
    uneven = [
        list(size)
        for size in config.image_grid_pinpoints
        if any(length % side or not length for length in size)
    ]
    if uneven:
        raise WeightsError(
            f"LLaVA-NeXT: image_grid_pinpoints do not fit tiles of {side} pixels. "
            f"Got {uneven[0]}; expected multiples of {side}. "
            "Fix: use a model whose grids consist of complete tiles"
        )
    return PrefixVLMConfig(
        vision=vit_config(vision, "clip", layer=config.vision_feature_layer),
        bridge=MLPConfig(depth=2),
        language=LanguageConfig.of(config.text_config, config.name_or_path or "bytes", tied=tied),
        grids=tuple((wide // side, high // side) for high, wide in config.image_grid_pinpoints),
        tiles="unpad",
    )


def hf_config(model: PrefixVLMConfig) -> Any:
    """Return the LlavaNextConfig of a model config.

    Raises SpecError if transformers has no such model.
    """
    from transformers import LlavaNextConfig

    vision, language, side = model.vision, model.language, model.pixels.size
    fits = isinstance(vision, ViTConfig) and (vision.kind, vision.select) == ("clip", "patch")
    if not fits or model.bridge != MLPConfig(depth=2) or model.tiles != "unpad" or not model.grids:
        raise SpecError(
            "LLaVA-NeXT: model not supported by transformers. Expected a CLIP ViT, an MLP of two "
            "matrices, grids, and tiles='unpad'"
        )
    tower = cast(ViTConfig, vision)
    return LlavaNextConfig(
        vision_config=tower.config().to_dict(),
        text_config=language.config().to_dict(),
        vision_feature_layer=tower.layer,
        image_grid_pinpoints=[[rows * side, columns * side] for columns, rows in model.grids],
        image_seq_length=model.image_tokens,
        tie_word_embeddings=language.tied,
        **FIXED,
    )


def special_ids(
    model: PrefixVLMConfig, tokenizer: Any, endings: Sequence[int], built: Any
) -> Origin:
    """Return the special ids and generation settings of a model that was trained here."""
    return language_special_ids(
        tokenizer, endings, built, image_token_id(model.language, tokenizer)
    )


def added_tokens(model: PrefixVLMConfig, origin: Origin) -> Mapping[int, str]:
    """Return the image token that the tokenizer needs, by its id."""
    return image_tokens(origin)


def tensor_names(model: PrefixVLMConfig) -> Mapping[str, str]:
    """Return our parameter names -> transformers', one to one."""
    return {name: replace_prefix(name, PARTS) for name in parameter_names(model)}


def stage(model: PrefixVLMConfig) -> Stage:
    """Return the stage for the imported weights; it is never trained."""
    return weights_stage(model, "instruct", (LanguageModeling(),), "v1")


def processor(model: PrefixVLMConfig, tokenizer: Any, template: str | None) -> Any:
    """Return the transformers processor of images and text."""
    return llava_processor("LlavaNextProcessor", model, tokenizer, template)


def outputs(ours: Any, theirs: Any, origin: Origin) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (ours, transformers') features, logits and texts for a wide and a narrow image."""
    model, generator = model_config(theirs.config), torch.Generator().manual_seed(0)
    look, side = model.pixels, model.pixels.size
    cut = [choose_grid(2 * side, side, look), choose_grid(side // 2 + 1, side, look)]
    counts = [1 + layout.columns * layout.rows for layout in cut]
    tiles = torch.randint(
        0, 256, (sum(counts), 3, side, side), dtype=torch.uint8, generator=generator
    )
    word, text = theirs.config.image_token_index, theirs.config.text_config
    vocab, places = (
        int(ours.language.get_input_embeddings().weight.shape[0]),
        [model.num_image_tokens(layout) for layout in cut],
    )
    more = torch.randint(
        5, vocab - 1, (tokens_beyond_windows(text, sum(places)),), generator=generator
    ).tolist()
    row = [1, *[IMAGE] * places[0], 2, *[IMAGE] * places[1], 3, 4, *more]
    ids = torch.tensor([[vocab - 1 if token == word else token for token in row]])
    layouts = torch.tensor(cut)
    own = {
        "ids": ids,
        "attention": torch.ones_like(ids, dtype=torch.bool),
        "pixels": tiles,
        "layouts": layouts,
    }
    their_images = {
        "pixel_values": pad_sequence(normalize(tiles, look).split(counts), batch_first=True),
        "image_sizes": torch.tensor([[layout.height, layout.width] for layout in cut]),
    }
    other = {
        "input_ids": ids.masked_fill(ids == IMAGE, word),
        "attention_mask": torch.ones_like(ids),
        **their_images,
    }
    features = theirs.get_image_features(**their_images).pooler_output
    never = () if text.vocab_size == vocab else (word,)  # only their model has the row
    return {
        "features": (ours.tiles(ours.images(tiles, None), layouts), torch.cat([*features])),
        "logits": (ours(**own).logits_BTV, theirs(**other).logits[..., :vocab]),
        **compare_texts(
            ours, theirs, own, other, ends=origin.generation, skip=ids.shape[1], never=never
        ),
    }
