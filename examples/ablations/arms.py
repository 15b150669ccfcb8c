"""The seven ablations: what each arm trains, how it is judged, and what the paper reports.

All use the real pairs of examples/data and EfficientNet-Lite0 at 128 px. The language model is
SmolLM2-135M, except for `instruction`, whose own tiny one is trained from scratch.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from benchmarks.capfilt import MISMATCHED, swapped
from bridgework.config import override
from bridgework.curation import CapFilt
from bridgework.data.dataset import open_dataset, write
from bridgework.data.samples import Part, Sample
from bridgework.evaluation import HeldOutLoss, Retrieval
from bridgework.losses import Contrastive, LanguageModeling, Matching
from bridgework.models import (
    CrossAttentionVLMConfig,
    EfficientNetConfig,
    GatesConfig,
    LanguageConfig,
    MEDConfig,
    MEDTextConfig,
    MLPConfig,
    PrefixVLMConfig,
    QFormerConfig,
    ResamplerConfig,
)
from bridgework.recipes import llava
from bridgework.system import (
    AdamW,
    Budget,
    EvalSpec,
    Mixture,
    Source,
    Stage,
    System,
    ZeRO,
    load,
)
from bridgework.training.driver import train
from bridgework.training.options import RunOptions

DATA = Path("examples/data")
PREFIX = "ablations"  # of the names of datasets and runs
CPU = ZeRO(stage=0, precision="fp32")
VISION = EfficientNetConfig(image_size=128, grid=1)
STYLE = Retrieval(name="retrieval", dataset=f"{DATA}/heldout_style")
CONCEPTS = Retrieval(name="retrieval", dataset=f"{DATA}/heldout_concepts")
LIKELIHOOD = HeldOutLoss(name="heldout", dataset=f"{DATA}/heldout_concepts", rows=64)
NAME, GROUP = "What is it?", "What kind of thing is it?"


@dataclass(frozen=True)
class Arm:
    """One side of an ablation: its system, the stages that it trains, and the paper's result."""

    system: System
    stages: tuple[str, ...]
    reported: str = ""  # of this arm against the first one
    # + the paper reports the first arm as better; "" it does not compare the two
    sign: Literal["+", ""] = "+"


@dataclass(frozen=True)
class Ablation:
    """Arms of one choice. The first one is the paper's choice."""

    name: str
    title: str
    paper: str
    about: str  # the setting here, and how it departs from the paper's
    arms: Mapping[str, Arm]
    metric: str
    higher: bool
    rows: int  # of the evaluation

    def system(self, arm: str, seed: int, share: float = 1.0) -> System:
        """Return the system of an arm with this seed and this share of the steps."""
        chosen = self.arms[arm]
        changes: dict[str, Any] = {"stages.*.seed": seed}
        for stage in chosen.system.stages:
            steps = max(2, round(stage.budget.steps * share))
            changes[f"stages.{stage.name}.budget.steps"] = steps
        return override(chosen.system, changes)


@cache
def ablations() -> tuple[Ablation, ...]:
    """Return all ablations."""
    return (
        _sampling(),
        _instruction(),
        _bridge(),
        _resampler(),
        _gates(),
        _stage1(),
        _capfilt(),
    )


# --- arms --------------------------------------------------------------------------------------


def _sampling() -> Ablation:
    groups = [Source(name=group, dataset=f"{PREFIX}-{group}") for group in EMOJI_GROUPS.values()]
    sources = (Source(name="clipart", dataset=f"{DATA}/clipart"), *groups)
    table = "2305.06500, table 2: 94.1 with, 92.6 without balanced sampling (held-in average)"

    def arm(alpha: float, reported: str = "", sign: Literal["+", ""] = "+") -> Arm:
        warm = _warm(STYLE)
        data = replace(warm.data, sources=sources, alpha=alpha)
        return Arm(_system(replace(warm, data=data)), ("warm",), reported, sign)

    return Ablation(
        "sampling",
        "Sources by the square root of their size, equally, or by size",
        "InstructBLIP",
        "Nine sources, from 70 to 1,866 pairs: clip art, and each group of the emoji. The bridge "
        "is trained by contrast and judged by retrieval. The paper tunes a Q-Former on 13 datasets.",
        {
            "sqrt": arm(0.5),
            "uniform": arm(0.0, table),
            "proportional": arm(1.0, "not compared by name", ""),
        },
        "retrieval.image_to_text_r10",
        higher=True,
        rows=STYLE.rows,
    )


