"""Feature cache: outputs of a frozen vision tower, computed once, shared by all stages and trials.

`<home>/features/<digest of the tower>/<dataset digest>/` mirrors the dataset: the same shard names,
row groups and order, with a column of float16 features instead of image bytes. `prepare` decides if
caching is worth its cost, and returns the reason. The decision depends on the recipe and its
datasets, never on the caches that exist already, because cached features are rounded.
"""

# N images  P patches  D width

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bridgework import storage
from bridgework.data.dataset import Dataset, open_dataset
from bridgework.data.images import load_image
from bridgework.errors import DataError, ResourceError
from bridgework.models.vision import EfficientNetConfig, VisionTower, ViTConfig
from bridgework.ray_utils import map_on_actors

TowerSpec = ViTConfig | EfficientNetConfig
SCHEMA = pa.schema([("key", pa.string()), ("features", pa.list_(pa.binary()))])
FREE_SHARE = 0.2  # of the disk's free space that cached features may take

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheDecision:
    """Folder of cached features, None if they are computed in training; and the reason."""

    folder: Path | None
    why: str


class TooLarge(DataError):
    """A feature that float16 cannot hold."""


def pays(datasets: Sequence[Dataset], draws: int) -> bool:
    """Return True if training draws more images than caching computes."""
    return draws > sum(d.manifest.rows for d in datasets)


def prepare(
    tower: TowerSpec,
    datasets: Sequence[Dataset],
    *,
    draws: int,
    home: Path,
    workers: int,
    demanded: bool = False,
    say: Callable[[str], object] = log.info,
) -> CacheDecision:
    """Cache the features of all images of `datasets` if that is cheaper than training without.

    draws: number of images that training reads. workers: Ray actors with a copy of the tower, each
    on a GPU if the cluster has GPUs or can start nodes with GPUs; 0 computes in this process.
    demanded: cache them even if it is not cheaper. Features that float16 cannot hold, or that the
    disk cannot, are computed in training; if they are demanded, an error is raised. say: is called
    with the cost before features are computed.
    """
    try:
        return _prepare(tower, datasets, draws, home, workers, demanded, say)
    except TooLarge as error:
        if demanded:
            raise
        return CacheDecision(None, f"features are computed in training: {error}")


def _prepare(
    tower: TowerSpec,
    datasets: Sequence[Dataset],
    draws: int,
    home: Path,
    workers: int,
    demanded: bool,
    say: Callable[[str], object],
) -> CacheDecision:
    rows = sum(d.manifest.rows for d in datasets)
    if not (demanded or pays(datasets, draws)):
        return CacheDecision(
            None,
            f"features are computed in training: it draws {draws:,} images, and caching would "
            f"compute {rows:,}",
        )
    module = tower.build()
    folder = home / "features" / module.digest()
    missing = [d for d in datasets if not storage.is_published(folder / d.manifest.digest)]
    if not missing:
        return CacheDecision(folder, f"the features of {len(datasets)} datasets are cached")
    rows = sum(d.manifest.rows for d in missing)
    each_s, shape = _measure(module, missing[0])
    size, room = rows * shape[0] * shape[1] * 2, FREE_SHARE * storage.free_bytes(home)
    cost = f"{rows:,} images once ({rows * each_s:.0f} CPU-s, {size / 1e6:.0f} MB)"
    if size > room:
        full = f"caching {cost} needs more than the {room / 1e6:.0f} MB to spare"
        if demanded:
            raise ResourceError(
                f"{home}: features cannot be cached, because {full}. "
                "Fix: free some, set BRIDGEWORK_HOME to a larger disk, or give --features computed"
            )
        return CacheDecision(None, f"features are computed in training: {full}")
    say(f"computing features of {cost} instead of {draws:,} times ({draws * each_s:.0f} CPU-s)")
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_atomic(
        folder / "features.json", json.dumps({"patches": shape[0], "width": shape[1]})
    )
    for dataset in missing:
        final = folder / dataset.manifest.digest
        # The trials of a sweep may cache the same dataset at the same time.
        with storage.lock(final):
            if not storage.is_published(final):
                _cache(tower, dataset, final, workers)
    return CacheDecision(folder, f"the features of {len(datasets)} datasets are cached")


def _measure(module: VisionTower, dataset: Dataset) -> tuple[float, tuple[int, int]]:
    """Return CPU-seconds per image and (patches, width), from the dataset's first images."""
    images = [image for sample in dataset.read_group(0, 0) for image in sample.images][:8]
    if not images:
        raise DataError(
            f"{dataset.path}: features cannot be cached. Got no images in its first row group"
        )
    _features(module, images[:1])  # warm-up
    started = time.process_time()
    patches, width = _features(module, images)[0].shape
    return (time.process_time() - started) / len(images), (patches, width)


def _features(module: VisionTower, images: Sequence[bytes]) -> list[np.ndarray[Any, Any]]:
    """Return float16 (P, D) for each image, or (0, D) if it cannot be decoded.

    The reader quarantines the latter. Raises TooLarge for a feature that float16 cannot hold.
    """
    squares: list[np.ndarray[Any, Any] | None] = []
    for image in images:
        try:
            squares.append(load_image(image, module.config.pixels))
        except DataError:
            squares.append(None)
    good = [s for s in squares if s is not None]
    if not good:
        return [np.zeros((0, 0), np.float16) for _ in squares]
    device = next(module.parameters()).device
    with torch.inference_mode():
        patches_NPD = module.eval()(torch.from_numpy(np.stack(good)).to(device))
    half_NPD = patches_NPD.to(torch.float16)
    if not bool(half_NPD.isfinite().all()) and bool(patches_NPD.isfinite().all()):
        raise TooLarge(
            f"a feature of the tower does not fit float16. Got {float(patches_NPD.abs().max()):g}; "
            f"expected at most {torch.finfo(torch.float16).max:g}"
        )
    computed = iter(half_NPD.cpu().numpy())
    return [
        np.zeros((0, patches_NPD.shape[-1]), np.float16) if s is None else next(computed)
        for s in squares
    ]


class _Writer:
    """Holds the tower; each call writes the features of one shard."""

    def __init__(self, tower: TowerSpec, path: str, folder: Path) -> None:
        self._folder = folder
        self._dataset = open_dataset(path)
        self._module = tower.build().to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, shard: int) -> None:
        info = self._dataset.manifest.shards[shard]
        with (
            storage.opened_for_writing(self._folder / info.file) as file,
            pq.ParquetWriter(file, SCHEMA, compression="none") as out,
        ):
            for group in range(-(-info.rows // self._dataset.manifest.group_rows)):
                samples = self._dataset.read_group(shard, group)
                flat = iter(_features(self._module, [i for s in samples for i in s.images]))
                rows = [
                    {"key": s.key, "features": [next(flat).tobytes() for _ in s.images]}
                    for s in samples
                ]
                out.write_table(pa.Table.from_pylist(rows, SCHEMA), row_group_size=len(rows))


def _cache(tower: TowerSpec, dataset: Dataset, final: Path, workers: int) -> None:
    """Write to a temporary folder and rename it: the cache of a dataset is complete or absent."""
    with storage.publishing(final) as folder:
        map_on_actors(
            partial(_Writer, tower, dataset.path, folder),
            range(len(dataset.manifest.shards)),
            workers,
            gpus=True,
            what="features of the vision tower",
        )
