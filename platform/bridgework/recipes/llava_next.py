"""LLaVA-NeXT, or LLaVA 1.6 (Liu et al. 2024): LLaVA 1.5 that reads an image at up to four times the pixels.

align      the projector, and the newline behind every row of patches, learn captions     (558K, as 1.5)
instruct   all of it learns to follow instructions, the vision tower at a tenth of the rate  (760K conversations)

bridgework train llava_next           7B; the authors give the cost of the 34B alone: 32 A100, a day
bridgework train llava_next --tiny    a laptop: a minute
There is no paper: https://llava-vl.github.io/blog/2024-01-30-llava-next, and what the code of 1.6 does at inference.
Departs from it: 15K instructions from users of the authors' demo were never published, so 745K are left.
"""

from dataclasses import replace

from bridgework.losses import Captioning
from bridgework.models import PrefixVLM
from bridgework.recipes.llava import CAPTIONS, CLIP_L, MIX_665K, VICUNA_7B
from bridgework.models import MLP
from bridgework.system import AdamW, Budget, Mixture, Source, Stage, System, ZeRO

GRIDS = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))  # columns and rows of 336 px: at most 2,928 tokens an image
MODEL = PrefixVLM(vision=CLIP_L, bridge=MLP(depth=2), language=VICUNA_7B, grids=GRIDS, tiles="unpad")
DOCUMENTS = {"gpt4v": 45_000, "docvqa": 10_000, "synthdog": 10_000, "chartqa": 18_000, "dvqa": 16_000, "ai2d": 2_000}


def system() -> System:
    """LLaVA-NeXT 7B: a base square of 336 px and up to four tiles beside it."""
    align = Stage(
        name="align",
        model=replace(MODEL, grids=()),  # one square, and so no newline yet
        trains={"bridge.*": 1.0},
        losses=(Captioning(),),
        data=Mixture(sources=(CAPTIONS,), template="plain"),
        budget=Budget(steps=2_180, batch=256, micro=32),
        optim=AdamW(peak_lr=1e-3),
        shard=ZeRO(stage=2),
    )
    conversations = {**MIX_665K, **DOCUMENTS}
    instruct = Stage(
        name="instruct",
        model=MODEL,
        trains={"vision.*": 0.1, "bridge.*": 1.0, "tiles.*": 1.0, "language.*": 1.0},  # ViT: 2e-6
        losses=(Captioning(),),
        data=Mixture(
            sources=tuple(Source(name=n, dataset=f"llava-{n}", rows=rows) for n, rows in conversations.items()),
            template="v1",
            max_tokens=4096,
        ),
        budget=Budget(steps=5_820, batch=128, micro=2),
        optim=AdamW(peak_lr=2e-5),
        starts_from="align",
        shard=ZeRO(stage=3),
    )
    return System(name="llava_next", paper="https://llava-vl.github.io/blog/2024-01-30-llava-next", stages=(align, instruct))
