"""CLIP (Radford et al. 2021, arXiv:2103.00020): an image tower and a text tower learn to find each other's pairs.

contrast   both towers, their projections and the temperature, from nothing               (2.3, 2.5)
sharpen    vit_l14_336 alone: one more epoch at a higher resolution                       (2.5)
probe      linear_probe alone: a linear layer over classes, on the frozen image tower     (3.2, A.3)
classify   fine_tune alone: the layer and the image tower                                 (3.2)

bridgework train clip              ViT-B/32; of the others, clip:vit_l14 took 256 V100 12 days (2.5)
bridgework train clip --tiny       a laptop: seconds
Departs from the paper: a center crop, not a random one (2.4); bfloat16, not float16. Its probes are logistic
regressions by L-BFGS, which the evaluation `logistic` is; the stage learns the same layer by AdamW. It fine-tunes
no tower, and says why (3.2): the settings of `classify` are ours, near those of WiSE-FT's baseline (arXiv:2109.01903).
Classifiers are judged under a natural shift too (3.3), here by CIFAR-10.1 (arXiv:1806.00451).
"""

from dataclasses import replace

from bridgework.evaluation import Classification, LinearProbe, Retrieval, ZeroShot
from bridgework.losses import Classification as ClassLoss
from bridgework.losses import Contrastive
from bridgework.models import (
    CLIPTextConfig,
    DualEncoderConfig,
    ImageClassifierConfig,
    ModifiedResNetConfig,
    ViTConfig,
)
from bridgework.system import AdamW, Budget, EvalSpec, Mixture, Source, Stage, System

VIT_B32 = ViTConfig(
    image_size=224, patch=32, width=768, depth=12, heads=12, ffn=3072, layer=-1, select="cls", act="quick_gelu",
    fit="crop",
)  # fmt: skip
VIT_L14 = replace(VIT_B32, patch=14, width=1024, depth=24, heads=16, ffn=4096)
TEXT_L = CLIPTextConfig(width=768, heads=12, ffn=3072)
WIT = Source(
    name="wit", dataset="wit-400m", rows=400_000_000
)  # 2.2: closed; any set of pairs takes its place
STEPS = 390_625  # 32 epochs of 400M pairs in batches of 32,768 (2.5)
ADAM = AdamW(
    peak_lr=5e-4, warmup=2_000 / STEPS, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6, clip=0.0
)  # appendix F

CIFAR_10 = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
IMAGES = Source(
    name="cifar10", dataset="cifar10-train", rows=50_000
)  # one of the paper's 27 datasets (A.1)


def system() -> System:
    return _clip(_contrast(DualEncoderConfig(vision=VIT_B32, text=CLIPTextConfig()), ADAM))


def vit_l14() -> System:
    return _clip(
        _contrast(
            DualEncoderConfig(vision=VIT_L14, text=TEXT_L, embed=768), replace(ADAM, peak_lr=4e-4)
        )
    )


def vit_l14_336() -> System:
    model = DualEncoderConfig(vision=replace(VIT_L14, image_size=336), text=TEXT_L, embed=768)
    high = replace(
        _contrast(model, replace(ADAM, peak_lr=2e-5)), name="sharpen", starts_from="contrast"
    )
    return _clip(
        vit_l14()["contrast"], replace(high, budget=replace(high.budget, steps=STEPS // 32))
    )


def rn50() -> System:
    model = DualEncoderConfig(
        vision=ModifiedResNetConfig(), text=CLIPTextConfig(), embed=1024, project_image=False
    )
    return _clip(_contrast(model, replace(ADAM, betas=(0.9, 0.999), eps=1e-8)))


def linear_probe() -> System:
    """ViT-B/32 and CIFAR-10; for other classes set stages.probe.model.classes and the source's dataset."""
    found = LinearProbe(
        name="logistic",
        dataset="cifar10-test",
        train="cifar10-train",
        rows=10_000,
        train_rows=50_000,
    )
    return _classifier(
        "probe",
        {"head.*": 1.0},
        AdamW(peak_lr=1e-3, warmup=0.0, clip=0.0),
        epochs=20,
        judges=(found,),
    )


def fine_tune() -> System:
    """The same layer, and the image tower with it."""
    optim = AdamW(peak_lr=3e-5, warmup=0.05, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6)
    return _classifier("classify", {"vision.*": 1.0, "head.*": 1.0}, optim, epochs=10)


def _classifier(
    name: str,
    trains: dict[str, float],
    optim: AdamW,
    *,
    epochs: int,
    judges: tuple[EvalSpec, ...] = (),
) -> System:
    contrast = system()["contrast"]
    classify = Stage(
        name=name, model=ImageClassifierConfig(vision=VIT_B32, classes=CIFAR_10), trains=trains, losses=(ClassLoss(),),
        data=Mixture(sources=(IMAGES,), template="caption", lanes=64),
        budget=Budget(steps=epochs * 50_000 // 512, batch=512, micro=128), optim=optim,
        starts_from="contrast", init_params=("vision.*",),
        evals=(Classification(name="cifar10", dataset="cifar10-test", rows=10_000),
               Classification(name="shifted", dataset="cifar10.1", rows=2_000), *judges),
    )  # fmt: skip
    return _clip(contrast, classify)


def _contrast(model: DualEncoderConfig, optim: AdamW) -> Stage:
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
