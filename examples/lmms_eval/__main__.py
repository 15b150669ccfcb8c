"""Evaluate a served model with lmms-eval and with bridgework: `python -m examples.lmms_eval`.

Five questions about every drawing (rows.py) go to the model in two ways: lmms-eval sends them to
the endpoint with its `async_openai` model, and `bridgework eval` asks the weights. The figures must
agree to 1e-9, and so must the answers. Without --model, `llava:quickstart` is trained on the
questions for a few minutes. README.md describes lmms-eval's own environment.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import yaml
from rich.table import Table

import bridgework as bw
from bridgework.errors import RunError
from bridgework.serving import launch
from bridgework.system import Source, System
from examples.lmms_eval.rows import CAPTION, FORMS, TASKS, write_all
from examples.report import Report, console, environment, run

VARIABLE = "LMMS_EVAL_VENV"  # its folder, if not .venv here
TOLERANCE = 1e-9
STEPS = {"warm": 100, "align": 60, "instruct": 120}
AT_ONCE = 4  # requests of lmms-eval


@dataclass(frozen=True)
class Form:
    """The evaluation of bridgework for a form of question, and its figures that are compared."""

    kind: str
    figures: tuple[str, ...]
    settings: tuple[str, ...] = ()


EVALUATIONS: Mapping[str, Form] = {
    "yes_no": Form("pope", ("accuracy", "precision", "recall", "f1")),
    "choice": Form("written_choice", ("accuracy", "unanswered")),
    "vqa": Form("vqa", ("accuracy",)),
    "caption": Form("captions", ("cider",), (f'prompts=["{CAPTION}"]',)),
    "refusal": Form(
        "refusals",
        ("refused", "over_refused"),
        ("""phrases=["i can't", "i cannot", "i'm sorry"]""",),
    ),
}


@dataclass(frozen=True)
class Answers:
    """Figures by (form, name), and answers by (form, key of the row)."""

    figures: dict[tuple[str, str], float]
    texts: dict[tuple[str, str], str]


def main(given: argparse.Namespace, report: Report) -> None:
    python = environment("lmms_eval", VARIABLE)
    # absolute, because lmms-eval is started in another folder
    folder = (report.home / "lmms_eval" / f"{given.rows}-rows").absolute()
    places = write_all(folder, given.rows)
    model = given.model
    if model is None:
        with report.part("train", "llava:quickstart on questions about emoji", 200):
            steps = {stage: given.steps or count for stage, count in STEPS.items()}
            results = bw.train(
                system(places["train"], steps), run="lmms-eval", home=report.home, console=console
            )
            model = results["instruct"].version or results["instruct"].artifact
    with report.part("lmms-eval", "async_openai against the endpoint", 100):
        theirs = ask_endpoint(python, str(model), folder, report.home)
    with report.part("bridgework", "bridgework eval of the same rows", 60):
        ours = ask_weights(str(model), folder, places, given.rows, report.home)
    conclude(report, theirs, ours)


def system(questions: Path, steps: Mapping[str, int]) -> System:
    """Return llava:quickstart with our questions in its last stage, and without evaluations."""
    quick = bw.load("llava:quickstart")
    instruct = quick["instruct"]
    source = Source(name="questions", dataset=str(questions))
    own = replace(instruct, data=replace(instruct.data, sources=(source,)))
    stages = tuple(
        replace(stage, evals=(), budget=replace(stage.budget, steps=steps[stage.name]))
        for stage in (*quick.stages[:-1], own)
    )
    return replace(quick, name="drawings", stages=stages)


def ask_endpoint(python: Path, model: str, folder: Path, home: Path) -> Answers:
    """Serve the model, and let lmms-eval send the questions to it. Raises RunError."""
    out = folder / "lmms-eval"
    shutil.rmtree(out, ignore_errors=True)
    port = launch.free_port()
    with bw.serve("chat", port=port, model=model, dev=True, home=str(home), cpus=0.5) as endpoint:
        url = f"{endpoint.address}/v1"
        served = httpx.get(f"{url}/models", trust_env=False).json()["data"][0]["id"]
        words = [
            *("--model", "async_openai"),
            *("--model_args", f"model={served},base_url={url},api_key=local,num_cpus={AT_ONCE}"),
            *("--tasks", ",".join(f"drawings_{form}" for form in FORMS)),
            *("--include_path", str(folder / "tasks")),
            *("--output_path", str(out), "--log_samples", "--batch_size", "1"),
        ]
        offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
        own = {"HF_HOME": str(folder / "hf"), "NO_PROXY": "*", "no_proxy": "*"}
        done = subprocess.run(
            [str(python), "-m", "lmms_eval", *words], cwd=folder, env=os.environ | offline | own
        )
    found = sorted(out.rglob("*_results.json"))
    if done.returncode or not found:
        raise RunError(
            f"lmms-eval ended with {done.returncode} and {len(found)} files of results. "
            f"Fix: see {home}/lmms_eval.log"
        )
    results = json.loads(found[-1].read_text())["results"]
    figures = {
        (name, figure): float(results[f"drawings_{name}"][f"{figure},none"])
        for name, form in EVALUATIONS.items()
        for figure in form.figures
    }
    texts = {}
    for name in FORMS:
        (file,) = out.rglob(f"*_samples_drawings_{name}.jsonl")
        keys = row_keys(folder / name)
        for line in map(json.loads, file.read_text().splitlines()):
            texts[name, keys[line["doc_id"]]] = line["filtered_resps"].strip()
    return Answers(figures, texts)


def ask_weights(
    model: str, folder: Path, places: Mapping[str, Path], rows: int, home: Path
) -> Answers:
    """Run `bridgework eval` on the same rows, greedy and with the tasks' limits of tokens."""
    file = folder / "answers.jsonl"
    command = [sys.executable, "-m", "bridgework.cli", "eval", model, "--json"]
    command += ["--samples", str(file)]
    for name, form in EVALUATIONS.items():
        command += ["--on", f"{form.kind}:{places[name]}"]
        for setting in (f"rows={rows}", *writing(name), *form.settings):
            command += ["--set", f"{form.kind}.{setting}"]
    env = os.environ | {"BRIDGEWORK_HOME": str(home)}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RunError(f"bridgework eval ended with {done.returncode}. Fix: see its lines above")
    printed = json.loads(done.stdout[done.stdout.index("{") :])
    figures = {
        (name, figure): float(printed[f"{form.kind}.{figure}"]["value"])
        for name, form in EVALUATIONS.items()
        for figure in form.figures
    }
    texts, keys = {}, {name: row_keys(places[name]) for name in FORMS}
    for line in map(json.loads, file.read_text().splitlines()):
        (name,) = (
            name
            for name, form in EVALUATIONS.items()
            if any(field.startswith(f"{form.kind}.") for field in line)
        )
        (key,) = (key for key in keys[name] if line["key"] in (key, f"{key}/question"))
        texts[name, key] = line["filtered_resps"].strip()
    return Answers(figures, texts)


