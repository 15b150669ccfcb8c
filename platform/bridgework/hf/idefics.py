"""CrossAttentionVLM to and from `IdeficsForVisionText2Text`, which is Flamingo on LLaMA.

Its two additional tokens are `<fake_token_around_image>`, in the position of our END, and
`<image>`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from bridgework.errors import SpecError
from bridgework.hf.common import (
    IMAGE_WORD,
    check_fields,
    compare_texts,
    is_read,
    language_special_ids,
    parameter_names,
    replace_prefix,
    vit_config,
    weights_stage,
)
from bridgework.hf.processors import processor_class
from bridgework.losses import LanguageModeling
from bridgework.models import (
    CrossAttentionVLMConfig,
    GatesConfig,
    LanguageConfig,
    ResamplerConfig,
    ViTConfig,
)
from bridgework.models.origin import Origin
from bridgework.models.vision import VIT_FIELDS, normalize
from bridgework.system import END, IMAGE, Scoring, Stage

ARCHITECTURES = ("IdeficsForVisionText2Text",)
END_WORD = "<fake_token_around_image>"
PARTS = {  # prefix of our names -> transformers'; the first match counts
    "vision.tower.": "model.vision_model.",
    "bridge.latents": "model.perceiver_resampler.latents",
    "bridge.norm.": "model.perceiver_resampler.layer_norm.",
    "language.lm_head.": "lm_head.",
    "language.": "",
    "extra.words.": "model.embed_tokens.additional_embedding.",
    "extra.head.": "lm_head.additional_fc.",
}
LAYER = {  # of the resampler, after its number
    "media_norm.": "0.context_layer_norm.",
    "latent_norm.": "0.latents_layer_norm.",
    "query.": "0.q_proj.",
    "key.": "0.k_proj.",
    "value.": "0.v_proj.",
    "query_norm.": "0.q_layer_norm.",
    "key_norm.": "0.k_layer_norm.",
    "out.": "0.output_proj.",
    "ffn_norm.": "1.ln.",
    "up.": "1.fc.",
    "down.": "1.c_proj.",
}
BLOCK = {  # between the layers of the language model
    "norm.": "input_layernorm.",
    "query.": "cross_attn.q_proj.",
    "key.": "cross_attn.k_proj.",
    "value.": "cross_attn.v_proj.",
    "query_norm.": "cross_attn.q_layer_norm.",
    "key_norm.": "cross_attn.k_layer_norm.",
    "out.": "cross_attn.o_proj.",
    "alpha": "alpha_cross_attn",
    "ffn_norm.": "post_attention_layernorm.",
    "up.": "mlp.up_proj.",
    "gate.": "mlp.gate_proj.",
    "down.": "mlp.down_proj.",
    "ffn_alpha": "alpha_dense",
}


def model_config(config: Any, *, tied: bool | None = None) -> CrossAttentionVLMConfig:
    """Return the model config of an IdeficsConfig. Raises WeightsError for unsupported fields."""
    check_fields(
        config,
        {"use_resampler": True, "additional_vocab_size": 2, "hidden_act": "silu", "dropout": 0.0},
    )
    perceiver, width = config.perceiver_config, config.hidden_size // config.num_attention_heads
    return CrossAttentionVLMConfig(
        vision=vit_config(config.vision_config, "clip", layer=-1, select="all", fit="crop"),
        bridge=ResamplerConfig(
            latents=perceiver.resampler_n_latents,
            depth=perceiver.resampler_depth,
            heads=perceiver.resampler_n_heads,
            head_width=perceiver.resampler_head_dim,
            qk_norm=perceiver.qk_layer_norms_perceiver,
            activation="relu",
            project=False,
        ),
        gates=GatesConfig(
            every=config.cross_layer_interval,
            heads=config.num_attention_heads,
            head_width=width,
            ffn=config.intermediate_size,
            activation="silu",
            gated_ffn=True,
            norm="rms",
            norm_eps=config.rms_norm_eps,
            qk_norm=config.qk_layer_norms,
            alpha="vector" if config.alpha_type == "vector" else "scalar",
        ),
        language=LanguageConfig(
            arch="llama",
            width=config.hidden_size,
            depth=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_attention_heads,
            ffn=config.intermediate_size,
            vocab=config.vocab_size,
            context=config.max_position_embeddings,
            tied=config.tie_word_embeddings if tied is None else tied,
            norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_parameters["rope_theta"],
            tokenizer=config.name_or_path or "bytes",
        ),
    )


def hf_config(model: CrossAttentionVLMConfig) -> Any:
    """Return the IdeficsConfig of a model config.

    Raises SpecError if transformers has no such model.
    """
    from transformers import IdeficsConfig

    vision, bridge, gates, language = model.vision, model.bridge, model.gates, model.language
    kind = isinstance(vision, ViTConfig) and (
        vision.kind,
        vision.select,
        vision.blocks == vision.depth,
    )
    if kind != ("clip", "all", True):
        raise SpecError(
            "Idefics: vision tower not supported by transformers. Expected a CLIP ViT, read with "
            "its CLS token after the last block"
        )
    tower = cast(ViTConfig, vision).config()
    numbers = {
        name: getattr(tower, name)
        for name in (*VIT_FIELDS.values(), "hidden_act", "layer_norm_eps")
    }
    numbers["embed_dim"] = numbers.pop("hidden_size")
    result = IdeficsConfig(
        vision_config=numbers,
        vocab_size=language.vocab,
        additional_vocab_size=2,
        use_resampler=True,
        hidden_size=language.width,
        intermediate_size=language.ffn,
        num_hidden_layers=language.depth,
        num_attention_heads=language.heads,
        max_position_embeddings=language.context,
        rms_norm_eps=language.norm_eps,
        tie_word_embeddings=language.tied,
        rope_parameters={"rope_type": "default", "rope_theta": language.rope_theta},
        cross_layer_interval=gates.every,
        qk_layer_norms=gates.qk_norm,
        alpha_type="vector" if gates.alpha == "vector" else "float",
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        perceiver_config={
            "resampler_n_latents": bridge.latents,
            "resampler_depth": bridge.depth,
            "resampler_n_heads": bridge.heads,
            "resampler_head_dim": bridge.head_width,
            "qk_layer_norms_perceiver": bridge.qk_norm,
        },
    )
    back = model_config(result)
    differ = [name for name in ("bridge", "gates") if getattr(back, name) != getattr(model, name)]
    differ += [
        name
        for name in ("arch", "kv_heads")
        if getattr(back.language, name) != getattr(language, name)
    ]
    differ += [f"language.{name}" for name in language.extra if is_read(name)]  # e.g. scaled RoPE
    differ += ["depth, which gates.every must divide"] * bool(language.depth % gates.every)
    if differ:
        raise SpecError(f"Idefics: fields not supported by transformers. Got {', '.join(differ)}")
    return result


def special_ids(
    model: CrossAttentionVLMConfig, tokenizer: Any, endings: Sequence[int], built: Any
) -> Origin:
    """Return the special ids and generation settings of a model that was trained here.

    The settings suppress the image token.
    """
    language = language_special_ids(tokenizer, endings, built)
    own = {path.removeprefix("text_config."): value for path, value in language.config.items()}
    return Origin(
        config=own,
        generation={**language.generation, "suppress_tokens": [model.language.vocab + 1]},
    )


def added_tokens(model: CrossAttentionVLMConfig, origin: Origin) -> Mapping[int, str]:
    """Return the tokens that the tokenizer needs, by their ids: those of END and of an image."""
    vocab = model.language.vocab
    return {vocab: END_WORD, vocab + 1: IMAGE_WORD}


def tensor_names(model: CrossAttentionVLMConfig) -> Mapping[str, str]:
    """Return our parameter names -> transformers', one to one."""
    return {name: _their_name(name, model.gates.every) for name in parameter_names(model)}


