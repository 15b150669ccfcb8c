"""Try client libraries on the chat app: `python -m examples.clients`, about a minute.

The openai client, litellm and langchain-openai, unchanged, call an endpoint in every way of
trials.py. Without --model, the model is a tiny LLaVA with random weights, because the trials are
about the protocol. README.md describes the environment of the libraries.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import httpx
import torch
from rich.table import Table

import bridgework as bw
from bridgework import artifacts
from bridgework.errors import RunError
from bridgework.serving import launch
from examples.clients.trials import Result
from examples.report import Report, console, environment, run

VARIABLE = "CLIENTS_VENV"  # its folder, if not .venv here
TRIALS = Path(__file__).with_name("trials.py")


def main(given: argparse.Namespace, report: Report) -> None:
    python = environment("clients", VARIABLE)
    model = given.model or tiny(report.home / "tiny-llava")
    with report.part("clients", "trials of every library", 60):
        rows = ask(python, model, report.home)
    table = Table("library", "trial", "result", box=None)
    for row in rows:
        result = "passed" if row["passed"] else f"[red]failed[/]  {row['detail']}"
        table.add_row(row["library"], row["trial"], result)
    console.print(table)
    report.values |= {"trials": rows}
    report.write()
    passed = sum(row["passed"] for row in rows)
    if passed < len(rows):
        raise RunError(f"{len(rows) - passed} of {len(rows)} trials failed")
    console.print(f"{passed} of {len(rows)} trials passed")


def tiny(folder: Path) -> str:
    """Write an artifact with random weights; return its folder."""
    system = bw.load("llava").tiny()
    torch.manual_seed(0)
    weights = system["instruct"].model.build().state_dict()
    artifacts.save(folder, weights, system=system, stage="instruct")
    return str(folder)


def ask(python: Path, model: str, home: Path) -> list[Result]:
    """Serve the model and run the trials in the libraries' environment. Raises RunError."""
    port = launch.free_port()
    with bw.serve("chat", port=port, model=model, dev=True, home=str(home), cpus=0.5) as endpoint:
        url = f"{endpoint.address}/v1"
        served = httpx.get(f"{url}/models", trust_env=False).json()["data"][0]["id"]
        command = [str(python), str(TRIALS), "--url", url, "--model", served]
        env = os.environ | {"NO_PROXY": "*", "no_proxy": "*"}
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RunError(f"the trials ended with {done.returncode}. Fix: see {home}/clients.log")
    return [json.loads(line) for line in lines]


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m examples.clients", description=__doc__)
    parser.add_argument("--model", help="registered model or artifact; default: random weights")
    return parser.parse_args(words)


if __name__ == "__main__":
    run("clients", partial(main, parse(sys.argv[1:])))
