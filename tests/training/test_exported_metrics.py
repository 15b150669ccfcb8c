"""Metrics that Ray exports to Prometheus: those of a real run, a real sweep and real actors."""

import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import ray
import requests
from prometheus_client.parser import text_string_to_metric_families

from bridgework import ray_metrics, ray_utils
from bridgework.errors import DataError
from bridgework.tuning import search
from bridgework.tuning.space import load as load_space
from tests.training.support import go, llava

Samples = dict[str, list[tuple[dict[str, str], float]]]
PREFIX = "ray_bridgework_"


def exported() -> Samples:
    """Return the samples of bridgework's metrics on this node, by name."""
    (node,) = (node for node in ray.nodes() if node["Alive"])
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    found: Samples = {}
    for family in text_string_to_metric_families(requests.get(url, timeout=10).text):
        for sample in family.samples:
            if sample.name.startswith(PREFIX):
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


class Watch:
    """Keeps the newest value of every series from its start, because Ray drops gauges after a while."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._over.wait(0.5):
            with suppress(requests.RequestException):  # the agent starts later than Ray
                for name, samples in exported().items():
                    for labels, value in samples:
                        self._found[name, frozenset(labels.items())] = value

    def until(self, complete: Callable[[Samples], bool]) -> Samples:
        """Return the samples as soon as `complete` holds: Ray exports every few seconds."""
        deadline = time.monotonic() + 120
        while True:
            found: Samples = {}
            for (name, labels), value in list(self._found.items()):
                found.setdefault(name, []).append((dict(labels), value))
            if complete(found):
                return found
            assert time.monotonic() < deadline, sorted(found)
            time.sleep(0.5)


def total(found: Samples, name: str, **labels: str) -> float:
    return sum(
        value
        for have, value in found.get(PREFIX + name, [])
        if all(have.get(key) == text for key, text in labels.items())
    )


def declared(name: str) -> str:
    """Return the name in METRICS of a metric that Prometheus sees."""
    name = name.removeprefix("ray_")
    return name if name in ray_metrics.METRICS else name.removesuffix("_total")


def check_names_and_labels(found: Samples) -> None:
    for name, samples in found.items():
        metric = ray_metrics.METRICS[declared(name)]
        assert name.endswith("_total") == (metric.kind == "counter")
        for labels, _ in samples:
            assert set(metric.labels) <= labels.keys()


@pytest.mark.usefixtures("ray_session")
def test_a_run_exports_its_steps_and_where_its_time_goes(home: Path, run: str) -> None:
    stage = {"run": run, "stage": "align", "system": "llava-tiny"}
    with Watch() as watch:
        go(llava(3), home, run, workers=1, checkpoint_every=2)
        found = watch.until(lambda found: total(found, "train_steps_total", **stage) == 3)
    check_names_and_labels(found)
    assert total(found, "train_step", **stage) == 2  # the newest, counted from 0
    assert total(found, "train_samples_total", **stage) == pytest.approx(
        3 * llava(3)["align"].budget.batch
    )
    for part in ("start", "data_wait", "step", "checkpoint", "evaluation"):
        assert total(found, "train_seconds_total", **stage, part=part) > 0
    assert total(found, "train_loss", **stage) > 0
    assert total(found, "data_rows_total") >= 3 * llava(3)["align"].budget.batch
    assert total(found, "data_read_seconds_total") > 0


@pytest.mark.usefixtures("ray_session")
def test_a_sweep_exports_its_trials_and_its_best_score(home: Path, run: str) -> None:
    with Watch() as watch:
        outcome = search.sweep(load_space("tests.tuning.tiny"), home=home, run=run)
        found = watch.until(
            lambda found: total(found, "sweep_trials_total", sweep=run, event="finished") == 2
        )
    check_names_and_labels(found)
    assert total(found, "sweep_trials_total", sweep=run, event="started") == 2
    assert total(found, "sweep_best", sweep=run) <= outcome.metrics["heldout.loss"] + 1e-6
    assert len([s for s in found[PREFIX + "sweep_score"] if s[0]["sweep"] == run]) == 2


def odd_numbers_fail(item: int) -> None:
    if item % 2:
        raise DataError(f"{item} is odd")


@pytest.mark.usefixtures("ray_session")
def test_actors_export_finished_items_and_errors() -> None:
    work = "items of a test"
    with Watch() as watch:
        ray_utils.map_on_actors(lambda: odd_numbers_fail, [0, 2, 4], 1, what=work)
        with pytest.raises(DataError):
            ray_utils.map_on_actors(lambda: odd_numbers_fail, [1], 1, what=work)
        found = watch.until(lambda found: total(found, "actor_errors_total", work=work) == 1)
    assert total(found, "actor_items_total", work=work) == 3


def test_every_metric_has_a_plain_name() -> None:
    for name, metric in ray_metrics.METRICS.items():
        assert re.fullmatch(r"bridgework_[a-z_]+", name) and not name.endswith("_total")
        assert metric.description.endswith(".")
