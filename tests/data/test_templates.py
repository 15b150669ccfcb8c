"""Templates, compared with the strings of LLaVA and of the tokenizers."""

import re
import threading

import pytest
from transformers import PreTrainedTokenizerBase

from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Part, Sample, pair
from bridgework.data.templates import (
    TEMPLATES,
    Segment,
    chat_text,
    conversation,
    prompt,
    render,
    stop,
)
from bridgework.data.tokenization import load_tokenizer
from bridgework.errors import SpecError

TURNS = [
    Part("user", image=0),
    Part("user", text="\nWhat is it?"),
    Part("assistant", text="A cat."),
    Part("user", text="Where?"),
    Part("assistant", text="On a mat, asleep."),
]
MESSAGES = [
    {"role": "user", "content": "<image>\nWhat is it?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "On a mat, asleep."},
]


def text(segments: list[Segment]) -> str:
    return "".join("<image>" if s.image is not None else s.text for s in segments)


def trained(segments: list[Segment]) -> list[str]:
    """Return the texts with loss; adjacent ones are joined."""
    marked = "".join(
        f"\0{s.text}\0" if s.train else "-" + re.sub(".", "-", s.text, flags=re.S) for s in segments
    )
    return [stretch.replace("\0", "") for stretch in re.split("-+", marked) if stretch]


def tokenizer_with(template: str) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer("bytes")
    tokenizer.chat_template = template
    return tokenizer


def test_plain_is_the_image_the_caption_and_a_newline() -> None:
    segments = render(pair("k", b"", "a red circle").parts, "plain", load_tokenizer("bytes"))
    assert text(segments) == "<image>a red circle\n"
    assert trained(segments) == ["a red circle\n"]


def test_plain_reads_a_conversation_as_llava_does() -> None:
    segments = render(TURNS[:3], "plain", load_tokenizer("bytes"))
    assert text(segments) == "<image>A cat.\n"


def test_v1_is_vicunas_published_string() -> None:
    segments = render(TURNS, "v1", load_tokenizer("bytes"))
    assert text(segments) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat is it? ASSISTANT: A cat.<|im_end|>"
        "USER: Where? ASSISTANT: On a mat, asleep.<|im_end|>"
    )
    assert trained(segments) == [" A cat.<|im_end|>", " On a mat, asleep.<|im_end|>"]


def test_v1_uses_a_system_part_instead_of_its_own_sentence() -> None:
    segments = render([Part("system", text="Be brief."), *TURNS[3:]], "v1", load_tokenizer("bytes"))
    assert text(segments).startswith("Be brief. USER: Where? ASSISTANT:")


def test_chat_matches_the_tokenizers_own_template(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    segments = render(TURNS, "chat", tokenizer)
    assert text(segments) == tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert trained(segments) == ["A cat.<|im_end|>", "On a mat, asleep.<|im_end|>"]


def test_chat_prompt_matches_the_tokenizers_own_template(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    segments = prompt(TURNS, "chat", tokenizer)
    assert text(segments) == tokenizer.apply_chat_template(
        MESSAGES[:3], tokenize=False, add_generation_prompt=True
    )
    assert trained(segments) == ["A cat.<|im_end|>"]


def test_system_part_of_a_sample_replaces_the_default_system_prompt(
    smollm2: PreTrainedTokenizerBase,
) -> None:
    assert "SmolLM" in text(render(TURNS, "chat", smollm2))
    segments = render([Part("system", text="Be brief."), *TURNS], "chat", smollm2)
    assert "SmolLM" not in text(segments)
    assert Segment("Be brief.") in segments


def test_template_that_moves_the_system_part_into_the_first_turn_works() -> None:
    tokenizer = tokenizer_with(
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
        "[INST] {{ ('<<SYS>>' + system + '<</SYS>> ' if loop.first and system else '') + m.content | trim }} [/INST]"
        "{% else %} {{ m.content | trim }} <|im_end|><|bos|>{% endif %}{% endfor %}"
    )
    segments = render([Part("system", text="Be brief."), *TURNS], "chat", tokenizer)
    assert text(segments).startswith(
        "[INST] <<SYS>>Be brief.<</SYS>> <image>\nWhat is it? [/INST] A cat. <|im_end|>"
    )
    assert trained(segments) == ["A cat. <|im_end|>", "On a mat, asleep. <|im_end|>"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1].content }}",
        "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{{ raise_exception('roles must alternate') }}",
    ],
)
def test_chat_template_that_changes_the_turns_is_rejected(template: str) -> None:
    with pytest.raises(BadSample, match="chat template") as caught:
        render(TURNS, "chat", tokenizer_with(template))
    assert caught.value.reason is Reason.BAD_ROW


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_is_a_prefix_of_the_training_text(
    template: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    parts = pair("k", b"", "a red circle").parts if template in ("plain", "caption") else TURNS
    full, start = (
        text(render(parts, template, tokenizer)),
        text(prompt(parts, template, tokenizer)),
    )
    assert full.startswith(start)
    assert full.removeprefix(start).strip() == parts[-1].text + stop(template, tokenizer).strip()


@pytest.mark.parametrize("template", ["v1", "chat"])
def test_caption_is_the_answer_to_its_image(template: str) -> None:
    tokenizer = load_tokenizer("bytes")
    turns = [Part("user", image=0), Part("assistant", text="a cat")]
    assert render(pair("k", b"", "a cat").parts, template, tokenizer) == render(
        turns, template, tokenizer
    )


def test_stop_is_the_text_that_ends_an_answer(smollm2: PreTrainedTokenizerBase) -> None:
    stops = {template: stop(template, smollm2) for template in TEMPLATES}
    eos = "<|im_end|>"
    assert stops == {
        "plain": "\n", "v1": eos, "chat": eos, "caption": eos, "answer": eos, "prompted": eos,
        "human": "###", "interleaved": "",
    }  # fmt: skip


def test_first_words_of_a_caption_can_be_its_question() -> None:
    halves = {
        tuple(
            p.text
            for p in conversation(pair("k", b"", "a red circle"), (), choice, prefix=True)
            if p.text
        )
        for choice in range(10)
    }
    assert halves == {("a", "red circle"), ("a red", "circle")}
    assert conversation(pair("k", b"", "circle"), (), 3, prefix=True) == list(
        pair("k", b"", "circle").parts
    )


def test_prompts_turn_a_pair_into_a_question_with_the_image_first_or_last() -> None:
    sample = pair("k", b"", "a cat")
    conversations = [
        conversation(sample, ("Describe it.", "What is it?"), choice) for choice in range(4)
    ]
    assert [text(render(m, "plain", load_tokenizer("bytes"))) for m in conversations] == [
        "<image>a cat\n"
    ] * 4
    asked = [
        "".join("<image>" if p.image is not None else p.text or "" for p in m[:-1])
        for m in conversations
    ]
    assert asked == [
        "<image>\nDescribe it.",
        "<image>\nWhat is it?",
        "Describe it.\n<image>",
        "What is it?\n<image>",
    ]


def test_conversation_and_pair_without_prompts_are_unchanged() -> None:
    talk = Sample("k", (b"",), tuple(TURNS))
    assert conversation(talk, ("Describe it.",), 1) == TURNS
    assert conversation(pair("k", b"", "a cat"), (), 1) == list(pair("k", b"", "a cat").parts)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([Part("user", text="hello?")], Reason.NO_TARGET),
        ([Part("user", text="hello?"), Part("assistant", text=" \n")], Reason.EMPTY_TEXT),
    ],
)
def test_sample_without_an_answer_is_bad(parts: list[Part], reason: Reason) -> None:
    with pytest.raises(BadSample) as caught:
        render(parts, "chat", load_tokenizer("bytes"))
    assert caught.value.reason is reason


