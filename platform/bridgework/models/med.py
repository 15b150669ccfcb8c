"""MED, BLIP's mixture of encoder and decoder: one set of weights, three modes (Li et al. 2022, arXiv:2201.12086, 3.1).

The text is read alone, read together with an image ([ENC] first), or written about an image ([DEC] first). Where the
model answers questions, what has no label is the question, which the encoder reads with the image; the decoder then
attends to the encoder alone (4.3).
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from bridgework.errors import SpecError
from bridgework.models.blip_vit import BlipViTConfig
from bridgework.models.med_text import MEDTextConfig
from bridgework.models.momentum import MomentumConfig
from bridgework.models.origin import Origin
from bridgework.models.pairs import OfPairs
from bridgework.spec import added, spec

if TYPE_CHECKING:
    from bridgework.models.med_model import MEDModel

Task = Literal["contrast", "match", "caption", "answer"]


@spec
class MED(OfPairs):
    """A vision tower and the text side, with the parts that its tasks need.

    A captioner beside an encoder shares its weights (3.2); alone, and where it answers, it has them to itself, as in
    the release's fine-tunes.
    """

    vision: BlipViTConfig
    text: MEDTextConfig
    tasks: tuple[Task, ...] = ("contrast", "match", "caption")
    embed: int = 256
    momentum: MomentumConfig | None = None  # the twin that momentum contrast needs
    origin: Origin | None = added(default=None)  # of an import: fields that an export writes again

    def __post_init__(self) -> None:
        if not self.tasks or {"caption", "answer"} <= set(self.tasks):
            raise SpecError(f"tasks are one or more, and either caption or answer, got {self.tasks}")
        if "contrast" not in self.tasks and ("match" in self.tasks or self.momentum is not None):
            raise SpecError("hard negatives and a momentum twin need the vectors of 'contrast': add it to tasks")
        if "answer" in self.tasks and self.vision.width != self.text.width:
            raise SpecError(
                f"an answer is written from what the encoder read: vision.width {self.vision.width} must be "
                f"text.width {self.text.width}"
            )

    def unshardable(self, wants: frozenset[str]) -> str:
        return "a MED's encoder, decoder and momentum twin share weights, which every worker needs complete"

    @property
    def tokenizer(self) -> str:
        return self.text.tokenizer

    @property
    def context(self) -> int:
        return self.text.context

    @property
    def pretrained(self) -> tuple[str, ...]:
        """The twin too need not be kept: it begins as a copy of what it follows."""
        vision = () if self.vision.weights is None else ("vision.*",)
        return vision if self.momentum is None else (*vision, "momentum.*")

    def build(self, *, pretrained: bool = True) -> "MEDModel":
        """The model in float32; without weights (or with `pretrained=False`) drawn from torch's generator."""
        from bridgework.models.med_model import MEDModel  # brings transformers, which takes seconds

        texts = self.text.build(
            self.vision.feature_width,
            reads=set(self.tasks) != {"caption"},
            writes=bool({"caption", "answer"} & set(self.tasks)),
            shares="caption" in self.tasks,
            pretrained=pretrained,
        )
        return MEDModel(self, self.vision.build(pretrained=pretrained), texts)

    def tiny(self) -> "MED":
        """The tasks stay; a queue of 64 entries, if there is one."""
        momentum = self.momentum
        if momentum is not None:
            momentum = replace(momentum, queue=min(momentum.queue, 64), ramp=min(momentum.ramp, 4))
        return replace(
            self,
            vision=self.vision.tiny(),
            text=self.text.tiny(),
            embed=min(self.embed, 32),
            momentum=momentum,
            origin=None,
        )
