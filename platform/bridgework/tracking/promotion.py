"""Promotion through a gate, rollback and history; every decision is a run in the tracker.

A candidate is compared with the champion by stored evaluations; missing ones are run. The decision
with all figures is recorded, also a refused one, and the versions refer to it by the tag `decision`.
"""

import getpass
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from bridgework import __version__, artifacts
from bridgework.errors import BridgeworkError, SpecError, TrackingError, WeightsError
from bridgework.evaluation import results
from bridgework.evaluation.gate import Gate, GateCheck, default_gate, judge
from bridgework.evaluation.results import EvaluationRecord
from bridgework.system import EvalSpec, Stage
from bridgework.tracking import evaluations
from bridgework.tracking.openlineage_events import Artifact, Event, emit
from bridgework.tracking.registry import holder, split
from bridgework.tracking.tracker import CHAMPION, Point, Produced, Tracker, Version

KIND = "decision"  # tag `kind` of the runs
Verdict = Literal["promoted", "refused", "undecided", "forced", "rolled back"]
Say = Callable[[str], object]


@dataclass(frozen=True)
class PromotionDecision:
    """One decision about the champion of a model."""

    model: str
    verdict: Verdict
    candidate: str  # version
    champion: str  # version before the decision; empty if there was none
    reason: str
    by: str
    at: str  # UTC, ISO 8601
    checks: tuple[GateCheck, ...] = ()
    version: str = __version__  # of bridgework
    run_id: str = field(default="", compare=False)

    @property
    def changed(self) -> bool:
        """True if another version became the champion."""
        return self.verdict not in ("refused", "undecided")


class NotPromoted(TrackingError):
    """A candidate did not pass the gate; `decision` has the figures."""

    def __init__(self, decision: PromotionDecision) -> None:
        self.decision = decision
        fix = (
            "evaluate on more rows"
            if decision.verdict == "undecided"
            else "train a better model, or give --force REASON"
        )
        super().__init__(
            f"{decision.model}:{decision.candidate} was not promoted over version "
            f"{decision.champion}: {decision.reason}. Fix: {fix}"
        )


def promote(
    tracker: Tracker,
    model: str,
    *,
    home: Path,
    gate: Gate | None = None,
    metric: str | None = None,
    force: str | None = None,
    say: Say = lambda text: None,
) -> PromotionDecision:
    """Make a version the champion if it passes the gate against the present one.

    gate: by default that of the candidate's stage (`default_gate`). metric: the only figure that
    must improve, instead of a gate. force: promote without a gate, for this reason. The first
    champion of a model needs no comparison.

    Raises NotPromoted if it does not pass, and TrackingError if another promotion was faster.
    """
    name, which = split(model)
    if force is not None and not force.strip():
        raise SpecError("--force: the reason is kept on record. Got a blank; expected a sentence")
    if gate is not None and metric is not None:
        raise SpecError("--gate and --metric exclude each other. Fix: put the metric into the gate")
    candidate, champions = tracker.version(name, which), tracker.champions(name)
    champion = tracker.version(name, champions[-1]) if champions else None
    if champion is not None and champion.version == candidate.version:
        raise TrackingError(
            f"{name}:{candidate.version} is the champion already. Fix: give another version"
        )
    checks: tuple[GateCheck, ...] = ()
    verdict: Verdict = "promoted"
    if force is not None:
        verdict, reason = "forced", force.strip()
    elif champion is None:
        reason = "first champion"
    else:
        checks = tuple(_checks(tracker, candidate, champion, gate, metric, home, say))
        verdict, reason = _verdict(checks)
    before = champion.version if champion else ""
    decision = _decision(name, verdict, candidate.version, before, reason, checks)
    if decision.changed and not tracker.set_champions(
        name, (*champions, candidate.version), champions
    ):
        now = holder(tracker, name, CHAMPION)
        raise TrackingError(
            f"{name}:{candidate.version} was not promoted, because another promotion was faster: "
            f"the champion is now version {now.version if now else '?'}. "
            "Fix: promote again, which compares it with the new champion"
        )
    decision = _record(tracker, decision, [v for v in (candidate, champion) if v is not None], home)
    if not decision.changed:
        raise NotPromoted(decision)
    return decision


