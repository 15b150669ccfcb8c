"""InstructBLIP's page: its 26 datasets, their prompts and shares, and one tiny step."""

import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bridgework.data.plan.shares import requested
from bridgework.data.reader import ReaderConfig, local
from bridgework.data.samples import Part
from bridgework.data.templates import TEMPLATES
from bridgework.data.tokenization import SampleEncoder, load_tokenizer
from bridgework.evaluation import VQA, Captions, MultipleChoice, YesNo
from bridgework.inference.pipeline import Pipeline
from bridgework.models.qformer import is_text
from bridgework.recipes import instructblip
from bridgework.system import Mixture, Scoring, Source, load
from tests.models.examples import pixels
from tests.recipes.test_blip2 import one_step

TASKS = {
    "CAPTION": set(), "CAPTION_TEXT": {"{ocr}"}, "ANSWER": {"{}"}, "ANSWER_TEXT": {"{}", "{ocr}"},
    "ANSWER_KNOWLEDGE": {"{}"}, "CHOOSE": {"{}", "{options}"}, "ASK": {"{}"},
}  # fmt: skip


def test_13_datasets_train_and_13_others_are_held_out() -> None:
    held_in, held_out = (
        {source.name for source in instructblip.HELD_IN},
        {judge.name for judge in instructblip.HELD_OUT},
    )
    assert (len(held_in), len(held_out)) == (13, 13) and not held_in & held_out
    stage = load("instructblip")["instruct"]
    datasets = {source.dataset for source in stage.data.sources}
    assert (
        not datasets & {e.dataset for e in stage.evals}
        and {e.name for e in stage.evals} == held_out
    )


def test_held_out_datasets_have_the_papers_metric_and_length_penalty() -> None:
    stage = load("instructblip")["instruct"]
    kinds = {
        kind: {judge.name for judge in stage.evals if type(judge) is kind}
        for kind in (Captions, VQA, MultipleChoice, YesNo)
    }
    assert kinds == {
        Captions: {"nocaps", "flickr30k"},  # CIDEr
        VQA: {"gqa", "vsr", "textvqa", "vizwiz", "msvd_qa", "msrvtt_qa", "ivqa"},
        MultipleChoice: {"iconqa", "scienceqa", "visdial"},  # ranked: accuracy, and MRR
        YesNo: {"hateful_memes"},  # AUC
    }
    for judge in stage.evals:
        if isinstance(judge, VQA):
            assert (judge.writing.beams, judge.writing.length_penalty) == (5, -1.0)
        if isinstance(judge, Captions):
            assert (judge.writing.least, judge.writing.most, judge.writing.length_penalty) == (
                10,
                80,
                1.0,
            )
        if isinstance(judge, MultipleChoice | YesNo):
            assert judge.scoring is None  # the stage's default: the plain log-likelihood
    assert stage.scoring == Scoring(prior=False)


def test_every_tiny_eval_runs_on_the_tiny_model(home: Path) -> None:
    stage = load("instructblip").tiny()["instruct"]
    torch.manual_seed(0)
    pipe = Pipeline(stage.model.build().eval(), stage)
    for judge in {type(judge): judge for judge in stage.evals}.values():
        result = judge.run(pipe, home)
        assert all(math.isfinite(value) for value in result.metrics.values())
        assert {name.partition(".")[2] for name in result.metrics} == set(judge.better)


@pytest.mark.parametrize(("task", "places"), TASKS.items())
def test_each_task_has_10_to_15_prompts_with_its_placeholders(task: str, places: set[str]) -> None:
    prompts: tuple[str, ...] = getattr(instructblip, task)
    assert 10 <= len(prompts) <= 15 and len(set(prompts)) == len(prompts)
    for prompt in prompts:
        assert {place for place in ("{}", "{ocr}", "{options}") if place in prompt} == places, (
            prompt
        )
        assert (
            all(prompt.count(place) <= 1 for place in ("{}", "{ocr}", "{options}"))
            and len(prompt) < 100
        ), prompt
        assert not re.search(r"[.:?!][A-Z]", prompt), f"a comma is missing in {prompt}"


