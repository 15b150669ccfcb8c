"""What a filter said of an image's two texts, and what is kept of them: values, no models.

A shard's verdicts are a file of JSON lines, one for every row, in order: whole or absent.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple
from uuid import uuid4

import fsspec

Origin = Literal["web", "written"]


@dataclass(frozen=True)
class Verdict:
    """One row of the source. A score is the filter's logit that text and image belong together."""

    key: str
    web: str = ""
    web_score: float | None = None  # None: nothing in the text that the filter can read
    written: str = ""
    written_score: float | None = None
    bad: tuple[str, str] | None = None  # a reason of the quarantine and its detail: the row was not judged


class Kept(NamedTuple):
    """A text that goes on."""

    origin: Origin
    text: str


def decide(verdict: Verdict, threshold: float) -> list[Kept]:
    """The texts that stay, none to two: those that the filter finds matched, and one text once (BLIP 3.3)."""
    kept: list[Kept] = []
    if verdict.web_score is not None and verdict.web_score > threshold:
        kept.append(Kept("web", verdict.web))
    repeated = bool(kept) and verdict.written.strip() == verdict.web.strip()
    if verdict.written_score is not None and verdict.written_score > threshold and not repeated:
        kept.append(Kept("written", verdict.written))
    return kept


@dataclass
class Counts:
    """How many images came in and texts went on; a manifest carries it."""

    images: int = 0
    web: int = 0  # kept
    written: int = 0  # kept
    both: int = 0  # images that kept the two
    dropped: int = 0  # images of which nothing was kept
    repeated: int = 0  # written texts that are the kept web text again
    unread: int = 0  # written texts in which there is nothing to read
    bad: int = 0  # rows that could not be judged: quarantined, and not among the images

    @classmethod
    def of(cls, verdicts: Iterable[Verdict], threshold: float) -> "Counts":
        counts = cls()
        for verdict in verdicts:
            counts._add(verdict, {kept.origin for kept in decide(verdict, threshold)}, threshold)
        return counts

    def _add(self, verdict: Verdict, kept: set[Origin], threshold: float) -> None:
        if verdict.bad is not None:
            self.bad += 1
            return
        score = verdict.written_score
        self.images += 1
        self.web += "web" in kept
        self.written += "written" in kept
        self.both += len(kept) == 2
        self.dropped += not kept
        self.unread += score is None
        self.repeated += score is not None and score > threshold and "written" not in kept


def save(path: str, verdicts: Iterable[Verdict]) -> None:
    fs, file = fsspec.core.url_to_fs(path)
    fs.makedirs(file.rpartition("/")[0], exist_ok=True)
    temporary = f"{file}.{uuid4().hex[:8]}.tmp"
    with fs.open(temporary, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(asdict(verdict), ensure_ascii=False) + "\n" for verdict in verdicts)
    fs.mv(temporary, file)


def read(path: str) -> Iterator[Verdict]:
    fs, file = fsspec.core.url_to_fs(path)
    with fs.open(file, encoding="utf-8") as lines:
        for line in lines:
            fields = json.loads(line)
            yield Verdict(**{**fields, "bad": tuple(fields["bad"]) if fields["bad"] else None})


def there(path: str) -> bool:
    fs, file = fsspec.core.url_to_fs(path)
    return bool(fs.exists(file))
