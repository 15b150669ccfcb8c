"""MiniGPT-4 (Zhu et al. 2023, arXiv:2304.10592): one matrix between BLIP-2's frozen eyes and a frozen Vicuna.

align    the matrix learns captions, without a prompt                                      (3.1)
polish   and then to describe at length and in whole sentences when it is asked            (3.2, 3.3)

bridgework train minigpt4           Vicuna-13B: 4 x A100-80G for 10 h, then one for 7 minutes (3.1, 3.3)
bridgework train minigpt4 --tiny    a laptop: seconds
minigpt4:without_qformer puts four patches side by side into the matrix (the release's LLaMA-2). The pairs of polish are
5,000 images of CC as align described them, rewritten by ChatGPT and checked by hand: 3,500 stayed (3.2).
Departs from the release: Vicuna 1.1, whose weights are complete (v0 exists as a difference to LLaMA). The paper's tests
of memes, recipes, advertisements and poems are judged by people, and are not among the evaluations.
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
QFORMER = QFormerConfig(weights=BLIP2)
LLAMA_2 = LanguageConfig(
    arch="llama", width=4096, depth=32, heads=32, kv_heads=32, ffn=11008, vocab=32000, context=4096,
    tokenizer="meta-llama/Llama-2-7b-chat-hf", weights="meta-llama/Llama-2-7b-chat-hf",
)  # fmt: skip
PAIRS = (  # drawn 115 to 14 (the release's configuration)
    Source(name="laion", dataset="blip-laion", rows=115_000_000),
    Source(name="cc_sbu", dataset="blip-cc-sbu", rows=14_000_000),
)
INSTRUCTIONS = (  # 3.3 names the first two
    "Describe this image in detail.", "Could you describe the contents of this image for me?",
    "Look at this picture and tell me what you notice.", "Please give a detailed account of what is in the picture.",
)  # fmt: skip

ASKED = "Question: {} Answer with a word or two:"
DRAWN = Writing(beams=1, top_p=0.9, most=300, repetition_penalty=1.05)  # demo.py
JUDGES = (  # AOK-VQA and GQA; hallucinated objects of long and of short descriptions
    MultipleChoice(name="aokvqa", dataset="aokvqa-val", prompts=("Question: {} Options: {options}. Answer:",)),
    VQA(name="gqa", dataset="gqa", prompts=(ASKED,), writing=Writing(beams=1, most=10)),
    CHAIR(name="long", dataset="coco-val2014", prompts=("Please describe this image as detailed as possible.",),
          writing=DRAWN),
    CHAIR(name="short", dataset="coco-val2014", writing=replace(DRAWN, most=60),
          prompts=("Please describe the image shortly and precisely, in less than 20 words.",)),
)  # fmt: skip


def system() -> System:
    return _minigpt4(
        PrefixVLMConfig(vision=EvaConfig(weights=BLIP2), bridge=QFORMER, language=VICUNA_13B)
    )


def without_qformer() -> System:
    patches = EvaConfig(weights=BLIP2, select="patch")
    return _minigpt4(
        PrefixVLMConfig(vision=patches, bridge=ConcatConfig(weights=BLIP2), language=LLAMA_2)
    )


def _minigpt4(model: PrefixVLMConfig) -> System:
    align = Stage(
        name="align", model=model, trains={"bridge.projection.*": 1.0}, losses=(LanguageModeling(),),
        data=Mixture(sources=PAIRS, template="plain", max_tokens=model.image_tokens + 34, lanes=64),
        budget=Budget(steps=20_000, batch=256, micro=64),
        optim=AdamW(peak_lr=1e-4, final_lr=8e-5, warmup=5_000 / 20_000, weight_decay=0.05),
        evals=(HeldOutLoss(name="coco", dataset="coco-karpathy-test", rows=1_000),),
    )  # fmt: skip
    described = Source(
        name="cc_sbu_align", dataset="minigpt4-align", rows=3_500, prompts=INSTRUCTIONS
    )
    polish = Stage(
        name="polish", model=model, trains={"bridge.projection.*": 1.0}, losses=(LanguageModeling(),),
        data=Mixture(sources=(described,), template="human", max_tokens=model.image_tokens + 224, lanes=12),
        budget=Budget(steps=400, batch=12, micro=12), starts_from="align",
        optim=AdamW(peak_lr=3e-5, final_lr=1e-5, warmup=0.2, weight_decay=0.05),  # the release's, over its 1,000 steps
        evals=JUDGES, scoring=Scoring(prior=False),  # its release ranks candidates by their loss
    )  # fmt: skip
    return System(name="minigpt4", paper="arXiv:2304.10592", stages=(align, polish))
