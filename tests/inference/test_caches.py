"""Caches by content: equal content hits, any other content misses, and no bound is exceeded."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from bridgework.data.samples import Part
from bridgework.inference.caches import (
    BLOCK,
    ImageCache,
    KeyValues,
    PrefixCache,
    boundaries,
    image_digest,
)
from bridgework.inference.engine import Engine, EngineLimits
from bridgework.inference.preprocess import EncodedImage
from bridgework.system import IMAGE, Pixels
from tests.inference import tiny

PIXELS = Pixels(size=8)
PLACES = 5
TEXT = list(range(100, 100 + 2 * BLOCK))
PAIRS = 10_000


def png(pixels_HWC: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "PNG", compress_level=0)
    return file.getvalue()


def values(seed: int, tokens: int) -> KeyValues:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(2, tokens, 3, generator=generator), torch.randn(2, tokens, 4, generator=generator))
        for _ in range(2)
    ]  # fmt: skip


def prompt(*images: bytes, before: int = BLOCK) -> list:
    """Text, then each image and some text."""
    ids = TEXT[:before]
    for _ in images:
        ids = [*ids, *[IMAGE] * PLACES, *TEXT]
    return boundaries(ids, [(digest, PLACES) for digest in images], [])


def test_no_other_content_hits_in_ten_thousand_adversarial_pairs() -> None:
    """The same text about another image, one pixel apart, or with other crop settings."""
    draws = np.random.default_rng(0)
    images, prefixes = ImageCache(2**30), PrefixCache(2**30)
    others = [replace(PIXELS, size=9), replace(PIXELS, fit="pad"), replace(PIXELS, video=True),
              replace(PIXELS, grids=((1, 2),)), replace(PIXELS, mean=(0.5, 0.5, 0.25))]  # fmt: skip
    blank, wrong = EncodedImage(torch.zeros(1, 1), None), 0
    known = prompt(image_digest(png(np.zeros((8, 8, 3), np.uint8)), PIXELS))
    prefixes.put(known, values(0, known[-1].tokens))
    for i in range(PAIRS):
        pixels_HWC = draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        first = image_digest(png(pixels_HWC), PIXELS)
        if i % 2:
            row, column, color = draws.integers(0, (8, 8, 3))
            pixels_HWC[row, column, color] ^= np.uint8(1 << draws.integers(8))
            second = image_digest(png(pixels_HWC), PIXELS)
        else:
            second = image_digest(png(pixels_HWC), others[i // 2 % len(others)])
        images.put(first, blank)
        wrong += images.get(second) is not None
        if i % 10 == 0:
            asked = prompt(first)
            prefixes.put(asked, values(i, asked[-1].tokens))
            wrong += prefixes.match(prompt(second))[0] > BLOCK
        assert prefixes.match(prompt(second))[0] == BLOCK  # the text before the image is shared
    assert wrong == 0


def test_equal_content_hits() -> None:
    images = ImageCache(2**20)
    image = EncodedImage(torch.arange(6.0).reshape(1, 2, 3), None)
    images.put(image_digest(b"a", PIXELS), image)
    found = images.get(image_digest(b"a", replace(PIXELS)))
    assert found is not None and torch.equal(found.features, image.features)
    assert image_digest((b"a",), PIXELS) != image_digest(b"a", PIXELS)  # a video of one frame
    assert image_digest((b"a", b"b"), PIXELS) != image_digest((b"ab",), PIXELS)


def test_order_of_images_and_the_instruction_belong_to_a_prefix() -> None:
    a, b = image_digest(b"a", PIXELS), image_digest(b"b", PIXELS)
    ends = {prompt(*order)[-1].digest for order in ((a, b), (b, a), (a, a), (b, b), (a,))}
    assert len(ends) == 5
    ids = [IMAGE] * PLACES
    about = [boundaries(ids, [(a, PLACES)], instruction) for instruction in ([], [1], [1, 2], [12])]
    assert len({one[-1].digest for one in about}) == 4
    # tokens that are written alike, and images of different sizes
    assert boundaries([1, 23] * BLOCK, [], [])[0] != boundaries([12, 3] * BLOCK, [], [])[0]
    apart = [boundaries([IMAGE] * 6, [(a, n), (b, 6 - n)], []) for n in (2, 3)]
    assert apart[0][-1].digest != apart[1][-1].digest


def test_prefix_is_what_was_put_wherever_prompts_part() -> None:
    a, b = image_digest(b"a", PIXELS), image_digest(b"b", PIXELS)
    cache = PrefixCache(2**20)
    first, second = prompt(a, a), prompt(a, b)
    of_first, of_second = values(1, first[-1].tokens), values(2, second[-1].tokens)
    cache.put(first, of_first)
    shared, found = cache.match(second)
    assert shared == BLOCK + PLACES + len(TEXT)
    of_second = [
        (torch.cat([k1[:, :shared], k2[:, shared:]], 1), torch.cat([v1[:, :shared], v2[:, shared:]], 1))
        for (k1, v1), (k2, v2) in zip(of_first, of_second, strict=True)
    ]  # fmt: skip
    cache.put(second, of_second)
    for asked, expected in ((first, of_first), (second, of_second)):
        tokens, found = cache.match(asked)
        assert tokens == asked[-1].tokens
        for (k, v), (ke, ve) in zip(found, expected, strict=True):
            assert torch.equal(k, ke[:, :tokens]) and torch.equal(v, ve[:, :tokens])


def test_caches_stay_within_their_bytes_and_keep_the_newest() -> None:
    size = 4 * 100
    images = ImageCache(10 * size)
    for i in range(100):
        images.put(bytes([i]), EncodedImage(torch.zeros(1, 100), None))
        assert images.bytes <= 10 * size
        images.get(bytes([0]))
    kept = [i for i in range(100) if images.get(bytes([i])) is not None]
    assert kept == [0, *range(91, 100)]
    one = sum(k.numel() + v.numel() for k, v in values(0, 1)) * 4
    prefixes = PrefixCache(300 * one)
    for i in range(50):
        asked = prompt(bytes([i]))
        prefixes.put(asked, values(i, asked[-1].tokens))
        assert 0 < prefixes.bytes <= 300 * one
        assert prefixes.match(asked)[0] == asked[-1].tokens
    assert prefixes.match(prompt(bytes([3])))[0] == BLOCK
    nothing = PrefixCache(0)
    nothing.put(asked, values(0, asked[-1].tokens))
    assert nothing.match(asked) == (0, [])


@pytest.mark.parametrize(
    "name", ["llava/instruct", "instructblip:vicuna_7b/instruct", "xgen_mm/instruct"]
)
def test_cached_prefix_and_image_give_the_answers_of_none(name: str) -> None:
    """Two questions about an image, about one a pixel apart, and a conversation that goes on."""
    pipe = tiny.pipe_of(name)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    near = pixels.copy()
    near[20, 25, 1] ^= 1
    first = pipe.inputs.question("what is in the big picture of the two cats?")
    longer = [*first, Part("assistant", text="a red cat"), Part("user", text="and on the left?")]
    asked = [
        (parts, [png(image)]) for image in (pixels, near) for parts in (first, longer, longer[:2])
    ]
    expected = [pipe.generate(*one, max_new_tokens=10) for one in asked]
    engine = Engine(pipe, EngineLimits())
    try:
        for _ in range(2):
            assert [engine.generate(*one, max_new_tokens=10) for one in asked] == expected
        status = engine.status()
    finally:
        engine.close()
    assert status.image_hits == status.image_queries - 2
    assert status.prefix_hits > status.prefix_queries / 3
