"""Makes the five small datasets beside this file from Debian's Open Clip Art and two npm packages of emoji (README.md).

python examples/data/make.py --clipart /usr/share/openclipart --twitter TWITTER.tgz --google GOOGLE.tgz [--out FOLDER]

Nothing is drawn at random: every choice is by the sha256 of a key, so the same packages and the same Pillow give the
same bytes. What is under --out already is replaced, but for the files that are no shards.
"""

import argparse
import csv
import hashlib
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bridgework.data.dataset import open_dataset, write
from bridgework.data.images import MAX_PIXELS, decode
from bridgework.data.importers import clipart, emoji, shrink
from bridgework.data.samples import Sample

HERE = Path(__file__).parent
HELD_OUT = 300  # rows of each test set: one in 300 is right by chance
SIDE = 128  # pixels
ALIKE = 5.0  # mean difference of two pictures, of 255, under which the second is taken for a copy of the first
FAINT = (
    5.0  # standard deviation of a picture's pixels, of 255, under which there is nothing to be seen
)
PER_CAPTION = 5  # pictures under one caption

CLIPART = "Open Clip Art Library 0.18 (Debian openclipart-png and openclipart-svg 0.18+dfsg)"
EMOJI = "npm emoji-datasource-{} 16.0.0"
SERIES = (  # icon themes, geometry, and series that only a number or a word tells apart
    "computer/icons/*",
    "computer/buttons/*",
    "recreation/games/cards/*",
    "shapes/*",
    "signs_and_symbols/clocks/*",
    "signs_and_symbols/led/*",
    "signs_and_symbols/map_symbols/*",
    "special/*",
    "transportation/roadsigns/*",
)
FLAG = re.compile(r"signs_and_symbols/flags/")
NATION = re.compile(
    r"signs_and_symbols/flags/(?:africa|america|asia|europe|oceania)/(?:\w+/)?([a-z_]*[a-z])\.png"
)
REGIONS = ("australia_", "canada_", "finland_", "france_", "germany_", "spain_", "uk_", "usa_")
NO_PICTURES = {
    "alphanum",
    "arrow",
    "av-symbol",
    "family",
    "keycap",
    "math",
    "other-symbol",
    "punctuation",
    "skin-tone",
}
IDLE = {"a", "an", "and", "in", "of", "on", "the", "with"} | {
    "big",
    "black",
    "little",
    "outline",
    "simple",
    "stylized",
    "white",
}
MANY_ALIKE = re.compile(r"^clock face|^family|facing right$")
PEOPLE = {
    "1f468",
    "1f469",
    "1f9d1",
    "200d",
    "2640",
    "2642",
    "fe0f",
}  # man, woman, person, and what joins them


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("clipart", "twitter", "google"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        clipart.ClipartImporter(side=SIDE, skip=SERIES, max_bad=0.05).run(
            given.clipart, f"{scratch}/clipart"
        )
        for name in ("twitter", "google"):
            emoji.EmojiImporter().run(getattr(given, name), f"{scratch}/{name}")
        pictures = distinct(captioned(open_dataset(f"{scratch}/clipart").samples()))
        twitter = concepts(open_dataset(f"{scratch}/twitter").samples())
        google = concepts(open_dataset(f"{scratch}/google").samples())
    new_titles = unique_titles(pictures, {words(sample.text) for sample in twitter.values()})[
        :HELD_OUT
    ]
    train = at_most(PER_CAPTION, (p for p in order(pictures) if p not in new_titles))
    new_concepts = unseen(twitter, {sample.text for sample in train})
    seen = {code: sample for code, sample in twitter.items() if code not in new_concepts}
    style = order(google[code] for code in seen.keys() & google.keys())[:HELD_OUT]
    for folder, samples, source, license in (
        ("clipart", train, CLIPART, clipart.LICENSE),
        ("heldout_clipart", new_titles, CLIPART, clipart.LICENSE),
        ("emoji", order(seen.values()), EMOJI.format("twitter"), emoji.LICENSES["twitter"]),
        (
            "heldout_concepts",
            order(new_concepts.values()),
            EMOJI.format("twitter"),
            emoji.LICENSES["twitter"],
        ),
        ("heldout_style", style, EMOJI.format("google"), emoji.LICENSES["google"]),
    ):
        put(given.out / folder, samples, source, license)


def put(folder: Path, samples: list[Sample], source: str, license: str) -> None:
    for old in (*folder.glob("*.parquet"), *folder.glob("manifest.json")):
        old.unlink()
    parameters = {
        "side": SIDE,
        "alike": ALIKE,
        "faint": FAINT,
        "per_caption": PER_CAPTION,
        "held_out": HELD_OUT,
    }
    manifest = write(
        samples,
        str(folder),
        source=source,
        license=license,
        made_by="examples/data/make.py",
        parameters=parameters,
    )
    print(
        f"{folder}: {manifest.rows} rows, {sum(s.bytes for s in manifest.shards):,} bytes, {manifest.digest[:12]}"
    )


def order(samples: Iterable[Sample]) -> list[Sample]:
    """Mixed, and always in the same way."""
    return sorted(samples, key=lambda sample: hashlib.sha256(sample.key.encode()).digest())


def captions() -> dict[str, str]:
    """captions.tsv, written by hand: a title -> its caption (in English, without jargon), or nothing to drop it."""
    with (HERE / "captions.tsv").open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return {row["title"]: row["caption"] for row in rows}


def retold(sample: Sample, caption: str) -> Sample:
    image, text = sample.parts
    return replace(sample, parts=(image, replace(text, text=caption)))


# --- clip art --------------------------------------------------------------------------------------------------------


def captioned(samples: Iterable[Sample]) -> Iterator[Sample]:
    """With captions that a person would give, and without the pictures whose title says too little."""
    table = captions()
    for sample in samples:
        nation = NATION.match(sample.key)
        caption = "" if FLAG.match(sample.key) else table.get(sample.text, sample.text)
        if nation and not nation[1].startswith(REGIONS):
            name = f"flag of {nation[1].replace('_', ' ')}"
            caption = table.get(name, name)
        if caption:
            yield retold(sample, re.sub(r"^aiga (.+)", r"\1 sign", caption))


def distinct(samples: Iterable[Sample]) -> list[Sample]:
    """Without pictures on which nothing is to be seen, and without those that look like an earlier one."""
    kept: list[Sample] = []
    known = np.empty((0, 3 * 24 * 24), dtype=np.float32)
    for sample in sorted(samples, key=lambda sample: sample.key):
        look = small(sample.images[0])
        if look.std() < FAINT or (len(known) and np.abs(known - look).mean(axis=1).min() < ALIKE):
            continue
        kept.append(sample)
        known = np.concatenate([known, look[None]])
    return kept


def small(image: bytes) -> NDArray[np.float32]:
    """float32 (3 * 24 * 24,): the picture on a white square, made small."""
    picture = decode(image)
    square = Image.new("RGB", (max(picture.size), max(picture.size)), "white")
    square.paste(
        picture, ((square.width - picture.width) // 2, (square.height - picture.height) // 2)
    )
    return np.asarray(square.resize((24, 24), Image.Resampling.BOX), dtype=np.float32).ravel()


def unique_titles(samples: list[Sample], known: set[frozenset[str]]) -> list[Sample]:
    """Pictures that no other one shares its subject with, nor any of the `known`; flags aside."""
    count = Counter([*known, *(words(sample.text) for sample in samples)])
    return order(s for s in samples if count[words(s.text)] == 1 and not FLAG.match(s.key))


def words(caption: str) -> frozenset[str]:
    """What a caption is about: its words in the singular, without those that only say how it is drawn."""
    found = frozenset(
        word.removesuffix("s") for word in re.findall(r"\w+", caption) if word not in IDLE
    )
    return found or frozenset({caption})


def at_most(limit: int, samples: Iterable[Sample]) -> list[Sample]:
    count: Counter[str] = Counter()
    kept = []
    for sample in samples:
        count[sample.text] += 1
        if count[sample.text] <= limit:
            kept.append(sample)
    return kept


# --- emoji -----------------------------------------------------------------------------------------------------------


def concepts(samples: Iterable[Sample]) -> dict[str, Sample]:
    """Code point -> its drawing, on white; without flags, keycaps, other signs and what only looks the other way."""
    table = captions()
    found = {}
    for sample in samples:
        name = sample.text.removesuffix(" symbol")
        caption = table.get(name, name.replace(": ", " with "))
        picture = sample.labels[0] != "Flags" and sample.labels[1] not in NO_PICTURES
        if picture and caption and not MANY_ALIKE.search(name):
            image = shrink(sample.images[0], SIDE, max_pixels=MAX_PIXELS)
            found[sample.provenance["unicode"].lower()] = retold(
                replace(sample, images=(image,)), caption
            )
    return found


def unseen(drawn: dict[str, Sample], captions: set[str]) -> dict[str, Sample]:
    """Concepts to hold out, of which no training set has a kin: neither a woman's to a man's, nor one in clip art."""
    known = {words(caption) for caption in captions}
    namesakes = Counter(words(sample.text) for sample in drawn.values())
    kin = defaultdict(list)
    for code in drawn:
        kin[" ".join(part for part in code.split("-") if part not in PEOPLE) or code].append(code)
    held: dict[str, Sample] = {}
    for family in sorted(
        kin.values(), key=lambda codes: hashlib.sha256(codes[0].encode()).digest()
    ):
        members = {code: drawn[code] for code in family}
        topics = [
            words(sample.text) for sample in members.values() if sample.labels[0] != "Symbols"
        ]
        fresh = [topic for topic in topics if topic not in known and namesakes[topic] == 1]
        if len(fresh) == len(members) <= HELD_OUT - len(held):
            held |= members
    return held


if __name__ == "__main__":
    main()