def rollback(tracker: Tracker, name: str, reason: str = "", *, home: Path) -> PromotionDecision:
    """Make the champion before the present one champion again; repeated, it goes further back.

    Raises TrackingError if the present champion is the first, and if a promotion was faster.
    """
    champions = tracker.champions(name)
    if len(champions) < 2:
        raise TrackingError(
            f"{name}: no champion to roll back to. Got "
            + (f"version {champions[0]}, the first one" if champions else "no champion")
            + f". Fix: promote another version, e.g. `bridgework promote {name}:VERSION`"
        )
    *_, back, current = champions
    if not tracker.set_champions(name, champions[:-1], champions):
        raise TrackingError(
            f"{name} was not rolled back, because its champion changed at the same time. "
            f"Fix: see `bridgework history {name}`, then roll back again"
        )
    decision = _decision(name, "rolled back", back, current, reason or "rollback", ())
    return _record(tracker, decision, [tracker.version(name, v) for v in (back, current)], home)


def history(tracker: Tracker, name: str) -> list[PromotionDecision]:
    """Return the decisions about a model, oldest first. Raises TrackingError for an unknown one."""
    tracker.champions(name)
    found = tracker.find({"kind": KIND, "model": name})
    return [
        PromotionDecision(
            model=name,
            verdict=_verdict_of(tags.get("verdict", "")),
            candidate=tags.get("candidate", ""),
            champion=tags.get("champion", ""),
            reason=tags.get("reason", ""),
            by=tags.get("by", ""),
            at=tags.get("at", ""),
            version=tags.get("bridgework", ""),
            run_id=run_id,
        )
        for run_id, tags in found
    ]


def _verdict_of(text: str) -> Verdict:
    known: tuple[Verdict, ...] = ("promoted", "refused", "undecided", "forced", "rolled back")
    return next((verdict for verdict in known if verdict == text), "refused")


def _checks(
    tracker: Tracker,
    candidate: Version,
    champion: Version,
    gate: Gate | None,
    metric: str | None,
    home: Path,
    say: Say,
) -> list[GateCheck]:
    gate, evals = resolve_gate(candidate.artifact, gate, metric)
    new, old = (
        stored_or_run(v.artifact, evals, home, tracker=tracker, say=say)
        for v in (candidate, champion)
    )
    checks = judge(gate, new, old)
    return [*checks, _parity(candidate, say)] if gate.parity else checks


def resolve_gate(
    artifact: str, gate: Gate | None, metric: str | None
) -> tuple[Gate, list[EvalSpec]]:
    """Return the gate for the weights of a candidate, and the evaluations that it needs.

    gate, metric: as in `promote`. Raises SpecError, with a suggestion, for a figure that no
    evaluation of the gate or of the candidate's stage returns.
    """
    own = stage_of(artifact).evals
    if gate is None:
        gate = Gate(improve=(metric,)) if metric else default_gate(own)
    return gate, gate.evals(own)


def stage_of(artifact: str) -> Stage:
    """Return the stage that made an artifact."""
    return artifacts.recipe(artifact)[artifacts.describe(artifact).stage]


def stored_or_run(
    artifact: str,
    evals: Sequence[EvalSpec],
    home: Path,
    *,
    tracker: Tracker | None,
    say: Say = lambda text: None,
) -> list[EvaluationRecord]:
    """Return the records of an artifact's evaluations; those that are not stored are run.

    A record of another version of bridgework, or a `timed` one, is not taken.
    """
    weights = artifacts.describe(artifact).digest
    known = {
        record.evaluation: record
        for record in results.records_of(artifact, weights, home)
        if record.version == __version__
    }
    identities = [results.identity(spec, home) for spec in evals]
    missing = [
        spec
        for spec, identity in zip(evals, identities, strict=True)
        if identity not in known or getattr(spec, "timed", False)
    ]
    if missing:
        say(f"{artifact}: {', '.join(e.name for e in missing)} not evaluated yet")
        done = evaluations.evaluate(artifact, missing, home, tracker=tracker, say=say)
        known |= {record.evaluation: record for _, record in done}
    return [known[identity] for identity in identities]


