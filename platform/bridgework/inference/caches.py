"""Caches of an engine, keyed by digests of content and bounded in bytes.

    ImageCache    vision features of images
    PrefixCache   keys and values of the language model after a prompt's first tokens

A digest covers everything that decides the value: the bytes of an image and its preprocessing; of a
prefix all its tokens, its images in order, and the instruction if the bridge reads one.
"""

# H heads  T tokens  D width of a head

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from bridgework.inference.preprocess import EncodedImage, ImageFile
from bridgework.system import IMAGE, Pixels

BLOCK = 16  # tokens of text between two boundaries, at which prefixes are compared

# keys and values (H, T, D) of each layer; None for a layer that shares those of another
KeyValues = list[tuple[Tensor, Tensor] | None]


def image_digest(image: ImageFile, pixels: Pixels) -> bytes:
    """Return the digest of an image's bytes, or of a video's frames, and of its preprocessing."""
    frames = image if isinstance(image, tuple) else (image,)
    digest = hashlib.sha256(f"{isinstance(image, tuple)} {pixels!r}".encode())
    for frame in frames:
        digest.update(hashlib.sha256(frame).digest())
    return digest.digest()


class ImageCache:
    """Vision features of the images used last, at most `max_bytes`. Safe to use from threads."""

    def __init__(self, max_bytes: int) -> None:
        self.bytes = 0
        self._max_bytes = max_bytes
        self._images: OrderedDict[bytes, EncodedImage] = OrderedDict()
        self._lock = Lock()

    def get(self, digest: bytes) -> EncodedImage | None:
        """Return the image of a digest, or None."""
        with self._lock:
            image = self._images.get(digest)
            if image is not None:
                self._images.move_to_end(digest)
            return image

    def put(self, digest: bytes, image: EncodedImage) -> None:
        """Add an image, and evict those that were not used for longest."""
        size = _bytes(image.features)
        with self._lock:
            if digest in self._images or size > self._max_bytes:
                return
            # a slice of a batch would keep the complete batch in memory
            self._images[digest] = EncodedImage(image.features.clone(), image.layout)
            self.bytes += size
            while self.bytes > self._max_bytes:
                _, evicted = self._images.popitem(last=False)
                self.bytes -= _bytes(evicted.features)


class Boundary(NamedTuple):
    """End of a prefix that can be shared."""

    tokens: int  # before it
    digest: bytes  # of everything before it


def boundaries(
    ids: Sequence[int], images: Iterable[tuple[bytes, int]], instruction: Sequence[int]
) -> list[Boundary]:
    """Return the boundaries of a prompt: after every image, and every BLOCK tokens of text.

    Args:
        ids: of the prompt, with IMAGE places.
        images: digest and number of places of each image, in order.
        instruction: ids that the bridge reads with the images; [] if it reads none.
    """
    digest = hashlib.sha256(repr(list(instruction)).encode()).digest()
    shown, found, at = iter(images), [], 0
    while at < len(ids):
        if ids[at] == IMAGE:
            image, places = next(shown)
            content = b"image" + image + places.to_bytes(8, "big")
            end = at + places
        else:
            end = at
            while end < min(at + BLOCK, len(ids)) and ids[end] != IMAGE:
                end += 1
            content = b"text" + repr(list(ids[at:end])).encode()
            if end - at < BLOCK and end == len(ids):
                break  # the last block is not complete
        digest, at = hashlib.sha256(digest + content).digest(), end
        found.append(Boundary(at, digest))
    return found


@dataclass(eq=False)
class _Node:
    """Keys and values of the tokens between two boundaries of a prefix."""

    parent: "_Node | None"
    begin: int  # tokens before it
    values: KeyValues
    keys: list[Boundary]  # boundaries in it
    bytes: int


class PrefixCache:
    """Keys and values of the prefixes used last, at most `max_bytes`; for one thread.

    Prefixes share what they have in common: a node holds the part that it adds to its parent.
    """

    def __init__(self, max_bytes: int) -> None:
        self.bytes = 0
        self._max_bytes = max_bytes
        self._nodes: OrderedDict[_Node, None] = OrderedDict()  # parents are newer than children
        self._by_digest: dict[bytes, _Node] = {}

    def match(self, prompt: Sequence[Boundary]) -> tuple[int, KeyValues]:
        """Return the longest known prefix: its number of tokens, and its keys and values."""
        for tokens, digest in reversed(prompt):
            if (node := self._by_digest.get(digest)) is not None:
                self._touch(node)
                return tokens, _prefix(node, tokens)
        return 0, []

    def put(self, prompt: Sequence[Boundary], values: KeyValues) -> None:
        """Add a prompt's keys and values, up to its last boundary."""
        known = [b for b in prompt if b.digest in self._by_digest]
        parent = self._by_digest[known[-1].digest] if known else None
        begin = known[-1].tokens if known else 0
        new = [boundary for boundary in prompt if boundary.tokens > begin]
        if not new:
            return
        end = new[-1].tokens
        part = [None if kv is None else (kv[0][:, begin:end], kv[1][:, begin:end]) for kv in values]
        size = sum(_bytes(k) + _bytes(v) for k, v in filter(None, part))
        if size > self._max_bytes:
            return
        part = [None if kv is None else (kv[0].clone(), kv[1].clone()) for kv in part]
        node = _Node(parent, begin, part, new, size)
        self._by_digest |= dict.fromkeys((boundary.digest for boundary in new), node)
        self._nodes[node] = None
        self.bytes += size
        self._touch(node)
        while self.bytes > self._max_bytes:
            self._evict()

    def _touch(self, node: _Node | None) -> None:
        while node is not None:
            self._nodes.move_to_end(node)
            node = node.parent

    def _evict(self) -> None:
        node, _ = self._nodes.popitem(last=False)
        for boundary in node.keys:
            del self._by_digest[boundary.digest]
        self.bytes -= node.bytes


def _prefix(node: _Node, tokens: int) -> KeyValues:
    """Return keys and values of the first `tokens` of the prefix that ends in `node`."""
    parts: list[KeyValues] = []
    end: int = tokens
    here: _Node | None = node
    while here is not None:
        length = end - here.begin
        parts.append([None if kv is None else (kv[0][:, :length], kv[1][:, :length])
                      for kv in here.values])  # fmt: skip
        end, here = here.begin, here.parent
    parts.reverse()
    return [
        None
        if layer[0] is None
        else (
            torch.cat([kv[0] for kv in layer if kv is not None], dim=1),
            torch.cat([kv[1] for kv in layer if kv is not None], dim=1),
        )
        for layer in zip(*parts, strict=True)
    ]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
