"""Prometheus metrics: those of replicas with vLLM's names, those of a gateway as `bridgework:*`.

A replica counts its own requests (`ReplicaMetrics`). GET /metrics of the gateway asks all replicas
and labels their metrics with the model, its version and the replica (`engine`), so one address covers an app.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from bridgework.serving.router import Outcome, Router

if TYPE_CHECKING:  # the engine imports torch, which a gateway does not need
    from bridgework.inference.engine import EngineStatus, RequestTimes

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SCRAPE_S = 3.0  # time in which replicas must answer
SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0,
)  # fmt: skip
TOKENS = (1, 4, 16, 64, 256, 1_024, 4_096, 16_384)

_HISTOGRAMS: Mapping[str, tuple[str, Sequence[float]]] = {
    "vllm:time_to_first_token_seconds": ("From the submission to the first token.", SECONDS),
    "vllm:inter_token_latency_seconds": ("Between two tokens of a sequence.", SECONDS),
    "vllm:e2e_request_latency_seconds": ("From the submission to the last token.", SECONDS),
    "vllm:request_queue_time_seconds": ("From the submission to a slot.", SECONDS),
    "vllm:request_prompt_tokens": ("Tokens of a prompt, with its images.", TOKENS),
    "vllm:request_generation_tokens": ("Generated tokens of a request.", TOKENS),
}
_COUNTERS = {  # name -> field of EngineStatus
    "vllm:prefix_cache_queries": ("prefix_queries", "Prompt tokens looked up in the cache."),
    "vllm:prefix_cache_hits": ("prefix_hits", "Prompt tokens found in the cache."),
    "vllm:mm_cache_queries": ("image_queries", "Images looked up in the cache."),
    "vllm:mm_cache_hits": ("image_hits", "Images found in the cache."),
    "vllm:prompt_tokens": ("prompt_tokens", "Prompt tokens of admitted requests."),
    "vllm:generation_tokens": ("generation_tokens", "Generated tokens."),
}


class ReplicaMetrics:
    """Metrics of one replica."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._histograms = {
            name: Histogram(name, text, registry=self._registry, buckets=buckets)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._finished = Counter(
            "vllm:request_success",
            "Finished requests by reason: stop, length, abort or error.",
            ["finished_reason"],
            registry=self._registry,
        )

    def observe(self, times: "RequestTimes") -> None:
        """Count a finished request."""
        values: dict[str, Iterable[float]] = {
            "vllm:time_to_first_token_seconds": (
                () if times.first_token_s is None else (times.first_token_s,)
            ),
            "vllm:inter_token_latency_seconds": times.inter_token_s,
            "vllm:e2e_request_latency_seconds": (times.end_to_end_s,),
            "vllm:request_queue_time_seconds": (times.queue_s,),
            "vllm:request_prompt_tokens": (times.prompt_tokens,),
            "vllm:request_generation_tokens": (times.completion_tokens,),
        }
        for name, observed in values.items():
            for value in observed:
                self._histograms[name].observe(value)
        self._finished.labels(times.finish_reason).inc()

    def collect(self, status: "EngineStatus") -> list[Metric]:
        """Return all metrics of the replica, with those of its engine."""
        usage = status.cached_tokens / status.max_cached_tokens if status.max_cached_tokens else 0.0
        gauges = {
            "vllm:num_requests_running": ("Requests that decode.", status.running),
            "vllm:num_requests_waiting": ("Requests that wait for a slot.", status.waiting),
            "vllm:kv_cache_usage_perc": ("Used share of the cache, 0 to 1.", usage),
        }
        families: list[Metric] = []
        for name, (text, value) in gauges.items():
            families.append(GaugeMetricFamily(name, text, value))
        for name, (field, text) in _COUNTERS.items():
            families.append(CounterMetricFamily(name, text, getattr(status, field)))
        return [*self._registry.collect(), *families]


