"""Captions ranked by a contrastive model: the best of an image's texts go on, each as a pair of its own."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bridgework.curation.rank import Rank
from bridgework.curation.runner import Annotation, make
from bridgework.data.dataset import open_dataset
from bridgework.data.samples import Part, Sample, pair
from bridgework.errors import SpecError, WeightsError
from bridgework.inference.pipeline import Pipeline
from tests.curation.models import clip, decided, judged, writer
from tests.curation.support import flags, written

FLAGS = list(flags())
WRITES: dict[str, Any] = {"captions": 3, "min_tokens": 2, "max_tokens": 8}


def row(key: str, flag: int, *texts: str) -> Sample:
    parts = (Part("caption", image=0), *(Part("caption", text=text) for text in texts))
    return Sample(key, FLAGS[flag].images, parts, language="en", license="CC0-1.0")


def fact(image: str, *texts: tuple[str, str, float | None]) -> Annotation:
    return {"image": image, "texts": [list(text) for text in texts]}


def kept(spec: Rank, *facts: Annotation) -> list[tuple[str, list[str]]]:
    """(why, origins of what goes on), row by row."""
    samples = [row(f"row-{number}", 0, "web") for number in range(len(facts))]
    return [
        (v.why, [s.key.partition("/")[2] for s in v.samples]) for v in decided(spec, samples, facts)
    ]


# --- what stays ------------------------------------------------------------------------------------------------------


def test_best_two_of_web_and_generated_texts_are_kept() -> None:
    told = fact(
        "a",
        ("web", "w", 0.3),
        ("written-1", "x", 0.1),
        ("written-2", "y", 0.4),
        ("written-3", "z", 0.2),
    )
    assert kept(Rank(model="m"), told) == [("kept", ["written-2", "web"])]
    assert kept(Rank(model="m", keep=1), told) == [("kept", ["written-2"])]
    assert kept(Rank(model="m", keep=9), told) == [
        ("kept", ["written-2", "web", "written-3", "written-1"])
    ]


def test_of_equal_scores_the_earlier_is_kept() -> None:
    tied = [("web", "w", 0.3), ("written-1", "x", 0.3), ("written-2", "y", 0.3)]
    assert kept(Rank(model="m"), fact("a", *tied)) == [("kept", ["web", "written-1"])]
    assert kept(Rank(model="m"), fact("a", *tied[::-1])) == [("kept", ["written-2", "written-1"])]


def test_equal_texts_count_once() -> None:
    told = fact(
        "a", ("web", "a  dog", 0.3), ("written-1", " a dog\n", 0.3), ("written-2", "a cat", 0.1)
    )
    assert kept(Rank(model="m"), told) == [("kept", ["web", "written-2"])]


def test_rows_of_one_image_compete_at_any_position() -> None:
    facts = [
        fact("a", ("web", "w", 0.1)), fact("b", ("web", "w", 0.0)), fact("a", ("web", "x", 0.3)),
        fact("a", ("web", "y", 0.2)), fact("a", ("web", "x", 0.3)), fact("b", ("web", " ", None)),
    ]  # fmt: skip
    assert kept(Rank(model="m"), *facts) == [
        ("other texts of its picture fit better", []), ("kept", ["web"]), ("kept", ["web"]), ("kept", ["web"]),
        ("a text of an earlier row of its picture", []), ("no text that the model reads", []),
    ]  # fmt: skip


def test_kept_texts_match_sorting_all_texts_of_an_image() -> None:
    """Against every text of every picture, sorted: the rows keep no more than the best of each as they go."""
    draws = random.Random(0)
    for keep in (1, 2, 3):
        scores = {
            (image, text): draws.choice((0.1, 0.2, 0.3)) for image in "ab" for text in "stuvwxyz"
        }
        rows = [(draws.choice("ab"), draws.choices("stuvwxyz", k=3)) for _ in range(9)]
        facts = [
            fact(i, *((f"web-{n}", text, scores[i, text]) for n, text in enumerate(ts)))
            for i, ts in rows
        ]
        found = Counter((r, origin) for r, (_, origins) in enumerate(kept(Rank(model="m", keep=keep), *facts))
                        for origin in origins)  # fmt: skip
        for image in "ab":
            first: dict[str, tuple[int, str]] = {}
            for r, (i, texts) in enumerate(rows):
                for n, text in enumerate(texts):
                    if i == image:
                        first.setdefault(text, (r, f"web-{n}"))
            best = sorted(first, key=lambda text: -scores[image, text])[:keep]
            assert all(found.pop(first[text]) == 1 for text in best)
        assert not found


def test_kept_text_has_score_rank_and_origin() -> None:
    told = fact("a", ("web", "w", 0.25), ("written-1", "x", 0.5))
    (verdict,) = decided(Rank(model="m"), [row("k", 0, "w")], [told])
    made, web = verdict.samples
    assert (web.key, web.parts[1].text, web.language, web.license) == (
        "k/web",
        "w",
        "en",
        "CC0-1.0",
    )
    assert (made.key, made.parts[1].text, made.language, made.images) == (
        "k/written-1",
        "x",
        None,
        FLAGS[0].images,
    )
    assert web.provenance == {"rank.origin": "web", "rank.score": "0.25", "rank.rank": "2"}
    assert made.provenance == {"rank.origin": "written-1", "rank.score": "0.5", "rank.rank": "1"}
    assert verdict.note == "1. x (0.5), 2. w (0.25)"


# --- what the models say ---------------------------------------------------------------------------------------------


def test_a_score_is_the_cosine_of_image_and_text(home: Path) -> None:
    samples = [row("one", 5, "red blue", "black"), row("two", 9, "green red")]
    model = Pipeline.load(clip(home))
    for told, sample in zip(judged(Rank(model=clip(home)), samples, home), samples, strict=True):
        texts = [part.text or "" for part in sample.parts[1:]]
        alike = torch.cosine_similarity(model.embed_images(sample.images), model.embed_texts(texts))
        assert [score for _, _, score in told["texts"]] == pytest.approx(alike.tolist(), abs=1e-4)
        assert [origin for origin, _, _ in told["texts"]] == ["web", "web-2"][: len(texts)]


def test_trained_clip_prefers_true_captions(home: Path, tmp_path: Path) -> None:
    """Every flag has its own name and those of four others; two stay."""
    samples = [
        row(f"{n}-{m}", n, FLAGS[(n + 11 * m) % len(FLAGS)].text)
        for n in range(0, len(FLAGS), 4)
        for m in range(5)
    ]
    source = written(tmp_path / "source", samples)
    made = make(Rank(model=clip(home)), [source], str(tmp_path / "made"), home=home, say=str)
    stay = [
        sample.provenance["rank.key"] for sample in open_dataset(str(tmp_path / "made")).samples()
    ]
    assert made.rows == len(stay) == 2 * 14 and set(
        Counter(k.partition("-")[0] for k in stay).values()
    ) == {2}
    assert sum(key.endswith("-0") for key in stay) >= 12  # by chance, 5.6 of 14


def test_generated_texts_match_pipeline_on_single_images(home: Path) -> None:
    samples = [row(f"row-{n}", n, FLAGS[n].text) for n in range(4)]
    spec = Rank(model=clip(home), captioner=writer(home), **WRITES)
    facts = judged(spec, samples, home)
    texts = [
        [text for origin, text, _ in told["texts"] if origin.startswith("written")]
        for told in facts
    ]
    assert all(len(set(three)) == 3 for three in texts)
    alone = judged(spec, samples[2:3], home)
    assert [text for _, text, _ in alone[0]["texts"]] == [samples[2].text, *texts[2]]
    other = judged(replace(spec, seed=1), samples[2:3], home)
    assert [text for _, text, _ in other[0]["texts"]][1:] != texts[2]


def test_a_ranked_dataset_names_both_models_and_ranks_again_without_them(
    home: Path, tmp_path: Path
) -> None:
    source = written(tmp_path / "source", FLAGS[:6])
    spec = Rank(model=clip(home), captioner=writer(home), **WRITES)
    made = make(spec, [source], str(tmp_path / "made"), home=home, say=str)
    assert made.rows == 12 and made.parameters["model"] == spec.models(home)["model"]
    assert (
        made.parameters["captioner"] == spec.models(home)["captioner"] != made.parameters["model"]
    )
    before = sorted((tmp_path / "made.judged").rglob("*.jsonl"))
    (tmp_path / "made").rename(tmp_path / "two")
    assert (
        make(replace(spec, keep=1), [source], str(tmp_path / "made"), home=home, say=str).rows == 6
    )
    assert sorted((tmp_path / "made.judged").rglob("*.jsonl")) == before


def test_text_without_tokens_is_not_ranked(home: Path) -> None:
    sample = row("k", 0, "red blue", "  ")
    facts = judged(Rank(model=clip(home)), [sample], home)
    assert facts[0]["texts"][1] == ["web-2", "  ", None]
    (verdict,) = decided(Rank(model="m"), [sample], facts)
    assert [made.key for made in verdict.samples] == ["k/web"]


# --- quarantined and rejected rows ---


def test_row_without_an_image_and_captions_is_quarantined(home: Path) -> None:
    torn = pair("torn", FLAGS[0].images[0][:40], "a torn flag")
    talk = Sample(
        "talk",
        FLAGS[0].images,
        (Part("user", image=0), Part("user", text="?"), Part("assistant", text="!")),
    )
    facts = judged(Rank(model=clip(home)), [torn, FLAGS[0], talk], home)
    assert [told.get("bad", [None])[0] for told in facts] == ["corrupt", None, "bad_row"]


@pytest.mark.parametrize(
    ("make_one", "words"),
    [
        (lambda: Rank(model="m", keep=0), "captions and keep are at least 1. Got 10 and 0"),
        (lambda: Rank(model="m", top_p=0.0), r"top_p is in \(0, 1\]"),
        (lambda: Rank(model="m", min_tokens=30), "min_tokens 30 and max_tokens 20"),
    ],
)
def test_invalid_rank_fields_are_rejected(make_one: Callable[[], Rank], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        make_one()


def test_models_without_generation_or_weights_are_rejected(home: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is not an artifact"):
        Rank(model=str(tmp_path)).models(home)
    with pytest.raises(SpecError, match=r"cannot generate text\. Got a DualEncoder"):
        judged(Rank(model=clip(home), captioner=clip(home)), FLAGS[:1], home)