def stage(model: CrossAttentionVLMConfig) -> Stage:
    """Return the stage for the imported weights; it is never trained.

    Candidates are ranked by their log-likelihood (arXiv:2204.14198, A.2).
    """
    return replace(
        weights_stage(model, "train", (LanguageModeling(),), "interleaved"),
        scoring=Scoring(prior=False),
    )


def processor(model: CrossAttentionVLMConfig, tokenizer: Any, template: str | None) -> Any:
    """Return the transformers processor of images and text.

    It squeezes images to a square, whereas ours are cropped.
    """
    look = model.pixels
    images = processor_class("IdeficsImageProcessor")(
        image_size=look.size, image_mean=list(look.mean), image_std=list(look.std)
    )
    return processor_class("IdeficsProcessor")(
        image_processor=images, tokenizer=tokenizer, image_size=look.size
    )


def outputs(ours: Any, theirs: Any, origin: Origin) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (ours, transformers') features, logits and texts for a document of two images."""
    generator = torch.Generator().manual_seed(0)
    look, vocab = ours.vision.config.pixels, theirs.config.vocab_size
    images = torch.randint(
        0, 256, (2, 3, look.size, look.size), dtype=torch.uint8, generator=generator
    )
    ids = torch.randint(0, vocab, (1, 12), generator=generator)
    ids[0, [1, 6]], ids[0, [5, 11]] = IMAGE, END
    is_image = ids == IMAGE
    own = {"ids": ids, "attention": torch.ones_like(is_image), "pixels": images}
    other = {
        "input_ids": ids.masked_fill(ids == END, vocab).masked_fill(is_image, vocab + 1),
        "attention_mask": torch.ones_like(ids),
        "pixel_values": normalize(images, look).unsqueeze(0),
        "image_attention_mask": (is_image.cumsum(-1).unsqueeze(-1) == torch.arange(1, 3)).long(),
    }
    seen = theirs.model.vision_model(normalize(images, look)).last_hidden_state
    never = (vocab + 1,)  # our side never generates <image>
    return {
        "features": (ours.images(images, None), theirs.model.perceiver_resampler(seen)),
        "logits": (ours(**own).logits_BTV, theirs(**other).logits),
        **compare_texts(
            ours, theirs, own, other, ends=origin.generation, skip=ids.shape[1], never=never
        ),
    }


def _their_name(name: str, every: int) -> str:
    if name.startswith("gates."):
        _, number, rest = name.split(".", 2)
        return f"model.gated_cross_attn_layers.{int(number) // every}.{replace_prefix(rest, BLOCK)}"
    if name.startswith("bridge.layers."):
        _, _, number, rest = name.split(".", 3)
        return f"model.perceiver_resampler.blocks.{number}.{replace_prefix(rest, LAYER)}"
    return replace_prefix(name, PARTS)