def _parity(candidate: Version, say: Say) -> GateCheck:
    """Export the candidate to transformers, which raises an error if an output differs."""
    from bridgework.hf import convert

    say(f"{candidate.name}:{candidate.version} is exported, to compare its outputs")
    with tempfile.TemporaryDirectory() as folder:
        try:
            certificate = convert.export_hf(Path(candidate.artifact), Path(folder) / "export")
        except BridgeworkError as error:
            return GateCheck("parity", "parity", "failed", f"its export is not equal: {error}")
    largest = max(certificate.differences.values(), default=0.0)
    return GateCheck(
        "parity", "parity", "passed", f"equal outputs within {largest:.1e}", new=largest
    )


def _verdict(checks: Sequence[GateCheck]) -> tuple[Verdict, str]:
    failed, undecided = (
        [check for check in checks if check.outcome == outcome]
        for outcome in ("failed", "undecided")
    )
    verdict: Verdict = "refused" if failed else "undecided" if undecided else "promoted"
    named = failed or undecided or checks
    return verdict, "; ".join(f"{check.figure}: {check.reason}{_figures(check)}" for check in named)


def _figures(check: GateCheck) -> str:
    if check.difference is None:
        return ""
    return (
        f" ({check.new:.4g} against {check.old:.4g}, difference {check.difference:+.4g} "
        f"[{check.low:.4g}, {check.high:.4g}], n={check.n:,}, {check.better} is better)"
    )


def _decision(
    name: str,
    verdict: Verdict,
    candidate: str,
    champion: str,
    reason: str,
    checks: Sequence[GateCheck],
) -> PromotionDecision:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without a name for its user
        user = "unknown"
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return PromotionDecision(name, verdict, candidate, champion, reason, user, now, tuple(checks))


def _record(
    tracker: Tracker, decision: PromotionDecision, versions: Sequence[Version], home: Path
) -> PromotionDecision:
    """Log a decision as a run with its figures, and refer to it from both versions."""
    tags = {
        "kind": KIND,
        "model": decision.model,
        "verdict": decision.verdict,
        "candidate": decision.candidate,
        "champion": decision.champion,
        "reason": decision.reason[:5_000],  # limit of MLflow's tags
        "by": decision.by,
        "at": decision.at,
        "bridgework": decision.version,
    }
    run = tracker.start(f"{decision.verdict} {decision.model}:{decision.candidate}", tags=tags)
    made = [_produced(tracker, version) for version in versions]
    models = [one.model_id for one in made if one is not None]
    tracker.inputs(run, [], models=models, context="decision")
    at = int(datetime.fromisoformat(decision.at).timestamp() * 1000)
    tracker.points(run, [Point(key, value, 0, at) for key, value in _points(decision).items()])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "decision.json"
        content = {k: v for k, v in asdict(decision).items() if k != "run_id"}
        file.write_text(json.dumps(content, indent=1))
        tracker.file(run, file)
    tracker.finish(run)
    for version in versions:
        tracker.tag_version(version.name, version.version, {"decision": run})
    named = [Artifact(f"models:/{v.name}/{v.version}", v.tags.get("digest", "")) for v in versions]
    event = Event(
        "PROMOTION",
        f"promotion/{decision.model}",
        "COMPLETE" if decision.changed else "ABORT",
        run=run,
        inputs=named,
        outputs=[Artifact(f"models:/{decision.model}@{CHAMPION}")] if decision.changed else [],
        tags={"verdict": decision.verdict, "reason": decision.reason[:500]},
    )
    emit(home, event)
    return PromotionDecision(**{**vars(decision), "run_id": run})


def _produced(tracker: Tracker, version: Version) -> Produced | None:
    digest = version.tags.get("digest")
    if not digest:
        try:
            digest = artifacts.describe(version.artifact).digest
        except WeightsError:
            return None
    return tracker.produced(digest, version.artifact)


def _points(decision: PromotionDecision) -> Mapping[str, float]:
    values = dict[str, float]()
    for check in decision.checks:
        fields = {"difference": check.difference, "difference.low": check.low,
                  "difference.high": check.high, "new": check.new, "old": check.old}  # fmt: skip
        values |= {f"{check.figure}.{key}": v for key, v in fields.items() if v is not None}
    return values
