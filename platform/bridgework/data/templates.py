"""Convert the parts of a sample to the segments of one token stream: scaffold, content and loss.

plain         images, then the caption and a newline                  LLaVA stage 1 (Liu et al. 2023, arXiv:2304.08485)
v1            "SYSTEM USER: question ASSISTANT: answer</s>USER: ..."  LLaVA stage 2, Vicuna's format
chat          the tokenizer's own chat template
caption       one of the captions and the token that ends a text      CLIP, BLIP, BLIP-2's first stage
answer        images, "question answer</s>", no scaffold              BLIP-2's second stage, InstructBLIP
prompted      the same, with nothing between question and answer      BLIP's captioner: "a picture of" a caption
human         "###Human: <Img>..</Img> question ###Assistant: a###"   MiniGPT-4 (Zhu et al. 2023, arXiv:2304.10592)
interleaved   images and texts in order, END after every chunk        Flamingo (Alayrac et al. 2022, arXiv:2204.14198)

A template is cut into segments *before* tokenization. So text of a user or a dataset can never
become scaffold, and the loss mask never depends on how a tokenizer merges across a boundary.

`read_as` first applies the options of a source: its prompts, and for documents the number of images
and their order (Alayrac et al. 2022, arXiv:2204.14198, 2.4 and A.3.2).
"""

from __future__ import annotations

import ctypes
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from itertools import groupby
from threading import Thread
from typing import TYPE_CHECKING, Any

from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Part, Sample
from bridgework.errors import SpecError, suggest
from bridgework.system import END, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

