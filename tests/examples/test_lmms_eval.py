"""lmms-eval on a served model: its requests ask what `bridgework eval` asks, and the figures agree."""

import base64
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from bridgework import artifacts
from bridgework.data.dataset import open_dataset
from bridgework.data.images import load_image
from bridgework.data.samples import Part, Sample
from bridgework.evaluation.base import about_image, question_of
from bridgework.evaluation.captioning import cider
from bridgework.evaluation.hallucination import parse_yes_no
from bridgework.evaluation.multiple_choice import parse_choice
from bridgework.evaluation.safety import Refusals
from bridgework.inference.pipeline import Pipeline
from bridgework.serving.options import Options, RequestLimits
from bridgework.serving.protocol import ChatRequest
from bridgework.serving.requests import read_conversation, sampling_arguments
from bridgework.system import load
from examples.lmms_eval import rows
from examples.lmms_eval.__main__ import EVALUATIONS, VARIABLE, task
from tests.house import source

ROWS = 6


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return rows.write_all(tmp_path_factory.mktemp("lmms-eval"), ROWS)


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    stage = load("llava").tiny()["instruct"]
    torch.manual_seed(0)
    return Pipeline(stage.model.build().eval(), stage)


@pytest.fixture(scope="module")
def utils() -> ModuleType:
    """Return the functions of the task files, as lmms-eval imports them: by their path."""
    spec = importlib.util.spec_from_file_location("drawings", rows.TASKS / "utils.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def request(form: str, doc: Mapping[str, Any], utils: ModuleType) -> dict[str, Any]:
    """Return the request of lmms-eval 0.7.3 for a document.

    The user turn is that of `ConfigurableMessagesTask`: the images, then the text. Its
    `ChatMessages.to_openai_messages` writes an image again as PNG, and `async_openai` adds the
    other fields.
    """
    given = task(form)
    common = task_defaults()
    content: list[dict[str, Any]] = []
    for image in getattr(utils, common["doc_to_visual"].removeprefix("utils."))(doc):
        stream = io.BytesIO()
        image.save(stream, format="PNG")
        url = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    content.append({"type": "text", "text": doc[common["doc_to_text"]]})
    return {
        "messages": [{"role": "user", "content": content}],
        "model": "drawings",
        "max_tokens": given["generation_kwargs"]["max_new_tokens"],
        "temperature": float(given["generation_kwargs"]["temperature"]),
    }


def task_defaults() -> dict[str, Any]:
    lines = (rows.TASKS / "_drawings").read_text().splitlines()
    pairs = (line.split(": ") for line in lines if not line.startswith("#"))
    return {key: value.removeprefix("!function ") for key, value in pairs}


def asked(form: str, sample: Sample, pipeline: Pipeline) -> list[Part]:
    """Return the conversation of bridgework's evaluation about a row."""
    if form == "caption":
        return about_image(pipeline, (rows.CAPTION,))
    return question_of(pipeline, sample, None)


@pytest.mark.parametrize("form", rows.FORMS)
def test_a_request_of_lmms_eval_asks_what_the_evaluation_asks(
    form: str, written: dict[str, Path], tiny: Pipeline, utils: ModuleType
) -> None:
    samples = list(open_dataset(str(written[form])).samples())
    docs = pq.read_table(written[form].parent / "tasks" / f"drawings_{form}.parquet").to_pylist()
    assert [doc["key"] for doc in docs] == [sample.key for sample in samples]
    assert len(docs) == ROWS
    for doc, sample in zip(docs, samples, strict=True):
        body = ChatRequest.model_validate(request(form, doc, utils))
        parts, images = read_conversation(body.messages, RequestLimits(), tiled=False)
        own = asked(form, sample, tiny)
        theirs, ours = (tiny.inputs.encode(one, answer=False) for one in (parts, own))
        assert theirs.ids == ours.ids
        pixels = tiny.stage.model.pixels
        assert isinstance(images[0], bytes)
        assert np.array_equal(load_image(images[0], pixels), load_image(sample.images[0], pixels))
        sampling = sampling_arguments(body, Options(model="drawings"))
        assert sampling["temperature"] == 0 and sampling["top_p"] == 1
        assert sampling["max_new_tokens"] == task(form)["generation_kwargs"]["max_new_tokens"]


def test_every_figure_of_a_task_is_compared() -> None:
    assert set(EVALUATIONS) == set(rows.FORMS)
    for name, form in EVALUATIONS.items():
        assert form.figures == tuple(one["metric"] for one in task(name)["metric_list"])


def test_test_rows_have_both_kinds_of_answers(written: dict[str, Path]) -> None:
    samples = {name: list(open_dataset(str(place)).samples()) for name, place in written.items()}
    assert {one.parts[-1].text for one in samples["yes_no"]} == {"yes", "no"}
    assert {"refuse" in one.labels for one in samples["refusal"]} == {True, False}
    trained = {one.key.split("/")[0] for one in samples["train"]}
    assert trained == set(rows.FORMS)


ANSWERS = (
    "yes", "No.", "Yes. It is not.", "there isn't one", "not sure", "", "b", "(B)", "B. a sun",
    "The answer is c.", "the answer is: (a)", "b c", "a sun", "A Sun.", "bee", "zebra",
    "I can't help with that.", "I\u2019m sorry, no", "a sun's rays, isn't it?", "U.S. flag",
)  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS)
def test_both_scores_of_an_answer_are_equal(answer: str, utils: ModuleType) -> None:
    options = ["a moon", "a sun", "a star", "an owl"]
    doc = {"candidates": options, "answer": "b", "labels": ["refuse"]}
    chosen = parse_choice(answer, options)
    assert utils.choice(doc, [answer]) == {"accuracy": chosen == 1, "unanswered": chosen is None}
    for truth in ("yes", "no"):
        scored = utils.yes_no({"answer": truth}, [answer])
        assert scored["accuracy"] == (parse_yes_no(answer) == (truth == "yes"))
    (setting,) = EVALUATIONS["refusal"].settings
    ours = Refusals(dataset="none", phrases=tuple(json.loads(setting.partition("=")[2])))
    assert utils.refusal(doc, [answer])["refused"] == (ours._is_refusal(answer), 1.0)