class GatewayMetrics:
    """Metrics of a gateway: requests by version, shares, and decisions about the challenger."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ["model_name", "version", "role"]
        self._requests = Counter(
            "bridgework:requests",
            "Calls of a model by result: ok, error or cancelled.",
            [*labels, "result"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "bridgework:request_seconds",
            "Seconds of a call of a model, as the gateway sees it.",
            [*labels, "method"],
            registry=self.registry,
            buckets=SECONDS,
        )
        self._decisions = Counter(
            "bridgework:canary_decisions",
            "Decisions about a challenger: roll_back, promote or not_promoted.",
            ["model_name", "version", "decision"],
            registry=self.registry,
        )
        self.rolled_back = Gauge(
            "bridgework:canary_rolled_back",
            "1 while a challenger has no share because it was worse. Alert on it.",
            registry=self.registry,
        )
        self.probe_score = Gauge(
            "bridgework:probe_score",
            "Mean score of the newest answers to the probes, 0 to 1.",
            labels,
            registry=self.registry,
        )
        self.switches = Counter(
            "bridgework:alias_switches",
            "Moved aliases by result: ok or failed.",
            ["result"],
            registry=self.registry,
        )

    def observe(self, outcome: Outcome, role: str) -> None:
        """Count a call of a model."""
        served = outcome.route.served
        labels = (served.model, served.version, role)
        self._requests.labels(*labels, outcome.result).inc()
        if outcome.result == "ok":
            self._seconds.labels(*labels, outcome.method).observe(outcome.seconds)

    def decided(self, outcome: str, model: str, version: str) -> None:
        """Count a decision about a challenger."""
        self._decisions.labels(model, version, outcome).inc()


class Exposition:
    """The text of GET /metrics: the gateway's metrics, and those of all replicas of its models."""

    def __init__(self, router: Router, metrics: GatewayMetrics) -> None:
        self._router, self._metrics = router, metrics

    async def text(self) -> bytes:
        """Return the metrics in Prometheus' text format.

        A model whose replicas do not answer has no `vllm:*` metrics, and 0 as
        `bridgework:replicas_reporting`.
        """
        models = list(self._router.roles.items())
        replies = await asyncio.gather(*(self._replicas(role) for role, _ in models))
        share = GaugeMetricFamily(
            "bridgework:traffic_share",
            "Share of the requests by the app's name that a model answers.",
            labels=["model_name", "version", "role"],
        )
        reporting = GaugeMetricFamily(
            "bridgework:replicas_reporting",
            "Replicas that reported their metrics.",
            labels=["model_name", "version", "role"],
        )
        families: dict[str, Metric] = {}
        challenged = self._router.share if len(models) > 1 else 0.0
        for (role, served), replicas in zip(models, replies, strict=True):
            labels = [served.model, served.version, role]
            share.add_metric(labels, challenged if role == "challenger" else 1 - challenged)
            reporting.add_metric(labels, len(replicas))
            for engine, metrics in replicas:
                names = {"model_name": served.model, "version": served.version, "engine": engine}
                for metric in metrics:
                    merged = families.setdefault(
                        metric.name, Metric(metric.name, metric.documentation, metric.type)
                    )
                    merged.samples += [
                        sample._replace(labels=names | sample.labels)
                        for sample in _without_created(metric).samples
                    ]
        own = [_without_created(metric) for metric in self._metrics.registry.collect()]
        return generate_latest(_Collected([*own, share, reporting, *families.values()]))

    async def _replicas(self, role: str) -> list[tuple[str, list[Metric]]]:
        """Return the id and the metrics of every replica of a model; [] if they do not answer."""
        served = self._router.roles[role]
        try:
            answer: Any = self._router.handle(served).broadcast("metrics")
            return list(await answer.results_async(timeout_s=SCRAPE_S))
        except (RayError, RayServeException, TimeoutError):
            return []


def _without_created(metric: Metric) -> Metric:
    """Drop the times at which counters were created, which no panel shows."""
    metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
    return metric


class _Collected(CollectorRegistry):
    """Metrics that were collected elsewhere."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        super().__init__()
        self._collected = metrics

    def collect(self) -> Iterable[Metric]:
        return self._collected
