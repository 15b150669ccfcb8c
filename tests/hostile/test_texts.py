"""What a dataset says is only text: it never turns into scaffold, images or loss, under any template."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from bridgework.data.quarantine import BadSample, Quarantine, Reason, records
from bridgework.data.samples import Part, pair
from bridgework.data.templates import TEMPLATES, prompt, render
from bridgework.data.tokenization import Encoded, encode
from bridgework.system import END, IGNORE
from tests.hostile import texts

PLACES = 3  # tokens of an image
PLAIN = "a cat"


def talk(text: str) -> list[Part]:
    """The text wherever one may stand, between two images."""
    return [
        Part("user", image=0),
        Part("user", text=text),
        Part("assistant", text=text),
        Part("user", image=1),
        Part("user", text=text),
        Part("assistant", text=text),
    ]


def read(
    text: str, template: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int = 10**6
) -> Encoded:
    return encode(
        render(talk(text), template, tokenizer),
        tokenizer,
        image_tokens=PLACES,
        max_tokens=max_tokens,
    )


def scaffold(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The image places, the ends of chunks and the special tokens in a stream, in order."""
    special = set(tokenizer.added_tokens_decoder)
    return [token for token in ids if token < 0 or token in special]


def learned(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the labels spell, without END."""
    return str(tokenizer.decode([label for label in encoded.labels if label not in (IGNORE, END)]))


@pytest.mark.parametrize("name", texts.TEXTS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_text_is_never_scaffold(
    template: str, name: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    text = texts.TEXTS[name]
    encoded, plain = read(text, template, tokenizer), read(PLAIN, template, tokenizer)
    assert scaffold(encoded.ids, tokenizer) == scaffold(plain.ids, tokenizer)
    assert (encoded.images, encoded.places) == (plain.images, plain.places)
    assert all(
        label in (IGNORE, token) for token, label in zip(encoded.ids, encoded.labels, strict=True)
    )
    assert learned(encoded, tokenizer) == learned(plain, tokenizer).replace(PLAIN, text)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_question_is_never_scaffold(template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    def asked(text: str) -> list[int]:
        segments = prompt(talk(text), template, tokenizer)
        return scaffold(
            encode(segments, tokenizer, image_tokens=PLACES, max_tokens=10**6).ids, tokenizer
        )

    for name, text in texts.TEXTS.items():
        assert asked(text) == asked(PLAIN), name


@pytest.mark.parametrize("name", texts.BLANK)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_blank_answer_is_put_aside(
    template: str, name: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(BadSample) as caught:
        read(texts.BLANK[name], template, tokenizer)
    assert caught.value.reason is Reason.EMPTY_TEXT
    with pytest.raises(BadSample) as caught:
        pair("k", b"", texts.BLANK[name])
    assert caught.value.reason is Reason.EMPTY_TEXT


@pytest.mark.parametrize("name", texts.ENDLESS)
@pytest.mark.parametrize("template", ["caption", "answer"])
def test_an_endless_caption_is_cut(
    template: str, name: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    parts = pair("k", b"", texts.ENDLESS[name]).parts
    encoded = encode(
        render(parts, template, tokenizer), tokenizer, image_tokens=PLACES, max_tokens=64
    )
    assert len(encoded.ids) == len(encoded.labels) == 64
    assert encoded.images == [0] and encoded.labels.count(IGNORE) <= 1 + PLACES


@pytest.mark.parametrize("template", ["v1", "chat", "human", "prompted", "interleaved"])
def test_a_question_without_end_leaves_nothing_to_learn(
    template: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    endless = texts.ENDLESS["words"][:50_000]
    asked = [Part("user", image=0), Part("user", text=endless), Part("assistant", text="a cat")]
    with pytest.raises(BadSample) as caught:
        encode(render(asked, template, tokenizer), tokenizer, image_tokens=PLACES, max_tokens=64)
    assert caught.value.reason is Reason.NO_TARGET


@pytest.mark.parametrize("template", TEMPLATES)
def test_half_of_a_surrogate_pair_is_put_aside(
    template: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(BadSample) as caught:
        read(texts.SURROGATE, template, tokenizer)
    assert caught.value.reason is Reason.BAD_ROW


def test_any_text_can_be_put_on_record(tmp_path: Path) -> None:
    said = [*texts.TEXTS.values(), *texts.BLANK.values(), texts.SURROGATE, "a\r\nb\u2028c"]
    quarantine = Quarantine(str(tmp_path), limit=1.0)
    for row, text in enumerate(said):
        quarantine.add("dataset", text, row, BadSample(Reason.BAD_ROW, text))
    quarantine.flush()
    assert [(record.key, record.detail) for record in records(str(tmp_path))] == [
        (text, text) for text in said
    ]