V1_SYSTEM = (  # published with LLaVA v1 and v1.5: their weights expect exactly this text
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CHAT_S = 5.0  # seconds for a chat template to write one conversation; usual are milliseconds
Turn = tuple[str, list[Part]]  # system | user | assistant, and its parts


@dataclass(frozen=True)
class Segment:
    """A piece of the stream that is tokenized on its own: text, or the place of one image."""

    text: str = ""
    image: int | None = None  # index into the sample's images
    train: bool = False  # has loss
    literal: bool = True  # content: text that looks like a special token stays plain text
    token: int | None = None  # a token outside the tokenizer's vocabulary: END
    closing: bool = False  # stays when the text before it is cut


def conversation(
    sample: Sample, prompts: Sequence[str], choice: int, *, prefix: bool = False
) -> list[Part]:
    """Return the sample's parts.

    With `prompts`, a pair becomes a question with its caption as answer.

    `choice`, any non-negative random integer, selects the prompt and whether the image is before or
    after it (LLaVA eq. 2). With `prefix`, the first words of the caption are the question, up to a
    random word, and the rest is the answer (BLIP-2's prefix language modeling, arXiv:2301.12597,
    3.3). In a conversation with one question, a prompt with {} replaces the question, which is
    inserted at {} (InstructBLIP, arXiv:2305.06500, 2.1). Other conversations, and samples with
    several texts, are not changed. In a prompt, {ocr} is the text in the image, and {options} or
    {OPTIONS} are the candidates of a multiple-choice question: "(a) red (b) blue", or "(A) red (B)
    blue".
    """
    images = [p for p in sample.parts if p.image is not None]
    texts = [p for p in sample.parts if p.text is not None]
    if prompts and [p.role for p in texts] == ["user", "assistant"]:
        prompt = prompts[choice % len(prompts)]
        question = replace(texts[0], text=_fill(prompt, sample, texts[0].text or ""))
        return [question if p is texts[0] else p for p in sample.parts]
    if not (prompts or prefix) or len(texts) != 1 or any(p.role != "caption" for p in sample.parts):
        return list(sample.parts)
    if prefix:
        words = (texts[0].text or "").split()
        if len(words) < 2:
            return list(sample.parts)
        at = 1 + choice % (len(words) - 1)
        halves = (
            Part("user", text=" ".join(words[:at])),
            Part("assistant", text=" ".join(words[at:])),
        )
        return [*(Part("user", image=p.image) for p in images), *halves]
    prompt, image_last = _fill(prompts[choice % len(prompts)], sample), choice // len(prompts) % 2
    users = [Part("user", image=p.image) for p in images]
    users = (
        [Part("user", text=prompt + "\n"), *users]
        if image_last
        else [*users, Part("user", text="\n" + prompt)]
    )
    return [*users, Part("assistant", text=texts[0].text)]


def _fill(prompt: str, sample: Sample, question: str | None = None) -> str:
    """Fill the placeholders of a prompt. Returns the question if there is one and no {} for it."""
    if question is not None and "{}" not in prompt:
        return question
    named = [(letter(place), text) for place, text in enumerate(sample.candidates)]
    values = {
        "{}": (question or "").strip(),
        "{ocr}": sample.ocr or "",
        "{options}": " ".join(f"({name}) {text}" for name, text in named),
        "{OPTIONS}": " ".join(f"({name.upper()}) {text}" for name, text in named),
    }
    return re.sub(r"\{(?:ocr|options|OPTIONS)?\}", lambda match: values[match[0]], prompt)


def letter(place: int) -> str:
    """Return the name of a candidate by its index: a, b, .. z, aa, ab, .."""
    tens, ones = divmod(place, 26)
    return (letter(tens - 1) if tens else "") + "abcdefghijklmnopqrstuvwxyz"[ones]


def render(
    parts: Sequence[Part], template: str, tokenizer: PreTrainedTokenizerBase, choice: int = 0
) -> list[Segment]:
    """Return the segments to train on, with loss on every answer and on the stop string after it.

    Neighboring parts of one role are one turn. `plain` and `caption` only use images, captions and
    answers, as LLaVA's stage 1 does; of several texts, `caption` uses one, selected by `choice`. In
    the other templates, a caption is the answer to its image. Raises BadSample for a sample without
    an answer, with a blank one, or with turns that the template does not allow; SpecError for an
    unknown template.
    """
    answers = [p.text for p in parts if p.text is not None and p.role in ("caption", "assistant")]
    if not answers:
        raise BadSample(Reason.NO_TARGET, "no part of the sample is a caption or an answer")
    if not all(answer.strip() for answer in answers):
        raise BadSample(Reason.EMPTY_TEXT, "an answer of the sample is blank")
    if template == "caption":
        texts = [p for p in parts if p.text is not None and p.role in ("caption", "assistant")]
        parts = [*(p for p in parts if p.image is not None), texts[choice % len(texts)]]
    return list(_segments(parts, template, tokenizer, ask=False))


def prompt(
    parts: Sequence[Part], template: str, tokenizer: PreTrainedTokenizerBase
) -> list[Segment]:
    """Return the segments before the last answer: a prefix of the result of `render`.

    The last answer is removed if there is one. Raises the errors of `render`, but needs no answer.
    """
    return list(_segments(unanswered(parts), template, tokenizer, ask=True))


def unanswered(parts: Sequence[Part]) -> list[Part]:
    """Return the conversation without its last answer, if it ends with one."""
    rest = list(parts)
    while rest and rest[-1].text is not None and rest[-1].role in ("caption", "assistant"):
        rest.pop()
    return rest


def stop(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text that ends an answer, e.g. `<|im_end|>`; empty if a chat template has none."""
    exchange = [Part("user", text="q"), Part("assistant", text="a")]
    return "".join(
        s.text for s in render(exchange, template, tokenizer) if s.train and not s.literal
    )


def _segments(
    parts: Sequence[Part], template: str, tokenizer: PreTrainedTokenizerBase, *, ask: bool
) -> Iterator[Segment]:
    write = TEMPLATES.get(template)
    if write is None:
        raise SpecError(f"unknown template {template!r}" + suggest(template, TEMPLATES))
    segments = write(_turns(parts), tokenizer, ask)
    return (s for s in segments if s.text or s.image is not None or s.token is not None)


def _turns(parts: Sequence[Part]) -> list[Turn]:
    """Group neighboring parts of one role; a caption is an answer, and its image is of the user."""

    def role(part: Part) -> str:
        if part.role != "caption":
            return part.role
        return "assistant" if part.image is None else "user"

    return [(name, list(group)) for name, group in groupby(parts, key=role)]


def _contents(turn: Turn) -> Iterator[Segment]:
    """Yield the segments of a turn's parts, without scaffold."""
    role, parts = turn
    for part in parts:
        if part.image is not None:
            yield Segment(image=part.image)
        else:
            yield Segment(part.text or "", train=role == "assistant")


def _images_first(turn: Turn) -> Iterator[Segment]:
    """Yield the images of a turn, then its texts, without newlines between prompt and image."""
    contents = list(_contents(turn))
    yield from (s for s in contents if s.image is not None)
    yield from (
        replace(s, text=s.text if s.train else s.text.strip("\n"))
        for s in contents
        if s.image is None
    )


def _plain(turns: list[Turn], tokenizer: PreTrainedTokenizerBase, ask: bool) -> Iterator[Segment]:
    for turn in turns:
        for segment in _contents(turn):
            if segment.image is not None or segment.train:
                yield segment
            if not segment.train:
                continue
            # The paper puts loss on the caption, LLaVA's code also on its newline; without that, no
            # model learns where a caption ends. As a segment of its own it is one token, whatever
            # the caption ends with.
            yield Segment("\n", train=True, literal=False)


def _caption(turns: list[Turn], tokenizer: PreTrainedTokenizerBase, ask: bool) -> Iterator[Segment]:
    for turn in turns:
        yield from (s for s in _contents(turn) if s.image is not None or s.train)
    if not ask:
        yield Segment(_ending(tokenizer, "caption"), train=True, literal=False, closing=True)


def _answer(turns: list[Turn], tokenizer: PreTrainedTokenizerBase, ask: bool) -> Iterator[Segment]:
    ending = _ending(tokenizer, "answer")
    has_text = False
    for turn in turns:
        for segment in _images_first(turn):
            add_space = segment.text and has_text
            yield replace(segment, text=" " + segment.text) if add_space else segment
            has_text = has_text or bool(segment.text)
        if turn[0] == "assistant":
            yield Segment(ending, train=True, literal=False, closing=True)
        elif has_text and tokenizer.bos_token is None and tokenizer.sep_token is not None:
            yield Segment(ending, literal=False)  # BERT's separator of two texts


def _prompted(
    turns: list[Turn], tokenizer: PreTrainedTokenizerBase, ask: bool
) -> Iterator[Segment]:
    return (s for s in _answer(turns, tokenizer, ask) if s.literal or s.train)


def _human(turns: list[Turn], tokenizer: PreTrainedTokenizerBase, ask: bool) -> Iterator[Segment]:
    lead = "###Human:"  # "###" also ends an answer, so later turns begin after it
    for role, parts in turns:
        if role == "system":
            yield from _contents((role, parts))
            continue
        yield Segment(" ###Assistant:" if role == "assistant" else lead, literal=False)
        for segment in _images_first((role, parts)):
            if segment.image is not None:
                yield Segment(" <Img>", literal=False)
                yield segment
                yield Segment("</Img>", literal=False)
            else:
                yield replace(segment, text=" " + segment.text.strip())
        if role == "assistant":
            yield Segment("###", train=True, literal=False, closing=True)
        lead = "Human:"
    if ask:
        yield Segment(" ###Assistant:", literal=False)


def _interleaved(
    turns: list[Turn], tokenizer: PreTrainedTokenizerBase, ask: bool
) -> Iterator[Segment]:
    # role of the last segment: an answer also ends before text without an image (e.g. a shot
    # without its image)
    last: str | None = None
    for turn in turns:
        for segment in _contents(turn):
            if last is not None and (
                segment.image is not None or (last, turn[0]) == ("assistant", "user")
            ):
                yield Segment(token=END, train=True)
            last = turn[0]
            yield segment
    if not ask:
        yield Segment(token=END, train=True, closing=True)


def _ending(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Return the token that ends a text: eos, or BERT's SEP."""
    ending = tokenizer.eos_token or tokenizer.sep_token
    if ending is None:
        raise SpecError(
            f"template {template!r} needs a tokenizer with an eos or sep token. Got neither"
        )
    return str(ending)


def _v1(turns: list[Turn], tokenizer: PreTrainedTokenizerBase, ask: bool) -> Iterator[Segment]:
    eos = tokenizer.eos_token
    if eos is None:
        raise SpecError("template 'v1' needs a tokenizer with an eos token; this one has none")
    own_system = bool(turns) and turns[0][0] == "system"
    yield from _contents(turns[0]) if own_system else [Segment(V1_SYSTEM, literal=False)]
    gap = " "  # before the first turn; later turns follow the eos token directly
    for turn in turns[own_system:]:
        role, (first, *rest) = turn[0], list(_contents(turn))
        if role == "system":
            raise BadSample(
                Reason.BAD_ROW, "template 'v1' allows a system part only before the first turn"
            )
        lead = " ASSISTANT:" if role == "assistant" else f"{gap}USER:"
        if first.image is None:  # byte-pair tokenizers expect the space in the token after it
            first = replace(first, text=" " + first.text)
        else:
            lead += " "
        yield Segment(lead, literal=False)
        yield from (first, *rest)
        if role == "assistant":
            yield Segment(eos, train=True, literal=False)
        gap = ""
    if ask:
        yield Segment(" ASSISTANT:", literal=False)


def _chat(turns: list[Turn], tokenizer: PreTrainedTokenizerBase, ask: bool) -> Iterator[Segment]:
    scaffold = _scaffold([role for role, _ in turns], tokenizer, ask)
    special = _special(tokenizer)
    yield Segment(scaffold[0], literal=False)
    for turn, after in zip(turns, scaffold[1:], strict=True):
        yield from _contents(turn)
        # An answer ends with the first special token after it (in ChatML eos); the newline after
        # that is scaffold.
        ending = special.search(after) if turn[0] == "assistant" else None
        cut = ending.end() if ending else 0
        yield Segment(after[:cut], train=True, literal=False)
        yield Segment(after[cut:], literal=False)


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    ask: bool,
    limit_s: float = CHAT_S,
) -> str:
    """Return the messages as formatted by the tokenizer's own chat template.

    A template is a program that is part of the weights. Raises SpecError for one that runs for more
    than `limit_s` seconds, after stopping it, and BadSample if it fails or rejects the messages.
    """
    chat: Any = [dict(message) for message in messages]
    options: Any = {"tokenize": False, "add_generation_prompt": ask}
    result: Future[Any] = Future()

    def write() -> None:
        try:
            result.set_result(tokenizer.apply_chat_template(chat, **options))
        except BaseException as error:  # also _Stopped: the waiting thread raises it
            result.set_exception(error)

    writer = Thread(target=write, daemon=True)
    writer.start()
    if wait([result], limit_s).not_done:
        _stop(writer)
        raise SpecError(
            f"the tokenizer's chat template runs for more than {limit_s:g} s. "
            "Fix: use another tokenizer, or one of bridgework's templates, e.g. template='v1'"
        )
    try:
        return str(result.result())
    except Exception as error:  # a template may raise anything
        roles = ", ".join(str(message["role"]) for message in chat)
        raise BadSample(
            Reason.BAD_ROW, f"the chat template rejects the turns {roles}: {error}"
        ) from None


class _Stopped(BaseException):
    """Raised inside a chat template that runs for too long."""


def _stop(thread: Thread) -> None:
    """Raise _Stopped in a thread, between two of its bytecode instructions."""
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident), ctypes.py_object(_Stopped)
        )
    thread.join(1)


