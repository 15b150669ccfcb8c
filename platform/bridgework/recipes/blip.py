"""BLIP (Li et al. 2022, arXiv:2201.12086): one model that finds, judges and captions, taught on captions it cleaned.

pretrain    contrast, matching and captions on noisy web pairs and human ones             (3.2)
captioner   from pretrain, on COCO: writes one caption for every web image, top_p 0.9     (3.3, 4.3)
filter      from pretrain, on COCO: drops web and written captions that do not match      (3.3)
bootstrap   a new model, from ImageNet and BERT again, learns from what both made of the web (3.3, 4.4, section 6)

bridgework train blip             ViT-B, 14M images: 32 GPUs (4.1), 3-4 days (the authors, salesforce/BLIP#2)
bridgework train blip --tiny      a laptop: seconds; blip:caption, blip:retrieval and blip:vqa add a fine-tune
Departs from the release: contrast sees the keys of the whole batch; hard negatives of pretraining are drawn by the
model's own vectors, not by its twin's; a fine-tune's twin and queue start again; a center crop, no flip, no
RandAugment, no drop-path; captions keep their punctuation; the rate decays by the step.
"""

from dataclasses import replace

from bridgework.curation import CapFilt
from bridgework.losses import Matching, MomentumContrastive
from bridgework.models import BlipViTConfig, MEDConfig, MomentumConfig
from bridgework.recipes import _blip_tunes as tunes
from bridgework.system import AdamW, Budget, Mixture, Source, Stage, System, ZeRO

HUMAN = (tunes.COCO, Source(name="vg", dataset="vg", rows=769_000))
WEB = {"cc3m": 3_000_000, "cc12m": 10_000_000, "sbu": 860_000}
NOISY = (
    *HUMAN,
    *(Source(name=name, dataset=name, rows=rows) for name, rows in WEB.items()),
)  # 14M images (4.1)
LAION = Source(
    name="laion", dataset="laion-115m", rows=115_000_000, max_epochs=4.0
)  # a fifth of it an epoch (4.1)
CLEAN = (*HUMAN, Source(name="capfilt", dataset="capfilt"))


def system() -> System:
    """ViT-B/16, 14M images."""
    return _blip(tunes.VIT_B, NOISY, steps=105_528, batch=2_880, peak_lr=3e-4)


def vit_l() -> System:
    """ViT-L/16, 129M images."""
    return _blip(tunes.VIT_L, (*NOISY, LAION), steps=318_300, batch=2_400, peak_lr=2e-4)


def caption() -> System:
    return _with("caption", tunes.captioning(tunes.VIT_B))


def retrieval() -> System:
    """On COCO; what Flickr30k's zero-shot numbers are taken with, too (5.1)."""
    return _with("retrieval", tunes.finding(tunes.VIT_B))


def vqa() -> System:
    """Beside the questions of VQAv2 those of Visual Genome, all of them."""
    return _with("vqa", tunes.answering(tunes.VIT_B))


def _blip(
    vit: BlipViTConfig, noisy: tuple[Source, ...], *, steps: int, batch: int, peak_lr: float
) -> System:
    pretrain = Stage(
        name="pretrain", trains={"*": 1.0}, zero=ZeRO(stage=1), evals=tunes.FOUND,
        model=MEDConfig(vision=vit, text=tunes.BERT, momentum=MomentumConfig(ramp=steps // 10)),  # 2 of 20 epochs
        losses=(MomentumContrastive(), Matching(negatives="lane"), tunes.WRITING),  # 90 samples, as of one GPU
        data=Mixture(sources=noisy, template="caption", max_tokens=30, lanes=32),
        budget=Budget(steps=steps, batch=batch, micro=batch // 32),
        optim=AdamW(peak_lr=peak_lr, final_lr=peak_lr * 0.85**20, decay="exponential", warmup=3_000 / steps,
                    weight_decay=0.05, clip=0.0),
    )  # fmt: skip
    clean = CapFilt(
        captioner="captioner",
        filter="filter",
        sources=tuple(s.dataset for s in noisy if s not in HUMAN),
    )
    bootstrap = replace(
        pretrain, name="bootstrap", data=replace(pretrain.data, sources=CLEAN), curation=clean
    )
    tuned = tunes.captioning(vit), tunes.finding(vit)
    return System(name="blip", paper="arXiv:2201.12086", stages=(pretrain, *tuned, bootstrap))


def _with(name: str, tuned: Stage) -> System:
    blip = system()
    return replace(blip, stages=(*blip.stages, replace(tuned, name=name, starts_from="bootstrap")))
