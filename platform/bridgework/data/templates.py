"""From the parts of a sample to the segments of one token stream: what is scaffold, what is content, what has loss.

plain         images, then the caption and a newline                  LLaVA stage 1 (Liu et al. 2023, arXiv:2304.08485)
v1            "SYSTEM USER: question ASSISTANT: answer</s>USER: ..."  LLaVA stage 2, Vicuna's format
chat          the tokenizer's own chat template
caption       one of the captions and the token that ends a text      CLIP, BLIP, BLIP-2's first stage
answer        images, "question answer</s>", no scaffold              BLIP-2's second stage, InstructBLIP
prompted      the same, with nothing between question and answer      BLIP's captioner: "a picture of" a caption
human         "###Human: <Img>..</Img> question ###Assistant: a###"   MiniGPT-4 (Zhu et al. 2023, arXiv:2304.10592)
interleaved   images and texts in order, END behind every chunk       Flamingo (Alayrac et al. 2022, arXiv:2204.14198)

A template is cut into segments *before* anything is tokenized, so what a person or a dataset wrote can never turn into
scaffold, and the loss mask never depends on how a tokenizer merges across a border.

A sample as a source wants it read: asked with its prompts; a document with so many images, before or behind texts.

The latter from Alayrac et al. 2022 (arXiv:2204.14198), 2.4 and A.3.2.
"""

import ctypes
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from itertools import groupby
from threading import Thread
from typing import Any

from transformers import PreTrainedTokenizerBase

from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Part, Sample
from bridgework.errors import SpecError, suggest
from bridgework.system import END, Source

