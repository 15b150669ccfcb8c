"""From sources to the curated dataset: what is judged already is not judged again, what is made is taken as it is.

`<dest>.judged/<address>/` holds the verdicts of every shard; the address names the sources, both models and how texts
were drawn. The threshold is no part of it: another one takes the same verdicts.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridgework.curation import judging, verdicts
from bridgework.curation.verdicts import Counts, Verdict, decide
from bridgework.data.catalog import resolve
from bridgework.data.manifest import Manifest, read_manifest
from bridgework.data.quarantine import BadSample, Quarantine, Reason, clear
from bridgework.data.samples import Part, Sample
from bridgework.data.shards import Dataset, open_dataset, write
from bridgework.errors import DataError
from bridgework.spec import to_dict
from bridgework.training import artefact

if TYPE_CHECKING:
    from bridgework.curation.capfilt import CapFilt

MADE_BY = "bridgework.curation.capfilt"
DRAWN = ("top_p", "temperature", "min_tokens", "max_tokens", "seed")  # what the verdicts depend on


@dataclass(frozen=True)
class Making:
    """A CapFilt with its sources and models at hand."""

    spec: "CapFilt"
    dest: str
    datasets: tuple[Dataset, ...]
    captioner: str  # folders of artefacts
    filter: str

    @classmethod
    def of(cls, spec: "CapFilt", artefacts: Mapping[str, Path], dest: str, home: Path) -> "Making":
        """Raises DataError for a source that is not there, WeightsError for what is no artefact."""
        datasets = tuple(open_dataset(resolve(source, home)) for source in spec.sources)
        making = cls(spec, dest.rstrip("/"), datasets, str(artefacts[spec.captioner]), str(artefacts[spec.filter]))
        making.models()
        return making

    def models(self) -> dict[str, str]:
        """Digests of the weights of the two."""
        return {name: artefact.describe(getattr(self, name)).digest for name in ("captioner", "filter")}

    def parameters(self) -> dict[str, Any]:
        """What, beside its parents, decides the dataset."""
        words: dict[str, Any] = to_dict(self.spec)
        return self.models() | {name: words[name] for name in (*DRAWN, "threshold")}

    @property
    def parents(self) -> tuple[str, ...]:
        return tuple(dataset.manifest.digest for dataset in self.datasets)

    def tasks(self) -> list[judging.Task]:
        """Every shard of every source, in order."""
        known = {name: value for name, value in self.parameters().items() if name != "threshold"}
        address = hashlib.sha256(json.dumps([self.parents, known]).encode()).hexdigest()[:16]
        return [
            judging.Task(d.path, shard, f"{self.dest}.judged/{address}/{d.manifest.digest[:12]}-{shard:05d}.jsonl")
            for d in self.datasets
            for shard in range(len(d.manifest.shards))
        ]

    def verdicts(self) -> Iterator[Verdict]:
        return (verdict for task in self.tasks() for verdict in verdicts.read(task.dest))

    def rows(self) -> Iterator[tuple[Dataset, int, Sample, Verdict]]:
        """Every row of every source with its verdict: (dataset, number of the row in it, sample, verdict)."""
        told = self.verdicts()
        for dataset in self.datasets:
            for number, sample in enumerate(dataset.samples()):
                yield dataset, number, sample, next(told)

    def samples(self, quarantine: Quarantine) -> Iterator[Sample]:
        """A pair for every text that is kept; what could not be judged goes to the quarantine."""
        models = self.models()
        for dataset, number, sample, verdict in self.rows():
            if verdict.bad is not None:
                reason, detail = verdict.bad
                quarantine.add(dataset.manifest.digest, sample.key, number, BadSample(Reason(reason), detail))
            for origin, text in decide(verdict, self.spec.threshold):
                yield _pair(sample, origin, text, dataset.manifest.digest, verdict, models)


def make(
    spec: "CapFilt",
    artefacts: Mapping[str, Path],
    dest: str,
    *,
    home: Path,
    workers: int,
    say: Callable[[str], object],
) -> Manifest:
    """See CapFilt.run."""
    making = Making.of(spec, artefacts, dest, home)
    if (made := _made(making)) is not None:
        say(f"{spec.makes} was made before: {made.rows:,} pairs in {dest}")
        return made
    tasks = making.tasks()
    left = [task for task in tasks if not verdicts.there(task.dest)]
    rows = sum(dataset.manifest.rows for dataset in making.datasets)
    say(f"{spec.makes}: {rows:,} images to caption and to judge; {len(tasks) - len(left)} of {len(tasks)} shards are")
    judging.judge(spec, making.captioner, making.filter, left, workers)
    counts = Counts.of(making.verdicts(), spec.threshold)
    say(f"{spec.makes}: kept {counts.web:,} web texts and {counts.written:,} written ones, dropped {counts.dropped:,}")
    return _write(making, counts)


def _made(making: Making) -> Manifest | None:
    """What stands at `dest`, if it is what would be made. Raises DataError where it is something else."""
    if not verdicts.there(f"{making.dest}/manifest.json"):
        return None
    manifest, wanted = read_manifest(making.dest), making.parameters()
    had = {name: manifest.parameters.get(name) for name in wanted}
    if manifest.made_by == MADE_BY and manifest.parents == making.parents and had == wanted:
        return manifest
    other = [name for name in wanted if had[name] != wanted[name]] or ["sources"]
    raise DataError(
        f"{making.dest} holds another dataset (it differs in {', '.join(other)}); delete it or choose another place"
    )


def _write(making: Making, counts: Counts) -> Manifest:
    if counts.images and counts.dropped == counts.images:
        raise DataError(
            f"capfilt: the filter kept nothing of {counts.images:,} images at threshold {making.spec.threshold:g}; "
            "train the filter longer, or lower the threshold"
        )
    folder = f"{making.dest}.quarantine"
    clear(folder)
    quarantine = Quarantine(folder)
    return write(
        making.samples(quarantine),
        making.dest,
        source=", ".join(dataset.path for dataset in making.datasets),
        licence=", ".join(dict.fromkeys(dataset.manifest.licence for dataset in making.datasets)),
        made_by=MADE_BY,
        parameters=making.parameters() | {"counts": asdict(counts)},
        parents=making.parents,
        quarantine=quarantine,
    )


def _pair(sample: Sample, origin: str, text: str, parent: str, verdict: Verdict, models: Mapping[str, str]) -> Sample:
    told = {
        "kept": origin,
        "web_score": "" if verdict.web_score is None else f"{verdict.web_score:g}",
        "written_score": "" if verdict.written_score is None else f"{verdict.written_score:g}",
        "dataset": parent,
        "key": sample.key,
        **models,
    }
    return Sample(
        key=f"{parent[:8]}/{sample.key}/{origin}",
        images=sample.images,
        parts=(Part("caption", image=0), Part("caption", text=text)),
        language=sample.language if origin == "web" else None,
        licence=sample.licence,
        provenance={**sample.provenance, **{f"capfilt.{name}": value for name, value in told.items()}},
    )
