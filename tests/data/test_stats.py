"""Statistics of datasets with known numbers, and tokens compared with the reader's."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridgework.data.dataset import write
from bridgework.data.reader import ReaderConfig, local
from bridgework.data.samples import Part, Sample, pair
from bridgework.data.stats import Spread, Stats, kind, stats
from bridgework.data.synthetic import shapes
from bridgework.errors import DataError
from bridgework.system import IGNORE, Source, Stage, load

MADE: dict[str, Any] = {"source": "test", "license": "CC0-1.0", "made_by": "tests"}
IMAGE = next(shapes(rows=1, size=24)).images[0]
TINY = load("llava").tiny()["align"]


def write_dataset(folder: Path, samples: Iterable[Sample]) -> str:
    write(samples, str(folder / "made"), **MADE, group_rows=4)
    return str(folder / "made")


def on(path: str, **data: Any) -> Stage:
    """Return the align stage with the dataset at `path`."""
    return replace(
        TINY, data=replace(TINY.data, sources=(Source(name="it", dataset=path),), **data)
    )


def test_every_row_and_image_is_counted(tmp_path: Path) -> None:
    path = write_dataset(
        tmp_path,
        [*shapes(rows=9, size=16), pair("x", IMAGE, "a cat", language="en", license="MIT")],
    )
    found = stats(path)
    assert (found.rows, found.shards, found.images) == (10, 1, 10)
    assert found.bytes == (Path(path) / "shard-00000.parquet").stat().st_size
    assert found.formats == {"PNG": 10}
    assert found.images_per_row == {1: 10}
    assert found.languages == {"not said": 9, "en": 1}
    assert found.licenses == {"CC0-1.0": 9, "MIT": 1}
    assert found.widths == Spread(16, 16, 16, 24, 24)
    assert found.answers is not None and found.answers.least == len("a cat")


def test_quantiles_are_values_that_occur() -> None:
    values = np.random.default_rng(0).integers(1000, size=101).tolist()
    assert Spread.of(values) == Spread(*(sorted(values)[at] for at in (0, 5, 50, 95, 100)))
    assert Spread.of([]) is None


def test_only_headers_are_read(tmp_path: Path) -> None:
    found = stats(
        write_dataset(
            tmp_path,
            [pair("half", IMAGE[:60], "cut off after its header"), pair("no", b"<html>", "none")],
        )
    )
    assert found.formats == {"PNG": 1}
    assert found.unreadable == {"not_an_image": 1}


@pytest.mark.parametrize(
    ("sample", "name"),
    [
        (pair("k", IMAGE, "a"), "pair"),
        (Sample("k", (), (Part("caption", text="a"),)), "text"),
        (Sample("k", (IMAGE,), (*pair("k", IMAGE, "a").parts, Part("caption", text="b"))), "interleaved"),
        (Sample("k", (), (Part("user", text="a"), Part("assistant", text="b"))), "conversation"),
        (Sample("k", (), (Part("user", text="a"), Part("assistant", text="b")), rejected="c"), "preference"),
        (pair("k", IMAGE, "a", times_s=(0.5,)), "video"),
    ],
)  # fmt: skip
def test_each_kind_of_sample_is_recognized(sample: Sample, name: str) -> None:
    assert kind(sample) == name


def test_tokens_match_those_of_the_reader(tmp_path: Path, home: Path) -> None:
    stage = on(write_dataset(tmp_path, shapes(rows=16, size=16)))
    fit = stats(stage.data.sources[0].dataset, for_stage=stage).fit
    feed = replace(
        ReaderConfig.of(stage, home), batch=16, steps=1, mixture=replace(stage.data, window=1)
    )
    [rows] = local(feed, rank=0, world=1, start=0)
    assert fit is not None
    assert fit.tokens == Spread.of([len(row.ids) for row in rows])
    assert fit.trained == Spread.of([sum(label != IGNORE for label in row.labels) for row in rows])
    assert fit.image_tokens == Spread.of([stage.model.image_tokens] * 16)
    assert (fit.truncated, fit.quarantined) == (0, {})


def test_rows_over_the_limit_are_truncated_and_rows_without_target_quarantined(
    tmp_path: Path,
) -> None:
    talk = (Part("user", text="q" * 200), Part("assistant", text="never reached"))
    samples = [
        pair("short", IMAGE, "short"),
        pair("long", IMAGE, "word " * 60),
        pair("bad", b"<html>", "its image is none"),
        Sample("late", (), talk),
    ]
    stage = on(write_dataset(tmp_path, samples), template="chat", max_tokens=100)
    fit = stats(stage.data.sources[0].dataset, for_stage=stage).fit
    assert fit is not None
    assert (fit.limit, fit.truncated) == (100, 1)
    assert fit.quarantined == {"not_an_image": 1, "no_target": 1}
    assert fit.tokens is not None and fit.tokens.most > 100


def test_pairs_are_read_with_the_prompts_of_their_source(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, shapes(rows=4, size=16))
    bare = on(path, template="chat")
    source = Source(name="it", dataset=path, prompts=("Why?",))
    asked = replace(bare, data=replace(bare.data, sources=(source,)))
    with_prompt, without = stats(path, for_stage=asked).fit, stats(path, for_stage=bare).fit
    assert with_prompt is not None and with_prompt.tokens is not None
    assert without is not None and without.tokens is not None
    assert with_prompt.tokens.median == without.tokens.median + len("Why?\n")


def test_summary_and_spreads_are_formatted(tmp_path: Path) -> None:
    stage = on(write_dataset(tmp_path, shapes(rows=5, size=16)))
    seen: list[tuple[int, int]] = []
    path = stage.data.sources[0].dataset
    found: Stats = stats(path, for_stage=stage, progress=lambda *at: seen.append(at))
    assert seen == [(n, 5) for n in range(1, 6)]
    assert found.summary()["kinds"] == "pair: 5"
    assert found.summary()["truncated rows"] == "0 (0.00%)"
    assert found.fit is not None and found.spreads()["tokens per row"] == found.fit.tokens


def test_missing_dataset_gives_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no dataset here"):
        stats(str(tmp_path / "nowhere"))
