"""MiniGPT-4 (Zhu et al. 2023, arXiv:2304.10592): one matrix from a frozen BLIP-2 to a frozen LM.

align    the matrix learns captions, without a prompt                                         (3.1)
polish   then long descriptions in complete sentences, after a prompt                    (3.2, 3.3)

bridgework train minigpt4           Vicuna-13B: 4 x A100-80G, 10 h; then one, 7 min (3.1, 3.3)
bridgework train minigpt4 --tiny    a laptop: seconds

minigpt4:without_qformer joins four patches into an input of the matrix (the release's LLaMA-2).

The pairs of polish are 5,000 images of CC, described by align, rewritten by ChatGPT and checked by
hand: 3,500 were kept (3.2).

Departs from the release:
- Vicuna 1.1, because its weights are complete (v0 is published as a difference to LLaMA);
- people rate the paper's tests of memes, recipes, advertisements and poems; they are not among the
  evaluations.
"""

from dataclasses import replace

from bridgework.evaluation import CHAIR, VQA, HeldOutLoss, MultipleChoice, Writing
from bridgework.losses import LanguageModeling
from bridgework.models import (
    ConcatConfig,
    EvaConfig,
    LanguageConfig,
    PrefixVLMConfig,
    QFormerConfig,
)
from bridgework.recipes._backbones import VICUNA_13B
from bridgework.system import AdamW, Budget, Mixture, Scoring, Source, Stage, System

BLIP2 = "Salesforce/blip2-flan-t5-xxl"  # its ViT, its LayerNorm and its Q-Former
LLAMA_2 = LanguageConfig(
    arch="llama", width=4096, depth=32, heads=32, kv_heads=32, ffn=11_008, vocab=32_000,
    context=4096, tokenizer="meta-llama/Llama-2-7b-chat-hf",
    weights="meta-llama/Llama-2-7b-chat-hf",
)  # fmt: skip
PAIRS = (  # weighted 115 to 14 (the release's configuration)
    Source(name="laion", dataset="blip-laion", rows=115_000_000),
    Source(name="cc_sbu", dataset="blip-cc-sbu", rows=14_000_000),
)
INSTRUCTIONS = (  # 3.3 names the first two
    "Describe this image in detail.",
    "Could you describe the contents of this image for me?",
    "Look at this picture and tell me what you notice.",
    "Please give a detailed account of what is in the picture.",
)
DESCRIPTIONS = Source(
    name="cc_sbu_align", dataset="minigpt4-align", rows=3_500, prompts=INSTRUCTIONS
)
CHOICE_PROMPTS = ("Question: {} Options: {options}. Answer:",)
ANSWER_PROMPTS = ("Question: {} Answer with a word or two:",)
LONG_PROMPTS = ("Please describe this image as detailed as possible.",)
SHORT_PROMPTS = ("Please describe the image shortly and precisely, in less than 20 words.",)
SAMPLED = Writing(beams=1, top_p=0.9, most=300, repetition_penalty=1.05)  # demo.py
# A-OKVQA and GQA; hallucinated objects of long and of short descriptions.
EVALS = (
    MultipleChoice(name="aokvqa", dataset="aokvqa-val", prompts=CHOICE_PROMPTS),
    VQA(name="gqa", dataset="gqa", prompts=ANSWER_PROMPTS, writing=Writing(beams=1, most=10)),
    CHAIR(name="long", dataset="coco-val2014", prompts=LONG_PROMPTS, writing=SAMPLED),
    CHAIR(
        name="short",
        dataset="coco-val2014",
        prompts=SHORT_PROMPTS,
        writing=replace(SAMPLED, most=60),
    ),
)


def system() -> System:
    """Vicuna-13B after BLIP-2's Q-Former: 32 tokens per image."""
    vision, bridge = EvaConfig(weights=BLIP2), QFormerConfig(weights=BLIP2)
    return _minigpt4(PrefixVLMConfig(vision=vision, bridge=bridge, language=VICUNA_13B))


def without_qformer() -> System:
    """LLaMA-2-7B-chat after groups of four patches: 64 tokens per image."""
    vision, bridge = EvaConfig(weights=BLIP2, select="patch"), ConcatConfig(weights=BLIP2)
    return _minigpt4(PrefixVLMConfig(vision=vision, bridge=bridge, language=LLAMA_2))


def _minigpt4(model: PrefixVLMConfig) -> System:
    align = Stage(
        name="align",
        model=model,
        trains={"bridge.projection.*": 1.0},
        losses=(LanguageModeling(),),
        data=Mixture(sources=PAIRS, template="plain", max_tokens=model.image_tokens + 34, lanes=64),
        budget=Budget(steps=20_000, batch=256, micro=64),
        optim=AdamW(peak_lr=1e-4, final_lr=8e-5, warmup=5_000 / 20_000, weight_decay=0.05),
        evals=(HeldOutLoss(name="coco", dataset="coco-karpathy-test", rows=1_000),),
    )
    polish = Stage(
        name="polish",
        model=model,
        trains={"bridge.projection.*": 1.0},
        losses=(LanguageModeling(),),
        data=Mixture(
            sources=(DESCRIPTIONS,),
            template="human",
            max_tokens=model.image_tokens + 224,
            lanes=12,
        ),
        budget=Budget(steps=400, batch=12, micro=12),
        # The release's rates, which it schedules over 1,000 steps
        optim=AdamW(peak_lr=3e-5, final_lr=1e-5, warmup=0.2, weight_decay=0.05),
        starts_from="align",
        evals=EVALS,
        scoring=Scoring(prior=False),  # its release ranks candidates by their loss
    )
    return System(name="minigpt4", paper="arXiv:2304.10592", stages=(align, polish))
