"""llava:next: LLaVA-NeXT, or LLaVA 1.6 (Liu et al. 2024): LLaVA 1.5 that reads an image at up to four times the pixels.

align      the projector learns captions, one square an image                                (558K, as 1.5)
instruct   tiles, with a newline behind every row of patches; all of it learns, the vision tower at a tenth of the rate

bridgework train llava:next           7B; the authors give the cost of the 34B alone: 32 A100, a day
bridgework train llava:next --tiny    a laptop: a minute
There is no paper, but a blog post, and the code of 1.6 at inference. Departs from the post: its 15K instructions from
users of the authors' demo were never published, so 745K of 760K are left.
"""

from dataclasses import replace

from bridgework.losses import LanguageModeling
from bridgework.models import MLPConfig, PrefixVLMConfig
from bridgework.recipes._llava_parts import CAPTIONS, CLIP_L, MIX_665K, VICUNA_7B
from bridgework.system import AdamW, Budget, Mixture, Source, Stage, System, ZeRO

BLOG = "https://llava-vl.github.io/blog/2024-01-30-llava-next"
GRIDS = (
    (1, 2),
    (2, 1),
    (2, 2),
    (3, 1),
    (1, 3),
)  # columns and rows of 336 px: at most 2,928 tokens an image
MODEL = PrefixVLMConfig(
    vision=CLIP_L, bridge=MLPConfig(depth=2), language=VICUNA_7B, grids=GRIDS, tiles="unpad"
)
ADDED = (
    "laion-gpt4v",
    "sharegpt4v",
    "docvqa",
    "synthdog-en",
    "chartqa",
    "dvqa",
    "ai2d",
)  # told without numbers


def next() -> System:
    """LLaVA-NeXT 7B: a base square of 336 px and up to four tiles beside it."""
    align = Stage(
        name="align",
        model=replace(MODEL, grids=()),
        trains={"bridge.*": 1.0},
        losses=(LanguageModeling(),),
        data=Mixture(sources=(CAPTIONS,), template="plain"),
        budget=Budget(steps=2_180, batch=256, micro=32),
        optim=AdamW(peak_lr=1e-3),
        zero=ZeRO(stage=2),
    )
    known = tuple(  # TextCaps left: its images are those of TextVQA's test
        Source(name=n, dataset=f"llava-{n}", rows=rows)
        for n, rows in MIX_665K.items()
        if n != "textcaps"
    )
    instruct = Stage(
        name="instruct",
        model=MODEL,
        trains={"vision.*": 0.1, "bridge.*": 1.0, "tiles.*": 1.0, "language.*": 1.0},  # ViT: 2e-6
        losses=(LanguageModeling(),),
        data=Mixture(
            sources=(*known, *(Source(name=n, dataset=f"llava-{n}") for n in ADDED)),
            template="v1",
            max_tokens=4096,
        ),
        budget=Budget(steps=5_820, batch=128, micro=2),
        optim=AdamW(peak_lr=2e-5),
        starts_from="align",
        zero=ZeRO(stage=3),
    )
    return System(name="llava", paper=BLOG, stages=(align, instruct))
