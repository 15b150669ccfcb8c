"""BLIP (Li et al. 2022, arXiv:2201.12086): one model, pretrained on web captions it cleans.

pretrain    contrast, matching and captioning on noisy web pairs and human captions           (3.2)
captioner   pretrain, fine-tuned on COCO: writes a caption per web image, top_p 0.9      (3.3, 4.3)
filter      pretrain, fine-tuned on COCO: drops web and written captions that do not match    (3.3)
bootstrap   a new model, again from ImageNet and BERT, on cleaned pairs   (3.3, 4.4, section 6)

bridgework train blip           ViT-B, 14M images: 32 GPUs (4.1), 3-4 days (salesforce/BLIP#2)
bridgework train blip --tiny    a laptop: seconds

blip:vit_l: ViT-L, 129M images. blip:caption, blip:retrieval and blip:vqa add a fine-tune (5).

Departs from the release:
- the contrastive loss uses the keys of the global batch;
- in pretraining, the model's own embeddings draw hard negatives, not its momentum encoder's;
- a fine-tune initializes its momentum encoder and queue again;
- a center crop; no flip, no RandAugment, no drop-path;
- captions keep their punctuation;
- the learning rate decays every step.
"""

from dataclasses import replace

from bridgework.curation import CapFilt
from bridgework.evaluation import VQA, Captions, Retrieval
from bridgework.losses import Answering, LanguageModeling, Matching, MomentumContrastive
from bridgework.models import BlipViTConfig, MEDConfig, MEDTextConfig, MomentumConfig
from bridgework.system import AdamW, Budget, Mixture, Scoring, Source, Stage, System, ZeRO

BERT = MEDTextConfig(weights="google-bert/bert-base-uncased")
VIT_B = BlipViTConfig(weights="facebook/deit-base-patch16-224")
VIT_L = BlipViTConfig(
    width=1024, depth=24, heads=16, ffn=4096, weights="google/vit-large-patch16-224-in21k"
)
COCO = Source(name="coco", dataset="coco-karpathy", rows=566_747)  # pairs: five captions per image
HUMAN = (COCO, Source(name="vg", dataset="vg", rows=769_000))
WEB = {"cc3m": 3_000_000, "cc12m": 10_000_000, "sbu": 860_000}
NOISY = (  # 14M images (4.1)
    *HUMAN,
    *(Source(name=name, dataset=name, rows=rows) for name, rows in WEB.items()),
)
# Each of the 20 epochs reads a fifth of LAION (4.1).
LAION = Source(name="laion", dataset="laion-115m", rows=115_000_000, max_epochs=4.0)
CLEAN = (*HUMAN, Source(name="capfilt", dataset="capfilt"))
QUESTIONS = (
    Source(name="vqav2", dataset="vqav2", rows=658_111),
    Source(name="vg-qa", dataset="vg-qa", rows=1_445_322),
)
CAPTIONING = LanguageModeling(label_smoothing=0.1)  # models/med.py of the release
FINE_TUNE = AdamW(peak_lr=1e-5, warmup=0.0, weight_decay=0.05, clip=0.0)
RETRIEVAL_EVALS = (
    Retrieval(name="coco", dataset="coco-karpathy-test", rows=5_000, rerank=256),
    Retrieval(name="flickr30k", dataset="flickr30k-test", rows=1_000, rerank=128),
)
CAPTION_EVALS = (
    Captions(name="coco", dataset="coco-karpathy-test", rows=5_000),
    Captions(name="nocaps", dataset="nocaps-val", rows=4_500),
)


def system() -> System:
    """ViT-B/16, 14M images."""
    return _blip(VIT_B, NOISY, steps=105_528, batch=2_880, peak_lr=3e-4)


def vit_l() -> System:
    """ViT-L/16, 129M images."""
    return _blip(VIT_L, (*NOISY, LAION), steps=318_300, batch=2_400, peak_lr=2e-4)


def caption() -> System:
    """Captioning on COCO (5), as the captioner but from bootstrap."""
    return _fine_tuned(replace(_captioner(VIT_B), name="caption"))


def retrieval() -> System:
    """Retrieval on COCO; the zero-shot results on Flickr30k are of this model too (5.1)."""
    return _fine_tuned(replace(_filter(VIT_B), name="retrieval"))


