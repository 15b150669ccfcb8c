"""Flamingo (Alayrac et al. 2022, arXiv:2204.14198): a frozen LM reads images by gated attention.

train      resampler, gated cross-attention, the row of <EOC>; vision and LM are frozen  (2.2, 2.4)

bridgework train flamingo           3B; flamingo:b9 and flamingo:b80 (1536 TPUv4, 15 days; B.1.2)
bridgework train flamingo --tiny    a laptop: seconds

NFNet-F6, Chinchilla and all four datasets are closed. SigLIP-SO400M replaces the vision tower (413M
for 435M). Open LMs of the same depth and width, where they exist, replace Chinchilla. Import open
data under the names below: OBELICS or MMC4 as m3w, COYO as align, a filtered LAION as ltip, WebVid
as vtp.

Departs from the paper:
- 384 px, not 320;
- weight decay on the resampler's matrices too (B.1.2: none);
- documents are read from their beginning (2.4: from anywhere);
- the batch size is ours.
"""

from typing import Literal

from bridgework.evaluation import VQA, Captions, FewShot, Writing
from bridgework.evaluation.few_shot import Shots
from bridgework.losses import LanguageModeling
from bridgework.models import CrossAttentionVLMConfig, GatesConfig, LanguageConfig, ResamplerConfig
from bridgework.recipes._backbones import SIGLIP
from bridgework.system import AdamW, Budget, EvalSpec, Mixture, Scoring, Source, Stage, System, ZeRO

RESAMPLER = ResamplerConfig(  # A.1.1, table 4
    latents=64, depth=6, heads=16, head_width=96, frames=8, project=False
)
# For Chinchilla 1.4B, 7B and 70B, with 24, 40 and 80 layers (table 5).
SMOLLM2_1_7B = LanguageConfig(
    width=2048, depth=24, heads=32, kv_heads=32, ffn=8192, vocab=49_152, context=2048, tied=True,
    rope_theta=130_000.0, tokenizer="HuggingFaceTB/SmolLM2-1.7B",
    weights="HuggingFaceTB/SmolLM2-1.7B",
)  # fmt: skip
MISTRAL_7B = LanguageConfig(
    arch="mistral", width=4096, depth=32, heads=32, kv_heads=8, ffn=14_336, vocab=32_000,
    context=2048, tokenizer="mistralai/Mistral-7B-v0.1", weights="mistralai/Mistral-7B-v0.1",
)  # fmt: skip
LLAMA_2_70B = LanguageConfig(
    width=8192, depth=80, heads=64, kv_heads=8, ffn=28_672, vocab=32_000, context=2048,
    tokenizer="meta-llama/Llama-2-70b-hf", weights="meta-llama/Llama-2-70b-hf",
)  # fmt: skip
# Rows: 2.4. Loss weights, the paper's lambda: B.1.2. Each source has the same share of a step.
SOURCES = (
    Source(name="m3w", dataset="m3w", rows=43_000_000, images=5, following=0.5, loss_weight=1.0),
    Source(name="align", dataset="align", rows=1_800_000_000, loss_weight=0.2),
    Source(name="ltip", dataset="ltip", rows=312_000_000, loss_weight=0.2),
    Source(name="vtp", dataset="vtp", rows=27_000_000, loss_weight=0.03),
)
SHOTS = (0, 4, 8, 16, 32)
CAPTION_TEST, CAPTION_SUPPORT = "coco-karpathy-val", "coco-karpathy-train"
# Closed-ended by likelihood, open-ended at 0 to 32 shots (3.1, A.2).
EVALS: tuple[EvalSpec, ...] = (
    FewShot(name="told", dataset=CAPTION_TEST, support=CAPTION_SUPPORT, shots=0),
    FewShot(name="four", dataset=CAPTION_TEST, support=CAPTION_SUPPORT, shots=4, orders=6),
    *(
        Captions(
            name=f"coco_{count}",
            dataset=CAPTION_TEST,
            prompts=("Output:",),
            writing=Writing(beams=3, most=20),
            shots=Shots(count=count, support=CAPTION_SUPPORT),
        )
        for count in SHOTS
    ),
    *(
        VQA(
            name=f"vqav2_{count}",
            dataset="vqav2-val",
            prompts=("Question: {} Answer:",),
            writing=Writing(beams=3, most=5),
            shots=Shots(count=count, support="vqav2-train"),
        )
        for count in SHOTS
    ),
)


def system() -> System:
    """3B: a gated block before every layer."""
    return _flamingo(SMOLLM2_1_7B, GatesConfig(every=1, heads=16, head_width=128), zero=1)


def b9() -> System:
    """9B: a gated block before every fourth layer."""
    return _flamingo(MISTRAL_7B, GatesConfig(every=4, heads=32, head_width=128), zero=2)


def b80() -> System:
    """80B: a gated block before every seventh layer.

    The paper shards the LM over 16 chips; here ZeRO 3 shards it.
    """
    return _flamingo(LLAMA_2_70B, GatesConfig(every=7, heads=64, head_width=128), zero=3)


def _flamingo(language: LanguageConfig, gates: GatesConfig, *, zero: Literal[1, 2, 3]) -> System:
    train = Stage(
        name="train",
        model=CrossAttentionVLMConfig(
            vision=SIGLIP, bridge=RESAMPLER, gates=gates, language=language
        ),
        trains={"bridge.*": 1.0, "gates.*": 1.0, "extra.*": 1.0},
        losses=(LanguageModeling(mean="samples"),),  # lambda weights a sample's summed loss (2.4)
        data=Mixture(  # windows of 256 tokens (2.4)
            sources=SOURCES, alpha=0.0, template="interleaved", max_tokens=256
        ),
        budget=Budget(steps=500_000, batch=2_048, micro=16),
        optim=AdamW(  # B.1.2
            peak_lr=1e-4, warmup=5_000 / 500_000, decay="constant", weight_decay=0.1
        ),
        zero=ZeRO(stage=zero),
        evals=EVALS,
        scoring=Scoring(prior=False),  # A.2
    )
    return System(name="flamingo", paper="arXiv:2204.14198", stages=(train,))
