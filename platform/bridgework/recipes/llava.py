"""LLaVA (Liu et al. 2023, arXiv:2304.08485; 1.5: arXiv:2310.03744): a projector between a CLIP ViT and a chat LM.

align      the projector learns to turn patches into words the frozen LM understands      (1.5: 558K captions)
instruct   projector and LM learn to follow instructions about images                     (1.5: 665K conversations)

bridgework train llava           1.5-7B as published: 8 x A100-80G, 3.5 h + 10 h (the authors' README)
bridgework train llava --tiny    a laptop: a minute
llava:v1 is the first LLaVA, llava:science_qa its fine-tune for ScienceQA (2304.08485, 5.2).
Departs from the release: the loss of a batch is the mean over all its answer tokens, whatever the number of workers.
"""

from dataclasses import replace

from bridgework.evaluation import Writing, WrittenChoice
from bridgework.losses import LanguageModeling
from bridgework.models import LinearConfig, MLPConfig, PrefixVLMConfig
from bridgework.recipes._llava_next import next
from bridgework.recipes._llava_parts import CAPTIONS, CLIP_L, JUDGES, MIX_665K, VICUNA_7B
from bridgework.recipes._llava_quickstart import quickstart
from bridgework.system import AdamW, Budget, Mixture, Source, Stage, System, ZeRO

__all__ = ["next", "quickstart", "science_qa", "system", "v1"]
LETTERED = ("{}\nOptions: {OPTIONS}",)


def system() -> System:
    """LLaVA-1.5 7B: 336 px, a two-layer MLP."""
    model = PrefixVLMConfig(vision=CLIP_L, bridge=MLPConfig(depth=2), language=VICUNA_7B)
    align = Stage(
        name="align", model=model, trains={"bridge.*": 1.0}, losses=(LanguageModeling(),),
        data=Mixture(sources=(CAPTIONS,), template="plain"),
        budget=Budget(steps=2_180, batch=256, micro=32), optim=AdamW(peak_lr=1e-3), zero=ZeRO(stage=2),
    )  # fmt: skip
    conversations = tuple(
        Source(name=n, dataset=f"llava-{n}", rows=rows) for n, rows in MIX_665K.items()
    )
    instruct = Stage(
        name="instruct", model=model, trains={"bridge.*": 1.0, "language.*": 1.0}, losses=(LanguageModeling(),),
        data=Mixture(sources=conversations, template="v1"),
        budget=Budget(steps=5_197, batch=128, micro=16), optim=AdamW(peak_lr=2e-5), zero=ZeRO(stage=3),
        starts_from="align", evals=JUDGES,
    )  # fmt: skip
    return System(name="llava", paper="arXiv:2310.03744", stages=(align, instruct))


def v1() -> System:
    """The first LLaVA: 224 px, one linear layer, 595K captions, 158K conversations for three epochs."""
    model = PrefixVLMConfig(
        vision=replace(CLIP_L, image_size=224, fit="crop", weights="openai/clip-vit-large-patch14"),
        bridge=LinearConfig(),
        language=replace(
            VICUNA_7B,
            context=2048,
            tokenizer="lmsys/vicuna-7b-v1.1",
            weights="lmsys/vicuna-7b-v1.1",
        ),
    )
    align, instruct = system().stages
    captions = Source(name="cc595k", dataset="llava-cc595k", rows=595_375)
    align = replace(
        align, model=model, data=replace(align.data, sources=(captions,)),
        budget=Budget(steps=4_651, batch=128, micro=16), optim=AdamW(peak_lr=2e-3),
    )  # fmt: skip
    conversations = Source(name="llava", dataset="llava-llava", rows=158_000)
    instruct = replace(
        instruct, model=model, data=replace(instruct.data, sources=(conversations,), lanes=32),
        budget=Budget(steps=14_812, batch=32, micro=4), evals=(),
    )  # fmt: skip
    return System(name="llava", paper="arXiv:2304.08485", stages=(align, instruct))


def science_qa() -> System:
    """The first LLaVA, from its aligned projector: 12 epochs of reasons first and then the answer (5.2)."""
    align, instruct = v1().stages
    questions = Source(
        name="scienceqa", dataset="scienceqa-train", rows=12_726, prompts=LETTERED
    )  # solutions=true
    judges = (
        WrittenChoice(name="scienceqa", dataset="scienceqa-test", rows=4_241, prompts=LETTERED,
                      writing=Writing(beams=1, most=512)),
    )  # fmt: skip
    tune = replace(
        instruct, name="science_qa", data=replace(instruct.data, sources=(questions,), lanes=64), evals=judges,
        budget=Budget(steps=12 * 12_726 // 128, batch=128, micro=16),  # 16 on each of 8 GPUs (finetune_sqa.sh)
    )  # fmt: skip
    return System(name="llava", paper="arXiv:2304.08485", stages=(align, tune))
