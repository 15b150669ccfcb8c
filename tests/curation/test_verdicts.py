"""What is kept of an image's two texts: a function of two scores and a threshold."""

from dataclasses import asdict
from pathlib import Path

import pytest

from bridgework.curation.verdicts import Counts, Kept, Verdict, decide, read, save, there

WEB, WRITTEN = Kept("web", "a dog"), Kept("written", "two cats")


def verdict(web: float | None, written: float | None, text: str = "two cats") -> Verdict:
    return Verdict("k", "a dog", web, text, written)


@pytest.mark.parametrize(
    ("web", "written", "kept"),
    [
        (1.0, 1.0, [WEB, WRITTEN]),
        (1.0, -1.0, [WEB]),
        (-1.0, 1.0, [WRITTEN]),
        (-1.0, -1.0, []),
        (0.0, 0.0, []),  # as likely as not is not matched
        (None, None, []),
        (1.0, None, [WEB]),
    ],
)
def test_each_text_stays_by_its_own_score(web: float | None, written: float | None, kept: list[Kept]) -> None:
    assert decide(verdict(web, written), 0.0) == kept


def test_the_threshold_is_of_the_logit() -> None:
    assert decide(verdict(1.0, 3.0), 2.0) == [WRITTEN]
    assert decide(verdict(1.0, 3.0), -2.0) == [WEB, WRITTEN]


def test_a_text_that_was_written_again_is_kept_once() -> None:
    assert decide(verdict(1.0, 1.0, " a dog\n"), 0.0) == [WEB]
    assert decide(verdict(-1.0, 1.0, "a dog"), 0.0) == [Kept("written", "a dog")]


def test_a_row_that_could_not_be_judged_keeps_nothing() -> None:
    assert decide(Verdict("k", bad=("truncated", "half a file")), -100.0) == []


def test_counts_add_up() -> None:
    told = [
        verdict(1.0, 1.0), verdict(1.0, -1.0), verdict(-1.0, -1.0), verdict(1.0, 1.0, "a dog"), verdict(-1.0, None),
        Verdict("k", bad=("truncated", "half a file")),
    ]  # fmt: skip
    counts = Counts.of(told, 0.0)
    assert asdict(counts) == {
        "images": 5, "web": 3, "written": 1, "both": 1, "dropped": 2, "repeated": 1, "unread": 1, "bad": 1,
    }  # fmt: skip
    assert counts.web + counts.written - counts.both + counts.dropped == counts.images


def test_verdicts_come_back_as_they_were_written(tmp_path: Path) -> None:
    told = [verdict(1.25, None, "zwei Hündchen\n"), Verdict("other", bad=("truncated", "half a file"))]
    path = str(tmp_path / "judged" / "0.jsonl")
    assert not there(path)
    save(path, told)
    assert there(path) and list(read(path)) == told
    assert [file.name for file in (tmp_path / "judged").iterdir()] == ["0.jsonl"]