def _instruction() -> Ablation:
    def arm(aware: bool, reported: str = "") -> Arm:
        bridge = QFormerConfig(
            queries=1, width=64, depth=2, heads=4, ffn=128, vocab=320, positions=128, dropout=0.0,
            tokenizer="bytes", text=aware,
        )  # fmt: skip
        language = LanguageConfig(
            width=96, depth=2, heads=4, kv_heads=4, ffn=192, vocab=320, context=192,
            tokenizer="bytes",
        )  # fmt: skip
        model = PrefixVLMConfig(vision=replace(VISION, grid=4), bridge=bridge, language=language)
        sources = (Source(name="questions", dataset=f"{PREFIX}-questions"),)
        stage = Stage(
            name="instruct",
            model=model,
            trains={"bridge.*": 1.0, "language.*": 1.0},
            losses=(LanguageModeling(),),
            data=Mixture(sources=sources, template="answer", max_tokens=128, lanes=16),
            budget=Budget(steps=160, batch=64, micro=64),
            optim=AdamW(peak_lr=3e-3, weight_decay=0.05),
            zero=CPU,
            evals=(replace(LIKELIHOOD, dataset=f"{PREFIX}-heldout-questions", rows=96),),
        )
        return Arm(_system(stage), ("instruct",), reported)

    return Ablation(
        "instruction",
        "A Q-Former that reads the instruction, or one that does not",
        "InstructBLIP",
        "Two questions about each emoji: its name, and its group. One query of a small Q-Former, "
        "and a language model of bytes that is trained too. The paper's language model is frozen "
        "and reads the instruction in both arms, as here.",
        {
            "aware": arm(True),
            "not aware": arm(
                False, "2305.06500, table 2: 94.1 with, 89.8 without (held-in average)"
            ),
        },
        "heldout.loss",
        higher=False,
        rows=96,
    )


def _bridge() -> Ablation:
    def arm(kind: str, reported: str = "") -> Arm:
        warm = override(_warm(STYLE), {"model.bridge": kind})
        return Arm(_system(warm), ("warm",), reported)

    return Ablation(
        "bridge",
        "A two-layer MLP or a linear layer",
        "LLaVA-1.5",
        "The bridge is trained by contrast and judged by retrieval. In the paper it is trained by "
        "the loss of captions, and judged by answers.",
        {
            "mlp": arm("mlp(depth=2)"),
            "linear": arm("linear", "2310.03744, 3.3: the MLP is better; no figure of it alone"),
        },
        "retrieval.image_to_text_r10",
        higher=True,
        rows=STYLE.rows,
    )


def _resampler() -> Ablation:
    def arm(bridge: Any, grid: int, reported: str = "", sign: Literal["+", ""] = "+") -> Arm:
        changes = {"model.vision": replace(VISION, grid=grid), "model.bridge": bridge}
        return Arm(_system(override(_warm(STYLE), changes)), ("warm",), reported, sign)

    resampler = ResamplerConfig(latents=4, depth=1, heads=4, head_width=32, ffn=1)
    return Ablation(
        "resampler",
        "A resampler or an MLP, at equal tokens",
        "BLIP-3 (xGen-MM)",
        "Four tokens each: four latents that read 16 cells, or an MLP on the average of each "
        "quarter of the image. Trained by contrast and judged by retrieval.",
        {
            "resampler": arm(resampler, 4),
            "mlp": arm(
                MLPConfig(depth=2), 2, "2408.08872 chooses the resampler, without such a table", ""
            ),
        },
        "retrieval.image_to_text_r10",
        higher=True,
        rows=STYLE.rows,
    )


