"""Metrics of replicas and gateways, and the dashboard that shows them."""

import asyncio
import json
import re
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from bridgework.inference.engine import EngineStatus, RequestTimes
from bridgework.serving.metrics import Exposition, GatewayMetrics, ReplicaMetrics
from bridgework.serving.router import Outcome, Route, Router, ServedModel

DASHBOARD = Path(__file__).parents[2] / "deploy/grafana/serving.json"
STATUS = EngineStatus(2, 3, 50, 200, 10, 4, 1_000, 600, 1_234, 567)
VLLM = {  # names of vLLM's own metrics
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries", "vllm:prefix_cache_hits", "vllm:mm_cache_queries",
    "vllm:mm_cache_hits", "vllm:prompt_tokens", "vllm:generation_tokens", "vllm:request_success",
    "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds", "vllm:request_queue_time_seconds",
    "vllm:request_prompt_tokens", "vllm:request_generation_tokens",
}  # fmt: skip


def collected(metrics: ReplicaMetrics) -> dict[str, float]:
    return {
        sample.name + sample.labels.get("finished_reason", "") + sample.labels.get("le", ""): (
            sample.value
        )
        for family in metrics.collect(STATUS)
        for sample in family.samples
    }


def test_replica_counts_its_requests_and_its_engine() -> None:
    metrics = ReplicaMetrics()
    metrics.observe(RequestTimes(0.2, 0.5, (0.01, 0.02, 0.03), 0.9, "stop", 40, 4))
    metrics.observe(RequestTimes(0.0, None, (), 0.1, "abort", 40, 0))
    found = collected(metrics)
    assert {family.name for family in metrics.collect(STATUS)} == VLLM
    assert found["vllm:time_to_first_token_seconds_count"] == 1
    assert found["vllm:inter_token_latency_seconds_count"] == 3
    assert found["vllm:e2e_request_latency_seconds_sum"] == 1.0
    assert found["vllm:request_queue_time_seconds_bucket0.1"] == 1
    assert found["vllm:request_success_totalstop"] == 1
    assert found["vllm:request_success_totalabort"] == 1
    assert found["vllm:kv_cache_usage_perc"] == 0.25
    assert found["vllm:mm_cache_hits_total"] == 4
    assert found["vllm:prompt_tokens_total"] == 1_234


def exposed(gateway: GatewayMetrics) -> list[Metric]:
    text = asyncio.run(Exposition(Router([], 0.0, 1.0), gateway).text()).decode()
    return list(text_string_to_metric_families(text))


def test_gateway_counts_calls_by_version_role_and_result() -> None:
    gateway = GatewayMetrics()
    served = ServedModel("0" * 12, "chat", "m", "3", "", "")
    for result in ("ok", "ok", "error"):
        gateway.observe(Outcome(Route(served), "generate", 0.3, result), "challenger")
    samples = {
        (s.name, s.labels.get("result")): (s.value, s.labels)
        for family in exposed(gateway)
        for s in family.samples
    }
    value, labels = samples["bridgework:requests_total", "ok"]
    assert value == 2
    assert labels == {"model_name": "m", "version": "3", "role": "challenger", "result": "ok"}
    assert samples["bridgework:requests_total", "error"][0] == 1
    assert samples["bridgework:request_seconds_count", None][0] == 2


def test_dashboard_shows_metrics_that_exist_and_every_one_of_them() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = " ".join(target["expr"] for panel in panels for target in panel.get("targets", []))
    shown = set(re.findall(r"(?:vllm|bridgework):\w+", queries))
    families = [*ReplicaMetrics().collect(STATUS), *exposed(GatewayMetrics())]
    suffix = {"counter": "_total", "histogram": "_bucket"}
    assert shown == {family.name + suffix.get(family.type, "") for family in families}
    assert len({panel["id"] for panel in panels}) == len(panels)