def vqa() -> System:
    """Visual question answering on VQAv2 and all questions of Visual Genome.

    All ten answers of a VQAv2 question count, each by its frequency. Visual Genome's one answer has
    weight 0.2 (vqa_dataset.py).
    """
    tune = Stage(
        name="vqa",
        model=MEDConfig(vision=replace(VIT_B, image_size=480), text=BERT, tasks=("answer",)),
        trains={"*": 1.0},
        losses=(Answering(label_smoothing=0.1, alone=0.2),),
        data=Mixture(sources=QUESTIONS, template="answer", max_tokens=45),
        budget=Budget(steps=82_165, batch=256, micro=16),
        optim=replace(FINE_TUNE, peak_lr=2e-5),
        zero=ZeRO(stage=1),
        # These answers are also training data: those of VQAv2's test set are not public.
        evals=(VQA(name="seen", dataset="vqav2-val", rows=5_000),),
        scoring=Scoring(prior=False),
    )
    return _fine_tuned(tune)


def _blip(
    vit: BlipViTConfig, noisy: tuple[Source, ...], *, steps: int, batch: int, peak_lr: float
) -> System:
    pretrain = Stage(
        name="pretrain",
        model=MEDConfig(
            vision=vit,
            text=BERT,
            momentum=MomentumConfig(ramp=steps // 10),  # 2 of 20 epochs
        ),
        trains={"*": 1.0},
        losses=(
            MomentumContrastive(),
            Matching(negatives="lane"),  # among the samples of a lane: 90, as on one GPU
            CAPTIONING,
        ),
        data=Mixture(sources=noisy, template="caption", max_tokens=30, lanes=32),
        budget=Budget(steps=steps, batch=batch, micro=batch // 32),
        optim=AdamW(
            peak_lr=peak_lr,
            final_lr=peak_lr * 0.85**20,
            decay="exponential",
            warmup=3_000 / steps,
            weight_decay=0.05,
            clip=0.0,
        ),
        zero=ZeRO(stage=1),
        evals=RETRIEVAL_EVALS,
    )
    web = tuple(source.dataset for source in noisy if source not in HUMAN)
    bootstrap = replace(
        pretrain,
        name="bootstrap",
        data=replace(pretrain.data, sources=CLEAN),
        curation=CapFilt(captioner="captioner", filter="filter", sources=web),
    )
    stages = (pretrain, _captioner(vit), _filter(vit), bootstrap)
    return System(name="blip", paper="arXiv:2201.12086", stages=stages)


def _captioner(vit: BlipViTConfig) -> Stage:
    coco = replace(COCO, prompts=("a picture of",))
    return Stage(
        name="captioner",
        model=MEDConfig(vision=replace(vit, image_size=384), text=BERT, tasks=("caption",)),
        trains={"*": 1.0},
        losses=(CAPTIONING,),
        data=Mixture(sources=(coco,), template="prompted", max_tokens=40, lanes=8),
        budget=Budget(steps=11_069, batch=256, micro=32),
        optim=replace(FINE_TUNE, peak_lr=1e-5 if vit.depth == 12 else 2e-6),
        starts_from="pretrain",
        zero=ZeRO(stage=1),
        evals=CAPTION_EVALS,
    )


def _filter(vit: BlipViTConfig) -> Stage:
    return Stage(
        name="filter",
        model=MEDConfig(
            vision=replace(vit, image_size=384),
            text=BERT,
            tasks=("contrast", "match"),
            momentum=MomentumConfig(ramp=2_214),  # 1 of 6 epochs
        ),
        trains={"*": 1.0},
        losses=(MomentumContrastive(), Matching(negatives="all", floor=0.0)),  # blip_retrieval.py
        data=Mixture(sources=(COCO,), template="caption", max_tokens=35, lanes=8, by_image=True),
        budget=Budget(steps=13_283, batch=256, micro=32),
        optim=replace(FINE_TUNE, peak_lr=1e-5 if vit.depth == 12 else 5e-6),
        starts_from="pretrain",
        zero=ZeRO(stage=1),
        evals=RETRIEVAL_EVALS,
    )


def _fine_tuned(tune: Stage) -> System:
    blip = system()
    return replace(blip, stages=(*blip.stages, replace(tune, starts_from="bootstrap")))
