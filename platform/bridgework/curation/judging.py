"""A captioner and a filter over shards: a verdict for every row, shard by shard, in this process or on Ray's actors.

A verdict depends on (seed, key), the models and the row group that the row lies in: not on who judges it, or when.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from bridgework.curation import verdicts
from bridgework.curation.verdicts import Verdict
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Sample, pair
from bridgework.data.shards import open_dataset
from bridgework.data.transforms import decode
from bridgework.inference import Pipeline

if TYPE_CHECKING:
    from bridgework.curation.capfilt import CapFilt

DIGITS = 4  # of a score, so that a file and memory agree on it


@dataclass(frozen=True)
class Task:
    """One shard to be judged, and the file that its verdicts go to."""

    dataset: str  # path or URL
    shard: int
    dest: str


class Judge:
    """Holds the models; writes the verdicts of one shard a call."""

    def __init__(self, spec: "CapFilt", captioner: str, filter_: str, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._spec = spec
        self._captioner, self._filter = Pipeline.load(captioner), Pipeline.load(filter_)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """`item` is a Task, as a row of Ray Data."""
        task = Task(**item)
        dataset = open_dataset(task.dataset)
        groups = -(-dataset.manifest.shards[task.shard].rows // dataset.manifest.group_rows)
        read = (dataset.read_group(task.shard, group) for group in range(groups))
        verdicts.save(task.dest, (verdict for samples in read for verdict in self.judge(samples)))
        return {"dest": task.dest}

    def judge(self, samples: Sequence[Sample]) -> list[Verdict]:
        """A verdict for each sample; one that cannot be judged says why."""
        texts = [_checked(sample) for sample in samples]
        good = [(s, text) for s, text in zip(samples, texts, strict=True) if isinstance(text, str)]
        judged = iter(self._judge([s for s, _ in good], [text for _, text in good]) if good else [])
        return [
            next(judged) if isinstance(text, str) else Verdict(sample.key, bad=(text.reason, text.detail))
            for sample, text in zip(samples, texts, strict=True)
        ]

    def _judge(self, samples: Sequence[Sample], web: Sequence[str]) -> list[Verdict]:
        spec, pictures = self._spec, [sample.images[0] for sample in samples]
        written = self._captioner.write(
            [self._captioner.ask(sample) for sample in samples],
            [[picture] for picture in pictures],
            [_seed(spec.seed, sample.key) for sample in samples],
            max_new_tokens=spec.max_tokens,
            min_new_tokens=spec.min_tokens,
            temperature=spec.temperature,
            top_p=spec.top_p,
        )
        seen_NPF = self._filter.features(pictures)
        scores = [self._scores(seen_NPF, texts) for texts in (web, written)]
        return [Verdict(sample.key, web[i], scores[0][i], written[i], scores[1][i]) for i, sample in enumerate(samples)]

    def _scores(self, seen_NPF: torch.Tensor, texts: Sequence[str]) -> list[float | None]:
        """The filter's logits; None for a text that it cannot read."""
        scores: list[float | None] = [None] * len(texts)
        if readable := [i for i, text in enumerate(texts) if self._readable(text)]:
            logits = self._filter.match(seen_NPF[readable], [texts[i] for i in readable])
            for i, logit in zip(readable, logits.tolist(), strict=True):
                scores[i] = round(logit, DIGITS)
        return scores

    def _readable(self, text: str) -> bool:
        try:
            self._filter.encode(self._filter.ask(pair("text", b"", text)), answer=True)
        except BadSample:
            return False
        return True


def judge(spec: "CapFilt", captioner: str, filter_: str, tasks: Sequence[Task], workers: int) -> None:
    """Write the verdicts of all `tasks`: by at most `workers` actors of Ray, or with 0 in this process."""
    if not tasks:
        return
    if not workers:
        one = Judge(spec, captioner, filter_)
        for task in tasks:
            one(vars(task))
        return
    import ray.data  # a machine that curates in one process needs no Ray

    actors = min(workers, len(tasks))
    gpus = ray.cluster_resources().get("GPU", 0.0) >= actors
    made = ray.data.from_items([vars(task) for task in tasks], override_num_blocks=len(tasks)).map(
        cast(Any, Judge),
        fn_constructor_args=(spec, captioner, filter_, max(1, torch.get_num_threads() // actors)),
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=0.5,
        num_gpus=1 if gpus else 0,
    )
    made.materialize()


def _checked(sample: Sample) -> str | BadSample:
    """The web's text of a pair whose image can be decoded, else what is wrong with it."""
    texts = [part for part in sample.parts if part.text is not None]
    if len(sample.images) != 1 or [part.role for part in texts] != ["caption"]:
        return BadSample(Reason.BAD_ROW, "CapFilt reads pairs: one image and one caption a row")
    try:
        decode(sample.images[0])
    except BadSample as error:
        return error
    return texts[0].text or ""


def _seed(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:7])
