"""Reports of the examples: intervals, drawings by a seed, and pages without other files."""

import re
from pathlib import Path

import numpy as np
import pytest

from bridgework.data.dataset import open_dataset
from bridgework.data.synthetic import shapes
from examples import clip_zero_shot, quickstart
from examples.pictures import Card, Line, page, sheet
from examples.report import Report, interval, percent

CARDS = [
    Card(
        sample.images[0], sample.text, [Line("a right one", "70 %", True), Line("wrong", "", False)]
    )
    for sample in shapes(4)
]


@pytest.mark.parametrize(
    ("share", "rows", "low", "high"),
    [(0.5, 300, 0.4438, 0.5562), (0.0, 300, 0.0, 0.0126), (1.0, 60, 0.9398, 1.0)],
)
def test_an_interval_is_wilsons(share: float, rows: int, low: float, high: float) -> None:
    z = 1.959964
    center = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * (share * (1 - share) / rows + z * z / (4 * rows**2)) ** 0.5
    assert interval(share, rows) == pytest.approx((center - half, center + half), abs=1e-6)
    assert interval(share, rows) == pytest.approx((low, high), abs=1e-3)


def test_a_share_that_is_none_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"not a share of rows\. Got nan of 300"):
        interval(float("nan"), 300)


def test_percentages_have_their_interval() -> None:
    assert percent(0.5, 300) == "50 % (44 to 56)"
    assert percent(1 / 300) == "0.3 %"


def test_candidates_hold_the_right_caption_once_and_never_change() -> None:
    held_out = list(open_dataset(quickstart.STYLE).samples())
    captions = quickstart.choices(held_out[7], held_out)
    assert captions == quickstart.choices(held_out[7], held_out)
    assert captions.count(held_out[7].text) == 1
    assert len(set(captions)) == quickstart.CANDIDATES
    places = {quickstart.choices(s, held_out).index(s.text) for s in held_out[:100]}
    assert len(places) == quickstart.CANDIDATES


def test_a_sheet_draws_every_card_and_marks_what_is_right() -> None:
    image = sheet("title", CARDS)
    assert image.size[0] > image.size[1] > 200
    pixels = np.asarray(image).reshape(-1, 3).tolist()
    for ink in ((11, 122, 59), (179, 38, 30)):  # right, wrong
        assert list(ink) in pixels
    assert sheet("none", []).size[1] > 0


def test_a_page_needs_no_other_file_and_escapes_texts() -> None:
    hostile = Card(CARDS[0].image, "<script>alert(1)</script>", [Line("a & b")])
    text = page("t", "x", ["a"], [["<b>"]], [*CARDS, hostile])
    assert "<script>" not in text and "&lt;b&gt;" in text and "a &amp; b" in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert text.count("<article>") == 5


def test_parts_record_their_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRIDGEWORK_HOME", str(tmp_path))
    report = Report("example")
    with report.part("one", "a title", 5):
        report.values["score"] = 0.5
    assert '"score": 0.5' in report.write().read_text()
    assert 0 <= report.seconds["one"] < 5


def test_clip_from_scratch_trains_all_but_the_image_tower() -> None:
    assert clip_zero_shot.system()["contrast"].trains == {"text.*": 1.0, "heads.*": 1.0}
