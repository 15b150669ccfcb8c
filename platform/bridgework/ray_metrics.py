"""Counters and gauges that Ray exports to Prometheus; deploy/grafana and deploy/prometheus read them.

Prometheus sees a gauge as `ray_NAME` and a counter as `ray_NAME_total`. Every process of a Ray may
record; Ray's agent on its node exports the values. Ray drops a gauge that is not set again for two of
its export intervals, 20 s by default, so the dashboards show the last value of a window.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ray.util.metrics import Counter, Gauge


@dataclass(frozen=True)
class Exported:
    """One exported metric: its kind, its description and the names of its labels."""

    kind: Literal["counter", "gauge"]
    description: str
    labels: tuple[str, ...] = ()


_STAGE = ("system", "run", "stage")

METRICS: Mapping[str, Exported] = {
    "bridgework_train_step": Exported("gauge", "Newest step of a stage.", _STAGE),
    "bridgework_train_steps": Exported(
        "counter", "Steps, those repeated after a restart included.", _STAGE
    ),
    "bridgework_train_seconds": Exported(
        "counter",
        "Seconds of a stage by part: start, data_wait, step, checkpoint, evaluation, snapshot.",
        (*_STAGE, "part"),
    ),
    "bridgework_train_samples": Exported("counter", "Samples, over all workers.", _STAGE),
    "bridgework_train_tokens": Exported("counter", "Tokens, over all workers.", _STAGE),
    "bridgework_train_loss": Exported("gauge", "Loss of the newest step.", _STAGE),
    "bridgework_train_grad_norm": Exported("gauge", "Norm of the gradient.", _STAGE),
    "bridgework_train_padding": Exported("gauge", "Share of padding in a batch.", _STAGE),
    "bridgework_train_replaced": Exported(
        "gauge", "Samples that were replaced since the stage began.", _STAGE
    ),
    "bridgework_train_source_share": Exported(
        "gauge", "Realized share of a source of the mixture.", (*_STAGE, "source")
    ),
    "bridgework_data_rows": Exported("counter", "Rows that the readers of training delivered."),
    "bridgework_data_read_seconds": Exported(
        "counter", "Seconds in which the readers read, decode and tokenize."
    ),
    "bridgework_actor_items": Exported(
        "counter", "Items that actors finished: chunks of an import, row groups ..", ("work",)
    ),
    "bridgework_actor_seconds": Exported("counter", "Seconds of the actors' calls.", ("work",)),
    "bridgework_actor_errors": Exported("counter", "Calls that raised an error.", ("work",)),
    "bridgework_sweep_trials": Exported(
        "counter", "Trials by event: started, finished, failed.", ("sweep", "event")
    ),
    "bridgework_sweep_score": Exported(
        "gauge", "Newest score of a trial, by the sweep's metric.", ("sweep", "trial", "metric")
    ),
    "bridgework_sweep_best": Exported(
        "gauge", "Best score of any trial so far.", ("sweep", "metric")
    ),
}


def add(name: str, amount: float = 1.0, **labels: str) -> None:
    """Add to a counter of METRICS; an amount of 0 adds nothing."""
    if amount > 0:
        _counter(name).inc(amount, labels)


def set_value(name: str, value: float, **labels: str) -> None:
    """Set a gauge of METRICS."""
    _gauge(name).set(value, labels)


@cache
def _counter(name: str) -> "Counter":
    from ray.util.metrics import Counter

    return Counter(name, METRICS[name].description, METRICS[name].labels)


@cache
def _gauge(name: str) -> "Gauge":
    from ray.util.metrics import Gauge

    return Gauge(name, METRICS[name].description, METRICS[name].labels)