def writing(form: str) -> list[str]:
    """Return the settings of a greedy answer with the task's limit of tokens."""
    most = task(form)["generation_kwargs"]["max_new_tokens"]
    return ["writing.beams=1", "writing.least=0", f"writing.most={most}"]


def task(form: str) -> dict[str, Any]:
    """Return the task file of a form; a function is its name."""
    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda _, node: node.value)
    with (TASKS / f"drawings_{form}.yaml").open() as file:
        return dict(yaml.load(file, loader))


def row_keys(dataset: Path) -> list[str]:
    return [sample.key for sample in bw.open_dataset(str(dataset)).samples()]


def conclude(report: Report, theirs: Answers, ours: Answers) -> None:
    """Print both figures side by side. Raises RunError if one differs by more than 1e-9."""
    table = Table("task", "figure", "lmms-eval", "bridgework", "difference", box=None)
    gaps = {place: abs(value - ours.figures[place]) for place, value in theirs.figures.items()}
    for (form, figure), gap in gaps.items():
        values = (f"{one.figures[form, figure]:.10f}" for one in (theirs, ours))
        table.add_row(form, figure, *values, f"{gap:.1g}")
    console.print(table)
    equal = sum(ours.texts.get(place) == text for place, text in theirs.texts.items())
    last = (
        f"{len(gaps)} figures, largest difference {max(gaps.values()):.1g}; "
        f"{equal} of {len(theirs.texts)} answers equal"
    )
    report.values |= {
        "lmms_eval": {f"{form}.{name}": value for (form, name), value in theirs.figures.items()},
        "bridgework": {f"{form}.{name}": value for (form, name), value in ours.figures.items()},
        "answers": [equal, len(theirs.texts)],
    }
    report.write()
    if max(gaps.values()) > TOLERANCE:
        raise RunError(f"{last}. Expected at most {TOLERANCE:g}")
    console.print(last)


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m examples.lmms_eval", description=__doc__)
    parser.add_argument("--model", help="registered model or artifact; default: one trained here")
    parser.add_argument("--rows", type=int, default=60, help="questions of each form (default 60)")
    parser.add_argument("--steps", type=int, help="of every stage of the training")
    return parser.parse_args(words)


if __name__ == "__main__":
    run("lmms_eval", partial(main, parse(sys.argv[1:])))
