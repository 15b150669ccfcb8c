"""Tiny pipelines whose random weights are large enough that images and words both matter."""

import io

import numpy as np
import torch
from PIL import Image

from bridgework.inference.pipeline import Pipeline
from bridgework.losses import LanguageModeling
from bridgework.models import LanguageConfig, MLPConfig, PrefixVLMConfig, ViTConfig
from bridgework.system import AdamW, Budget, Mixture, Source, Stage, load

PROMPT = "What is shown?"


def stage(
    template: str = "chat", prompts: tuple[str, ...] = (PROMPT,), context: int = 512
) -> Stage:
    language = LanguageConfig(
        width=32,
        depth=2,
        heads=4,
        kv_heads=4,
        ffn=64,
        vocab=320,
        context=context,
        tokenizer="bytes",
    )
    return Stage(
        name="align",
        model=PrefixVLMConfig(vision=ViTConfig().tiny(), bridge=MLPConfig(), language=language),
        trains={"bridge.*": 1.0},
        losses=(LanguageModeling(),),
        data=Mixture(
            sources=(Source(name="s", dataset="s", prompts=prompts),), template=template, lanes=4
        ),
        budget=Budget(steps=1, batch=8),
        optim=AdamW(peak_lr=1e-3),
    )


def pipeline(
    template: str = "chat", prompts: tuple[str, ...] = (PROMPT,), context: int = 512
) -> Pipeline:
    spec = stage(template, prompts, context)
    torch.manual_seed(0)
    model = spec.model.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Pipeline(model.eval(), spec)


def pipe_of(name: str) -> Pipeline:
    """A tiny model whose images, tiles and words all matter."""
    system, _, stage = name.partition("/")
    found = load(system).tiny()[stage]
    torch.manual_seed(0)
    model = found.model.build(pretrained=False).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "alpha" in parameter_name:
                parameter.fill_(0.6)
            elif parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return Pipeline(model, found)


def picture(seed: int = 0, size: tuple[int, int] = (64, 128)) -> bytes:
    image = Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    )
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
