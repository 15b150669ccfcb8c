"""BLIP-2's fine-tune on questions: ViT and Q-Former train, and the Q-Former reads the question (2301.12597, 4.3)."""

from dataclasses import replace

from bridgework.losses import LanguageModeling
from bridgework.models import PrefixVLMConfig, QFormerConfig
from bridgework.recipes._backbones import OPT_2_7B, VIT_G
from bridgework.system import AdamW, Budget, Mixture, Source, Stage

QUESTIONS = tuple(
    Source(name=name, dataset=name, rows=rows, prompts=("Question: {} Answer:",))
    for name, rows in (("vqav2", 658_111), ("vg-qa", 1_445_322))
)


def asking(bridge: QFormerConfig) -> Stage:
    vision = replace(VIT_G, image_size=490)
    return Stage(
        name="vqa", model=PrefixVLMConfig(vision=vision, bridge=replace(bridge, text=True), language=OPT_2_7B),
        trains={"bridge.*": 1.0, **layerwise(vision.depth, 0.95)}, losses=(LanguageModeling(),),
        data=Mixture(sources=QUESTIONS, template="answer", max_tokens=96, lanes=16),
        budget=Budget(steps=82_165, batch=128, micro=4),
        optim=AdamW(peak_lr=1e-5, warmup=1_000 / 82_165, weight_decay=0.05), starts_from="generate",
    )  # fmt: skip


def layerwise(depth: int, decay: float) -> dict[str, float]:
    """What of a ViT trains: every block `decay` times as fast as the one behind it, the embeddings slowest."""
    blocks = {f"vision.tower.encoder.layers.{i}.*": decay ** (depth - i) for i in range(depth)}
    return {"vision.tower.embeddings.*": decay ** (depth + 1), **blocks}
