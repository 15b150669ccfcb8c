"""BLIP to and from transformers' fine-tunes: captioning, question answering, retrieval.

What transformers has no class for is the whole of pre-training, where a captioner shares the encoder's weights.
transformers reads a question and a text to match with [CLS] in front; here [ENC] is, as in the release.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bridgework.data.tokens import load_tokenizer
from bridgework.errors import SpecError, WeightsError
from bridgework.interop.parts import greedy
from bridgework.losses import Captioning, Contrastive, Matching
from bridgework.models import MED, BlipViTConfig, MEDTextConfig
from bridgework.models.med import Task
from bridgework.models.med_text import FIELDS
from bridgework.models.vision import VIT_FIELDS, normalise
from bridgework.system import IGNORE, AdamW, Budget, LossSpec, Mixture, Scoring, Source, Stage

TASKS: Mapping[str, tuple[Task, ...]] = {
    "BlipForConditionalGeneration": ("caption",),
    "BlipForQuestionAnswering": ("answer",),
    "BlipForImageTextRetrieval": ("contrast", "match"),
}
ARCHITECTURES = tuple(TASKS)
PARTS = {  # ours -> transformers'; its head of words is tied to its embeddings
    "vision.tower.": "vision_model.",
    "text.": "text_encoder.",
    "decoder.": "text_decoder.bert.",
    "heads.transform.": "text_decoder.cls.predictions.transform.",
    "heads.bias": "text_decoder.cls.predictions.bias",
    "heads.vision.": "vision_proj.",
    "heads.text.": "text_proj.",
    "heads.match.": "itm_head.",
}
FIXED = {"text_config": {"layer_norm_eps": 1e-12, "hidden_act": "gelu", "tie_word_embeddings": True},
         "vision_config": {"hidden_act": "gelu", "attention_dropout": 0.0}}  # fmt: skip


def spec(config: Any) -> MED:
    """The wiring of a BlipConfig. Raises WeightsError for what it cannot be."""
    text, vision = config.text_config, config.vision_config
    wanted = {f"{part}.{name}": value for part, fields in FIXED.items() for name, value in fields.items()}
    wanted |= {
        "text_config.encoder_hidden_size": vision.hidden_size,
        "text_config.bos_token_id": text.vocab_size - 2,  # [DEC]; [ENC] is behind it
        "text_config.attention_probs_dropout_prob": text.hidden_dropout_prob,
    }
    for name, value in wanted.items():
        part, _, field = name.partition(".")
        if (found := getattr(getattr(config, part), field)) != value:
            raise WeightsError(f"this BLIP has {name} {found}, and only {value} is read")
    numbers = {ours: getattr(text, theirs) for ours, theirs in FIELDS.items()}
    return MED(
        vision=BlipViTConfig(
            norm_eps=vision.layer_norm_eps, **{ours: getattr(vision, theirs) for ours, theirs in VIT_FIELDS.items()}
        ),
        text=MEDTextConfig(
            **numbers | {"vocab": text.vocab_size - 2},
            dropout=text.hidden_dropout_prob,
            tokenizer=config.name_or_path or "bytes",
        ),
        tasks=TASKS[_architecture(config)],
        embed=config.image_text_hidden_size,
    )


def config(model: MED) -> Any:
    """The BlipConfig of a wiring. Raises SpecError where transformers has no class for its tasks."""
    from transformers import BlipConfig

    named = [name for name, tasks in TASKS.items() if set(tasks) == set(model.tasks)]
    if not named or model.momentum is not None:
        raise SpecError(
            f"transformers has no BLIP with the tasks {', '.join(model.tasks)}"
            + (" and a momentum twin" if model.momentum else "")
            + "; take a stage that captions, answers, or finds and matches"
        )
    tokenizer = load_tokenizer(model.text.tokenizer)
    ending = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    special = {"bos_token_id": model.text.dec, "sep_token_id": ending, "pad_token_id": tokenizer.pad_token_id}
    return BlipConfig(
        text_config=model.text.config(model.vision.width).to_dict() | special,
        vision_config=model.vision.config().to_dict(),
        image_text_hidden_size=model.embed,
        architectures=named,
    )


def names(model: MED) -> Mapping[str, str]:
    """Our parameters -> transformers', one to one."""
    with torch.device("meta"):
        ours = [name for name, _ in model.build(pretrained=False).named_parameters()]
    return {name: _theirs(name) for name in ours}