def _gates() -> Ablation:
    def arm(alpha: Literal["scalar", "none"], reported: str = "") -> Arm:
        bridge = ResamplerConfig(latents=4, depth=1, heads=4, head_width=32, ffn=1, project=False)
        gates = GatesConfig(every=10, heads=4, head_width=32, ffn=576, alpha=alpha)
        stage = Stage(
            name="train",
            model=CrossAttentionVLMConfig(
                vision=VISION, bridge=bridge, gates=gates, language=llava.QUICK_MODEL.language
            ),
            trains={"bridge.*": 1.0, "gates.*": 1.0, "extra.*": 5.0},  # learns to end
            losses=(LanguageModeling(),),
            data=Mixture(
                sources=_pairs(), alpha=0.5, template="interleaved", max_tokens=64, lanes=16
            ),
            budget=Budget(steps=12, batch=16, micro=16),
            optim=AdamW(peak_lr=1e-3, warmup=0.1, weight_decay=0.1),
            zero=CPU,
            evals=(replace(LIKELIHOOD, rows=32),),
        )
        return Arm(_system(stage), ("train",), reported)

    return Ablation(
        "gates",
        "Gates that start at zero, or none",
        "Flamingo",
        "Three cross-attention blocks in a frozen SmolLM2-135M, 12 steps. The paper trains 3B "
        "parameters for 500,000 steps.",
        {
            "gates": arm("scalar"),
            "no gates": arm(
                "none", "2204.14198, table 3 (iii): 70.7 with, 66.5 without (overall score)"
            ),
        },
        "heldout.loss",
        higher=False,
        rows=32,
    )


def _stage1() -> Ablation:
    warm, align, _ = load("llava:quickstart").stages
    small = {"model.vision": VISION}
    warm = override(replace(warm, evals=()), {**small, "budget.steps": 120})
    align = override(replace(align, evals=(LIKELIHOOD,)), {**small, "budget.steps": 12})
    alone = replace(align, starts_from=None)
    return Ablation(
        "stage1",
        "Representation learning before the generative stage, or none",
        "BLIP-2",
        "Stage 1 trains the bridge by contrast. Then bridge and adapters learn the captions with "
        "SmolLM2-135M for 12 steps. The paper's first stage has three losses and a Q-Former.",
        {
            "with stage 1": Arm(_system(warm, align), ("warm", "align")),
            "without": Arm(
                _system(alone),
                ("align",),
                "2301.12597, 4.3 and figure 5: much lower accuracy in zero-shot VQA",
            ),
        },
        "heldout.loss",
        higher=False,
        rows=LIKELIHOOD.rows,
    )


def _capfilt() -> Ablation:
    text = MEDTextConfig(
        width=64, depth=2, heads=4, ffn=128, vocab=260, context=64, dropout=0.0, tokenizer="bytes"
    )
    model = MEDConfig(vision=VISION, text=text, tasks=("caption",), embed=64)
    clean = Source(name="clean", dataset=f"{DATA}/emoji")
    captioner = Stage(
        name="captioner",
        model=model,
        trains={"decoder.*": 1.0, "heads.*": 1.0},
        losses=(LanguageModeling(),),
        data=Mixture(
            sources=(replace(clean, prompts=("a picture of",)),),
            template="prompted",
            max_tokens=48,
            lanes=16,
        ),
        budget=Budget(steps=200, batch=64, micro=64),
        optim=AdamW(peak_lr=2e-3, weight_decay=0.05),
        zero=CPU,
    )
    judge = replace(
        captioner,
        name="filter",
        model=replace(model, tasks=("contrast", "match")),
        trains={"text.*": 1.0, "heads.*": 1.0},
        losses=(Contrastive(), Matching(negatives="all", floor=0.0)),
        data=Mixture(sources=(clean,), template="caption", max_tokens=48, lanes=16),
        budget=Budget(steps=240, batch=64, micro=64),
    )
    web, made = f"{PREFIX}-web", "capfilt"
    warm = _warm(CONCEPTS)
    raw = replace(warm, data=replace(warm.data, sources=(Source(name="web", dataset=web),)))
    filtered = replace(
        warm,
        data=replace(warm.data, sources=(Source(name="web", dataset=made),)),
        curation=CapFilt(
            captioner="captioner",
            filter="filter",
            sources=(web,),
            makes=made,
            min_tokens=2,
            max_tokens=32,
            threshold=-2.0,  # as in examples/capfilt.py
        ),
    )
    return Ablation(
        "capfilt",
        "Web pairs as they are, or after CapFilt",
        "BLIP",
        f"Captioner and filter learn Twitter's emoji. The web is 300 drawings by Google, with "
        f"{MISMATCHED:.0%} of the captions moved to another drawing. Each arm trains a bridge on "
        "the web alone, by contrast, and is judged by retrieval of other concepts. The paper "
        "trains on human captions too.".replace("%", " %"),
        {
            "capfilt": Arm(_system(captioner, judge, filtered), ("captioner", "filter", "warm")),
            "raw": Arm(
                _system(raw),
                ("warm",),
                "2201.12086, table 1: TR@1 on COCO 80.6 with both, 78.4 without",
            ),
        },
        "retrieval.image_to_text_r10",
        higher=True,
        rows=CONCEPTS.rows,
    )


