"""`bridgework data order` and `data mixture`: the order is that of training, at any world size, from any start."""

import json
from itertools import chain
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bridgework.cli import app
from bridgework.data.dataset import write
from bridgework.data.reader import ReaderConfig, local
from bridgework.data.synthetic import shapes
from bridgework.errors import SpecError
from bridgework.system import Mixture, Source, load

MADE = {"source": "test", "license": "CC0-1.0", "made_by": "tests"}


def order(*words: str | int | Path) -> list[dict[str, object]]:
    done = CliRunner().invoke(
        app, ["data", "order", *map(str, words), "--json"], catch_exceptions=False
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def told(*words: str | int | Path) -> list[dict[str, float]]:
    done = CliRunner().invoke(
        app, ["data", "mixture", *map(str, words), "--json"], catch_exceptions=False
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources of 96 and 24 rows in a group, and one of 40 beside it, over 8 lanes."""
    folder = tmp_path_factory.mktemp("blend")
    for name, rows in (("many", 96), ("few", 24), ("other", 40)):
        write(
            shapes(rows=rows, size=8, seed=rows),
            str(folder / name),
            **MADE,
            group_rows=8,
            shard_rows=64,
        )
    inner = [{"name": name, "dataset": str(folder / name)} for name in ("many", "few")]
    file = folder / "blend.json"
    group = {"name": "pair", "sources": inner, "alpha": 0.5}
    other = {"name": "other", "dataset": str(folder / "other")}
    file.write_text(json.dumps({"sources": [group, other], "alpha": 1.0, "lanes": 8, "window": 2}))
    return file


def test_the_order_is_what_training_reads(home: Path) -> None:
    stage = load("llava").tiny()["instruct"]
    read = list(local(ReaderConfig.of(stage, home), rank=0, world=1, start=3))
    names = [source.name for source in stage.data.leaves]
    lines = order("llava/instruct", "--tiny", "--start", 3 * 8, "--steps", 5)
    assert [line["step"] for line in lines] == [3, 4, 5, 6, 7]
    assert [line["ranks"][0] for line in lines] == [
        [f"{names[r.source]}/{r.key}" for r in rows] for rows in read
    ]


@pytest.mark.parametrize("world", [2, 3, 8])
def test_any_world_size_shares_the_same_batches(blend: Path, world: int) -> None:
    for alone, shared in zip(
        order(blend, "--batch", 16, "--steps", 5),
        order(blend, "--batch", 16, "--steps", 5, "--world", world),
        strict=True,
    ):
        assert len(shared["ranks"]) == world
        assert sorted(chain(*shared["ranks"])) == sorted(alone["ranks"][0])


def test_any_start_goes_on_with_the_same_batches(blend: Path) -> None:
    whole = order(blend, "--batch", 16, "--steps", 10)
    for start in range(10):
        assert (
            order(blend, "--batch", 16, "--start", 16 * start, "--steps", 10 - start)
            == whole[start:]
        )


def test_one_epoch_of_a_dataset_holds_every_row_once(blend: Path) -> None:
    lines = order(blend.parent / "many", "--batch", 32, "--set", "lanes=8", "--steps", 3)
    keys = [key for line in lines for key in line["ranks"][0]]
    assert len(keys) == 96 == len(set(keys))


def test_a_mixture_has_no_end_and_every_epoch_is_another_order(blend: Path) -> None:
    lines = order(
        blend.parent / "many", "--batch", 32, "--set", "lanes=8", "--start", 96 * 5, "--steps", 6
    )
    first, second = (
        [key for line in lines[at : at + 3] for key in line["ranks"][0]] for at in (0, 3)
    )
    assert sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize("steps", [3, 7, 10])
def test_the_rows_of_a_capped_source_are_those_that_mixture_tells(steps: int, blend: Path) -> None:
    """However the run's end lies in a window."""
    changes = [
        "--batch",
        16,
        "--set",
        "sources.pair.sources.few.max_epochs=0.25",
        "--set",
        "window=4",
    ]
    few = told(blend, *changes, "--steps", steps)[1]
    lines = order(blend, *changes, "--budget", steps, "--steps", steps)
    drawn = [key for line in lines for key in line["ranks"][0] if key.startswith("few/")]
    assert len(drawn) == round(few["realized"] * 16 * steps) <= 6 and len(set(drawn)) == len(drawn)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lava"], "did you mean 'llava'?"),
        (["llava/instrct"], "did you mean 'instruct'?"),
        (["llava/instruct", "--tiny", "--start", "3"], "multiple of the batch 8, got 3"),
        (
            ["llava/instruct", "--tiny", "--steps", "9"],
            "the run has 8: ask for fewer, or give a larger --budget",
        ),
        (["llava/instruct", "--tiny", "--world", "5"], "of 5 has no lane"),
        (["llava/instruct", "--tiny", "--batch", "9"], "not a multiple of data.lanes 4"),
        (["llava", "--tiny", "--set", "stages.align.data.alfa=1"], "did you mean 'alpha'?"),
        (["no.json"], "not a mixture in JSON"),
    ],
)
def test_wrong_words_are_refused_with_advice(words: list[str], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        order(*words)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "node",
    [
        '{"name": "a", "dataset": "x", "sources": [{"name": "b", "dataset": "y"}]}',
        '{"name": "a", "sources": 3}',
        '{"name": 5, "dataset": "x"}',
        '{"name": "a", "dataset": null}',
        '{"dataset": "x"}',
        "7",
    ],
)
def test_a_source_is_a_dataset_or_a_group_and_never_both(node: str, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(f'{{"sources": [{node}]}}')
    with pytest.raises(
        SpecError, match=r"sources\.0: Got .*; expected a source \(name and dataset\) or a group"
    ):
        order(str(tmp_path / "m.json"))


def test_groups_without_end_are_refused(tmp_path: Path) -> None:
    nested = '{"name": "a", "sources": [' * 3000 + "7" + "]}" * 3000
    (tmp_path / "m.json").write_text(f'{{"sources": [{nested}]}}')
    with pytest.raises(SpecError, match=r"not a mixture in JSON|too deep"):
        order(str(tmp_path / "m.json"))


@pytest.mark.parametrize("words", [":f", ".x:y", "os.path:join", "no_module:f", "json:nothing"])
def test_what_is_no_function_that_gives_a_mixture_is_refused(words: str) -> None:
    with pytest.raises(SpecError, match="give a function without arguments"):
        order(words)


def wrong() -> Mixture:
    return Mixture(sources=(Source(name="a", dataset="x"),), window=0)


def test_what_is_wrong_inside_a_mixtures_function_is_told_as_it_is() -> None:
    with pytest.raises(SpecError, match=r"^window must be at least 1, got 0$"):
        order(f"{__name__}:wrong")


def test_a_group_is_as_large_as_its_sources_and_shares_by_its_own_alpha(blend: Path) -> None:
    many, few, other = told(blend, "--batch", 16)
    assert other["by_alpha"] == pytest.approx(40 / 160)
    root = 96**0.5 / (96**0.5 + 24**0.5)
    assert many["by_alpha"] == pytest.approx(root * 120 / 160) and few["by_alpha"] == pytest.approx(
        (1 - root) * 0.75
    )
    assert many["realized"] + few["realized"] + other["realized"] == pytest.approx(1.0)


def test_factors_and_caps_are_told_apart(blend: Path) -> None:
    changes = [
        "--set",
        "sources.other.factor=3",
        "--set",
        "sources.pair.sources.few.max_epochs=0.5",
    ]
    many, few, other = told(blend, "--batch", 16, *changes)
    assert other["by_factor"] == pytest.approx(3 * 0.25 / 1.5) and other[
        "by_alpha"
    ] == pytest.approx(0.25)
    assert few["capped"] and few["by_cap"] < few["by_factor"] and few["epochs"] <= 0.5
    assert many["by_cap"] > many["by_factor"] and not many["capped"]


def test_shares_are_told_before_the_data_is_here() -> None:
    found = told("instructblip/instruct")
    assert sum(each["by_cap"] for each in found) == pytest.approx(1.0) and not any(
        each["known"] for each in found
    )


def _capped(folder: Path, names: tuple[str, ...], cap: float, lanes: int) -> Path:
    sources = [{"name": n, "dataset": str(folder / n), "max_epochs": cap} for n in names]
    file = folder / f"capped-{len(names)}-{cap}-{lanes}.json"
    file.write_text(json.dumps({"sources": sources, "lanes": lanes, "window": 2}))
    return file


@pytest.mark.parametrize(
    ("names", "cap", "lanes"),
    [
        (("many", "few", "other"), 1, 8),
        (("many",), 1, 64),
        (("few",), 1, 16),
        (("many", "other"), 0.5, 4),
    ],
)
def test_a_mixture_of_capped_sources_has_as_many_steps_as_its_caps_allow(
    names: tuple[str, ...], cap: float, lanes: int, blend: Path
) -> None:
    file = _capped(blend.parent, names, cap, lanes)
    assert all(each["epochs"] <= cap for each in told(file))
    keys = [key for line in order(file) for key in line["ranks"][0]]
    assert len(keys) == len(set(keys)) and keys


def test_a_batch_that_the_lanes_cannot_share_is_refused_without_a_count_of_steps(
    blend: Path,
) -> None:
    with pytest.raises(SpecError) as caught:
        order(blend, "--batch", 9)
    assert "Got batch 9, 8 lanes" in str(caught.value)
    assert "1099511627776" not in str(caught.value)
    with pytest.raises(SpecError, match=r"--start \d+ is too far"):
        order(blend, "--batch", 16, "--start", 16 << 41)