def stage(model: MED) -> Stage:
    """A stage that holds the weights: nothing is trained in it."""
    writes = "contrast" not in model.tasks
    losses: tuple[LossSpec, ...] = (Captioning(label_smoothing=0.1),) if writes else (Contrastive(), Matching())
    template = "answer" if "answer" in model.tasks else "prompted" if writes else "caption"
    return Stage(
        name="-".join(model.tasks),
        model=model,
        trains={"*": 1.0},
        losses=losses,
        data=Mixture(
            sources=(Source(name="shapes", dataset="synthetic:shapes"),),
            template=template,
            max_tokens=model.context,
            lanes=1,
        ),
        budget=Budget(steps=1, batch=1),
        optim=AdamW(peak_lr=1e-5),
        scoring=Scoring(prior="answer" not in model.tasks),  # answers by their log-likelihood (blip_vqa.py)
    )


def outputs(ours: Any, theirs: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Both sides' features, and logits with greedy ids or cosines with log-odds, for two random images and texts."""
    text, look, generator = ours.config.text, ours.config.pixels, torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, look.size, look.size), dtype=torch.uint8, generator=generator)
    ids = torch.randint(0, text.vocab, (2, min(8, text.context)), generator=generator)
    real, pixels = torch.ones_like(ids, dtype=torch.bool), normalise(images, look)
    written, read = (torch.cat([torch.full_like(ids[:, :1], token), ids[:, 1:]], 1) for token in (text.dec, text.enc))
    features, seen = ours.vision(images), theirs.vision_model(pixels).last_hidden_state
    found = {"features": (features, seen)}
    if "caption" in ours.config.tasks:
        expected = theirs(input_ids=written, pixel_values=pixels).logits
        # of a prompt transformers drops the last id, where its processor puts [SEP]
        return found | {
            "logits": (ours(ids, real, pixels=images).logits_BTV, expected),
            "greedy": _greedy(ours, theirs, images, ids[:, :3], read[:, :4]),
        }
    if "answer" in ours.config.tasks:  # transformers' own forward gives no logits
        labels = torch.cat([torch.full_like(ids[:, :1], IGNORE), ids[:, 1:]], 1)  # [CLS] alone is the question
        asked = theirs.text_encoder(input_ids=read[:, :1], encoder_hidden_states=seen).last_hidden_state
        expected = theirs.text_decoder(input_ids=written, encoder_hidden_states=asked).logits
        return found | {
            "logits": (ours(ids, real, labels, images).logits_BTV[:, :-1], expected[:, :-1]),
            "greedy": _greedy(ours, theirs, images, ids, read),
        }
    image, words = ours.embed_images(features), ours.embed_texts(ids, real)
    odds = theirs(input_ids=read, pixel_values=pixels).itm_score.diff(dim=1)[:, 0]
    return found | {
        "cosines": (image @ words.T, theirs(input_ids=ids, pixel_values=pixels, use_itm_head=False).itm_score),
        "match": (ours.match(ids, real, features), odds),
    }


def _greedy(ours: Any, theirs: Any, images: Tensor, prompts: Tensor, their_prompts: Tensor) -> tuple[Tensor, Tensor]:
    text, look, special = ours.config.text, ours.config.pixels, theirs.config.text_config
    ends = {"eos_token_id": special.sep_token_id, "pad_token_id": special.pad_token_id}  # theirs takes its config's
    real = torch.ones_like(prompts, dtype=torch.bool)
    return greedy(
        ours,
        theirs,
        {"ids": prompts, "attention": real, "pixels": images, **ends},
        {
            "input_ids": their_prompts,
            "attention_mask": torch.ones_like(their_prompts),
            "pixel_values": normalise(images, look),
            "suppress_tokens": [text.dec, text.enc],  # here they are never written
        },
    )


def _architecture(config: Any) -> str:
    known = [name for name in config.architectures or () if name in TASKS]
    if not known:
        raise WeightsError(f"of BLIP, {', '.join(TASKS)} are read, not {config.architectures}")
    return str(known[0])


def _theirs(name: str) -> str:
    (part,) = (part for part in PARTS if name.startswith(part))
    return PARTS[part] + name.removeprefix(part)