def test_both_scores_of_captions_are_equal(utils: ModuleType) -> None:
    true = ["a red sun", "the moon's face", "it isn't an owl", "U.S. flag, small"]
    said = ["a sun", "a moon's face", "it isn't a star", "flag of the U.S."]
    ours = cider(said, [[text] for text in true]).mean()
    assert utils.cider(list(zip(said, true, strict=True))) == pytest.approx(ours, abs=1e-12)
    assert ours > 0.1


@pytest.mark.slow
@pytest.mark.skipif(
    VARIABLE not in os.environ,
    reason=f"{VARIABLE} names no environment of lmms-eval, see examples/lmms_eval/README.md",
)
def test_figures_of_lmms_eval_agree(tmp_path: Path) -> None:
    system = load("llava").tiny()
    torch.manual_seed(0)
    model = system["instruct"].model.build()
    artifacts.save(tmp_path / "model", model.state_dict(), system=system, stage="instruct")
    done = subprocess.run(
        [sys.executable, "-m", "examples.lmms_eval", "--model", str(tmp_path / "model"),
         "--rows", "6"],
        cwd=source.ROOT,
        env={**os.environ, "BRIDGEWORK_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=540,
    )  # fmt: skip
    log = tmp_path / "home" / "lmms_eval.log"
    assert done.returncode == 0, done.stdout + log.read_text()[-4000:]
    assert done.stdout.splitlines()[-1].endswith("30 of 30 answers equal")
    found = json.loads((tmp_path / "home" / "lmms_eval.json").read_text())
    for name, value in found["lmms_eval"].items():
        assert value == pytest.approx(found["bridgework"][name], abs=1e-9), name
