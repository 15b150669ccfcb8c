"""xGen-MM, BLIP-3 (Xue et al. 2024, arXiv:2408.08872): a resampler from frozen SigLIP to Phi-3.

pretrain     resampler and LM: interleaved documents and captions      (100B tokens, the model card)
instruct     any-resolution tiles: one epoch of single-image conversations                     (1M)
multi_image  conversations about several images, mixed with some about one
prefer       adapters learn by DPO which of two answers is better          (VLFeedback: 62.6K pairs)
safety       the adapters learn what to refuse                          (VLGuard: 2K; 5K of others)

bridgework train xgen_mm           4B; the authors give no cost
bridgework train xgen_mm --tiny    a laptop: a minute

Shares, batch sizes and LoRA's rank are ours, because only fine-tuning code was released.

Departs from the release:
- a newline, not <|endofchunk|>, ends a pretraining text;
- SigLIP's last norm is not run, because the resampler starts with one;
- tiles are resampled as tiles (the code cuts wide grids into strips);
- DPO has no answers generated from noised images.
"""

from dataclasses import replace

from bridgework.losses import DPO, LanguageModeling
from bridgework.models import LanguageConfig, LoRAConfig, PrefixVLMConfig, ResamplerConfig
from bridgework.recipes._backbones import SIGLIP
from bridgework.system import AdamW, Budget, Mixture, Source, Stage, System, ZeRO

PHI_3 = LanguageConfig(
    arch="phi3", width=3072, depth=32, heads=32, kv_heads=32, ffn=8192, vocab=32_064, context=4096,
    tokenizer="microsoft/Phi-3-mini-4k-instruct", weights="microsoft/Phi-3-mini-4k-instruct",
)  # fmt: skip
BASE = PrefixVLMConfig(
    vision=SIGLIP,
    bridge=ResamplerConfig(latents=128, depth=6, heads=16, head_width=96, activation="gelu"),
    language=PHI_3,
)
# Columns and rows of 384 px, as released.
TILED = replace(BASE, grids=((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))
# Adapters: 2.6 % of the LM.
ADAPTED = replace(TILED, language=replace(PHI_3, lora=LoRAConfig(rank=64, alpha=128)))
WEB = {  # rows and share of each source; MINT's three parts are 7:5:1
    "mint_html": (1_054_000_000, 0.7), "mint_pdf": (24_000_000, 0.5), "mint_arxiv": (870_000, 0.1),
    "obelics": (141_000_000, 1.3), "kale": (218_000_000, 1.0), "ocr": (200_000_000, 0.5),
    "grounding": (50_000_000, 0.5), "datacomp": (1_400_000_000, 0.5), "cc12m": (12_400_000, 0.1),
    "cc3m": (3_300_000, 0.1), "vg": (108_000, 0.02), "sbu": (1_000_000, 0.08),
}  # fmt: skip
PAGES = tuple(
    Source(name=name, dataset=name, rows=rows, factor=share) for name, (rows, share) in WEB.items()
)
SINGLE = Source(name="single", dataset="xgen-sft", rows=1_000_000)
MULTIPLE = (
    Source(name="mantis", dataset="mantis-instruct", rows=721_000),
    Source(name="mmdu", dataset="mmdu", rows=45_000),
    replace(SINGLE, factor=0.5),
)
PREFERENCES = Source(name="vlfeedback", dataset="vlfeedback", rows=62_600)
REFUSALS = (
    Source(name="vlguard", dataset="vlguard", rows=2_000),
    # prevents that the model refuses everything
    Source(name="helpful", dataset="xgen-sft-5k", rows=5_000),
)


def system() -> System:
    """xGen-MM (Phi-3-mini): 128 tokens per tile; an image is a base square and up to four tiles."""
    pretrain = Stage(
        name="pretrain",
        model=BASE,
        trains={"bridge.*": 1.0, "language.*": 1.0},
        losses=(LanguageModeling(),),
        data=Mixture(sources=PAGES, alpha=0.0, template="plain"),  # by share, not by size
        budget=Budget(steps=48_000, batch=1_024, micro=8),
        optim=AdamW(peak_lr=4e-5, warmup=0.04),
        zero=ZeRO(stage=2),
    )
    instruct = replace(
        pretrain,
        name="instruct",
        model=TILED,
        data=Mixture(sources=(SINGLE,), template="chat"),
        budget=Budget(steps=15_625, batch=64, micro=8),
        optim=AdamW(peak_lr=2e-5, warmup=2_000 / 15_625),
        starts_from="pretrain",
        zero=ZeRO(stage=3),
    )
    multi_image = replace(
        instruct,
        name="multi_image",
        data=Mixture(sources=MULTIPLE, template="chat"),
        starts_from="instruct",
    )
    prefer = Stage(
        name="prefer",
        model=ADAPTED,
        trains={"language.*lora_*": 1.0},
        losses=(DPO(beta=0.1),),
        data=Mixture(sources=(PREFERENCES,), template="chat"),
        budget=Budget(steps=978, batch=64, micro=4),
        optim=AdamW(peak_lr=1e-5),
        starts_from="instruct",
        zero=ZeRO(stage=2),
    )
    safety = replace(
        prefer,
        name="safety",
        losses=(LanguageModeling(),),
        data=Mixture(sources=REFUSALS, template="chat"),
        budget=Budget(steps=328, batch=64, micro=8),  # three epochs
        starts_from="prefer",
    )
    stages = (pretrain, instruct, multi_image, prefer, safety)
    return System(name="xgen_mm", paper="arXiv:2408.08872", stages=stages)
