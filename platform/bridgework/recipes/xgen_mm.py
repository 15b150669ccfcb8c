"""xGen-MM, or BLIP-3 (Xue et al. 2024, arXiv:2408.08872): a resampler between a frozen SigLIP and Phi-3-mini.

pretrain     resampler and LM learn from interleaved documents and captions            (100B tokens, the model card)
instruct     any-resolution tiles: one epoch of single-image conversations             (1M)
multi_image  conversations about several images, beside some about one
prefer       adapters learn which of two answers is better, by DPO                     (VLFeedback: 62.6K pairs)
safety       the adapters learn what to refuse                                         (VLGuard 2K and 5K others)

bridgework train xgen_mm           4B; the authors give no cost
bridgework train xgen_mm --tiny    a laptop: a minute
Shares, batches and LoRA's rank are ours: only fine-tuning code was released. Departs from it: a newline, not
<|endofchunk|>, ends a text of pretraining; SigLIP's last norm is not run, for the resampler begins with one; tiles are
resampled as tiles (the code cuts wide grids into strips); DPO has no answers made from noised images.
"""

from dataclasses import replace

from bridgework.losses import DPO, LanguageModeling
from bridgework.models import (
    LanguageConfig,
    LoRAConfig,
    PrefixVLMConfig,
    ResamplerConfig,
    ViTConfig,
)
from bridgework.system import AdamW, Budget, Mixture, Source, Stage, System, ZeRO

PHI_3 = LanguageConfig(
    arch="phi3", width=3072, depth=32, heads=32, kv_heads=32, ffn=8192, vocab=32_064, context=4096,
    tokenizer="microsoft/Phi-3-mini-4k-instruct", weights="microsoft/Phi-3-mini-4k-instruct",
)  # fmt: skip
BASE = PrefixVLMConfig(
    vision=ViTConfig(kind="siglip", image_size=384, patch=14, width=1152, depth=27, heads=16, ffn=4304, layer=-1,
                     fit="pad", weights="google/siglip-so400m-patch14-384"),
    bridge=ResamplerConfig(latents=128, depth=6, heads=16, head_width=96, activation="gelu"), language=PHI_3,
)  # fmt: skip
TILED = replace(
    BASE, grids=((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
)  # columns and rows of 384 px, as released
ADAPTED = replace(
    TILED, language=replace(PHI_3, lora=LoRAConfig(rank=64, alpha=128))
)  # 2.6 % of the LM
WEB = {  # rows, and the share that each has; MINT's three parts are 7:5:1
    "mint_html": (1_054_000_000, 0.7), "mint_pdf": (24_000_000, 0.5), "mint_arxiv": (870_000, 0.1),
    "obelics": (141_000_000, 1.3), "kale": (218_000_000, 1.0), "ocr": (200_000_000, 0.5),
    "grounding": (50_000_000, 0.5), "datacomp": (1_400_000_000, 0.5), "cc12m": (12_400_000, 0.1),
    "cc3m": (3_300_000, 0.1), "vg": (108_000, 0.02), "sbu": (1_000_000, 0.08),
}  # fmt: skip
PAGES = tuple(
    Source(name=name, dataset=name, rows=rows, factor=share) for name, (rows, share) in WEB.items()
)
SINGLE = Source(name="single", dataset="xgen-sft", rows=1_000_000)
MIXED = (Source(name="mantis", dataset="mantis-instruct", rows=721_000),
         Source(name="mmdu", dataset="mmdu", rows=45_000), replace(SINGLE, factor=0.5))  # fmt: skip
REFUSALS = (Source(name="vlguard", dataset="vlguard", rows=2_000),  # and what keeps it from refusing everything:
            Source(name="helpful", dataset="xgen-sft-5k", rows=5_000))  # fmt: skip


def system() -> System:
    """xGen-MM (Phi-3-mini): 128 tokens a tile, base square and up to four tiles an image."""
    pretrain = Stage(
        name="pretrain", model=BASE, trains={"bridge.*": 1.0, "language.*": 1.0}, losses=(LanguageModeling(),),
        data=Mixture(sources=PAGES, alpha=0.0, template="plain"),  # by share, whatever their size
        budget=Budget(steps=48_000, batch=1_024, micro=8), optim=AdamW(peak_lr=4e-5, warmup=0.04), zero=ZeRO(stage=2),
    )  # fmt: skip
    instruct = replace(
        pretrain, name="instruct", model=TILED, data=Mixture(sources=(SINGLE,), template="chat"),
        budget=Budget(steps=15_625, batch=64, micro=8), optim=AdamW(peak_lr=2e-5, warmup=2_000 / 15_625),
        starts_from="pretrain", zero=ZeRO(stage=3),
    )  # fmt: skip
    several = replace(
        instruct,
        name="multi_image",
        data=Mixture(sources=MIXED, template="chat"),
        starts_from="instruct",
    )
    prefer = Stage(
        name="prefer", model=ADAPTED, trains={"language.*lora_*": 1.0}, losses=(DPO(beta=0.1),),
        data=Mixture(sources=(Source(name="vlfeedback", dataset="vlfeedback", rows=62_600),), template="chat"),
        budget=Budget(steps=978, batch=64, micro=4), optim=AdamW(peak_lr=1e-5), zero=ZeRO(stage=2),
        starts_from="instruct",
    )  # fmt: skip
    safety = replace(
        prefer, name="safety", losses=(LanguageModeling(),), data=Mixture(sources=REFUSALS, template="chat"),
        budget=Budget(steps=328, batch=64, micro=8), starts_from="prefer",  # three epochs
    )  # fmt: skip
    return System(
        name="xgen_mm",
        paper="arXiv:2408.08872",
        stages=(pretrain, instruct, several, prefer, safety),
    )
