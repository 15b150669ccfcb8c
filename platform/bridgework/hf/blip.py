"""BLIP to and from transformers: the fine-tunes for captioning, question answering and retrieval.

transformers has no class for pre-training, where the captioner shares the encoder's weights. Its
questions and texts to match begin with [CLS]; here they begin with [ENC], as in the release.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bridgework.errors import SpecError, WeightsError
from bridgework.hf.common import compare_texts, parameter_names, replace_prefix, weights_stage
from bridgework.hf.processors import image_processor, processor_class
from bridgework.losses import Contrastive, LanguageModeling, Matching
from bridgework.models import BlipViTConfig, MEDConfig, MEDTextConfig
from bridgework.models.blip_med import Task
from bridgework.models.blip_text import FIELDS
from bridgework.models.origin import Origin
from bridgework.models.vision import VIT_FIELDS, normalize
from bridgework.system import IGNORE, LossSpec, Scoring, Stage

TASKS: Mapping[str, tuple[Task, ...]] = {
    "BlipForConditionalGeneration": ("caption",),
    "BlipForQuestionAnswering": ("answer",),
    "BlipForImageTextRetrieval": ("contrast", "match"),
}
ARCHITECTURES = tuple(TASKS)
PARTS = {  # ours -> transformers'; its LM head is tied to its embeddings
    "vision.tower.": "vision_model.",
    "text.": "text_encoder.",
    "decoder.": "text_decoder.bert.",
    "heads.transform.": "text_decoder.cls.predictions.transform.",
    "heads.bias": "text_decoder.cls.predictions.bias",
    "heads.vision.": "vision_proj.",
    "heads.text.": "text_proj.",
    "heads.match.": "itm_head.",
}
FIXED = {  # values of every MED
    "text_config": {"layer_norm_eps": 1e-12, "hidden_act": "gelu", "tie_word_embeddings": True},
         "vision_config": {"hidden_act": "gelu", "attention_dropout": 0.0}}  # fmt: skip


def model_config(config: Any, *, tied: bool | None = None) -> MEDConfig:
    """Return the model config of a BlipConfig. Raises WeightsError for unsupported fields."""
    text, vision, tasks = config.text_config, config.vision_config, TASKS[_architecture(config)]
    expected = {
        f"{part}.{name}": value for part, fields in FIXED.items() for name, value in fields.items()
    }
    expected |= {
        "text_config.encoder_hidden_size": vision.hidden_size,
        "text_config.attention_probs_dropout_prob": text.hidden_dropout_prob,
    }
    if {"caption", "answer"} & set(tasks):
        # [DEC], the first token of a generated text; [ENC] is the next id
        expected["text_config.bos_token_id"] = text.vocab_size - 2
    for name, value in expected.items():
        part, _, field = name.partition(".")
        if (given := getattr(getattr(config, part), field)) != value:
            raise WeightsError(f"BLIP: {name} is not supported. Got {given}; expected {value}")
    numbers = {ours: getattr(text, theirs) for ours, theirs in FIELDS.items()}
    return MEDConfig(
        vision=BlipViTConfig(
            norm_eps=vision.layer_norm_eps,
            **{ours: getattr(vision, theirs) for ours, theirs in VIT_FIELDS.items()},
        ),
        text=MEDTextConfig(
            **numbers | {"vocab": text.vocab_size - 2},
            dropout=text.hidden_dropout_prob,
            tokenizer=config.name_or_path or "bytes",
        ),
        tasks=tasks,
        embed=config.image_text_hidden_size,
    )


def hf_config(model: MEDConfig) -> Any:
    """Return the BlipConfig of a model config.

    Raises SpecError for tasks without a class, and for another vision tower.
    """
    from transformers import BlipConfig

    named = [name for name, tasks in TASKS.items() if set(tasks) == set(model.tasks)]
    if not named or model.momentum is not None:
        raise SpecError(
            f"transformers has no BLIP with the tasks {', '.join(model.tasks)}"
            + (" and a momentum encoder" if model.momentum else "")
            + ". Fix: export a stage that captions, answers, or does contrast and match"
        )
    if not isinstance(model.vision, BlipViTConfig):
        raise SpecError(
            f"transformers' BLIP has no {type(model.vision).__name__}. "
            "Fix: export a model whose vision is a BlipViTConfig"
        )
    return BlipConfig(
        text_config={
            **model.text.config(model.vision.width).to_dict(),
            "bos_token_id": model.text.dec,
        },
        vision_config=model.vision.config().to_dict(),
        image_text_hidden_size=model.embed,
        architectures=named,
    )


def special_ids(model: MEDConfig, tokenizer: Any, endings: Sequence[int], built: Any) -> Origin:
    """Return the special ids of a model that was trained here.

    In transformers' BLIP a text ends with `sep_token_id`.
    """
    ending = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    given = {"sep_token_id": ending, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": ending}
    return Origin(config={f"text_config.{name}": value for name, value in given.items()})


def tensor_names(model: MEDConfig) -> Mapping[str, str]:
    """Return our parameter names -> transformers', one to one."""
    return {name: replace_prefix(name, PARTS) for name in parameter_names(model)}


