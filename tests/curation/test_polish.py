"""Second-stage descriptions: written, continued once if short, mended by rules that leave a mended text alone."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bridgework.curation import llm
from bridgework.curation.mending import clean, wrong
from bridgework.curation.polish import CONTINUE, PROMPT, REWRITE, Polish
from bridgework.curation.runner import make
from bridgework.data.dataset import open_dataset
from bridgework.data.samples import Part, Sample, pair
from bridgework.data.tokenization import tokenize
from bridgework.errors import SpecError, WeightsError
from bridgework.inference.pipeline import Pipeline
from tests.curation.models import decided, endpoint, judged, writer
from tests.curation.support import flags, written

FLAGS = list(flags())
FINE = (
    "The image shows a small harbour in the early morning. Three boats lie at a wooden pier, and their masts are "
    "mirrored in the calm water. A man in a blue jacket is carrying a net to the nearest boat."
)
SHORT: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0}
# pieces of what such models write, to be put together in any way
PIECES = (
    FINE, "The the cat cat sleeps.", "A dog. A dog. A dog.", "###Human:", "### Assistant: Sure!", "<Img></Img>",
    "I'm sorry, I cannot see it.", "Ein Hund liegt vor dem Haus und schaut den Kindern auf der Wiese beim Spielen zu.",
    "\u732b\u304c\u5bdd\u3066\u3044\u308b\u3002", "Mr. Smith waits.", "!!!!!!!!", "and a", "It is red, red and blue.",
    "</s>", "\n\n", "\x00\u200b", "e\u0301clair", "the", ".", "<|im_end|>", "human:", "#", "\u25a1",
    "As an AI language model, I can say this.",
)  # fmt: skip
OTHERS = {  # that a dog runs, or runs home
    "Japanese": "\u72ac\u304c\u8d70\u3063\u3066\u3044\u308b\u3002",
    "Russian": "\u0421\u043e\u0431\u0430\u043a\u0430 \u0431\u0435\u0436\u0438\u0442.",
    "French": "Le chien court dans le jardin de la maison avec les enfants du village.",
}


def row(text: str, key: str = "k") -> Sample:
    return pair(key, FLAGS[0].images[0], text)


# --- the rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mended"),
    [
        (FINE, FINE),
        ("The the dog sits on on the mat.", "The dog sits on the mat."),
        ("There is a red car, a red car, a red car in the street.", "There is a red car in the street."),
        ("A dog and a dog run.", "A dog and a dog run."),
        ("It is so-so, and very very very nice.", "It is so-so, and very nice."),
        ("A dog runs. It is brown. A dog runs! It is BROWN.", "A dog runs. It is brown."),
        ("A dog runs. It is chasing a", "A dog runs."),
        ("###Assistant: A dog runs.### ###Human: Continue", "A dog runs."),
        ("<Img></Img> A dog <|im_end|> runs.</s>", "A dog runs."),
        ("I'm sorry, I am an AI. A dog runs. Let me know if you need more.", "A dog runs."),
        ("Sure, here is it. A dog runs.", "A dog runs."),
        ("A dog \u25a1\u25a1\ufffd runs @@@@@@ here.", "A dog runs here."),
        ("Mr. Smith walks with Dr. Jones, e.g. in the park.", "Mr. Smith walks with Dr. Jones, e.g. in the park."),
        ("A dog\n\nruns\tfast.", "A dog runs fast."),
        ("It is red , red, red and blue.", "It is red and blue."),
        ("Dog. A cat sleeps.", "A cat sleeps."),
        ('He says "stop." A cat sleeps.', 'He says "stop." A cat sleeps.'),
        ("", ""),
    ],
)  # fmt: skip
def test_what_such_models_leave_behind_is_removed(text: str, mended: str) -> None:
    assert clean(text) == mended


@pytest.mark.parametrize(
    "text",
    [
        "The stadium holds 1,000,000 people and 100,000,000 seats.",
        "It shows 3, 3 and 4.",
        "He has 20 20 vision.",
        "The clock reads 10 10.",
        "Two rows of 5 red, 5 red cars.",
        "A bus of the 3rd 3rd row stops.",
        "No. 5 is worn by a man.",
        "The player with no. 10 runs.",
    ],
)
def test_numbers_stay_as_they_are(text: str) -> None:
    assert clean(text) == text


def test_a_no_before_a_word_ends_a_sentence() -> None:
    assert clean("Is it red? No. It is blue.") == "Is it red? It is blue."


EMOJI = (
    *("\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f3f3\ufe0f\u200d\U0001f308"),
    *(
        "\u2764\ufe0f\u200d\U0001f525",
        "\U0001f469\U0001f3fd\u200d\u2695\ufe0f",
        "\U0001f44d\U0001f3fb",
    ),
    *(
        "\U0001f1e9\U0001f1ea",
        "1\ufe0f\u20e3",
        "\u25b6\ufe0f",
        "\u25fe",
        "\U0001f415\u200d\U0001f9ba",
    ),
    *("\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", "\u2640\ufe0f"),
)


@pytest.mark.parametrize("emoji", EMOJI)
def test_emoji_stay_as_they_are(emoji: str) -> None:
    text = f"The family {emoji} stands on the lawn {emoji}{emoji} in front of the house."
    assert clean(text) == text


@pytest.mark.parametrize(
    "hidden", ["\u200b", "\ufeff", "\u00ad", "\u202e", "\u200d", "\U000e0067", "\0", "\x07"]
)
def test_what_is_not_seen_and_joins_nothing_is_removed(hidden: str) -> None:
    given = f"The family {hidden} stands on the lawn, {hidden}in front of the house."
    assert clean(given) == "The family stands on the lawn, in front of the house."


@pytest.mark.parametrize("language", OTHERS)
def test_sentences_of_another_language_are_removed(language: str) -> None:
    assert clean(f"A dog runs. {OTHERS[language]} It is brown.") == "A dog runs. It is brown."
    assert clean(f"{OTHERS[language]}{OTHERS[language]}") == ""


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=8), st.sampled_from(("", " ", "\n")))
def test_mended_twice_is_mended_once(pieces: list[str], joint: str) -> None:
    mended = clean(joint.join(pieces))
    assert clean(mended) == mended and "\n" not in mended


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
@example("#a##Human:##")
@example("<Im<Img>g>")
def test_any_text_is_mended_once(text: str) -> None:
    assert clean(clean(text)) == clean(text)


def test_rules_remove_and_never_add() -> None:
    draws = random.Random(0)
    for _ in range(60):
        text = normalize("NFC", " ".join(draws.choices(PIECES, k=6)))
        words = text.casefold().split()
        assert all(
            word in words or any(word in longer for longer in words)
            for word in clean(text).casefold().split()
        )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (FINE, None),
        ("", "nothing is left"),
        ("A dog runs.", "too short"),
        ("Drei kleine Boote liegen im Hafen, und ein Mann tr\u00e4gt ein Netz.", "not English"),
    ],
)
def test_what_is_too_short_or_not_english_is_dropped(text: str, fault: str | None) -> None:
    assert wrong(text, 8) == fault


# --- texts that are there --------------------------------------------------------------------------------------------


def test_what_goes_on_is_a_part_of_what_came_in(home: Path, tmp_path: Path) -> None:
    texts = [
        FINE,
        FINE + " It is",
        "too short.",
        "I'm sorry, but I am not able to tell what this picture shows to you.",
    ]
    samples = [pair(f"row-{n}", FLAGS[n].images[0], text) for n, text in enumerate(texts)]
    source = written(tmp_path / "source", samples)
    made = make(Polish(), [source], str(tmp_path / "made"), home=home, say=str)
    stay = list(open_dataset(str(tmp_path / "made")).samples())
    assert [sample.key for sample in stay] == ["row-0", "row-1"] and [
        s.parts[1].text for s in stay
    ] == [FINE, FINE]
    assert {sample.images for sample in stay} <= {sample.images for sample in samples}
    assert made.parameters["counts"] == {
        "kept": 1,
        "kept, mended": 1,
        "too short": 1,
        "nothing is left": 1,
    }


def test_an_answer_is_mended_as_a_caption_is_and_two_texts_are_put_aside(home: Path) -> None:
    image = FLAGS[0].images
    talk = Sample(
        "t",
        image,
        (Part("user", image=0), Part("user", text="What is it?"), Part("assistant", text=FINE)),
    )
    two = Sample(
        "two",
        image,
        (Part("caption", image=0), Part("caption", text="a"), Part("caption", text="b")),
    )
    facts = judged(Polish(), [talk, two], home)
    assert facts[1]["bad"][0] == "bad_row"
    (verdict,) = decided(Polish(), [talk, two], facts)
    assert verdict.samples[0].parts == (Part("caption", image=0), Part("caption", text=FINE))


def test_another_length_needs_no_judge(home: Path) -> None:
    facts = judged(Polish(), [row(FINE)], home)
    assert [v.why for v in decided(Polish(min_words=100), [row(FINE)], facts)] == ["too short"]


# --- a model describes -----------------------------------------------------------------------------------------------


def test_a_short_description_is_continued_exactly_once(home: Path) -> None:
    model = Pipeline.load(writer(home))
    firsts = [
        fact["written"]
        for fact in judged(Polish(model=writer(home), enough=0, **SHORT), FLAGS[:6], home)
    ]
    lengths = [len(tokenize(text, model.tokenizer, literal=True)) for text in firsts]
    enough = sorted(lengths)[3]
    spec = Polish(model=writer(home), enough=enough, **SHORT)
    facts = judged(spec, FLAGS[:6], home)
    assert [fact["continued"] for fact in facts] == [length < enough for length in lengths]
    assert 0 < sum(fact["continued"] for fact in facts) < 6
    for sample, fact, first in zip(FLAGS, facts, firsts, strict=False):
        more = _continued(sample, first, home) if fact["continued"] else ""
        assert fact["written"] == f"{first} {more}".strip()


def _continued(sample: Sample, first: str, home: Path) -> str:
    """What the model says to "Continue" behind its description, asked alone in the human template."""
    loaded = Pipeline.load(writer(home))
    model = Pipeline(
        loaded.model, replace(loaded.stage, data=replace(loaded.stage.data, template="human"))
    )
    asked = [Part("user", image=0), Part("user", text="\n" + PROMPT), Part("assistant", text=first)]
    how: Any = {"max_new_tokens": SHORT["max_tokens"], "temperature": 1.0, "top_p": 0.9}
    seed = llm.drawn(0, sample.key, 1)
    return model.generate_batch([[*asked, Part("user", text=CONTINUE)]], [sample.images], [seed], **how)[0]


def test_what_is_written_depends_on_seed_key_and_template(home: Path) -> None:
    spec = Polish(model=writer(home), enough=0, **SHORT)
    texts = [fact["written"] for fact in judged(spec, FLAGS[:4], home)]
    assert [fact["written"] for fact in judged(spec, FLAGS[2:4], home)] == texts[2:]
    assert [fact["written"] for fact in judged(replace(spec, seed=1), FLAGS[:4], home)] != texts
    assert [
        fact["written"] for fact in judged(replace(spec, template=None), FLAGS[:4], home)
    ] != texts
    assert spec.models(home).keys() == {"model"} and Polish().models(home) == {}


def test_rows_without_a_text_can_be_described_and_torn_ones_not(home: Path) -> None:
    bare = Sample("bare", FLAGS[1].images, (Part("caption", image=0),))
    torn = pair("torn", FLAGS[0].images[0][:40], "a torn flag")
    facts = judged(Polish(model=writer(home), **SHORT), [bare, torn], home)
    assert (
        facts[0].keys() == {"written", "continued", "rewritten"} and facts[1]["bad"][0] == "corrupt"
    )


# --- an endpoint rewrites --------------------------------------------------------------------------------------------


def test_an_endpoint_rewrites_what_was_mended_and_is_mended_itself(home: Path) -> None:
    def answer(request: dict[str, Any]) -> str | int:
        (message,) = request["messages"]
        return (
            400
            if "harbour" not in message["content"]
            else "Sure, with pleasure! " + FINE.replace("small", "quiet")
        )

    other = (
        "A brown dog runs over a wide and green meadow. " * 2
        + "It is followed by two children who laugh and wave at it."
    )
    samples = [row(FINE + " It is", "one"), row(other, "two"), row("\u72ac\u3002", "three")]
    with endpoint(answer) as server:
        spec = Polish(endpoint=server.url, rewriter="editor")
        facts = judged(spec, samples, home)
    asked = [request["messages"][0]["content"].removeprefix(REWRITE) for request in server.asked]
    assert sorted(asked) == sorted([FINE, clean(other)])  # nothing is left of the third
    texts = [
        v.samples[0].parts[1].text if v.samples else v.why for v in decided(spec, samples, facts)
    ]
    assert texts == [FINE.replace("small", "quiet"), clean(other), "nothing is left"]


@pytest.mark.parametrize(
    ("make_one", "words"),
    [
        (lambda: Polish(endpoint="http://x"), "give both, or neither"),
        (lambda: Polish(top_p=0.0), r"top_p lies in \(0, 1\]"),
        (lambda: Polish(min_words=0), "at least 1"),
        (lambda: Polish(prompt=" "), "the prompt is empty"),
    ],
)
def test_a_polish_that_cannot_run_is_refused(make_one: Callable[[], Polish], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        make_one()


def test_a_model_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is not an artifact"):
        Polish(model=str(tmp_path)).models(tmp_path)
