"""Model cards: README.md with the front matter of the Hugging Face Hub, written from the record.

A card states the recipe, the pretrained weights, the datasets with their licenses, the figures with
their intervals, and what is not known. Nothing in it is typed by hand.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from bridgework import artifacts
from bridgework.config import flat
from bridgework.data.catalog import home
from bridgework.data.manifest import Manifest, read_manifest
from bridgework.errors import DataError
from bridgework.evaluation import results
from bridgework.mixture import DatasetInput
from bridgework.system import Stage, System
from bridgework.tracking import environment
from bridgework.tracking.tracker import JOURNAL, Journal

FILE = "README.md"
HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # org/name
PROBE = "bias."  # figures of the bias probe begin with it
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Facts:
    """Facts about a training that its artifact does not hold.

    figures: name -> value. intervals: name -> (low, high) of its 95 % interval, and the rows.
    hours: duration of the steps of the stage. tags: of its run, e.g. git_commit, command.
    """

    figures: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float, int]] = field(default_factory=dict)
    hours: float | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


def stored_facts(folder: Path, home: Path) -> Facts:
    """Return the figures and intervals of the stored evaluations of an artifact.

    The hours are those of the journal next to it; an imported artifact has none.
    """
    records = results.records_of(folder, artifacts.describe(folder).digest, home)
    figures = {figure.name: figure for record in records for figure in record.figures}
    return Facts(
        figures={name: figure.value for name, figure in figures.items()},
        intervals={
            name: (found.low, found.high, found.n)
            for name, figure in figures.items()
            if (found := figure.interval) is not None and found.clusters > 1
        },
        hours=_hours(folder.parent / JOURNAL),
    )


def _hours(journal: Path) -> float | None:
    """Return the hours of all steps of a journal. A repeated step counts once."""
    seconds = {
        point.step: point.value
        for _, points in Journal(journal).points()
        for point in points
        if point.key == "step_s"
    }
    return sum(seconds.values()) / 3600 if seconds else None


def model_card(folder: Path, facts: Facts | None = None, *, library: str = "bridgework") -> str:
    """Return the card of the artifact in `folder`.

    library: the library that loads the weights next to the card. Raises WeightsError if `folder`
    holds no artifact.
    """
    info, system = artifacts.describe(folder), artifacts.recipe(folder)
    stage = system[info.stage]
    facts = facts or replace(stored_facts(folder, home()), tags=environment.tags())
    manifests = {d.digest: _manifest(d) for d in info.datasets}
    licenses = sorted({m.license if m else UNKNOWN for m in manifests.values()})
    weights = sorted({v for p, v in flat(stage.model).items() if _is_weights(p, v)})
    data = ModelCardData(
        license="other",
        license_name="of-the-data-and-the-pretrained-weights",
        library_name=library,
        pipeline_tag="image-text-to-text" if "logits" in _outputs(stage) else None,
        tags=["vision-language", "bridgework", system.name],
        base_model=[w for w in weights if HUB.fullmatch(w)] or None,
        datasets=sorted({d.name for d in info.datasets}) or None,
        model_name=system.name,
        eval_results=[
            EvalResult(
                task_type="image-text-to-text",
                dataset_type="own",
                dataset_name=name.rpartition(".")[0] or name,
                metric_type=name,
                metric_value=value,
            )
            for name, value in sorted(facts.figures.items())
        ]
        or None,
    )
    parts = [
        f"---\n{data.to_yaml().strip()}\n---",
        f"# {system.name}, stage {stage.name}",
        f"{info.parameters:,} parameters in {info.tensors:,} tensors are stored here. "
        f"The recipe follows {system.paper or 'no paper'}; its fingerprint is `{info.fingerprint}`, "
        f"the digest of the weights `{info.digest[:12]}`.",
        _use(stage),
        "## Weights\n\n"
        + ("\n".join(f"- {w}" for w in weights) or "- none: trained from random values")
        + "\n\nThe licenses of these weights are those of their publishers, and are not checked.",
        _data(info.datasets, manifests, licenses),
        _training(system, stage, info, facts),
        _evaluation(facts),
        _limits(facts),
    ]
    return "\n\n".join(parts) + "\n"


def description(folder: Path, tags: Mapping[str, str]) -> str:
    """Return the text of a registered version: its card without the front matter."""
    facts = replace(stored_facts(folder, home()), tags=environment.tags() | dict(tags))
    return model_card(folder, facts).partition("---\n\n")[2]


def _use(stage: Stage) -> str:
    task = (
        "It writes text about images: captions and answers."
        if "logits" in _outputs(stage)
        else "It compares images with texts."
    )
    return (
        f"## Intended use\n\n{task} It is meant for research and for the task of its training data. "
        "Decisions about people, and any use without a human who checks the answers, are not "
        "intended."
    )


def _data(
    datasets: tuple[DatasetInput, ...],
    manifests: Mapping[str, Manifest | None],
    licenses: list[str],
) -> str:
    rows = [
        f"| {d.name} | {d.rows:,} | {m.license if (m := manifests[d.digest]) else UNKNOWN} | "
        f"{m.source if m else UNKNOWN} | `{d.digest[:12]}` |"
        for d in datasets
    ]
    table = "| dataset | rows | license | source | digest |\n|---|---|---|---|---|\n"
    listed = table + "\n".join(rows) if rows else "The weights were imported: no dataset is known."
    end = f"\n\nLicenses of the data: {', '.join(licenses)}." if rows else ""
    return f"## Data\n\n{listed}{end}"


def _training(system: System, stage: Stage, info: artifacts.Info, facts: Facts) -> str:
    stages = ", ".join(s.name for s in system.stages)
    lines = [
        f"Stage {stage.name} of {stages}: {info.steps:,} steps of {stage.budget.batch:,} samples, "
        f"peak learning rate {stage.optim.peak_lr:g}, trained parameters "
        f"{', '.join(f'`{glob}`' for glob in stage.trains)}."
    ]
    if facts.hours is not None:
        lines.append(f"Duration of the steps: {facts.hours:.3g} hours. Energy: not measured.")
    else:
        lines.append("Duration and energy: not recorded.")
    for tag in ("hardware", "versions", "git_commit", "command", "seed"):
        if facts.tags.get(tag):
            lines.append(f"{tag.replace('_', ' ').capitalize()}: `{facts.tags[tag]}`.")
    return "## Training\n\n" + "\n".join(f"- {line}" for line in lines)


def _evaluation(facts: Facts) -> str:
    if not facts.figures:
        return "## Evaluation\n\nNo figures are recorded."
    lines = ["| figure | value | 95 % interval | rows |", "|---|---|---|---|"]
    for name, value in sorted(facts.figures.items()):
        low, high, rows = facts.intervals.get(name, (float("nan"), float("nan"), 0))
        interval = f"{low:.4g} to {high:.4g}" if rows else "not known"
        lines.append(f"| {name} | {value:.4g} | {interval} | {rows or 'not known'} |")
    return "## Evaluation\n\n" + "\n".join(lines)


def _limits(facts: Facts) -> str:
    probed = [name for name in facts.figures if name.startswith(PROBE)]
    probe = (
        "The bias probe compares captions and questions in which one word is swapped: see "
        + ", ".join(f"`{name}`" for name in probed)
        if probed
        else "No bias probe was run"
    )
    return (
        "## Limits\n\nThe model knows the words and images of its data, and may state what an image "
        f"does not show. {probe}. The figures hold for the datasets above, and for no other."
    )


def _is_weights(path: str, value: object) -> bool:
    return path.rpartition(".")[2] == "weights" and isinstance(value, str)


def _outputs(stage: Stage) -> frozenset[str]:
    return frozenset(loss.requires for loss in stage.losses)


def _manifest(dataset: DatasetInput) -> Manifest | None:
    try:
        manifest = read_manifest(dataset.path)
    except (DataError, OSError):
        return None
    return manifest if manifest.digest == dataset.digest else None
