"""The prefix wiring: bridge tokens stand in the token stream of a language model (LLaVA, BLIP-2's second stage).

A row of ids holds IMAGE wherever one image token goes, so the data lays out the places and the model fills them in
order (Liu et al. 2023, arXiv:2304.08485, 4.1). A language model of two halves reads the row up to the first label and
writes the rest. With `grids`, an image is its base square and the tiles of one grid (LLaVA-NeXT, xGen-MM).
"""

from dataclasses import replace
from math import isqrt

from bridgework.errors import SpecError
from bridgework.models import preference, tiling
from bridgework.models.bridges import MLP, Concat, Linear, QFormer, Resampler
from bridgework.models.eva import EvaConfig
from bridgework.models.language import LanguageConfig
from bridgework.models.origin import Origin
from bridgework.models.prefix_model import Outputs, PrefixModel
from bridgework.models.vision import EfficientNetConfig, ViTConfig
from bridgework.spec import added, spec
from bridgework.system import Layout, Pixels

__all__ = ["Outputs", "PrefixModel", "PrefixVLM"]


@spec
class PrefixVLM:
    """A vision tower, a bridge and a language model, causal or of two halves."""

    vision: ViTConfig | EvaConfig | EfficientNetConfig
    bridge: Linear | MLP | Concat | QFormer | Resampler
    language: LanguageConfig
    grids: tuple[tuple[int, int], ...] = ()  # (columns, rows) of tiles beside the base square, to choose from
    tiles: tiling.Tiles = "resample"  # how tiles become tokens, see bridgework.models.tiling
    reference: preference.Reference = "adapters_off"  # of preference learning; "frozen_copy" holds what trains twice
    origin: Origin | None = added(default=None)  # of an import: fields that an export writes again

    def __post_init__(self) -> None:
        most = max(self.places(Layout(*grid, *grid)) for grid in [*self.grids, (0, 0)])
        if most >= self.context:
            raise SpecError(
                f"an image takes {most} tokens and language.context is {self.context}: "
                "take a longer context, smaller images, fewer tiles or a bridge with fewer tokens"
            )
        read = self.image_tokens if self.tiles == "unpad" else self.vision.tokens
        if self.grids and isqrt(self.vision.tokens) ** 2 != read:
            raise SpecError(
                f"tiles lie in a grid of patches; the tower gives {self.vision.tokens} vectors a square and the "
                f'bridge {self.image_tokens}: take vision.select="patch", and with tiles="unpad" a bridge '
                "that keeps each patch"
            )

    @property
    def pixels(self) -> Pixels:
        return replace(self.vision.pixels, grids=self.grids)

    def unshardable(self, wants: frozenset[str]) -> str | None:
        if self.reference == "frozen_copy" and "preference" in wants:
            return 'model.reference="frozen_copy" holds what trains complete on every worker'
        return None

    @property
    def tokenizer(self) -> str:
        return self.language.tokenizer

    @property
    def context(self) -> int:
        return self.language.context

    @property
    def image_tokens(self) -> int:
        return self.bridge.tokens(self.vision.tokens)

    def places(self, layout: Layout) -> int:
        return tiling.places(layout, self.image_tokens, self.tiles)

    @property
    def instruction(self) -> str | None:
        return self.bridge.instruction if isinstance(self.bridge, QFormer) else None

    @property
    def square_tokens(self) -> int:
        return self.vision.tokens

    @property
    def unpackable(self) -> str | None:
        return self.language.unpackable

    @property
    def pretrained(self) -> tuple[str, ...]:
        towers = {"vision.*": self.vision.weights, "language.*": self.language.weights}
        bridge = self.bridge.pretrained if isinstance(self.bridge, QFormer | Concat) else ()
        return tuple(glob for glob, weights in towers.items() if weights is not None) + tuple(
            f"bridge.{glob}" for glob in bridge
        )

    def build(self, *, pretrained: bool = True) -> "PrefixModel":
        """The model in float32; without weights (or with `pretrained=False`) drawn from torch's generator."""
        vision, widths = self.vision.build(pretrained=pretrained), (self.vision.feature_width, self.language.width)
        own_weights = {"pretrained": pretrained} if isinstance(self.bridge, QFormer | Concat) else {}
        return PrefixModel(
            vision,
            self.bridge.build(*widths, **own_weights),
            self.language.build(pretrained=pretrained),
            tiling.Unpad(self.language.width) if self.tiles == "unpad" else None,
            preference.FrozenCopy() if self.reference == "frozen_copy" else None,
        )

    def tiny(self) -> "PrefixVLM":
        return replace(
            self, vision=self.vision.tiny(), bridge=self.bridge.tiny(), language=self.language.tiny(), origin=None
        )
