"""CLIP (Radford et al. 2021, arXiv:2103.00020): image and text towers, trained by contrast.

contrast   both towers, their projections and the temperature, from scratch              (2.3, 2.5)
sharpen    vit_l14_336 only: one more epoch at a higher resolution                            (2.5)
probe      linear_probe only: a linear layer over classes, on the frozen image tower     (3.2, A.3)
classify   fine_tune only: the linear layer and the image tower                               (3.2)

bridgework train clip            ViT-B/32; its variant clip:vit_l14 took 256 V100 12 days (2.5)
bridgework train clip --tiny     a laptop: seconds

clip:vit_l14, clip:vit_l14_336 and clip:rn50 change the towers. clip:linear_probe and clip:fine_tune
add a classifier.

Departs from the paper:
- a center crop, not a random one (2.4);
- bfloat16, not float16;
- `probe` trains its layer by AdamW. The paper fits a logistic regression by L-BFGS, as the
  evaluation `logistic` does;
- the paper fine-tunes no tower and gives its reasons (3.2). The settings of `classify` are ours,
  near those of WiSE-FT's baseline (arXiv:2109.01903);
- classifiers are also evaluated under natural distribution shift (3.3), here on CIFAR-10.1
  (arXiv:1806.00451).
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
    image_size=224, patch=32, width=768, depth=12, heads=12, ffn=3072, layer=-1, select="cls",
    act="quick_gelu", fit="crop",
)  # fmt: skip
VIT_L14 = replace(VIT_B32, patch=14, width=1024, depth=24, heads=16, ffn=4096)
TEXT_L = CLIPTextConfig(width=768, heads=12, ffn=3072)
# WebImageText is closed (2.2). Any set of pairs can replace it.
WIT = Source(name="wit", dataset="wit-400m", rows=400_000_000)
STEPS = 390_625  # 32 epochs of 400M pairs in batches of 32,768 (2.5)
ADAM = AdamW(  # appendix F
    peak_lr=5e-4, warmup=2_000 / STEPS, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6, clip=0.0
)
CIFAR_10 = (  # one of the paper's 27 datasets (A.1)
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
IMAGES = Source(name="cifar10", dataset="cifar10-train", rows=50_000)


def system() -> System:
    """ViT-B/32."""
    return _clip(_contrast(DualEncoderConfig(vision=VIT_B32, text=CLIPTextConfig()), ADAM))


def vit_l14() -> System:
    """ViT-L/14."""
    model = DualEncoderConfig(vision=VIT_L14, text=TEXT_L, embed=768)
    return _clip(_contrast(model, replace(ADAM, peak_lr=4e-4)))


def vit_l14_336() -> System:
    """ViT-L/14, with one more epoch at 336 px."""
    model = DualEncoderConfig(vision=replace(VIT_L14, image_size=336), text=TEXT_L, embed=768)
    contrast = _contrast(model, replace(ADAM, peak_lr=2e-5))
    sharpen = replace(
        contrast,
        name="sharpen",
        budget=replace(contrast.budget, steps=STEPS // 32),
        starts_from="contrast",
    )
    return _clip(vit_l14()["contrast"], sharpen)


def rn50() -> System:
    """ResNet-50, with CLIP's changes."""
    model = DualEncoderConfig(
        vision=ModifiedResNetConfig(), text=CLIPTextConfig(), embed=1024, project_image=False
    )
    return _clip(_contrast(model, replace(ADAM, betas=(0.9, 0.999), eps=1e-8)))


def linear_probe() -> System:
    """ViT-B/32 on CIFAR-10.

    For other classes set stages.probe.model.classes and the source's dataset.
    """
    logistic = LinearProbe(
        name="logistic",
        dataset="cifar10-test",
        train="cifar10-train",
        rows=10_000,
        train_rows=50_000,
    )
    optim = AdamW(peak_lr=1e-3, warmup=0.0, clip=0.0)
    return _classifier("probe", {"head.*": 1.0}, optim, epochs=20, evals=(logistic,))


def fine_tune() -> System:
    """ViT-B/32 on CIFAR-10: trains the linear layer and the image tower."""
    optim = AdamW(peak_lr=3e-5, warmup=0.05, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6)
    return _classifier("classify", {"vision.*": 1.0, "head.*": 1.0}, optim, epochs=10)


def _contrast(model: DualEncoderConfig, optim: AdamW) -> Stage:
    return Stage(
        name="contrast",
        model=model,
        trains={"vision.*": 1.0, "text.*": 1.0, "heads.*": 1.0},
        losses=(Contrastive(temperature=None),),  # learned: starts at 0.07, at least 0.01 (2.5)
        data=Mixture(sources=(WIT,), template="caption", max_tokens=77, lanes=256),
        budget=Budget(steps=STEPS, batch=32_768, micro=128),
        optim=optim,
        evals=(
            ZeroShot(name="imagenet", dataset="imagenet-val", rows=50_000),
            Retrieval(name="flickr30k", dataset="flickr30k-test", rows=1_000),
        ),
    )


def _classifier(
    name: str,
    trains: dict[str, float],
    optim: AdamW,
    *,
    epochs: int,
    evals: tuple[EvalSpec, ...] = (),
) -> System:
    classify = Stage(
        name=name,
        model=ImageClassifierConfig(vision=VIT_B32, classes=CIFAR_10),
        trains=trains,
        losses=(ClassLoss(),),
        data=Mixture(sources=(IMAGES,), template="caption", lanes=64),
        budget=Budget(steps=epochs * 50_000 // 512, batch=512, micro=128),
        optim=optim,
        starts_from="contrast",
        init_params=("vision.*",),
        evals=(
            Classification(name="cifar10", dataset="cifar10-test", rows=10_000),
            Classification(name="shifted", dataset="cifar10.1", rows=2_000),
            *evals,
        ),
    )
    return _clip(system()["contrast"], classify)


def _clip(*stages: Stage) -> System:
    return System(name="clip", paper="arXiv:2103.00020", stages=stages)
