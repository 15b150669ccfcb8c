"""What CapFilt keeps of an image's two texts: a function of two scores and a threshold."""

import pytest

from bridgework.curation.capfilt import CapFilt, Scores
from bridgework.data.samples import pair

SAMPLE = pair("k", b"image", "a dog", language="en", provenance={"crawl.url": "x"})


def scores(web: float | None, written: float | None, text: str = "two cats") -> Scores:
    return Scores([text], web, [written])


def origins(told: Scores, threshold: float) -> list[str]:
    return [each.origin for each in told.select("a dog", threshold)[0]]


@pytest.mark.parametrize(
    ("web", "written", "kept"),
    [
        (1.0, 1.0, ["web", "written"]),
        (1.0, -1.0, ["web"]),
        (-1.0, 1.0, ["written"]),
        (-1.0, -1.0, []),
        (0.0, 0.0, []),  # as likely as not is not matched
        (None, None, []),
        (1.0, None, ["web"]),
    ],
)
def test_each_text_is_kept_by_its_own_score(
    web: float | None, written: float | None, kept: list[str]
) -> None:
    assert origins(scores(web, written), 0.0) == kept


def test_the_threshold_is_of_the_logit() -> None:
    assert origins(scores(1.0, 3.0), 2.0) == ["written"]
    assert origins(scores(1.0, 3.0), -2.0) == ["web", "written"]


def test_repeated_text_is_kept_once() -> None:
    again, why = scores(1.0, 1.0, " a dog\n").select("a dog", 0.0)
    assert [each.origin for each in again] == ["web"] and why == "web text, which was written again"
    assert origins(scores(-1.0, 1.0, "a dog"), 0.0) == ["written"]


def test_each_of_several_generated_texts_is_kept_by_its_score_and_once() -> None:
    several = Scores(["a cat", "two cats", "a cat ", "a bird"], -1.0, [1.0, 2.0, 3.0, -1.0])
    kept, why = several.select("a dog", 0.0)
    assert [(each.number, each.text) for each in kept] == [(0, "a cat"), (1, "two cats")]
    assert why == "written text, which was written again"


def test_every_outcome_has_its_own_reason() -> None:
    told = [scores(1, 1), scores(1, -1), scores(-1, 1), scores(-1, -1), scores(1, 1, "a dog"), scores(-1, None),
            scores(1, None)]  # fmt: skip
    whys = [one.select("a dog", 0.0)[1] for one in told]
    assert whys == [
        "both texts",
        "web text",
        "written text",
        "no text fits",
        "web text, which was written again",
        "no text fits, nothing to read in the written one",
        "web text, nothing to read in the written one",
    ]


def test_decision_has_a_pair_per_kept_text() -> None:
    spec = CapFilt(captioner="captioner", filter="filter", sources=("web",))
    rows = [(SAMPLE, scores(1.25, 2.0)._asdict()), (SAMPLE, scores(-1, None)._asdict())]
    both, none = spec.decide(lambda: iter(rows))
    assert [(s.key, s.text, s.language) for s in both.samples] == [
        ("k/web", "a dog", "en"),
        ("k/written", "two cats", None),
    ]
    told = both.samples[1].provenance
    assert told == {
        "crawl.url": "x",
        "capfilt.kept": "written",
        "capfilt.web_score": "1.25",
        "capfilt.written_score": "2",
    }
    assert none.samples == () and both.note == "web 1.25, written 2: two cats"
