"""What the wirings of pairs have in common: each text has one image beside it, and no place for it inside."""

from typing import Any

from bridgework.system import Layout, Pixels


class OfPairs:
    """The half of a ModelSpec that is the same for all of them; the spec adds what its text is."""

    vision: Any  # the config of the tower

    @property
    def pixels(self) -> Pixels:
        pixels: Pixels = self.vision.pixels
        return pixels

    @property
    def square_tokens(self) -> int:
        return int(self.vision.tokens)

    @property
    def image_tokens(self) -> int:
        return 0

    def places(self, layout: Layout) -> int:
        return 0

    @property
    def instruction(self) -> None:
        return None

    def unshardable(self, wants: frozenset[str]) -> str | None:
        return None

    @property
    def unpackable(self) -> str:
        return "the wiring reads pairs, each text beside its own image"
