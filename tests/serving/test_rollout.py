"""Canary, roll-back, promotion and moved aliases, with real Serve apps."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from typer.testing import CliRunner

from bridgework.cli import app as cli
from bridgework.errors import SpecError
from bridgework.serving import launch
from bridgework.serving.app import application
from bridgework.serving.models import Replica
from bridgework.serving.options import Options
from bridgework.serving.protocol import Answer
from bridgework.serving.registrar import model_apps
from tests.serving.support import QUESTIONS, ModelHome, ServeChat, until

CHAT = "/v1/chat/completions"


class Slow(Replica):
    """Takes twice the time for an answer."""

    async def generate(self, *args: Any, **kwargs: Any) -> Answer:
        started = time.monotonic()
        answer = await super().generate(*args, **kwargs)
        await asyncio.sleep(time.monotonic() - started)
        return answer


class Raising(Replica):
    """Fails at every answer."""

    async def generate(self, *args: Any, **kwargs: Any) -> Answer:
        raise RuntimeError("planted")


def chat(text: str = "x", **changes: Any) -> dict[str, Any]:
    asked = [{"role": "user", "content": text}]
    return {"model": "m", "messages": asked, "max_tokens": 4, "temperature": 0} | changes


def metrics(http: httpx.Client) -> dict[tuple[str, str], float]:
    """Return the values of GET /metrics by name and version or role."""
    reply = http.get("/metrics")
    assert reply.status_code == 200, reply.text
    return {
        (sample.name, sample.labels.get("version", "") + sample.labels.get("result", "")): (
            sample.value
        )
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }


@pytest.mark.slow
def test_share_changes_at_run_time_and_outlives_the_gateway(
    serve_chat: ServeChat, model_home: ModelHome
) -> None:
    home = model_home.path
    with serve_chat(home, challenger="m@challenger", share=0.1, **{"canary.alpha": 0}) as http:

        def versions(number: int = 40) -> set[str]:
            ids = [
                http.post(CHAT, json=chat(max_tokens=1), headers={"x-request-id": str(i)})
                for i in range(number)
            ]
            return {reply.json()["id"].split("-")[1] for reply in ids}

        runner = CliRunner()
        shown = runner.invoke(cli, ["traffic", "c"])
        assert shown.exit_code == 0, shown.output
        assert "challenger" in shown.output and "10%" in shown.output
        assert len(versions()) == 2
        assert "0%" in runner.invoke(cli, ["traffic", "c", "--share", "0"]).output
        assert len(versions()) == 1
        assert metrics(http)["bridgework:traffic_share", "2"] == 0
        with pytest.raises(SpecError, match="no app of this name"):
            launch.traffic("d", None)
        with pytest.raises(SpecError, match="expected 0 to 1"):
            launch.traffic("c", 2.0)
        launch.traffic("c", 0.5)
        assert metrics(http)["bridgework:traffic_share", "2"] == 0.5
    with serve_chat(home, challenger="m@challenger", share=0.1, **{"canary.alpha": 0}) as http:
        assert metrics(http)["bridgework:traffic_share", "2"] == 0.5
    with serve_chat(home, challenger="m@challenger", share=0.2, **{"canary.alpha": 0}) as http:
        assert metrics(http)["bridgework:traffic_share", "2"] == 0.2
    with serve_chat(home) as http, pytest.raises(SpecError, match="has no challenger"):
        launch.traffic("c", 0.5)


@pytest.mark.slow
def test_challenger_that_answers_noise_is_rolled_back_and_recorded(
    serve_chat: ServeChat,
    model_home: ModelHome,
) -> None:
    canary = {"canary.probes": model_home.probes, "canary.probe_s": 1}
    with serve_chat(model_home.path, challenger="m:3", share=0.5, **canary) as http:
        until(lambda: metrics(http)["bridgework:canary_rolled_back", ""] == 1)
        assert metrics(http)["bridgework:traffic_share", "3"] == 0
        state = launch.traffic("c", None)
        assert f"{QUESTIONS} probes answered worse" in state["rolled_back"]
        assert state["figures"]["baseline.probe_score"] == 1
        (run,) = until(model_home.decisions)
        assert run.data.tags["decision"] == "roll_back"
        assert "probes answered worse" in run.data.tags["reason"]
        assert run.data.metrics["eval/challenger.probe_score"] < 0.9
        assert run.data.params["canary.answers"] == "0.05"
        assert http.post(CHAT, json=chat(model="m:3")).status_code == 200  # it is still loaded


def test_metrics_have_vllms_names_and_the_figures_of_each_version(
    serve_chat: ServeChat,
    model_home: ModelHome,
) -> None:
    with serve_chat(model_home.path, challenger="m:2") as http:
        for version in ("1", "2", "2"):
            body = chat(model=f"m:{version}", max_tokens=5)
            usage = http.post(CHAT, json=body).json()["usage"]
        with http.stream("POST", CHAT, json=chat(model="m:1", stream=True)) as reply:
            assert reply.read()
        expected = {
            ("vllm:e2e_request_latency_seconds_count", "1"): 2,
            ("vllm:time_to_first_token_seconds_count", "2"): 2,
            ("vllm:generation_tokens_total", "2"): 2 * usage["completion_tokens"],
            ("vllm:prompt_tokens_total", "2"): 2 * usage["prompt_tokens"],
            ("vllm:num_requests_running", "1"): 0,
            ("vllm:request_success_total", "2"): 2,
            ("bridgework:requests_total", "1ok"): 2,  # a complete stream is no error
            ("bridgework:traffic_share", "1"): 1,
        }

        def counted() -> bool:  # a replica counts a request after its client has the answer
            found = metrics(http)
            return {name: found.get(name) for name in expected} == expected

        until(counted, limit_s=60)
        assert http.get("/health/ready").json() == http.get("/health/live").json()


def test_moved_alias_is_served_without_a_failed_request(
    serve_chat: ServeChat, model_home: ModelHome
) -> None:
    with serve_chat(model_home.path, follow="alias") as http, ThreadPoolExecutor(3) as pool:
        stop = False

        def ask_on() -> list[tuple[int, str]]:
            replies = []
            while not stop:
                reply = http.post(CHAT, json=chat(max_tokens=8))
                replies.append((reply.status_code, reply.json().get("id", "-").split("-")[1]))
            return replies

        before = http.post(CHAT, json=chat()).json()["id"].split("-")[1]
        asking = [pool.submit(ask_on) for _ in range(2)]
        model_home.tracker.alias("m", "champion", "3")
        try:
            until(lambda: "m:3" in [m["id"] for m in http.get("/v1/models").json()["data"]])
            until(lambda: len(model_apps("c")) == 1)  # the replaced model is unloaded
        finally:
            stop = True
        replies = [reply for one in asking for reply in one.result()]
        assert {status for status, _ in replies} == {200}
        assert {deployment for _, deployment in replies} > {before}
        assert metrics(http)["bridgework:alias_switches_total", "ok"] == 1
        assert http.get("/health").status_code == 200
    assert model_apps("c") == []


@pytest.mark.slow
def test_app_that_follows_an_alias_leaves_no_model_when_serve_deletes_it(
    serve_chat: ServeChat,
    model_home: ModelHome,
) -> None:
    args = {"model": "m", "cpus": 0.5, "home": str(model_home.path), "dev": True}
    serve.run(application_of(args | {"follow": "alias"}), name="d", route_prefix="/d")
    assert len(model_apps("d")) == 1
    serve.delete("d")
    until(lambda: not model_apps("d"))


def application_of(args: dict[str, Any]) -> serve.Application:
    from bridgework.serving.routes import chat_routes

    return application("chat", args, chat_routes)


@pytest.mark.slow
def test_version_that_cannot_be_loaded_leaves_the_champion(
    serve_chat: ServeChat, model_home: ModelHome, tmp_path: Path
) -> None:
    home = model_home
    with serve_chat(home.path, follow="alias") as http:
        (tmp_path / "noise" / "weights.safetensors").unlink(missing_ok=True)
        for file in (tmp_path / "noise").glob("*.safetensors"):
            file.unlink()
        home.tracker.alias("m", "champion", "3")
        until(lambda: metrics(http).get(("bridgework:alias_switches_total", "failed")))
        assert http.post(CHAT, json=chat()).status_code == 200
        assert "m:1" in [m["id"] for m in http.get("/v1/models").json()["data"]]


def test_good_challenger_is_promoted_through_the_gate(
    serve_chat: ServeChat, model_home: ModelHome, tmp_path: Path
) -> None:
    gate = tmp_path / "gate.toml"
    gate.write_text(
        f'[guard]\n"vqa.accuracy" = 0.1\n[[evaluation]]\non = "vqa:{model_home.probes}"\n'
    )
    canary = {
        "canary.gate": str(gate),
        "canary.promote_requests": 20, "canary.promote_s": 0, "canary.latency": 20.0,
        "canary.probes": model_home.probes, "canary.probe_s": 1,
    }  # fmt: skip
    arguments: dict[str, Any] = {"challenger": "m:2", "share": 0.5, "auto_promote": True} | canary
    with serve_chat(model_home.path, **arguments) as http:

        def decided() -> list[Any]:
            for _ in range(20):
                assert http.post(CHAT, json=chat()).status_code == 200
            return model_home.decisions()

        (run,) = until(decided)
        assert (run.data.tags["decision"], run.data.tags["reason"][:6]) == ("promote", "within")
        assert model_home.tracker.version("m", "champion").version == "2"
        until(lambda: launch.traffic("c", None)["models"][0]["model"] == "m:2")
        assert http.post(CHAT, json=chat(model="m:1")).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("planted", ["noise", "slow", "raises"])
def test_planted_bad_challenger_is_out_within_200_of_its_requests(
    serve_chat: ServeChat, model_home: ModelHome, planted: str, weights: str
) -> None:
    from bridgework.serving import models

    replicas = {"noise": Replica, "slow": Slow, "raises": Raising}
    canary: dict[str, Any] = {"canary.probes": model_home.probes}
    challenger = "m:3" if planted == "noise" else "m:2"
    with pytest.MonkeyPatch.context() as patch:
        # the deployment of the challenger alone has the planted class
        normal = models.deployment

        def deployment(role: str, options: Options) -> serve.Deployment:
            made = normal(role, options)
            if role != "challenger":
                return made
            return serve.deployment(
                name=role, ray_actor_options={"num_cpus": 0.5}, max_ongoing_requests=4
            )(replicas[planted])

        patch.setattr(models, "deployment", deployment)
        serving_it = serve_chat(model_home.path, challenger=challenger, share=0.5, **canary)
        with serving_it as http:
            for number in range(600):
                http.post(CHAT, json=chat(str(number), max_tokens=16))
                if metrics(http)["bridgework:canary_rolled_back", ""]:
                    break
            state = launch.traffic("c", None)
            assert state["rolled_back"] and state["models"][1]["share"] == 0
            assert state["figures"]["challenger.requests"] <= 200
            statuses = {http.post(CHAT, json=chat(str(n))).status_code for n in range(20)}
            assert statuses == {200}