def stage(model: MEDConfig) -> Stage:
    """Return the stage for the imported weights; it is never trained."""
    generates = "contrast" not in model.tasks
    losses: tuple[LossSpec, ...] = (
        (LanguageModeling(label_smoothing=0.1),) if generates else (Contrastive(), Matching())
    )
    template = "answer" if "answer" in model.tasks else "prompted" if generates else "caption"
    result = weights_stage(model, "-".join(model.tasks), losses, template)
    # answers are ranked by their log-likelihood (BLIP's blip_vqa.py)
    return replace(result, scoring=Scoring(prior="answer" not in model.tasks))


def processor(model: MEDConfig, tokenizer: Any, template: str | None) -> Any:
    """Return the transformers processor of images and text."""
    return processor_class("BlipProcessor")(
        image_processor=image_processor(model.pixels), tokenizer=tokenizer
    )


def outputs(ours: Any, theirs: Any, origin: Origin) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (ours, transformers') for two random images and texts.

    Features, and logits with generated texts or cosines with log-odds.
    """
    text, look, generator = ours.config.text, ours.config.pixels, torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (2, 3, look.size, look.size), dtype=torch.uint8, generator=generator
    )
    ids = torch.randint(0, text.vocab, (2, min(8, text.context)), generator=generator)
    real, pixels = torch.ones_like(ids, dtype=torch.bool), normalize(images, look)
    written, read = (
        torch.cat([torch.full_like(ids[:, :1], token), ids[:, 1:]], 1)
        for token in (text.dec, text.enc)
    )
    features, seen = ours.vision(images), theirs.vision_model(pixels).last_hidden_state
    found = {"features": (features, seen)}
    if "caption" in ours.config.tasks:
        expected = theirs(input_ids=written, pixel_values=pixels).logits
        # of a prompt transformers drops the last id, where its processor puts [SEP]
        return found | {
            "logits": (ours(ids, real, pixels=images).logits_BTV, expected),
            **_texts(ours, theirs, images, ids[:, :3], read[:, :4], origin),
        }
    if "answer" in ours.config.tasks:  # transformers' own forward gives no logits
        labels = torch.cat(
            [torch.full_like(ids[:, :1], IGNORE), ids[:, 1:]], 1
        )  # [CLS] alone is the question
        asked = theirs.text_encoder(
            input_ids=read[:, :1], encoder_hidden_states=seen
        ).last_hidden_state
        expected = theirs.text_decoder(input_ids=written, encoder_hidden_states=asked).logits
        return found | {
            "logits": (ours(ids, real, labels, images).logits_BTV[:, :-1], expected[:, :-1]),
            **_texts(ours, theirs, images, ids, read, origin),
        }
    image, words = ours.embed_images(features), ours.embed_texts(ids, real)
    odds = theirs(input_ids=read, pixel_values=pixels).itm_score.diff(dim=1)[:, 0]
    return found | {
        "cosines": (
            image @ words.T,
            theirs(input_ids=ids, pixel_values=pixels, use_itm_head=False).itm_score,
        ),
        "match": (ours.match(ids, real, features), odds),
    }


def _texts(
    ours: Any, theirs: Any, images: Tensor, prompts: Tensor, their_prompts: Tensor, origin: Origin
) -> dict[str, tuple[Tensor, Tensor]]:
    text, look = ours.config.text, ours.config.pixels
    ends = {"eos_token_id": origin.config.get("text_config.sep_token_id"),
            "pad_token_id": origin.config.get("text_config.pad_token_id")}  # fmt: skip
    captions = "caption" in ours.config.tasks
    return compare_texts(
        ours,
        theirs,
        {"ids": prompts, "attention": torch.ones_like(prompts, dtype=torch.bool), "pixels": images},
        {
            "input_ids": their_prompts,
            "attention_mask": torch.ones_like(their_prompts),
            "pixel_values": normalize(images, look),
        },
        ends=ends,
        skip=prompts.shape[1] if captions else 1,
        never=(text.dec, text.enc),  # here they are never written
        forced=True,
    )


def _architecture(config: Any) -> str:
    known = [name for name in config.architectures or () if name in TASKS]
    if not known:
        raise WeightsError(
            f"BLIP: architecture not supported. Got {config.architectures}; "
            f"expected one of {', '.join(TASKS)}"
        )
    return str(known[0])
