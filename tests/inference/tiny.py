"""A tiny pipeline whose random weights are large enough that images and words both matter."""

import torch

from bridgework.inference import Pipeline
from bridgework.losses import Captioning
from bridgework.models import MLP, LanguageConfig, PrefixVLM, ViTConfig
from bridgework.system import AdamW, Budget, Mixture, Source, Stage

PROMPT = "What is shown?"


def stage(template: str = "chat", prompts: tuple[str, ...] = (PROMPT,), context: int = 512) -> Stage:
    language = LanguageConfig(
        width=32, depth=2, heads=4, kv_heads=4, ffn=64, vocab=320, context=context, tokenizer="bytes"
    )
    return Stage(
        name="align",
        model=PrefixVLM(vision=ViTConfig().tiny(), bridge=MLP(), language=language),
        trains={"bridge.*": 1.0},
        losses=(Captioning(),),
        data=Mixture(sources=(Source(name="s", dataset="s", prompts=prompts),), template=template, lanes=4),
        budget=Budget(steps=1, batch=8),
        optim=AdamW(peak_lr=1e-3),
    )


def pipeline(template: str = "chat", prompts: tuple[str, ...] = (PROMPT,), context: int = 512) -> Pipeline:
    spec = stage(template, prompts, context)
    torch.manual_seed(0)
    model = spec.model.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Pipeline(model.eval(), spec)