def _warm(evaluation: EvalSpec) -> Stage:
    """Return the first stage of the quick start: the bridge, by contrast with the captions."""
    warm = load("llava:quickstart")["warm"]
    return override(
        replace(warm, evals=(evaluation,)), {"model.vision": VISION, "budget.steps": 120}
    )


def _pairs() -> tuple[Source, ...]:
    return tuple(
        Source(name=name, dataset=f"{DATA}/{name}", rows=rows)
        for name, rows in (("clipart", 1_866), ("emoji", 1_117))
    )


def _system(*stages: Stage) -> System:
    return System(name="ablation", paper="-", stages=stages)


# --- runs --------------------------------------------------------------------------------------


def score(name: str, arm: str, seed: int, share: float, home: Path, threads: int) -> float:
    """Train one arm with one seed, unless it is finished, and return its metric."""
    ablation = next(a for a in ablations() if a.name == name)
    stages = ablation.arms[arm].stages
    result = train(
        ablation.system(arm, seed, share),
        home=home,
        run=f"{run_prefix(share)}/{name}/{arm.replace(' ', '-')}-{seed}",
        stages=stages,
        options=RunOptions(workers=0, threads=threads, features="cached"),
        console=Console(quiet=True),
    )
    return result[stages[-1]].metrics[ablation.metric]


def run_prefix(share: float) -> str:
    return PREFIX if share == 1 else f"{PREFIX}-{share:g}"


# --- data --------------------------------------------------------------------------------------

EMOJI_GROUPS = {
    "People & Body": "people",
    "Objects": "objects",
    "Travel & Places": "travel",
    "Smileys & Emotion": "smileys",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Symbols": "symbols",
    "Activities": "activities",
}


def write_data(home: Path) -> None:
    """Write the datasets that examples/data does not have, unless they exist."""
    emoji = list(open_dataset(f"{DATA}/emoji").samples())
    for label, name in EMOJI_GROUPS.items():
        _write(home, name, "emoji", [sample for sample in emoji if sample.labels[0] == label])
    _write(home, "questions", "emoji", _questions(emoji))
    concepts = open_dataset(f"{DATA}/heldout_concepts").samples()
    _write(home, "heldout-questions", "heldout_concepts", _questions(concepts))
    web, _ = swapped(list(open_dataset(f"{DATA}/heldout_style").samples()))
    _write(home, "web", "heldout_style", web)


def _questions(samples: Iterable[Sample]) -> list[Sample]:
    """Return two questions about each drawing, in an order drawn by a fixed seed."""
    asked = []
    for sample in samples:
        for name, question, answer in (
            ("name", NAME, sample.text),
            ("group", GROUP, sample.labels[0].lower()),
        ):
            parts = (
                Part("user", image=0),
                Part("user", text=question),
                Part("assistant", text=answer),
            )
            asked.append(replace(sample, key=f"{sample.key}/{name}", parts=parts))
    random.Random(0).shuffle(asked)
    return asked


def _write(home: Path, name: str, source: str, samples: Sequence[Sample]) -> None:
    folder = home / "datasets" / f"{PREFIX}-{name}"
    if not (folder / "manifest.json").exists():
        licenses = {sample.license for sample in samples} - {None}
        about = ", ".join(sorted(map(str, licenses))) or f"see {DATA}/{source}"
        write(samples, str(folder), source=source, license=about, made_by=__name__)
