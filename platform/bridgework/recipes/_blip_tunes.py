"""BLIP's fine-tunes: the captioner and the filter of CapFilt, and questions (arXiv:2201.12086, 3.3, 5); its towers."""

from dataclasses import replace
from typing import Any

from bridgework.evaluation import VQA, Captions, Retrieval
from bridgework.losses import Answering, LanguageModeling, Matching, MomentumContrastive
from bridgework.models import BlipViTConfig, MEDConfig, MEDTextConfig, MomentumConfig
from bridgework.system import AdamW, Budget, Mixture, Scoring, Source, Stage, ZeRO

BERT = MEDTextConfig(weights="google-bert/bert-base-uncased")
VIT_B = BlipViTConfig(weights="facebook/deit-base-patch16-224")
VIT_L = BlipViTConfig(
    width=1024, depth=24, heads=16, ffn=4096, weights="google/vit-large-patch16-224-in21k"
)
COCO = Source(
    name="coco", dataset="coco-karpathy", rows=566_747
)  # pairs, here and below: five captions an image
QUESTIONS = (
    Source(name="vqav2", dataset="vqav2", rows=658_111),
    Source(name="vg-qa", dataset="vg-qa", rows=1_445_322),
)
WRITING = LanguageModeling(label_smoothing=0.1)  # models/med.py of the release
FOUND = (Retrieval(name="coco", dataset="coco-karpathy-test", rows=5_000, rerank=256),
         Retrieval(name="flickr30k", dataset="flickr30k-test", rows=1_000, rerank=128))  # fmt: skip
WRITTEN = (Captions(name="coco", dataset="coco-karpathy-test", rows=5_000),
           Captions(name="nocaps", dataset="nocaps-val", rows=4_500))  # fmt: skip
ANSWERED = (
    VQA(name="seen", dataset="vqav2-val", rows=5_000),
)  # learned from; of test there are no answers to be had


def captioning(vit: BlipViTConfig) -> Stage:
    model = MEDConfig(vision=replace(vit, image_size=384), text=BERT, tasks=("caption",))
    source = replace(COCO, prompts=("a picture of",))
    data = Mixture(sources=(source,), template="prompted", max_tokens=40, lanes=8)
    rate = 1e-5 if vit.depth == 12 else 2e-6
    return _tune(
        model,
        name="captioner",
        losses=(WRITING,),
        data=data,
        steps=11_069,
        micro=32,
        peak_lr=rate,
        evals=WRITTEN,
    )


def finding(vit: BlipViTConfig) -> Stage:
    vision, momentum = replace(vit, image_size=384), MomentumConfig(ramp=2_214)  # 1 of 6 epochs
    model = MEDConfig(vision=vision, text=BERT, tasks=("contrast", "match"), momentum=momentum)
    data = Mixture(
        sources=(COCO,), template="caption", max_tokens=35, lanes=8, by_image=True
    )  # five captions each
    losses = (MomentumContrastive(), Matching(negatives="all", floor=0.0))  # blip_retrieval.py
    rate = 1e-5 if vit.depth == 12 else 5e-6
    return _tune(
        model,
        name="filter",
        losses=losses,
        data=data,
        steps=13_283,
        micro=32,
        peak_lr=rate,
        evals=FOUND,
    )


def answering(vit: BlipViTConfig) -> Stage:
    """All ten answers count, each by its frequency; of Visual Genome the one, as 0.2 (vqa_dataset.py)."""
    model = MEDConfig(vision=replace(vit, image_size=480), text=BERT, tasks=("answer",))
    asked = Mixture(sources=QUESTIONS, template="answer", max_tokens=45)
    losses = (Answering(label_smoothing=0.1, alone=0.2),)
    return _tune(model, losses=losses, data=asked, steps=82_165, micro=16, peak_lr=2e-5, evals=ANSWERED,
                 scoring=Scoring(prior=False))  # fmt: skip


def _tune(
    model: MEDConfig, *, steps: int, micro: int, peak_lr: float, name: str = "tune", **fields: Any
) -> Stage:
    return Stage(
        name=name, model=model, trains={"*": 1.0}, starts_from="pretrain", zero=ZeRO(stage=1),
        budget=Budget(steps=steps, batch=256, micro=micro),
        optim=AdamW(peak_lr=peak_lr, warmup=0.0, weight_decay=0.05, clip=0.0), **fields,
    )  # fmt: skip
