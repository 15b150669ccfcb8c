"""BLIP-2 (Li et al. 2023, arXiv:2301.12597): a 32-query Q-Former from a frozen ViT to a frozen LM.

represent   the Q-Former learns to read the ViT: contrast, matching, captioning               (3.2)
generate    its queries, projected, become a soft prompt that the LM continues                (3.3)

bridgework train blip2           ViT-g, OPT-2.7B: 16 x A100-40G; Flan-T5-XXL under 6 + 3 days (3.4)
bridgework train blip2 --tiny    a laptop: seconds

blip2:opt_6_7b, blip2:vicuna_7b and blip2:flan_t5 change the LM.
blip2:caption (4.2), blip2:vqa (4.3) and blip2:retrieval (4.4) add a fine-tune of Q-Former and ViT
(tables 7 to 9).

A web image has two captions: the two that CLIP ranks highest of its own and BLIP-large's ten (3.4).

Departs from LAVIS:
- gathered keys carry their gradient;
- BOS precedes the image;
- a Flan-T5 prompt ends without </s>;
- fine-tuned answers and captions end with </s>, not with a newline;
- a center crop, no flip.
"""

from dataclasses import replace

from bridgework.evaluation import VQA, Captions, HeldOutLoss, Retrieval, Writing
from bridgework.losses import LanguageModeling, Matching, QueryContrast
from bridgework.models import (
    LanguageConfig,
    PrefixVLMConfig,
    QFormerConfig,
    QFormerPretrainerConfig,
)
from bridgework.recipes._backbones import FLAN_XL, OPT_2_7B, OPT_6_7B, VICUNA_7B, VIT_G
from bridgework.system import AdamW, Budget, Mixture, Source, Stage, System, ZeRO

BRIDGE = QFormerConfig(bert="google-bert/bert-base-uncased")
BRIDGE_TEXT = replace(BRIDGE, text=True)  # reads text too
OBJECTIVES = (
    QueryContrast(),
    Matching(negatives="all", floor=0.0),
    LanguageModeling(label_smoothing=0.1),
)
IMAGES = {  # 129M (3.4)
    "coco": 113_000, "vg": 100_000, "cc3m": 2_950_000, "cc12m": 10_060_000, "sbu": 860_000,
    "laion": 115_000_000,
}  # fmt: skip
PAIRS = tuple(
    Source(name=name, dataset=f"blip2-{name}", rows=rows) for name, rows in IMAGES.items()
)
COCO = Source(name="coco", dataset="coco-karpathy", rows=566_747)  # pairs: five captions per image
QUESTIONS = tuple(
    Source(name=name, dataset=name, rows=rows, prompts=("Question: {} Answer:",))
    for name, rows in (("vqav2", 658_111), ("vg-qa", 1_445_322))
)
QUERIES = (  # the Q-Former's tensors without its text layers (3.3)
    "bridge.queries",
    "bridge.ln_vision.*",
    "bridge.qformer.layernorm.*",
    "bridge.qformer.encoder.layer.*attention.*",
    "bridge.qformer.encoder.layer.*_query.*",
)
PHOTO = "a photo of"  # table 7
ADAM = AdamW(peak_lr=1e-4, weight_decay=0.05, betas=(0.9, 0.98))  # 3.4
RETRIEVAL_EVALS = (
    Retrieval(name="coco", dataset="coco-karpathy-test", rows=5_000, rerank=128),
    Retrieval(name="flickr30k", dataset="flickr30k-test", rows=1_000, rerank=128),
)
CAPTION_EVALS = tuple(
    Captions(name=name, dataset=dataset, rows=rows, prompts=(PHOTO,),
             writing=Writing(beams=5, least=8, most=30))
    for name, dataset, rows in (("coco", "coco-karpathy-test", 5_000),
                                ("nocaps", "nocaps-val", 4_500))
)  # fmt: skip


def system() -> System:
    """OPT-2.7B."""
    return _blip2(OPT_2_7B)


def opt_6_7b() -> System:
    """OPT-6.7B."""
    return _blip2(OPT_6_7B)


def vicuna_7b() -> System:
    """Vicuna-7B 1.1: InstructBLIP's Vicuna starts from it (2305.06500, 2.6)."""
    return _blip2(VICUNA_7B, batch=1_520)


def flan_t5() -> System:
    """Flan-T5-XL: encodes a random number of a caption's first words and decodes the rest (3.3)."""
    return _blip2(FLAN_XL, prefix=True, batch=1_520)


