"""webdataset's tars: per row its images, a JSON of all other fields, and a .txt for a pair.

`a%2Fb.0.jpg`, `a%2Fb.json`: the row `a/b`. Keys are URL-encoded except letters, digits, `_`, `-`
and `~`, because webdataset cuts names at the first dot. `urllib.parse.unquote` restores the key,
and the JSON holds it too.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from itertools import chain, count, islice
from typing import IO
from urllib.parse import quote

from bridgework.config import config_class
from bridgework.data.exporters import Exported, ending, filled, licensed, staged
from bridgework.data.samples import Sample
from bridgework.errors import DataError

INDEX = "shardindex.json"  # the tars and their rows, in the form of wids


@config_class
class WebDatasetExporter:
    """Write a dataset as tars of `rows` rows each, in order, to the folder DEST. Nothing is lost.

    The license of the complete dataset becomes that of each row without one of its own, because
    tars have no manifest. An existing DEST is an error; on any error nothing is left there.
    """

    rows: int = 1000

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise DataError(
                f"rows={self.rows}: a tar holds at least 1 row. Fix: give a larger number"
            )

    def run(self, source: str, dest: str) -> Exported:
        images = 0
        samples = licensed(source)
        with staged(dest, last=INDEX) as (fs, folder):
            shards: list[tuple[str, int]] = []
            for number in count():
                first = next(samples, None)
                if first is None:
                    break
                name = f"{number:05d}.tar"
                with fs.open(f"{folder}/{name}", "wb") as file:
                    rows, shown = _write(file, chain([first], islice(samples, self.rows - 1)))
                shards.append((name, rows))
                images += shown
            listed = [{"url": name, "nsamples": rows} for name, rows in shards]
            index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": listed}
            fs.pipe_file(f"{folder}/{INDEX}", json.dumps(index, indent=1).encode())
        return Exported(sum(rows for _, rows in shards), images)


def _write(file: IO[bytes], samples: Iterable[Sample]) -> tuple[int, int]:
    """Write one tar. Returns its rows and images."""
    rows = images = 0
    with tarfile.open(fileobj=file, mode="w|") as tar:
        for sample in samples:
            for name, data in _members(sample):
                member = tarfile.TarInfo(f"{_stem(sample.key)}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            rows, images = rows + 1, images + len(sample.images)
    return rows, images


def _stem(key: str) -> str:
    return quote(key, safe="").replace(".", "%2E")


def _members(sample: Sample) -> Iterator[tuple[str, bytes]]:
    """Yield (ending, content) of each member; a single image has no number."""
    many = len(sample.images) > 1
    names = [
        f"{place}.{ending(image)}" if many else ending(image)
        for place, image in enumerate(sample.images)
    ]
    yield from zip(names, sample.images, strict=True)
    texts = [part for part in sample.parts if part.text is not None]
    if len(sample.images) == 1 and [part.role for part in texts] == ["caption"]:
        yield "txt", str(texts[0].text).encode()
    entry = {"key": sample.key, "images": names, **filled(sample)}
    yield "json", json.dumps(entry, ensure_ascii=False).encode()