def test_shares_are_proportional_to_the_square_root_of_the_size() -> None:
    sources = tuple(Source(name=f"s{i}", dataset="x") for i in range(3))
    weights = requested(Mixture(sources=sources, alpha=0.5), [1, 4, 9])
    assert [float(w / sum(weights)) for w in weights] == pytest.approx([1 / 6, 1 / 3, 1 / 2])


def test_two_datasets_have_a_manual_weight() -> None:
    data = load("instructblip")["instruct"].data
    assert data.alpha == 0.5 and {s.name: s.factor for s in data.sources if s.factor != 1} == {
        "okvqa": 2.0, "aokvqa": 0.5,
    }  # fmt: skip
    assert data.template in TEMPLATES


def test_text_layers_of_the_bridge_train_only_with_the_instruction(
    home: Path,
) -> None:
    aware = one_step(load("instructblip").tiny()["instruct"], home)
    unaware = one_step(load("instructblip:without_instruction").tiny()["instruct"], home)
    assert {n.split(".")[0] for n in aware} == {"bridge"}
    assert any(is_text(n.removeprefix("bridge.")) for n in aware)
    assert not any(is_text(n.removeprefix("bridge.")) for n in unaware)


def test_instruct_starts_from_blip2s_generate() -> None:
    for variant in ("instructblip", "instructblip:vicuna_7b"):
        system = load(variant)
        assert [s.name for s in system.stages] == ["represent", "generate", "instruct"]
        assert system["instruct"].model.language == system["generate"].model.language
        assert system["instruct"].starts_from == "generate"


def test_long_instruction_keeps_its_end_and_an_empty_one_is_two_tokens() -> None:
    stage = load("instructblip").tiny()["instruct"]
    streams = SampleEncoder.of(stage.model, stage.data)
    ids = streams.instruction([Part("user", image=0), Part("user", text="word " * 100 + "the end")])
    tokenizer = load_tokenizer("bytes")
    assert len(ids) == 128 and tokenizer.decode(ids, skip_special_tokens=True).endswith("the end")
    assert len(streams.instruction([Part("user", image=0)])) == 2


def test_empty_instruction_is_read_and_32_vectors_reach_the_language_model() -> None:
    stage = load("instructblip").tiny()["instruct"]
    model, streams = stage.model.build().eval(), SampleEncoder.of(stage.model, stage.data)
    seen = []
    for text in ("", "What is it?", "word " * 60):
        instruction = torch.tensor(
            [streams.instruction([Part("user", image=0), Part("user", text=text)])]
        )
        with torch.no_grad():
            seen.append(model.images(pixels(1), None, instruction))
    assert {tuple(vectors.shape) for vectors in seen} == {
        (1, stage.model.image_tokens, stage.model.language.width)
    }
    assert all(bool(vectors.isfinite().all()) for vectors in seen) and not torch.equal(
        seen[0], seen[1]
    )
    assert load("instructblip")["instruct"].model.image_tokens == 32


def test_prompts_of_a_task_are_drawn_uniformly(home: Path) -> None:
    stage = load("instructblip").tiny()["instruct"]
    source = replace(stage.data.sources[0], prompts=instructblip.CAPTION)
    stage = replace(
        stage, data=replace(stage.data, sources=(source,)), budget=replace(stage.budget, steps=150)
    )
    tokenizer = load_tokenizer("bytes")
    rows = [
        row
        for rows in local(ReaderConfig.of(stage, home), rank=0, world=1, start=0)
        for row in rows
    ]
    texts = [tokenizer.decode([i for i in row.ids if i >= 0]) for row in rows]
    counts = Counter(prompt for text in texts for prompt in instructblip.CAPTION if prompt in text)
    assert sum(counts.values()) == len(rows) == 1_200 and len(counts) == len(instructblip.CAPTION)
    mean, share = len(rows) / len(counts), 1 / len(counts)
    spread = (len(rows) * share * (1 - share)) ** 0.5
    assert all(abs(count - mean) < 4 * spread for count in counts.values()), counts