def caption() -> System:
    """Captioning on COCO: OPT-2.7B, 364 px, five epochs (4.2, table 7)."""
    steps = 5 * 566_747 // 256
    coco = replace(COCO, prompts=(PHOTO,))
    vision = replace(VIT_G, image_size=364)
    tune = Stage(
        name="caption",
        model=PrefixVLMConfig(vision=vision, bridge=BRIDGE, language=OPT_2_7B),
        # With OPT-2.7B no block has a lower rate (table 7).
        trains={"bridge.*": 1.0, **layerwise_rates(vision.depth, 1.0)},
        losses=(LanguageModeling(),),
        data=Mixture(sources=(coco,), template="prompted", max_tokens=96, lanes=16),
        budget=Budget(steps=steps, batch=256, micro=4),
        optim=AdamW(peak_lr=1e-5, warmup=1_000 / steps, weight_decay=0.05),
        starts_from="generate",
        evals=CAPTION_EVALS,
    )
    return replace(system(), stages=(*system().stages, tune))


def vqa() -> System:
    """Visual question answering: OPT-2.7B, 490 px, five epochs (4.3, table 8).

    ViT and Q-Former train, and the Q-Former reads the question.
    """
    vision = replace(VIT_G, image_size=490)
    tune = Stage(
        name="vqa",
        model=PrefixVLMConfig(vision=vision, bridge=BRIDGE_TEXT, language=OPT_2_7B),
        trains={"bridge.*": 1.0, **layerwise_rates(vision.depth, 0.95)},
        losses=(LanguageModeling(),),
        data=Mixture(sources=QUESTIONS, template="answer", max_tokens=96, lanes=16),
        budget=Budget(steps=82_165, batch=128, micro=4),
        optim=AdamW(peak_lr=1e-5, warmup=1_000 / 82_165, weight_decay=0.05),
        starts_from="generate",
    )
    return replace(system(), stages=(*system().stages, tune))


def retrieval() -> System:
    """Retrieval on COCO: the objectives of `represent`, 364 px, five epochs (4.4, table 9).

    All five captions of an image are positives.
    """
    steps = 5 * 566_747 // 224
    vision = replace(VIT_G, image_size=364)
    tune = Stage(
        name="retrieval",
        model=QFormerPretrainerConfig(vision=vision, bridge=BRIDGE_TEXT),
        trains={"bridge.*": 1.0, "heads.*": 1.0, **layerwise_rates(vision.depth, 0.95)},
        losses=OBJECTIVES,
        data=Mixture(sources=(COCO,), template="caption", max_tokens=32, lanes=16, by_image=True),
        budget=Budget(steps=steps, batch=224, micro=14),
        optim=AdamW(peak_lr=1e-5, warmup=1_000 / steps, weight_decay=0.05),
        starts_from="represent",
        zero=ZeRO(stage=1),
        evals=RETRIEVAL_EVALS,
    )
    return replace(system(), stages=(system()["represent"], tune))


def layerwise_rates(depth: int, decay: float) -> dict[str, float]:
    """Return globs of the ViT and their multipliers: each block has `decay` times the next block's.

    The embeddings have the lowest.
    """
    blocks = {f"vision.tower.encoder.layers.{i}.*": decay ** (depth - i) for i in range(depth)}
    return {"vision.tower.embeddings.*": decay ** (depth + 1), **blocks}


def _blip2(language: LanguageConfig, *, prefix: bool = False, batch: int = 1_920) -> System:
    represent = Stage(
        name="represent",
        model=QFormerPretrainerConfig(vision=VIT_G, bridge=BRIDGE_TEXT),
        trains={"bridge.*": 1.0, "heads.*": 1.0},
        losses=OBJECTIVES,
        data=Mixture(sources=PAIRS, template="caption", max_tokens=32, lanes=16),
        budget=Budget(steps=250_000, batch=1_680, micro=105),
        optim=replace(ADAM, warmup=2_000 / 250_000),
        zero=ZeRO(stage=1),
        evals=RETRIEVAL_EVALS,
    )
    pairs = tuple(replace(source, prefix=prefix) for source in PAIRS)
    template = "answer" if prefix else "plain"
    question = "Question: {} Short answer:" if prefix else "Question: {} Answer:"  # 4.1
    short = Writing(beams=5, most=10, length_penalty=-1.0)  # 4.1
    generate = Stage(
        name="generate",
        model=PrefixVLMConfig(vision=VIT_G, bridge=BRIDGE, language=language),
        trains={"bridge.*": 1.0},
        losses=(LanguageModeling(),),
        data=Mixture(sources=pairs, template=template, max_tokens=66, lanes=16),
        budget=Budget(steps=80_000, batch=batch, micro=batch // 16),
        optim=replace(ADAM, final_lr=5e-5, warmup=2_000 / 80_000),
        starts_from="represent",
        init_params=QUERIES,
        evals=(
            HeldOutLoss(name="nocaps", dataset="nocaps-val", rows=1_000),
            VQA(name="vqav2", dataset="vqav2-val", rows=5_000, prompts=(question,), writing=short),
        ),
    )
    return System(name="blip2", paper="arXiv:2301.12597", stages=(represent, generate))
