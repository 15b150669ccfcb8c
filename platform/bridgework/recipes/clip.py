"""CLIP (Radford et al. 2021, arXiv:2103.00020): an image tower and a text tower learn to find each other's pairs.

contrast   both towers, their projections and the temperature, from nothing               (2.3, 2.5)
sharpen    vit_l14_336 alone: one more epoch at a higher resolution                       (2.5)

bridgework train clip              ViT-B/32; of the others, clip:vit_l14 took 256 V100 12 days (2.5)
bridgework train clip --tiny       a laptop: seconds
Departs from the paper: a centre crop, not a random one (2.4); bfloat16, not float16.
"""

from dataclasses import replace

from bridgework.evaluation import Retrieval, ZeroShot
from bridgework.losses import Contrastive
from bridgework.models import CLIPTextConfig, DualEncoder, ModifiedResNetConfig, ViTConfig
from bridgework.system import AdamW, Budget, Mixture, Source, Stage, System

VIT_B32 = ViTConfig(
    image_size=224, patch=32, width=768, depth=12, heads=12, ffn=3072, layer=-1, select="cls", act="quick_gelu",
    fit="crop",
)  # fmt: skip
VIT_L14 = replace(VIT_B32, patch=14, width=1024, depth=24, heads=16, ffn=4096)
TEXT_L = CLIPTextConfig(width=768, heads=12, ffn=3072)
WIT = Source(name="wit", dataset="wit-400m", rows=400_000_000)  # 2.2: closed; any set of pairs takes its place
STEPS = 390_625  # 32 epochs of 400M pairs in batches of 32,768 (2.5)
ADAM = AdamW(peak_lr=5e-4, warmup=2_000 / STEPS, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6, clip=0.0)  # appendix F


def system() -> System:
    return _clip(_contrast(DualEncoder(vision=VIT_B32, text=CLIPTextConfig()), ADAM))


def vit_l14() -> System:
    return _clip(_contrast(DualEncoder(vision=VIT_L14, text=TEXT_L, embed=768), replace(ADAM, peak_lr=4e-4)))


def vit_l14_336() -> System:
    model = DualEncoder(vision=replace(VIT_L14, image_size=336), text=TEXT_L, embed=768)
    high = replace(_contrast(model, replace(ADAM, peak_lr=2e-5)), name="sharpen", starts_from="contrast")
    return _clip(vit_l14()["contrast"], replace(high, budget=replace(high.budget, steps=STEPS // 32)))


def rn50() -> System:
    model = DualEncoder(vision=ModifiedResNetConfig(), text=CLIPTextConfig(), embed=1024, project_image=False)
    return _clip(_contrast(model, replace(ADAM, betas=(0.9, 0.999), eps=1e-8)))


def _contrast(model: DualEncoder, optim: AdamW) -> Stage:
    return Stage(
        name="contrast", model=model, trains={"vision.*": 1.0, "text.*": 1.0, "heads.*": 1.0},
        losses=(Contrastive(temperature=None),),  # learned: 0.07 at first, 0.01 at the least (2.5)
        data=Mixture(sources=(WIT,), template="caption", max_tokens=77, lanes=256),
        budget=Budget(steps=STEPS, batch=32_768, micro=128), optim=optim,
        evals=(ZeroShot(name="imagenet", dataset="imagenet-val", rows=50_000),
               Retrieval(name="flickr30k", dataset="flickr30k-test", rows=1_000)),
    )  # fmt: skip


def _clip(*stages: Stage) -> System:
    return System(name="clip", paper="arXiv:2103.00020", stages=stages)
