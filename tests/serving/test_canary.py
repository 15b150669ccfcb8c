"""Comparison of a challenger with the champion: false alarms, power, probes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bridgework.errors import SpecError
from bridgework.serving import launch
from bridgework.serving.canary import TESTS, Canary, Group
from bridgework.serving.options import CanaryLimits, parse_options
from bridgework.serving.probes import Probe, overlap
from tests.serving.support import ModelHome

Draw = Callable[[np.random.Generator], tuple[float, bool]]  # seconds, error


def answer(median_s: float, errors: float = 0.0) -> Draw:
    """Return a server whose latency is log-normal: 5 % of its answers take 3 times the median."""
    return lambda random: (
        median_s * float(np.exp(random.normal(0, 0.7))),
        random.random() < errors,
    )


def requests_until_out(
    canary: Canary, challenger: Draw, baseline: Draw, seed: int, limit: int
) -> int | None:
    """Send equal shares; return the challenger's requests at the roll-back, None if there is none."""
    random = np.random.default_rng(seed)
    servers: dict[Group, Draw] = {"challenger": challenger, "baseline": baseline}
    for _ in range(2 * limit):
        group: Group = "challenger" if random.random() < 0.5 else "baseline"
        seconds, error = servers[group](random)
        canary.observe(group, seconds, error=error)
        if canary.verdict() is not None:
            return canary.groups["challenger"].requests
    return None


def false_alarms(limits: CanaryLimits, times: int, requests: int) -> float:
    """Return the share of comparisons that roll back a challenger that is exactly at the margins."""
    worst = answer(limits.latency, 0.05), answer(1.0, 0.05)
    out = [requests_until_out(Canary(limits), *worst, seed, requests) for seed in range(times)]
    return sum(n is not None for n in out) / times


class _Uncorrected(Canary):
    """Takes the same looks, each at the full level."""

    def _level(self, kind: str) -> float:
        return self._limits.alpha / TESTS


def check_false_alarms(times: int, requests: int) -> None:
    alpha = 0.2  # large, so that few repetitions show it
    limits = CanaryLimits(alpha=alpha, errors=0.0)
    sd = (alpha * (1 - alpha) / times) ** 0.5
    assert false_alarms(limits, times, requests) <= alpha + 2 * sd


def test_looking_after_every_request_keeps_the_false_alarm_rate() -> None:
    check_false_alarms(times=60, requests=500)


@pytest.mark.slow
def test_looking_after_every_request_keeps_the_false_alarm_rate_of_long_comparisons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_false_alarms(times=300, requests=3_000)
    limits = CanaryLimits(alpha=0.2, errors=0.0)
    monkeypatch.setattr(Canary, "_level", _Uncorrected._level)
    assert false_alarms(limits, times=100, requests=3_000) > 0.25  # the correction is needed