V1_SYSTEM = (  # published with LLaVA v1 and v1.5: their weights expect it word for word
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CHAT_S = (
    5.0  # that a chat template may take to write one conversation; a sound one takes milliseconds
)
Turn = tuple[str, list[Part]]  # system | user | assistant, and what it says


@dataclass(frozen=True)
class Segment:
    """A stretch of the stream that is tokenized on its own: text, or the place of one image."""

    text: str = ""
    image: int | None = None  # index into the sample's images
    train: bool = False  # has loss
    literal: bool = True  # content: what looks like a special token in it stays plain text
    token: int | None = None  # a token that no tokenizer knows: END
    closing: bool = False  # stays when the text before it is cut


def conversation(
    sample: Sample, prompts: Sequence[str], choice: int, *, prefix: bool = False
) -> list[Part]:
    """The sample's parts; a pair with `prompts` becomes one question and its caption as the answer.

    `choice`, any non-negative draw, picks the prompt and whether the image stands before or after it (LLaVA eq. 2).
    With `prefix` the caption's first words, up to a drawn one, are the question and the rest is the answer (BLIP-2's
    prefix language modeling, arXiv:2301.12597, 3.3). Around the only question of a conversation goes a prompt with {}
    in it (InstructBLIP, arXiv:2305.06500, 2.1). What else is a conversation, or has more than one text, stays as it is.
    A prompt with {ocr} names the text in the image, one with {options} or {OPTIONS} the candidates of a multiple-choice
    question: "(a) red (b) blue", or "(A) red (B) blue".
    """
    images = [p for p in sample.parts if p.image is not None]
    texts = [p for p in sample.parts if p.text is not None]
    if prompts and [p.role for p in texts] == ["user", "assistant"]:
        framed = replace(
            texts[0], text=_framed(prompts[choice % len(prompts)], sample, texts[0].text or "")
        )
        return [framed if p is texts[0] else p for p in sample.parts]
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
    prompt, last = _framed(prompts[choice % len(prompts)], sample), choice // len(prompts) % 2
    shown = [Part("user", image=p.image) for p in images]
    asked = (
        [*shown, Part("user", text="\n" + prompt)]
        if not last
        else [Part("user", text=prompt + "\n"), *shown]
    )
    return [*asked, Part("assistant", text=texts[0].text)]


def _framed(prompt: str, sample: Sample, question: str | None = None) -> str:
    """The prompt with what its places mean; a question that the prompt has no place for stays as it is."""
    if question is not None and "{}" not in prompt:
        return question
    named = [(letter(place), text) for place, text in enumerate(sample.candidates)]
    pieces = {
        "{}": (question or "").strip(),
        "{ocr}": sample.ocr or "",
        "{options}": " ".join(f"({name}) {text}" for name, text in named),
        "{OPTIONS}": " ".join(f"({name.upper()}) {text}" for name, text in named),
    }
    return re.sub(r"\{(?:ocr|options|OPTIONS)?\}", lambda found: pieces[found[0]], prompt)


def letter(place: int) -> str:
    """The name of a candidate: a, b, .. z, aa, ab, .."""
    tens, ones = divmod(place, 26)
    return (letter(tens - 1) if tens else "") + "abcdefghijklmnopqrstuvwxyz"[ones]


def render(
    parts: Sequence[Part], template: str, tokenizer: PreTrainedTokenizerBase, choice: int = 0
) -> list[Segment]:
    """The segments to train on: loss on every answer and on the stop string that ends it.

    Neighboring parts of one role are one turn. Under `plain` and `caption` only images, captions and answers are read
    (as LLaVA's stage 1 does; of several, `caption` takes the one that `choice` draws); under the others a caption is
    the answer to its image. Raises BadSample for a sample without an
    answer, with a blank one, or with turns that the template refuses; SpecError for an unknown template.
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
    """The segments that end where the assistant is to speak: a prefix of what `render` gives, up to the last answer.

    A last answer, if there is one, is left out. Raises as `render` does, but needs no answer.
    """
    return list(_segments(unanswered(parts), template, tokenizer, ask=True))


def unanswered(parts: Sequence[Part]) -> list[Part]:
    """Return the conversation without its last answer, if it ends with one."""
    kept = list(parts)
    while kept and kept[-1].text is not None and kept[-1].role in ("caption", "assistant"):
        kept.pop()
    return kept


def stop(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that ends an answer, e.g. `<|im_end|>`; empty where a chat template has none."""
    exchange = [Part("user", text="q"), Part("assistant", text="a")]
    return "".join(
        s.text for s in render(exchange, template, tokenizer) if s.train and not s.literal
    )


def _segments(
    parts: Sequence[Part], template: str, tokenizer: PreTrainedTokenizerBase, *, ask: bool
) -> Iterator[Segment]:
    write = TEMPLATES.get(template)
    if write is None:
        raise SpecError(f"there is no template {template!r}" + suggest(template, TEMPLATES))
    segments = write(_turns(parts), tokenizer, ask)
    return (s for s in segments if s.text or s.image is not None or s.token is not None)


def _turns(parts: Sequence[Part]) -> list[Turn]:
    def role(part: Part) -> str:
        return (
            part.role
            if part.role != "caption"
            else "user"
            if part.image is not None
            else "assistant"
        )

    return [(name, list(said)) for name, said in groupby(parts, key=role)]


def _said(turn: Turn) -> Iterator[Segment]:
    role, parts = turn
    for part in parts:
        if part.image is not None:
            yield Segment(image=part.image)
        else:
            yield Segment(part.text or "", train=role == "assistant")


def _images_first(turn: Turn) -> Iterator[Segment]:
    """What a turn shows, then what it says, without the line breaks that set a prompt off from its image."""
    said = list(_said(turn))
    yield from (s for s in said if s.image is not None)
    yield from (
        replace(s, text=s.text if s.train else s.text.strip("\n")) for s in said if s.image is None
    )


def _plain(turns: list[Turn], tokenizer: PreTrainedTokenizerBase, ask: bool) -> Iterator[Segment]:
    for turn in turns:
        for said in _said(turn):
            if said.image is not None or said.train:
                yield said
            if not said.train:
                continue
            # The paper puts the loss on the caption; LLaVA's code on its newline too, and without that no model
            # learns where a caption ends. Apart from the caption it is one token, whatever the caption ends in.
            yield Segment("\n", train=True, literal=False)


def _caption(turns: list[Turn], tokenizer: PreTrainedTokenizerBase, ask: bool) -> Iterator[Segment]:
    for turn in turns:
        yield from (said for said in _said(turn) if said.image is not None or said.train)
    if not ask:
        yield Segment(_ending(tokenizer, "caption"), train=True, literal=False, closing=True)


def _answer(turns: list[Turn], tokenizer: PreTrainedTokenizerBase, ask: bool) -> Iterator[Segment]:
    ending = _ending(tokenizer, "answer")
    asked = False
    for turn in turns:
        for said in _images_first(turn):
            yield replace(said, text=" " + said.text) if said.text and asked else said
            asked = asked or bool(said.text)
        if turn[0] == "assistant":
            yield Segment(ending, train=True, literal=False, closing=True)
        elif asked and tokenizer.bos_token is None and tokenizer.sep_token is not None:
            yield Segment(
                ending, literal=False
            )  # BERT's own way to put two texts beside each other


def _prompted(
    turns: list[Turn], tokenizer: PreTrainedTokenizerBase, ask: bool
) -> Iterator[Segment]:
    return (said for said in _answer(turns, tokenizer, ask) if said.literal or said.train)


def _human(turns: list[Turn], tokenizer: PreTrainedTokenizerBase, ask: bool) -> Iterator[Segment]:
    lead = "###Human:"  # "###" ends an answer, so later turns begin behind it
    for role, parts in turns:
        if role == "system":
            yield from _said((role, parts))
            continue
        yield Segment(" ###Assistant:" if role == "assistant" else lead, literal=False)
        for said in _images_first((role, parts)):
            if said.image is not None:
                yield from (
                    Segment(" <Img>", literal=False),
                    said,
                    Segment("</Img>", literal=False),
                )
            else:
                yield replace(said, text=" " + said.text.strip())
        if role == "assistant":
            yield Segment("###", train=True, literal=False, closing=True)
        lead = "Human:"
    if ask:
        yield Segment(" ###Assistant:", literal=False)


def _interleaved(
    turns: list[Turn], tokenizer: PreTrainedTokenizerBase, ask: bool
) -> Iterator[Segment]:
    before: str | None = (
        None  # who spoke last: an answer ends too where text alone goes on (a shot without its image)
    )
    for turn in turns:
        for said in _said(turn):
            if before is not None and (
                said.image is not None or (before, turn[0]) == ("assistant", "user")
            ):
                yield Segment(token=END, train=True)
            before = turn[0]
            yield said
    if not ask:
        yield Segment(token=END, train=True, closing=True)


def _ending(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """The token that ends a text: eos, or BERT's SEP."""
    ending = tokenizer.eos_token or tokenizer.sep_token
    if ending is None:
        raise SpecError(
            f"template {template!r} ends texts with the tokenizer's eos or sep token, and it has neither"
        )
    return str(ending)


def _v1(turns: list[Turn], tokenizer: PreTrainedTokenizerBase, ask: bool) -> Iterator[Segment]:
    eos = tokenizer.eos_token
    if eos is None:
        raise SpecError(
            "template 'v1' ends answers with the tokenizer's eos token, and this tokenizer has none"
        )
    own = bool(turns) and turns[0][0] == "system"
    yield from _said(turns[0]) if own else [Segment(V1_SYSTEM, literal=False)]
    gap = " "  # between the system sentence and the first turn; later turns follow the eos token directly
    for turn in turns[own:]:
        role, (first, *rest) = turn[0], list(_said(turn))
        if role == "system":
            raise BadSample(
                Reason.BAD_ROW, "template 'v1' takes a system part only before the first turn"
            )
        lead = " ASSISTANT:" if role == "assistant" else f"{gap}USER:"
        if (
            first.image is None
        ):  # the space belongs to the word after it: so all byte-pair tokenizers were trained
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
        yield from _said(turn)
        # An answer ends with the first special token after it (in ChatML eos); the newline behind that is scaffold.
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
    """The messages as the tokenizer's own chat template writes them.

    A template is a program that comes with the weights. Raises SpecError for one that runs for more
    than `limit_s` seconds, which is stopped, and BadSample where it fails or refuses the messages.
    """
    given: Any = [dict(message) for message in messages]
    how: Any = {"tokenize": False, "add_generation_prompt": ask}
    done: Future[Any] = Future()

    def write() -> None:
        try:
            done.set_result(tokenizer.apply_chat_template(given, **how))
        except BaseException as error:  # _Stopped too: the waiting thread raises it
            done.set_exception(error)

    writer = Thread(target=write, daemon=True)
    writer.start()
    if wait([done], limit_s).not_done:
        _stop(writer)
        raise SpecError(
            f"the tokenizer's chat template runs for more than {limit_s:g} s. Fix: take another tokenizer, "
            "or a template of bridgework's own, such as template='v1'"
        )
    try:
        return str(done.result())
    except Exception as error:  # a template may raise anything
        roles = ", ".join(str(message["role"]) for message in given)
        raise BadSample(
            Reason.BAD_ROW, f"the chat template refuses the turns {roles}: {error}"
        ) from None


class _Stopped(BaseException):
    """Raised inside a chat template that runs for too long."""


def _stop(thread: Thread) -> None:
    """Raise _Stopped in a thread, between two steps of its program."""
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident), ctypes.py_object(_Stopped)
        )
    thread.join(1)