def _scaffold(roles: list[str], tokenizer: PreTrainedTokenizerBase, ask: bool) -> list[str]:
    """Return the chat template's strings before, between and after the contents.

    There is one more string than turns.
    """
    if tokenizer.chat_template is None:
        raise SpecError(
            "template 'chat' needs a tokenizer with a chat template; this one has none. "
            "Fix: use template 'v1'"
        )
    # Characters of the private use area represent the contents: no template writes, strips or
    # splits them.
    messages: list[dict[str, Any]] = [
        {"role": r, "content": f"\ue000{i}\ue001"} for i, r in enumerate(roles)
    ]
    text = chat_text(tokenizer, messages, ask=ask)
    pieces = re.split("\ue000(\\d+)\ue001", text)
    if pieces[1::2] != [str(i) for i in range(len(roles))]:
        raise BadSample(
            Reason.BAD_ROW,
            f"the chat template does not write each of {', '.join(roles)} once, in order",
        )
    return pieces[::2]


def _special(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    names = sorted(
        (t.content for t in tokenizer.added_tokens_decoder.values()), key=len, reverse=True
    )
    return re.compile("|".join(map(re.escape, names)) or r"\Z.")


Writer = Callable[["list[Turn]", "PreTrainedTokenizerBase", bool], "Iterator[Segment]"]
TEMPLATES: Mapping[str, Writer] = {
    "plain": _plain,
    "v1": _v1,
    "chat": _chat,
    "caption": _caption,
    "answer": _answer,
    "prompted": _prompted,
    "human": _human,
    "interleaved": _interleaved,
}


def read_as(source: Source, sample: Sample, choice: int, *, video: bool = False) -> list[Part]:
    """Return the parts of a sample as a source reads it.

    `choice` is any non-negative random integer.

    With `video`, the frames of a video are one image at the position of the first frame.
    """
    parts = conversation(sample, source.prompts, choice, prefix=source.prefix)
    if video and sample.times_s:
        parts = collapse_videos(parts)
    return arrange_document(parts, choice, images=source.images, following=source.following)


def collapse_videos(parts: Sequence[Part]) -> list[Part]:
    """Return the parts of a video with one place for all frames: the position of the first."""
    return [part for part in parts if not part.image]


def arrange_document(
    parts: Sequence[Part], choice: int, *, images: int | None, following: float
) -> list[Part]:
    """Return the document with at most `images` images.

    With probability `following`, images come before their texts.

    In that case a text belongs to the image after it. `choice`, any non-negative random integer, is
    the seed. Conversations are not changed.
    """
    if any(part.role != "caption" for part in parts):
        return list(parts)
    document = truncate_images(parts, images) if images is not None else list(parts)
    if random.Random(choice).random() < following:
        return images_before_text(document)
    return document


def truncate_images(parts: Sequence[Part], images: int) -> list[Part]:
    """Return the document up to, but without, image number `images` + 1."""
    places = [at for at, part in enumerate(parts) if part.image is not None]
    return list(parts[: places[images]] if len(places) > images else parts)


def images_before_text(parts: Sequence[Part]) -> list[Part]:
    """Move every image before the texts that precede it.

    Each text then attends to the image after it.
    """
    moved: list[Part] = []
    texts: list[Part] = []
    for part in parts:
        if part.image is None:
            texts.append(part)
        else:
            moved += [part, *texts]
            texts = []
    return [*moved, *texts]
