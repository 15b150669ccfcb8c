"""Dedup: planted twins are found, pictures that only resemble each other are not, and the first of a group stays."""

import base64
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from bridgework.curation.dedup import Dedup, Signature
from bridgework.curation.near_duplicates import By, ImageHasher
from bridgework.curation.runner import Decision, make
from bridgework.data.dataset import open_dataset
from bridgework.data.manifest import Manifest
from bridgework.data.quarantine import BadSample
from bridgework.data.samples import Part, Sample, pair
from bridgework.errors import SpecError
from bridgework.inference.pipeline import Pipeline
from tests.curation.support import embedder, file, scenes, written

SCENES = scenes(60)


def planted() -> tuple[list[Sample], dict[str, str]]:
    """60 scenes, shuffled together with copies of some; and of every copy, how it was made."""
    samples = [pair(f"scene-{i}", file(image), f"scene {i}") for i, image in enumerate(SCENES)]
    how: dict[str, Callable[[Image.Image], bytes]] = {
        "same": lambda image: file(image),
        "encoded": lambda image: file(image, "JPEG", quality=50),
        "resized": lambda image: file(
            image.resize((64, 48), Image.Resampling.LANCZOS), "WEBP", quality=80
        ),
        "mirrored": lambda image: file(ImageOps.mirror(image)),
        "turned": lambda image: file(image.rotate(90, expand=True)),
        "repainted": lambda image: file(turned(image)),
    }
    copies = [
        pair(f"{name}-{i}", made(SCENES[i]), f"copy {i}")
        for name, made in how.items()
        for i in range(0, 60, 6)
    ]
    return [*samples, *random.Random(0).sample(copies, len(copies))], {
        s.key: s.key.partition("-")[0] for s in copies
    }


def run(
    samples: Sequence[Sample], folder: Path, home: Path, **fields: Any
) -> tuple[Manifest, set[str]]:
    """The manifest, and the keys of the rows that were dropped."""
    source, dest = written(folder / "source", list(samples)), str(folder / "made")
    made = make(Dedup(**fields), [source], dest, home=home, say=lambda text: None)
    kept = [s.key for s in open_dataset(dest).samples()]
    assert kept == [s.key for s in samples if s.key in set(kept)]  # in order
    return made, {s.key for s in samples} - set(kept)


def turned(image: Image.Image) -> Image.Image:
    """The same brightness everywhere, and other colors."""
    brightness, blue, red = image.convert("YCbCr").split()
    return Image.merge("YCbCr", (brightness, red, blue)).convert("RGB")


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, {"same"}),
        ({"by": "perceptual"}, {"same", "encoded", "resized"}),
        (
            {"by": "perceptual", "distance": 10, "color": 255},
            {"same", "encoded", "resized", "repainted"},
        ),
    ],
    ids=["bytes", "perceptual", "any color"],
)
def test_planted_duplicates_are_found_and_no_others(
    fields: dict[str, Any], found: set[str], home: Path, tmp_path: Path
) -> None:
    samples, how = planted()
    made, dropped = run(samples, tmp_path, home, **fields)
    assert dropped == {key for key, kind in how.items() if kind in found}
    assert made.parameters["counts"] == {
        "kept": len(samples) - len(dropped),
        "duplicate of an earlier row": len(dropped),
    }


def test_first_of_a_group_is_kept_and_the_others_note_its_key(home: Path) -> None:
    image, other = (file(scene) for scene in SCENES[:2])
    samples = [
        pair("b", image, "x"),
        pair("a", image, "y"),
        pair("c", other, "z"),
        pair("d", image, "x"),
    ]
    told = decided(Dedup(), samples, home)
    assert [(v.why, v.note, v.samples) for v in told] == [
        ("kept", "", (samples[0],)),
        ("duplicate of an earlier row", "duplicate of b", ()),
        ("kept", "", (samples[2],)),
        ("duplicate of an earlier row", "duplicate of b", ()),
    ]


def test_with_text_duplicates_need_equal_texts(home: Path) -> None:
    image, again = file(SCENES[0]), file(SCENES[0], "JPEG", quality=60)
    samples = [
        pair("first", image, "A dog, running."),
        pair("other", again, "two cats"),
        pair("case", again, "a DOG running"),
        pair("cats", image, "Two cats!"),
    ]
    kept = [v.why == "kept" for v in decided(Dedup(by="perceptual", text=True), samples, home)]
    assert kept == [True, True, False, False]
    assert [v.why == "kept" for v in decided(Dedup(by="perceptual"), samples, home)] == [
        True,
        False,
        False,
        False,
    ]