def _scaffold(roles: list[str], tokenizer: PreTrainedTokenizerBase, ask: bool) -> list[str]:
    """What the chat template writes before, between and after the contents: one string more than there are turns."""
    if tokenizer.chat_template is None:
        raise SpecError(
            "template 'chat' needs a tokenizer with a chat template, and this one has none; use 'v1'"
        )
    # Characters of the private use area stand for the contents: no template writes, strips or splits them.
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


Writer = Callable[[list[Turn], PreTrainedTokenizerBase, bool], Iterator[Segment]]
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
    """The parts of a sample as the stage reads it, of which `choice`, any non-negative draw, decides what is drawn.

    With `video` the frames of a video are one picture, which stands where the first of them stood.
    """
    parts = conversation(sample, source.prompts, choice, prefix=source.prefix)
    if video and sample.times_s:
        parts = collapse_videos(parts)
    return arrange_document(parts, choice, images=source.images, following=source.following)


def collapse_videos(parts: Sequence[Part]) -> list[Part]:
    """The parts of a video with one place for all its frames: where the first of them stood."""
    return [part for part in parts if not part.image]


def arrange_document(
    parts: Sequence[Part], choice: int, *, images: int | None, following: float
) -> list[Part]:
    """The document with at most `images` images; with a chance of `following`, texts belong to the image behind them.

    `choice`, any non-negative draw, decides. What is not a document (a conversation) stays as it is.
    """
    if any(part.role != "caption" for part in parts):
        return list(parts)
    kept = truncate_images(parts, images) if images is not None else list(parts)
    return images_before_text(kept) if random.Random(choice).random() < following else kept


def truncate_images(parts: Sequence[Part], images: int) -> list[Part]:
    """The document up to its image number `images` + 1."""
    places = [at for at, part in enumerate(parts) if part.image is not None]
    return list(parts[: places[images]] if len(places) > images else parts)


def images_before_text(parts: Sequence[Part]) -> list[Part]:
    """Every image goes before the texts that lead to it: each of them then sees the image that came behind it."""
    made: list[Part] = []
    texts: list[Part] = []
    for part in parts:
        if part.image is None:
            texts.append(part)
        else:
            made += [part, *texts]
            texts = []
    return [*made, *texts]
