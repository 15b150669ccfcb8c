"""Dashboards and alerts: every expression parses, and every metric, label and variable in it exists."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import ray
import yaml

from bridgework import ray_metrics
from tests.house import source

GRAFANA, PROMETHEUS = source.ROOT / "deploy/grafana", source.ROOT / "deploy/prometheus"
RULES = yaml.safe_load((PROMETHEUS / "rules.yaml").read_text(encoding="utf-8"))["groups"]
# dashboards whose metrics are of this module; serving has its own
DASHBOARDS = {name: GRAFANA / f"{name}.json" for name in ("training", "data", "sweep")}
RAYS = Path(ray.__file__).parent / "dashboard/modules/metrics/dashboards"
OWN_VARIABLES = {"Run", "Stage", "Sweep", "TrainRunName"}
# labels that Ray, Prometheus or its relabeling adds to every metric
COMMON = {"SessionName", "ray_io_cluster", "instance", "RayNodeType"}
CHILDREN = ("lhs", "rhs", "expr", "args", "vector_selector", "param")


def dashboard(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARDS[name].read_text(encoding="utf-8"))
    return found


def variables(name: str) -> dict[str, dict[str, Any]]:
    return {variable["name"]: variable for variable in dashboard(name)["templating"]["list"]}


@cache
def rays_variables() -> set[str]:
    """The variables of the dashboards that Ray ships."""
    return {
        variable["name"]
        for path in RAYS.glob("*_base.json")
        for variable in json.loads(path.read_text(encoding="utf-8"))["templating"]["list"]
    }


@cache
def rays_metrics() -> set[str]:
    """The metrics that Ray's own dashboards use."""
    texts = [path.read_text(encoding="utf-8") for path in RAYS.glob("*.py")]
    names = {name for text in texts for name in re.findall(r"\bray_\w+", text)}
    return names | {
        f"ray_data_{name}"
        for text in texts
        for name in re.findall(r'metric\.name == "(\w+)"', text)
    }


@cache
def servings_metrics() -> set[str]:
    """The metrics of GET /metrics, which tests/serving/test_metrics.py compares with the code."""
    text = (GRAFANA / "serving.json").read_text(encoding="utf-8")
    return set(re.findall(r"(?:vllm|bridgework):\w+", text))


def filled(expression: str) -> str:
    """An expression with values for Grafana's variables."""
    for name in ("$window", "$__range"):
        expression = expression.replace(f"[{name}]", "[5m]")
    return re.sub(r"\$\w+", ".*", expression)


def expressions() -> Iterator[tuple[str, str]]:
    for name in DASHBOARDS:
        for panel in dashboard(name)["panels"]:
            for target in panel["targets"]:
                yield f"{name}: {panel['title']}", target["expr"]
    for group in RULES:
        for rule in group["rules"]:
            yield f"rules: {rule.get('alert') or rule['record']}", rule["expr"]


def selectors(node: Any) -> Iterator[Any]:
    """Every selector of metrics in a parsed expression."""
    if type(node).__name__ == "VectorSelector":
        yield node
    for name in CHILDREN:
        child = getattr(node, name, None)
        for one in child if isinstance(child, list) else [child]:
            if one is not None:
                yield from selectors(one)


@pytest.mark.parametrize(
    ("where", "expression"), [pytest.param(*pair, id=pair[0]) for pair in expressions()]
)
def test_metrics_and_labels_of_an_expression_exist(where: str, expression: str) -> None:
    recorded = {rule["record"] for group in RULES for rule in group["rules"] if "record" in rule}
    found = list(selectors(promql_parser.parse(filled(expression))))
    assert found
    for selector in found:
        if selector.name.startswith("ray_bridgework_"):
            name = selector.name.removeprefix("ray_")
            metric = ray_metrics.METRICS[name.removesuffix("_total")]
            assert name.endswith("_total") == (metric.kind == "counter"), f"{where}: {name}"
            used = {matcher.name for matcher in selector.matchers.matchers}
            assert used <= {*metric.labels, *COMMON}, f"{where}: {name}"
        else:
            known = rays_metrics() | recorded | servings_metrics()
            assert selector.name in known, f"{where}: {selector.name}"


@pytest.mark.parametrize("name", DASHBOARDS)
def test_labels_in_a_legend_are_those_that_the_expression_keeps(name: str) -> None:
    for panel in dashboard(name)["panels"]:
        for target in panel["targets"]:
            kept = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", target["expr"]))))
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept, panel["title"]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_variables_are_those_of_rays_dashboards_and_are_all_used(name: str) -> None:
    known = variables(name)
    assert known.keys() <= rays_variables() | OWN_VARIABLES
    text = json.dumps(dashboard(name)["panels"]) + json.dumps(list(known.values()))
    used = set(re.findall(r"\$\{?(\w+)", text)) - {"__range", "__all"}
    assert used == known.keys()
    queries = [v["query"]["query"] for v in known.values() if v["type"] == "query"]
    for query in queries:
        selector, _, label = query.removeprefix("label_values(").removesuffix(")").rpartition(", ")
        (found,) = selectors(promql_parser.parse(filled(selector)))
        metric = ray_metrics.METRICS.get(found.name.removeprefix("ray_").removesuffix("_total"))
        assert metric is not None or found.name in rays_metrics(), query
        assert metric is None or label in {*metric.labels, *COMMON}, query


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_do_not_overlap_and_have_a_title(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard(name)["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert panel["title"] and at["x"] + at["w"] <= 24 and not cells & taken
        taken |= cells


def test_every_exported_metric_is_in_a_dashboard() -> None:
    shown = " ".join(expression for _, expression in expressions())
    missing = [
        name
        for name, metric in ray_metrics.METRICS.items()
        if f"ray_{name}" + ("_total" if metric.kind == "counter" else "") not in shown
    ]
    assert not missing


def test_every_alert_reports_what_happened_and_what_to_do() -> None:
    alerts = [rule for group in RULES for rule in group["rules"] if "alert" in rule]
    assert len(alerts) >= 8
    for alert in alerts:
        assert alert["labels"]["severity"] in ("info", "warning", "critical")
        assert alert["annotations"].keys() == {"summary", "description"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on the PATH")
def test_alerts_fire_on_what_they_name_and_on_nothing_else() -> None:
    cases = source.ROOT / "tests/deploy/rules_test.yaml"
    done = subprocess.run(
        ["promtool", "test", "rules", str(cases)], capture_output=True, text=True, cwd=cases.parent
    )
    assert done.returncode == 0, done.stdout + done.stderr
