"""The prefix wiring with unpadded tiles to and from transformers' `LlavaNextForConditionalGeneration` (LLaVA 1.6)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bridgework.data.tiling import layout_of
from bridgework.data.tokens import load_tokenizer
from bridgework.errors import SpecError, WeightsError
from bridgework.losses import Captioning
from bridgework.models import language as language_tower
from bridgework.models import vision as vision_tower
from bridgework.models.bridges import MLP
from bridgework.models.language import LanguageConfig
from bridgework.models.prefix_vlm import PrefixVLM
from bridgework.models.vision import ViTConfig
from bridgework.system import IMAGE, AdamW, Budget, Mixture, Source, Stage

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
IMAGE_WORD = "<image>"


def spec(config: Any) -> PrefixVLM:
    """The wiring of a LlavaNextConfig. Raises WeightsError for what it cannot be."""
    for name, value in WANTED.items():
        if getattr(config, name) != value:
            raise WeightsError(f"this LLaVA-NeXT has {name} {getattr(config, name)}, and only {value} is read")
    vision, text = config.vision_config, config.text_config
    if vision.model_type != "clip_vision_model" or not isinstance(config.vision_feature_layer, int):
        raise WeightsError(
            f"this LLaVA-NeXT reads layer {config.vision_feature_layer} of a {vision.model_type}, "
            "and only one layer of a clip_vision_model is read"
        )
    numbers = {ours: getattr(vision, theirs) for ours, theirs in vision_tower.VIT_FIELDS.items()}
    side = vision.image_size
    return PrefixVLM(
        vision=ViTConfig(kind="clip", layer=config.vision_feature_layer, act=vision.hidden_act, **numbers),
        bridge=MLP(depth=2),
        language=_language(text, config.name_or_path or "bytes"),
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
    numbers = {theirs: getattr(vision, ours) for ours, theirs in vision_tower.VIT_FIELDS.items()}
    return LlavaNextConfig(
        vision_config=numbers | {"hidden_act": getattr(vision, "act", None) or "quick_gelu"},
        text_config=language.config().to_dict(),
        vision_feature_layer=getattr(vision, "layer", -2),
        image_grid_pinpoints=[[rows * side, columns * side] for columns, rows in model.grids],
        image_seq_length=model.image_tokens,
        image_token_index=_image_word(language),
        tie_word_embeddings=language.tied,
        **WANTED,
    )


def names(model: PrefixVLM) -> Mapping[str, str]:
    """Our parameters -> transformers', one to one."""
    with torch.device("meta"):
        ours = [name for name, _ in model.build(pretrained=False).named_parameters()]
    return {name: _theirs(name) for name in ours}


def stage(model: PrefixVLM) -> Stage:
    """A stage that holds the weights: nothing is trained in it."""
    return Stage(
        name="instruct",
        model=model,
        trains={"*": 1.0},
        losses=(Captioning(),),
        data=Mixture(
            sources=(Source(name="shapes", dataset="synthetic:shapes"),),
            template="v1",
            max_tokens=model.context,
            lanes=1,
        ),
        budget=Budget(steps=1, batch=1),
        optim=AdamW(peak_lr=1e-5),
    )


def outputs(ours: Any, theirs: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Both sides' logits for a random text with a wide and a narrow image in it."""
    model, generator = spec(theirs.config), torch.Generator().manual_seed(0)
    look, side = model.pixels, model.pixels.size
    cut = [layout_of(2 * side, side, look), layout_of(side // 2 + 1, side, look)]
    counts = [1 + layout.columns * layout.rows for layout in cut]
    tiles = torch.randint(0, 256, (sum(counts), 3, side, side), dtype=torch.uint8, generator=generator)
    word = theirs.config.image_token_index
    row = [1, *[IMAGE] * model.places(cut[0]), 2, *[IMAGE] * model.places(cut[1]), 3, 4]
    ids = torch.tensor([[token + 1 if token == word else token for token in row]])
    found = ours(ids, torch.ones_like(ids, dtype=torch.bool), pixels=tiles, layouts=torch.tensor(cut))
    expected = theirs(
        input_ids=ids.masked_fill(ids == IMAGE, word),
        attention_mask=torch.ones_like(ids),
        pixel_values=pad_sequence(vision_tower.normalise(tiles, look).split(counts), batch_first=True),
        image_sizes=torch.tensor([[layout.height, layout.width] for layout in cut]),
    )
    return {"logits": (found.logits_BTV, expected.logits)}


def _language(text: Any, tokenizer: str) -> LanguageConfig:
    numbers = {
        ours: next(getattr(text, name) for name in theirs if hasattr(text, name))
        for ours, theirs in language_tower.FIELDS.items()
    }
    theta = text.rope_parameters["rope_theta"]
    return LanguageConfig(arch=text.model_type, tokenizer=tokenizer, rope_theta=theta, **numbers)


def _image_word(language: LanguageConfig) -> int:
    """The id that stands for an image: the tokenizer's, else the last of the vocabulary, which is padding."""
    found: int | None = load_tokenizer(language.tokenizer).get_vocab().get(IMAGE_WORD)
    return language.vocab - 1 if found is None else found


def _theirs(name: str) -> str:
    (part,) = (part for part in PARTS if name.startswith(part))
    return PARTS[part] + name.removeprefix(part)