def test_unknown_template_is_rejected_with_a_suggestion() -> None:
    with pytest.raises(SpecError, match="did you mean 'plain'"):
        render(TURNS, "plan", load_tokenizer("bytes"))


def test_tokenizer_without_a_chat_template_is_rejected() -> None:
    with pytest.raises(SpecError, match="Fix: use template 'v1'"):
        render(TURNS, "chat", tokenizer_with(None))


QUESTION = Sample("k", (b"",), tuple(TURNS[:3]), ocr="STOP, 5 km")


def test_prompt_is_filled_with_the_only_question_of_a_conversation() -> None:
    """Filled in one pass, so braces in a question or in OCR text are not placeholders."""
    framed = conversation(QUESTION, ("Question: {} Short answer:", "{}"), 0)
    assert framed == [TURNS[0], Part("user", text="Question: What is it? Short answer:"), TURNS[2]]
    seen = conversation(QUESTION, ("OCR tokens: {ocr}. {}",), 0)
    assert seen[1].text == "OCR tokens: STOP, 5 km. What is it?"
    odd = Sample("k", (b"",), (TURNS[0], Part("user", text="{ocr}?"), TURNS[2]), ocr="{}")
    assert conversation(odd, ("{ocr} {}",), 0)[1].text == "{} {ocr}?"


def test_prompt_without_placeholder_or_longer_conversation_changes_no_question() -> None:
    assert conversation(QUESTION, ("Describe.",), 0) == TURNS[:3]
    long = Sample("k", (b"",), tuple(TURNS))
    assert conversation(long, ("Question: {}",), 0) == TURNS


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("answer", "<image>Describe it. A cat.<|im_end|>"),
        ("human", "###Human: <Img><image></Img> Describe it. ###Assistant: A cat.###"),
    ],
)
def test_images_come_first_in_templates_trained_that_way(template: str, expected: str) -> None:
    for choice in range(2):  # LLaVA prompt after its image, and before it
        parts = conversation(pair("k", b"", "A cat."), ("Describe it.",), choice)
        assert text(render(parts, template, load_tokenizer("bytes"))) == expected


HANGING = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
}


@pytest.mark.parametrize("name", HANGING)
def test_chat_template_that_never_ends_is_stopped(name: str) -> None:
    tokenizer, before = tokenizer_with(HANGING[name]), set(threading.enumerate())
    with pytest.raises(SpecError, match=r"runs for more than 0.2 s.*another tokenizer"):
        chat_text(tokenizer, MESSAGES, ask=True, limit_s=0.2)
    for left in set(threading.enumerate()) - before:
        left.join(30)
        assert not left.is_alive()  # no thread runs in the background


@pytest.mark.parametrize(
    "template",
    [
        *("{{ 1 // 0 }}", "{{ messages['x'].y.z }}", "{{ raise_exception('no') }}"),
        "{% for a in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    ],
)
def test_chat_template_that_fails_is_a_bad_sample(template: str) -> None:
    with pytest.raises(BadSample, match="the chat template rejects the turns user, assistant"):
        render(TURNS, "chat", tokenizer_with(template))