def test_a_picture_of_one_brightness_is_compared_by_its_bytes(home: Path) -> None:
    red, blue = (file(Image.new("RGB", (64, 64), color)) for color in ("#d00000", "#0000d0"))
    samples = [pair("red", red, "red"), pair("blue", blue, "blue"), pair("red again", red, "red")]
    assert [v.why == "kept" for v in decided(Dedup(by="perceptual"), samples, home)] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("by", ["bytes", "perceptual"])
def test_documents_are_compared_by_all_their_images_and_texts_without_images_by_their_words(
    by: By, home: Path
) -> None:
    one, two = (file(scene) for scene in SCENES[:2])

    def document(key: str, *images: bytes) -> Sample:
        return Sample(key, images, tuple(Part("caption", image=i) for i in range(len(images))))

    def talk(key: str, text: str) -> Sample:
        return Sample(key, (), (Part("user", text=text), Part("assistant", text="Yes.")))

    samples = [
        document("d1", one, two), document("d2", two, one), document("d3", one, two), pair("p", one, "x"),
        talk("t1", "Is it?"), talk("t2", "Was it?"), talk("t3", "is  it"),
    ]  # fmt: skip
    kept = [
        s.key
        for s, v in zip(samples, decided(Dedup(by=by), samples, home), strict=True)
        if v.samples
    ]
    assert kept == ["d1", "d2", "p", "t1", "t2"]


def test_kept_rows_do_not_depend_on_the_shards(home: Path, tmp_path: Path) -> None:
    samples, _ = planted()
    kept = []
    for number, cut in enumerate(((8, 16), (32, 4096), (1, 7))):
        source, dest = (
            written(tmp_path / f"{number}", samples, *cut),
            str(tmp_path / f"made-{number}"),
        )
        make(Dedup(by="perceptual"), [source], dest, home=home, say=lambda text: None)
        kept.append([s.key for s in open_dataset(dest).samples()])
    assert kept[0] == kept[1] == kept[2]


def test_invalid_image_is_quarantined_if_it_must_be_decoded() -> None:
    sample = pair("torn", file(SCENES[0])[:200], "torn")
    fact, sound = Dedup(by="perceptual").judge(Path())(
        [sample, pair("sound", file(SCENES[0]), "sound")]
    )
    assert fact["bad"][0] == "truncated" and Signature(**sound).code
    assert "bad" not in Dedup().judge(Path())([sample])[0]


# --- the search, against one that compares every two rows ------------------------------------------------------------


@pytest.mark.parametrize("distance", [0, 2, 3, 4, 5, 8, 9, 16])
@pytest.mark.parametrize("text", [False, True])
def test_hash_search_matches_exhaustive_search(distance: int, text: bool) -> None:
    draw = random.Random(distance)
    hashes = [draw.getrandbits(64) for _ in range(40)]
    for _ in range(360):  # near ones, and chains of them
        bits = draw.sample(range(64), draw.randrange(0, 20))
        hashes.append(draw.choice(hashes) ^ sum(1 << bit for bit in bits))
    colors = [draw.choice((100, 115, 130)) for _ in hashes]
    facts = [
        Signature(
            str(number // 2 if number % 50 == 1 else number),
            str(draw.randrange(2)),
            hashed(code, color),
        )
        for number, (code, color) in enumerate(zip(hashes, colors, strict=True))
    ]
    facts = [
        f._replace(code=facts[int(f.images or 0)].code) for f in facts
    ]  # the same bytes have the same hash
    codes = [base64.b64decode(f.code or "") for f in facts]

    def near(i: int, j: int) -> bool:
        bits = int.from_bytes(codes[i][:8]) ^ int.from_bytes(codes[j][:8])
        return bits.bit_count() <= distance and abs(codes[i][-1] - codes[j][-1]) <= 20

    assert twins(Dedup(by="perceptual", distance=distance, text=text), facts) == slow(
        facts, near, text
    )


@pytest.mark.parametrize("similarity", [0.5, 0.9, 0.99])
def test_embedding_search_matches_exhaustive_search(similarity: float) -> None:
    rng = np.random.default_rng(0)
    centres_ND = rng.normal(size=(30, 16))
    rows_ND = centres_ND[rng.integers(0, 30, 300)] + rng.normal(size=(300, 16)) * rng.choice(
        [0.05, 0.2, 0.6], (300, 1)
    )
    half_ND = (rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)).astype(np.float16)
    facts = [Signature(str(i), "", b64(row.tobytes())) for i, row in enumerate(half_ND)]
    wide_ND = half_ND.astype(np.float64)
    cosines_NN = (wide_ND / np.linalg.norm(wide_ND, axis=1, keepdims=True)) @ (
        wide_ND / np.linalg.norm(wide_ND, axis=1, keepdims=True)
    ).T
    limit = similarity - 1e-3
    assert not np.any(np.abs(cosines_NN - limit) < 1e-6)  # none that rounding decides
    found = twins(Dedup(by="embedding", model="a/model", similarity=similarity), facts)
    assert (
        found == slow(facts, lambda i, j: bool(cosines_NN[i, j] > limit), False)
        and len(set(found)) < 300
    )


