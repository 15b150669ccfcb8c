"""InstructBLIP (Dai et al. 2023, arXiv:2305.06500): BLIP-2 whose queries hear the instruction as they look.

represent, generate   as in BLIP-2, for the language model at hand                         (2.6)
instruct              13 datasets as instructions, in proportion to the root of their size (2.1, 2.4)

bridgework train instructblip           Flan-T5-XL: after BLIP-2's cost, 16 x A100-40G for up to 1.5 days (2.6)
bridgework train instructblip --tiny    a laptop: seconds
instructblip:without_instruction hides it from the Q-Former (table 2), instructblip:vicuna_7b swaps the language model.
Departs from the paper: prompts and the two manual weights are ours (the weights are not published); of the 13 held-out
datasets MSVD-QA and MSRVTT-QA are judged by written answers, not by ranking those of their training sets; the last
checkpoint is kept, not the best of every 3,000.
"""

from dataclasses import replace

from bridgework.losses import LanguageModeling
from bridgework.models import LanguageConfig, PrefixVLMConfig
from bridgework.recipes import blip2
from bridgework.recipes._backbones import FLAN_XL, VICUNA_7B, VIT_G
from bridgework.recipes._instructions import HELD_IN, HELD_OUT
from bridgework.system import AdamW, Budget, Mixture, Scoring, Stage, System

STEPS = 60_000  # 2.6: at most, chosen by validation


def system() -> System:
    """Flan-T5-XL, 3B."""
    return _instructblip(blip2.flan_t5(), FLAN_XL, batch=192)


def vicuna_7b() -> System:
    return _instructblip(blip2.vicuna_7b(), VICUNA_7B, batch=128)


def without_instruction() -> System:
    return _instructblip(blip2.flan_t5(), FLAN_XL, batch=192, aware=False)


def _instructblip(
    start: System, language: LanguageConfig, *, batch: int, aware: bool = True
) -> System:
    instruct = Stage(
        name="instruct",
        model=PrefixVLMConfig(
            vision=VIT_G, bridge=replace(blip2.BRIDGE, text=aware), language=language
        ),
        trains={"bridge.*": 1.0},
        losses=(LanguageModeling(),),
        data=Mixture(
            sources=HELD_IN, alpha=0.5, template="answer", max_tokens=32 + 128 + 256, lanes=16
        ),
        budget=Budget(steps=STEPS, batch=batch, micro=batch // 16),
        optim=AdamW(peak_lr=1e-5, warmup=1_000 / STEPS, weight_decay=0.05),
        starts_from="generate",
        evals=HELD_OUT,
        scoring=Scoring(prior=False),  # candidates are ranked by their log-likelihood (2.5)
    )
    return System(name="instructblip", paper="arXiv:2305.06500", stages=(*start.stages, instruct))
