"""Feature cache: the same numbers as the tower, only if caching is cheaper."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from bridgework.data import synthetic
from bridgework.data.catalog import resolve
from bridgework.data.dataset import Dataset, open_dataset, write
from bridgework.data.images import load_image
from bridgework.data.samples import Sample, pair
from bridgework.models import EfficientNetConfig, ViTConfig
from bridgework.system import System
from bridgework.training import feature_cache
from tests.training.support import go, llava, losses

pytest.importorskip("efficientnet_lite_pytorch", reason="the tower's network comes in a package")
TOWER = EfficientNetConfig(image_size=64, grid=2)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Return a dataset of three shards with one damaged image."""
    rows = list(synthetic.shapes(40))
    rows[5] = pair(rows[5].key, rows[5].images[0][:200], "a torn picture")
    return written(tmp_path / "data", rows)


def written(folder: Path, rows: list[Sample]) -> Dataset:
    about = {"source": "s", "license": "CC0-1.0", "made_by": "test"}
    write(rows, str(folder), group_rows=8, shard_rows=16, **about)
    return open_dataset(str(folder))


def prepare(
    dataset: Dataset,
    home: Path,
    draws: int = 10_000,
    workers: int = 0,
    say: Callable[[str], object] = print,
) -> feature_cache.CacheDecision:
    home.mkdir(exist_ok=True)
    return feature_cache.prepare(TOWER, [dataset], draws=draws, home=home, workers=workers, say=say)


def stored(verdict: feature_cache.CacheDecision, dataset: Dataset) -> list[dict[str, Any]]:
    assert verdict.folder is not None
    files = sorted((verdict.folder / dataset.manifest.digest).glob("*.parquet"))
    assert [f.name for f in files] == [s.file for s in dataset.manifest.shards]
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_cached_features_match_the_tower(dataset: Dataset, tmp_path: Path) -> None:
    rows = stored(prepare(dataset, tmp_path / "home"), dataset)
    samples = list(dataset.samples())
    assert [row["key"] for row in rows] == [s.key for s in samples]
    good = [s for i, s in enumerate(samples) if i != 5]
    with torch.inference_mode():
        squares = np.stack([load_image(s.images[0], TOWER.pixels) for s in good])
        expected = TOWER.build().eval()(torch.from_numpy(squares))
    found = [np.frombuffer(row["features"][0], np.float16) for i, row in enumerate(rows) if i != 5]
    torch.testing.assert_close(
        torch.from_numpy(np.stack(found)).float().view_as(expected), expected, rtol=2e-3, atol=2e-3
    )


def test_undecodable_image_has_no_features(dataset: Dataset, tmp_path: Path) -> None:
    rows = stored(prepare(dataset, tmp_path / "home"), dataset)
    assert [i for i, row in enumerate(rows) if not row["features"][0]] == [5]


def test_row_groups_match_the_dataset(dataset: Dataset, tmp_path: Path) -> None:
    verdict = prepare(dataset, tmp_path / "home")
    assert verdict.folder is not None
    for shard in dataset.manifest.shards:
        ours = pq.ParquetFile(verdict.folder / dataset.manifest.digest / shard.file)
        theirs = pq.ParquetFile(Path(dataset.path) / shard.file)
        sizes = [
            [f.metadata.row_group(g).num_rows for g in range(f.num_row_groups)]
            for f in (ours, theirs)
        ]
        assert sizes[0] == sizes[1]
        ours.close()
        theirs.close()


def test_features_are_computed_once(dataset: Dataset, tmp_path: Path) -> None:
    said: list[str] = []
    first = prepare(dataset, tmp_path / "home", say=said.append)
    assert first.why == "the features of 1 datasets are cached"
    (cost,) = said
    assert cost.startswith("computing features of 40 images once") and "10,000 times" in cost
    assert first.folder is not None
    written_at = {f: f.stat().st_mtime_ns for f in first.folder.rglob("*.parquet")}
    second = prepare(dataset, tmp_path / "home")
    assert second.folder == first.folder
    assert second.why == first.why
    assert written_at == {f: f.stat().st_mtime_ns for f in first.folder.rglob("*.parquet")}


def test_decision_against_caching_has_a_reason(dataset: Dataset, tmp_path: Path) -> None:
    verdict = prepare(dataset, tmp_path / "home", draws=40)
    assert verdict.folder is None
    assert "it draws 40 images, and caching would compute 40" in verdict.why
    assert not list((tmp_path / "home").glob("features/*"))


def test_failed_cache_leaves_no_files(dataset: Dataset, tmp_path: Path) -> None:
    (Path(dataset.path) / dataset.manifest.shards[2].file).write_bytes(b"torn")
    with pytest.raises(Exception, match="shard"):
        prepare(dataset, tmp_path / "home")
    assert not [
        f
        for f in (tmp_path / "home").rglob("*")
        if dataset.manifest.digest in f.name and f.is_dir()
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_actors_write_the_same_files_as_one_process(dataset: Dataset, tmp_path: Path) -> None:
    alone = stored(prepare(dataset, tmp_path / "alone"), dataset)
    spread = stored(prepare(dataset, tmp_path / "actors", workers=2), dataset)
    assert [row["key"] for row in spread] == [row["key"] for row in alone]
    for one, other in zip(
        spread, alone, strict=True
    ):  # another number of threads sums in another order
        ours, theirs = (np.frombuffer(row["features"][0], np.float16) for row in (one, other))
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3)


# --- in a run --------------------------------------------------------------------------------------------------------


def system(steps: int = 20, **changes: Any) -> System:
    return llava(steps, **{"stages__*__model__vision": TOWER, **changes})


def test_losses_from_features_match_losses_from_pixels(
    home: Path, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    go(system(), home, f"{run}-pixels", features="computed")
    go(system(), home, run)
    assert "datasets are cached" in capsys.readouterr().err
    digest = open_dataset(resolve("synthetic:shapes", home)).manifest.digest
    assert (home / "features" / TOWER.build().digest() / digest).is_dir()
    assert dict(losses(home, run)) == pytest.approx(dict(losses(home, f"{run}-pixels")), rel=1e-2)


@pytest.mark.parametrize("glob", ["vision.*", "v*", "*", "[u-w]ision.*"])
def test_trained_tower_is_never_replaced_by_its_features(
    home: Path, run: str, glob: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"{run}-{len(glob)}-{glob.count('*')}"
    go(system(1, stages__align__trains={"bridge.*": 1.0, glob: 1.0}), home, run)
    assert "features" not in capsys.readouterr().err


def large(folder: Path) -> ViTConfig:
    """Return a tower with outputs beyond float16, which some trained towers have."""
    tower = ViTConfig(
        kind="siglip", image_size=16, patch=8, width=16, depth=1, heads=2, ffn=32, layer=-1
    )
    model = tower.build().tower
    with torch.no_grad():
        model.encoder.layers[0].mlp.fc2.bias.fill_(1e5)
    model.save_pretrained(folder)
    return replace(tower, weights=str(folder))


def test_features_that_float16_cannot_hold_are_computed_in_training(
    dataset: Dataset, tmp_path: Path
) -> None:
    tower = large(tmp_path / "tower")
    (tmp_path / "home").mkdir()
    verdict = feature_cache.prepare(
        tower, [dataset], draws=10_000, home=tmp_path / "home", workers=0
    )
    assert verdict.folder is None
    assert "does not fit float16. Got 1" in verdict.why and "expected at most 65504" in verdict.why
    assert not list((tmp_path / "home").rglob("*.parquet"))