BAD: dict[str, tuple[Draw, Draw]] = {  # challenger, baseline
    "raises": (answer(0.1, errors=1.0), answer(0.1)),
    "raises sometimes": (answer(0.1, errors=0.2), answer(0.1)),
    "2x slower": (answer(0.2), answer(0.1)),
    "hangs up early": (answer(0.001, errors=0.5), answer(0.1)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_challenger_is_out_within_200_requests(name: str) -> None:
    for seed in range(20):
        out = requests_until_out(Canary(CanaryLimits()), *BAD[name], seed, 200)
        assert out is not None, seed


def test_challenger_within_the_margins_stays() -> None:
    for seed in range(20):
        equal = requests_until_out(Canary(CanaryLimits()), answer(0.1), answer(0.1), seed, 1_000)
        faster = requests_until_out(Canary(CanaryLimits()), answer(0.05), answer(0.1), seed, 500)
        assert (equal, faster) == (None, None), seed


def test_reason_names_every_failed_test_with_its_figures() -> None:
    canary = Canary(CanaryLimits())
    for _ in range(20):
        canary.observe("challenger", 0.1, error=True)
        canary.observe("baseline", 0.1)
    verdict = canary.verdict()
    assert verdict is not None and verdict.worse
    assert "error rate 100.0% against 0.0%" in verdict.reason
    assert verdict.figures["challenger.error_rate"] == 1
    assert canary.verdict() is None  # the next look is after more requests


def test_worse_answers_to_probes_are_seen_at_the_first_round() -> None:
    canary = Canary(CanaryLimits())
    canary.observe_probes([0.8] * 32, [0.1] * 32)
    verdict = canary.verdict()
    assert verdict is not None
    assert "32 probes answered worse and 0 better of 32" in verdict.reason


def test_the_same_answers_again_are_no_new_evidence() -> None:
    canary = Canary(CanaryLimits())
    canary.observe_probes([0.8] * 7 + [0.1], [0.1] * 7 + [0.8])
    assert canary.verdict() is None
    level = canary._level("probes")
    for _ in range(100):
        canary.observe_probes([0.8] * 7 + [0.1], [0.1] * 7 + [0.8])
        assert canary.verdict() is None
    assert canary._level("probes") == level


def test_few_lost_probes_within_the_margin_are_accepted() -> None:
    canary = Canary(CanaryLimits(answers=0.1))
    canary.observe_probes([1.0] * 100, [1.0] * 91 + [0.0] * 9)
    assert canary.verdict() is None


def test_promotion_needs_requests_time_latency_errors_and_probes() -> None:
    limits = CanaryLimits(promote_requests=100, promote_s=60, probes="dataset")

    def compared(
        challenger: Draw, requests: int = 200, scores: tuple[float, float] = (0.5, 0.5)
    ) -> Canary:
        canary, random = Canary(limits), np.random.default_rng(0)
        for _ in range(requests):
            for group, draw in (("challenger", challenger), ("baseline", answer(0.1))):
                seconds, error = draw(random)
                canary.observe(group, seconds, error=error)
        canary.observe_probes([scores[0]] * 8, [scores[1]] * 8)
        return canary

    assert compared(answer(0.05)).promotable(61) is not None
    assert compared(answer(0.05)).promotable(59) is None
    assert compared(answer(0.05), requests=99).promotable(61) is None
    assert compared(answer(0.05, errors=0.1)).promotable(61) is None
    assert compared(answer(0.3)).promotable(61) is None
    assert compared(answer(0.05), scores=(0.5, 0.4)).promotable(61) is None
    unprobed = compared(answer(0.05))
    unprobed.scores = ((), ())
    assert unprobed.promotable(61) is None


def test_alpha_zero_switches_the_comparison_off() -> None:
    assert requests_until_out(Canary(CanaryLimits(alpha=0)), *BAD["raises"], 0, 200) is None


def test_generated_answers_are_scored_by_their_words() -> None:
    assert overlap("A red circle.", "a red circle") == 1
    assert overlap("a blue circle", "a red circle") == pytest.approx(2 / 3)
    assert overlap("qx zv", "a red circle") == 0
    assert (overlap("!?", "!?"), overlap("", "!?")) == (1, 0)
    probe = Probe("rank", (b"", ["a", "b"], None), "b")
    assert (probe.score([("b", 1.0), ("a", 0.0)]), probe.score([("a", 1.0)])) == (1, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"canary.latency": 0.5}, "canary.latency: out of range. Got 0.5; expected at least 1"),
        ({"canary.errors": 2}, "canary.errors: out of range. Got 2; expected 0 to 1"),
        ({"canary.alpha": 0.9}, "expected 0 to 0.5"),
        ({"canary.prob": "x"}, "did you mean 'probes'"),
        ({"auto_promote": True}, "auto_promote without a challenger"),
        ({"auto_promote": True, "challenger": "b@challenger"}, "not versions of one registered"),
        ({"model": "/a", "auto_promote": True, "challenger": "/a"}, "a folder has no alias"),
        ({"model": "a:1", "follow": "alias"}, "no model has an alias"),
        ({"model": "./a", "follow": "alias"}, "no model has an alias"),
        ({"follow": "version"}, "alias"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        parse_options({"model": "a", **arguments})
    assert "\n" not in str(caught.value)


PROMOTING = {"auto_promote": "true", "challenger": "m@challenger", "share": "0.1"}


def start(home: Path, **arguments: str) -> None:
    """Start an app that must be refused before it needs a Ray."""
    address = launch.AppAddress(port=launch.free_port())
    given = {"model": "m", "dev": "true", "home": str(home)} | PROMOTING | arguments
    launch.start("chat", given, address)


def test_a_wrong_gate_is_refused_before_the_app_starts(
    tmp_path: Path, model_home: ModelHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "gate.toml"
    file.write_text('improv = ["ranking.accuracy"]')
    gate = {"canary.gate": str(file)}
    with pytest.raises(SpecError, match="unknown key 'improv'; did you mean 'improve'"):
        start(tmp_path, **gate)
    with pytest.raises(SpecError, match="unknown key 'improv'"):
        written = {"model": "m"} | PROMOTING | gate
        launch.write_config(tmp_path / "serve.yaml", "chat", written, launch.AppAddress())
    with pytest.raises(SpecError, match="does not exist"):
        start(tmp_path, **{"canary.gate": "none.toml"})
    with pytest.raises(SpecError, match="exclude each other"):
        start(tmp_path, **gate, **{"canary.metric": "a.b"})
    file.write_text('improve = ["vqav2.acuracy"]')
    monkeypatch.chdir(tmp_path)  # a relative path is that of the command
    with pytest.raises(SpecError, match=r"did you mean 'vqav2\.accuracy'"):
        start(tmp_path, **{"canary.gate": "gate.toml"})


def test_a_wrong_metric_is_refused_before_the_app_starts(model_home: ModelHome) -> None:
    for metric, message in {
        "vqav2.acuracy": r"no evaluation returns 'vqav2\.acuracy'; did you mean 'vqav2\.accuracy'",
        "vqav2.most_common": "is a baseline, so it cannot decide a promotion",
        "loss": "no evaluation returns 'loss'",
    }.items():
        with pytest.raises(SpecError, match=message) as caught:
            start(model_home.path, **{"canary.metric": metric})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["canary.gate", "canary.metric"])
def test_a_gate_that_decides_nothing_is_refused(field: str) -> None:
    with pytest.raises(SpecError, match=f"{field} without auto_promote"):
        parse_options({"model": "m", field: "vqav2.accuracy"})
