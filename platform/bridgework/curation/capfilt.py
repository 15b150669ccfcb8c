"""CapFilt (BLIP, arXiv:2201.12086, 3.3): a captioner writes a text for every web image, a filter drops what is wrong.

Every image gets one caption by nucleus sampling (4.3: more diverse than a beam's, and better to learn from); its web
text and the written one stay if the filter's matching head finds that they fit the image. Each text that stays is a
pair of its own, as in the authors' release: a mixture by size then counts pairs, as it does for human captions.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bridgework.errors import SpecError
from bridgework.spec import spec

if TYPE_CHECKING:
    from bridgework.data.manifest import Manifest

KEEPS_ALL = -1e4  # below every logit


@spec
class CapFilt:
    """Which stages write and judge, what they read, and how texts are drawn; a system.CurationSpec."""

    captioner: str  # an earlier stage; it is asked as it was trained
    filter: str  # an earlier stage with a matching head
    sources: tuple[str, ...]  # datasets of images and what the web says of them, not of human captions
    makes: str = "capfilt"
    top_p: float = 0.9  # 4.3
    temperature: float = 1.0
    min_tokens: int = 5  # the authors' release, models/blip.py: 5 to 20 tokens
    max_tokens: int = 20
    threshold: float = 0.0  # of the filter's logit: 0 is where match and mismatch are equally likely
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources:
            raise SpecError("capfilt needs at least one source to caption and to filter")
        if not 0 < self.top_p <= 1 or self.temperature < 0:
            raise SpecError(
                f"capfilt: top_p lies in (0, 1] and temperature is at least 0; got {self.top_p:g} and "
                f"{self.temperature:g}"
            )
        if not 0 <= self.min_tokens <= self.max_tokens or self.max_tokens < 1:
            raise SpecError(
                f"capfilt: a caption has min_tokens {self.min_tokens} to max_tokens {self.max_tokens}; "
                "give 0 <= min_tokens <= max_tokens"
            )

    @property
    def uses(self) -> tuple[str, ...]:
        return (self.captioner, self.filter)

    def tiny(self) -> "CapFilt":
        """Everything is kept: a filter of a few steps judges by chance, and may leave nothing to learn from."""
        return CapFilt(
            captioner=self.captioner, filter=self.filter, sources=("synthetic:shapes",), makes=self.makes,
            top_p=self.top_p, temperature=self.temperature, min_tokens=2, max_tokens=8, threshold=KEEPS_ALL,
            seed=self.seed,
        )  # fmt: skip

    def run(
        self,
        artefacts: Mapping[str, Path],
        dest: str,
        *,
        home: Path,
        workers: int = 0,
        say: Callable[[str], object] = print,
    ) -> "Manifest":
        """The manifest of the dataset at `dest`, made now unless it is there; a run that was cut off goes on.

        `artefacts` are those of the stages that it `uses`. `workers` actors of Ray hold the models; 0 works in this
        process. Raises DataError for another dataset at `dest`, and where nothing is kept; SpecError for a stage that
        cannot write or judge.
        """
        from bridgework.curation.making import make  # brings torch, which a recipe does without

        return make(self, artefacts, dest, home=home, workers=workers, say=say)
