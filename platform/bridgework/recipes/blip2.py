"""BLIP-2 (Li et al. 2023, arXiv:2301.12597): a 32-query Q-Former between a frozen ViT and a frozen language model.

represent   the Q-Former learns to read the ViT: contrast, matching, captions              (3.2)
generate    its queries, projected, become a soft prompt that the language model continues (3.3)

bridgework train blip2             ViT-g, OPT-2.7B: 16 x A100-40G; with Flan-T5-XXL under 6 + 3 days (3.4)
bridgework train blip2 --tiny      a laptop: seconds
blip2:caption (4.2), blip2:vqa (4.3) and blip2:retrieval (4.4) add a fine-tune of Q-Former and ViT (tables 7 to 9).
A web image has two captions: of ten that BLIP-large wrote and its own, those that CLIP likes most (3.4).
Departs from LAVIS: gathered keys carry their gradient; BOS is before the image; a Flan-T5 prompt ends without </s>;
fine-tuned answers and captions end with </s>, not with a newline; a center crop, no flip.
"""

from dataclasses import replace

from bridgework.evaluation import Captions, Writing
from bridgework.losses import LanguageModeling, Matching, QueryContrast
from bridgework.models import (
    LanguageConfig,
    PrefixVLMConfig,
    QFormerConfig,
    QFormerPretrainerConfig,
)
from bridgework.recipes._backbones import FLAN_XL, OPT_2_7B, OPT_6_7B, VICUNA_7B, VIT_G
from bridgework.recipes._blip2_judges import FOUND, answered
from bridgework.recipes._blip2_vqa import asking, layerwise
from bridgework.system import AdamW, Budget, Mixture, Source, Stage, System, ZeRO

BRIDGE = QFormerConfig(bert="google-bert/bert-base-uncased")
IMAGES = {
    "coco": 113_000,
    "vg": 100_000,
    "cc3m": 2_950_000,
    "cc12m": 10_060_000,
    "sbu": 860_000,
    "laion": 115_000_000,
}
PAIRS = tuple(
    Source(name=name, dataset=f"blip2-{name}", rows=rows) for name, rows in IMAGES.items()
)  # 129M (3.4)
QUERIES = (  # of the Q-Former, without its text (3.3)
    "bridge.queries", "bridge.ln_vision.*", "bridge.qformer.layernorm.*", "bridge.qformer.encoder.layer.*attention.*",
    "bridge.qformer.encoder.layer.*_query.*",
)  # fmt: skip
ADAM = AdamW(peak_lr=1e-4, weight_decay=0.05, betas=(0.9, 0.98))  # 3.4
OBJECTIVES = (
    QueryContrast(),
    Matching(negatives="all", floor=0.0),
    LanguageModeling(label_smoothing=0.1),
)
PHOTO = "a photo of"  # table 7
COCO = Source(name="coco", dataset="coco-karpathy", rows=566_747)  # pairs: five captions an image
LARGE = replace(VIT_G, image_size=364)  # tables 7 and 9
WRITTEN = tuple(
    Captions(
        name=name,
        dataset=dataset,
        rows=rows,
        prompts=(PHOTO,),
        writing=Writing(beams=5, least=8, most=30),
    )
    for name, dataset, rows in (
        ("coco", "coco-karpathy-test", 5_000),
        ("nocaps", "nocaps-val", 4_500),
    )
)


def system() -> System:
    return _blip2(OPT_2_7B)


def opt_6_7b() -> System:
    return _blip2(OPT_6_7B)


def vicuna_7b() -> System:
    """What InstructBLIP's Vicuna starts from (2305.06500, 2.6)."""
    return _blip2(VICUNA_7B, batch=1_520)


def flan_t5() -> System:
    """Flan-T5-XL: the first words of a caption, of any number, are encoded and the others decoded (3.3)."""
    return _blip2(FLAN_XL, prefix=True, batch=1_520)


def vqa() -> System:
    """OPT-2.7B at 490 px, for five epochs of questions (4.3, table 8)."""
    return replace(system(), stages=(*system().stages, asking(BRIDGE)))


def caption() -> System:
    """OPT-2.7B writes COCO's captions, at 364 px for five epochs (4.2, table 7)."""
    steps = 5 * 566_747 // 256
    tune = Stage(
        name="caption", model=PrefixVLMConfig(vision=LARGE, bridge=BRIDGE, language=OPT_2_7B),
        trains={"bridge.*": 1.0, **layerwise(LARGE.depth, 1.0)},  # of OPT-2.7B no block learns slower (table 7)
        losses=(LanguageModeling(),), starts_from="generate", evals=WRITTEN,
        data=Mixture(sources=(replace(COCO, prompts=(PHOTO,)),), template="prompted", max_tokens=96, lanes=16),
        budget=Budget(steps=steps, batch=256, micro=4),
        optim=AdamW(peak_lr=1e-5, warmup=1_000 / steps, weight_decay=0.05),
    )  # fmt: skip
    return replace(system(), stages=(*system().stages, tune))


def retrieval() -> System:
    """The first stage's objectives on COCO, at 364 px for five epochs (4.4, table 9); its captions share images."""
    steps = 5 * 566_747 // 224
    tune = Stage(
        name="retrieval", model=QFormerPretrainerConfig(vision=LARGE, bridge=replace(BRIDGE, text=True)),
        trains={"bridge.*": 1.0, "heads.*": 1.0, **layerwise(LARGE.depth, 0.95)}, zero=ZeRO(stage=1),
        losses=OBJECTIVES, starts_from="represent", evals=FOUND,
        data=Mixture(sources=(COCO,), template="caption", max_tokens=32, lanes=16, by_image=True),
        budget=Budget(steps=steps, batch=224, micro=14),
        optim=AdamW(peak_lr=1e-5, warmup=1_000 / steps, weight_decay=0.05),
    )  # fmt: skip
    return replace(system(), stages=(system()["represent"], tune))


def _blip2(language: LanguageConfig, *, prefix: bool = False, batch: int = 1_920) -> System:
    represent = Stage(
        name="represent", model=QFormerPretrainerConfig(vision=VIT_G, bridge=replace(BRIDGE, text=True)),
        trains={"bridge.*": 1.0, "heads.*": 1.0}, zero=ZeRO(stage=1), evals=FOUND,
        losses=OBJECTIVES,
        data=Mixture(sources=PAIRS, template="caption", max_tokens=32, lanes=16),
        budget=Budget(steps=250_000, batch=1_680, micro=105), optim=replace(ADAM, warmup=2_000 / 250_000),
    )  # fmt: skip
    pairs = tuple(replace(source, prefix=prefix) for source in PAIRS)
    generate = Stage(
        name="generate", model=PrefixVLMConfig(vision=VIT_G, bridge=BRIDGE, language=language),
        trains={"bridge.*": 1.0},
        losses=(LanguageModeling(),), starts_from="represent", init_params=QUERIES, evals=answered(short=prefix),
        data=Mixture(sources=pairs, template="answer" if prefix else "plain", max_tokens=66, lanes=16),
        budget=Budget(steps=80_000, batch=batch, micro=batch // 16),
        optim=replace(ADAM, final_lr=5e-5, warmup=2_000 / 80_000),
    )  # fmt: skip
    return System(name="blip2", paper="arXiv:2301.12597", stages=(represent, generate))
