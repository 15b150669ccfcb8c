"""Two small datasets of different kinds, and the feed of a stage over both."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bridgework.data.dataset import write
from bridgework.data.reader import ReaderConfig
from bridgework.data.samples import Part, Sample
from bridgework.data.synthetic import shapes
from bridgework.system import Mixture, Source
from tests.toy import Eye

MADE = {"source": "test", "license": "CC0-1.0", "made_by": "tests"}


def talks(rows: int) -> Iterator[Sample]:
    """Conversations with none, one and two images, in turn."""
    images = [sample.images[0] for sample in shapes(rows=2 * rows, size=12, seed=1)]
    for row in range(rows):
        shown = tuple(images[2 * row : 2 * row + row % 3])
        asked = [Part("user", image=i) for i in range(len(shown))]
        parts = (
            *asked,
            Part("user", text=f"\nNumber {row}?"),
            Part("assistant", text=f"It is {row}."),
        )
        yield Sample(f"talk-{row}", shown, parts)


@pytest.fixture(scope="session")
def feed(tmp_path_factory: pytest.TempPathFactory) -> ReaderConfig:
    """11 steps of 8 samples over 4 lanes in windows of 3: nothing divides anything."""
    folder: Path = tmp_path_factory.mktemp("datasets")
    paths = (str(folder / "pairs"), str(folder / "talks"))
    made = [
        write(shapes(rows=90, size=16), paths[0], **MADE, group_rows=8, shard_rows=32),
        write(talks(33), paths[1], **MADE, group_rows=4, shard_rows=20),
    ]
    mixture = Mixture(
        sources=(
            Source(name="pairs", dataset=paths[0], prompts=("What is it?",)),
            Source(name="talks", dataset=paths[1]),
        ),
        alpha=0.5,
        template="chat",
        lanes=4,
        window=3,
    )
    return ReaderConfig(
        mixture=mixture,
        datasets=paths,
        digests=tuple(manifest.digest for manifest in made),
        batch=8,
        steps=11,
        seed=3,
        model=Eye(),
    )