def test_chain_of_similar_images_does_not_collapse() -> None:
    facts = [Signature(str(n), "", hashed((1 << 4 * n) - 1)) for n in range(4)]  # each 4 bits on
    assert twins(Dedup(by="perceptual", distance=4), facts) == [0, 0, 2, 2]


def test_embedding_model_finds_images_with_similar_embeddings(home: Path, tmp_path: Path) -> None:
    folder = embedder(home)
    samples, _ = planted()
    made, dropped = run(
        samples, tmp_path, home, by="embedding", model=str(folder), similarity=0.999
    )
    embedded_ND = (
        Pipeline.load(str(folder), "cpu").embed_images([s.images[0] for s in samples]).numpy()
    )
    cosines_NN = embedded_ND @ embedded_ND.T
    facts = [Signature(s.images[0].hex(), "", None) for s in samples]
    stays = slow(facts, lambda i, j: bool(cosines_NN[i, j] > 0.998), False)
    assert dropped == {s.key for number, s in enumerate(samples) if stays[number] != number}
    assert {key for key in dropped if key.startswith("same")} and len(dropped) < len(samples)
    assert made.parameters["model"] != str(folder) and len(made.parameters["model"]) == 64


def test_unreadable_image_does_not_affect_its_neighbors(home: Path) -> None:
    signer = ImageHasher("embedding", Pipeline.load(str(embedder(home)), "cpu"))
    told = signer([file(SCENES[0]), b"no picture", file(SCENES[1])])
    assert isinstance(told[1], BadSample) and isinstance(told[0], bytes) and told[0] != told[2]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"by": "embedding"}, "needs model=ARTIFACT"),
        ({"model": "a/model"}, "by=bytes uses no model"),
        ({"distance": 17}, "0 to 16 bits of 64; got 17"),
        ({"color": 256}, "color: got 256; expected a difference of 0 to 255"),
        ({"similarity": 0.0}, r"cosine in \(0, 1\]; got 0"),
    ],
)
def test_conflicting_fields_are_rejected(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Dedup(**fields)


# --- what tests share ------------------------------------------------------------------------------------------------


def hashed(code: int, color: int = 128) -> str:
    """A perceptual signature with one color all over."""
    return b64(code.to_bytes(8) + bytes([color]) * 32)


def b64(code: bytes) -> str:
    return base64.b64encode(code).decode()


def decided(curation: Dedup, samples: Sequence[Sample], home: Path) -> list[Decision]:
    facts = curation.judge(home)(samples)
    return list(curation.decide(lambda: iter(list(zip(samples, facts, strict=True)))))


def twins(curation: Dedup, facts: Sequence[Signature]) -> list[int]:
    """For each row the row that stays for it."""
    samples = [pair(str(number), b"", "text") for number in range(len(facts))]

    def rows() -> Iterator[tuple[Sample, dict[str, Any]]]:
        yield from zip(samples, (f._asdict() for f in facts), strict=True)

    return [
        n if v.samples else int(v.note.removeprefix("duplicate of "))
        for n, v in enumerate(curation.decide(rows))
    ]


def slow(facts: Sequence[Signature], near: Any, text: bool) -> list[int]:
    stays: list[int] = []
    for i, fact in enumerate(facts):
        alike = (
            j
            for j in range(i)
            if stays[j] == j and (near(i, j) or facts[j].images == fact.images)
            if not text or facts[j].text == fact.text
        )
        stays.append(next(alike, i))
    return stays
