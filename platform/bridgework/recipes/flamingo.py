"""Flamingo (Alayrac et al. 2022, arXiv:2204.14198): a frozen LM that looks at images through gated blocks of its own.

train      resampler, gated cross-attention and the row of <EOC>; vision and LM stay frozen          (2.2, 2.4)

bridgework train flamingo           3B; flamingo:b9 and flamingo:b80 (which took 1536 TPUv4 15 days, B.1.2)
bridgework train flamingo --tiny    a laptop: seconds
NFNet-F6, Chinchilla and all four datasets are closed. In their place: SigLIP-SO400M (413M for 435M), and LMs of the
same depth and width where there are any. Import open data under the names below: OBELICS or MMC4 as m3w, COYO as
align, a filtered LAION as ltip, WebVid as vtp.
Departs from the paper: 384 px, not 320; weight decay on the resampler's matrices too (B.1.2: none); documents are read
from their beginning (2.4: from anywhere); the batch size is ours.
"""

from bridgework.evaluation import VQA, Captions, FewShot, Writing
from bridgework.evaluation.few_shot import Shots
from bridgework.losses import LanguageModeling
from bridgework.models import (
    CrossAttentionVLMConfig,
    GatesConfig,
    LanguageConfig,
    ResamplerConfig,
    ViTConfig,
)
from bridgework.system import AdamW, Budget, EvalSpec, Mixture, Scoring, Source, Stage, System, ZeRO

SIGLIP = ViTConfig(
    kind="siglip", image_size=384, patch=14, width=1152, depth=27, heads=16, ffn=4304, layer=-1, fit="pad",
    weights="google/siglip-so400m-patch14-384",
)  # fmt: skip
RESAMPLER = ResamplerConfig(
    latents=64, depth=6, heads=16, head_width=96, frames=8, project=False
)  # A.1.1, table 4
LMS = {  # for Chinchilla 1.4B, 7B and 70B, of 24, 40 and 80 layers (table 5)
    "3b": LanguageConfig(
        width=2048, depth=24, heads=32, kv_heads=32, ffn=8192, vocab=49_152, context=2048, tied=True,
        rope_theta=130_000.0, tokenizer="HuggingFaceTB/SmolLM2-1.7B", weights="HuggingFaceTB/SmolLM2-1.7B"),
    "9b": LanguageConfig(
        arch="mistral", width=4096, depth=32, heads=32, kv_heads=8, ffn=14_336, vocab=32_000, context=2048,
        tokenizer="mistralai/Mistral-7B-v0.1", weights="mistralai/Mistral-7B-v0.1"),
    "80b": LanguageConfig(
        width=8192, depth=80, heads=64, kv_heads=8, ffn=28_672, vocab=32_000, context=2048,
        tokenizer="meta-llama/Llama-2-70b-hf", weights="meta-llama/Llama-2-70b-hf"),
}  # fmt: skip
SOURCES = (  # rows: 2.4, lambda: B.1.2; every source gives the same share of a step
    Source(name="m3w", dataset="m3w", rows=43_000_000, images=5, following=0.5, loss_weight=1.0),
    Source(name="align", dataset="align", rows=1_800_000_000, loss_weight=0.2),
    Source(name="ltip", dataset="ltip", rows=312_000_000, loss_weight=0.2),
    Source(name="vtp", dataset="vtp", rows=27_000_000, loss_weight=0.03),
)
JUDGES: tuple[EvalSpec, ...] = (  # closed-ended, by likelihood, and open-ended at 0 to 32 shots (3.1, A.2)
    FewShot(name="told", dataset="coco-karpathy-val", support="coco-karpathy-train", shots=0),
    FewShot(name="four", dataset="coco-karpathy-val", support="coco-karpathy-train", shots=4, orders=6),
    *(Captions(name=f"coco_{n}", dataset="coco-karpathy-val", prompts=("Output:",), writing=Writing(beams=3, most=20),
               shots=Shots(count=n, support="coco-karpathy-train")) for n in (0, 4, 8, 16, 32)),
    *(VQA(name=f"vqav2_{n}", dataset="vqav2-val", prompts=("Question: {} Answer:",), writing=Writing(beams=3, most=5),
          shots=Shots(count=n, support="vqav2-train")) for n in (0, 4, 8, 16, 32)),
)  # fmt: skip


def system() -> System:
    """3B: a block before every layer."""
    return _flamingo("3b", GatesConfig(every=1, heads=16, head_width=128), ZeRO(stage=1))


def b9() -> System:
    """9B: a block before every fourth layer."""
    return _flamingo("9b", GatesConfig(every=4, heads=32, head_width=128), ZeRO(stage=2))


def b80() -> System:
    """80B: a block before every seventh layer; the paper splits the LM over 16 chips, here ZeRO-3 does."""
    return _flamingo("80b", GatesConfig(every=7, heads=64, head_width=128), ZeRO(stage=3))


def _flamingo(size: str, gates: GatesConfig, shard: ZeRO) -> System:
    train = Stage(
        name="train", model=CrossAttentionVLMConfig(vision=SIGLIP, bridge=RESAMPLER, gates=gates, language=LMS[size]),
        trains={"bridge.*": 1.0, "gates.*": 1.0, "extra.*": 1.0}, zero=shard, evals=JUDGES,
        losses=(LanguageModeling(mean="samples"),),  # lambda weighs the expected sum over a sample's tokens (2.4)
        data=Mixture(sources=SOURCES, alpha=0.0, template="interleaved", max_tokens=256),  # windows of 256 (2.4)
        budget=Budget(steps=500_000, batch=2_048, micro=16),
        optim=AdamW(peak_lr=1e-4, warmup=5_000 / 500_000, decay="constant", weight_decay=0.1),  # B.1.2
        scoring=Scoring(prior=False),  # A.2
    )  # fmt: skip
    return System(name="flamingo", paper="arXiv:2204.14198", stages=(train,))
