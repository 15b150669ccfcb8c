"""A toy system of two stages, with every kind of field that a recipe may have; it needs no part of the platform."""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from bridgework.config import config_class
from bridgework.system import AdamW, Budget, Layout, Mixture, Pixels, Source, Stage, System, ZeRO


@config_class
class Linear:
    pass


@config_class
class MLP:
    depth: int = 2
    act: Literal["gelu", "relu"] = "gelu"


@config_class
class QFormerConfig:
    queries: int
    width: int = 768


@config_class
class Wiring:
    bridge: Linear | MLP | QFormerConfig = MLP()
    name_of_lm: str = "toy"
    layer: int | None = None
    grid: tuple[int, int] = (2, 2)
    tied: bool = False
    cut: int | Literal["auto"] = "auto"

    pixels: ClassVar[Pixels] = Pixels(size=32)
    tokenizer: ClassVar[str] = "bytes"
    context: ClassVar[int] = 128
    image_tokens: ClassVar[int] = 4
    instruction: ClassVar[str | None] = None
    pretrained: ClassVar[tuple[str, ...]] = ()
    vision_tokens: ClassVar[int] = 4
    packing_refusal: ClassVar[str | None] = None

    def num_image_tokens(self, layout: Layout) -> int:
        return self.image_tokens

    def build(self, *, pretrained: bool = True) -> Any:
        return self

    def tiny(self) -> "Wiring":
        return replace(self, name_of_lm="tiny")


@config_class
class Eye:
    """What a model tells the data, and no model."""

    pixels: Pixels = Pixels(size=8)
    tokenizer: str = "bytes"
    context: int = 512
    image_tokens: int = 2
    instruction: str | None = None
    pretrained: tuple[str, ...] = ()
    vision_tokens: int = 4
    packing_refusal: str | None = None

    def num_image_tokens(self, layout: Layout) -> int:
        return self.image_tokens

    def build(self, *, pretrained: bool = True) -> None: ...
    def tiny(self) -> "Eye":
        return self


@config_class
class Captioning:
    weight: float = 1.0
    label_smoothing: float = 0.0

    requires: ClassVar[str] = "logits"
    whole_batch: ClassVar[bool] = False
    supports_packing: ClassVar[bool] = True

    cached_outputs: ClassVar[tuple[str, ...]] = ()

    def __call__(self, outputs: Any) -> Any:
        return 0.0

    def count(self, labels_BT: Any) -> Any:
        return 1


@config_class
class Contrastive(Captioning):
    temperature: float = 0.07


@config_class
class Eval:
    name: str = "heldout"
    rows: int = 100

    def tiny(self) -> "Eval":
        return replace(self, rows=4)

    def run(self, pipeline: Any, home: Path) -> Any:
        return None


@config_class
class Curation:
    """Makes a dataset of what the first stage reads."""

    makes: str = "cc3m"
    stage: str | None = None
    sources: tuple[str, ...] = ("raw",)

    @property
    def uses(self) -> tuple[str, ...]:
        return () if self.stage is None else (self.stage,)

    def tiny(self) -> "Curation":
        return replace(self, sources=("synthetic:shapes",))

    def run(self, artifacts: Any, dest: str, **how: Any) -> None: ...


def system() -> System:
    align = Stage(
        name="align",
        model=Wiring(),
        trains={"bridge.*": 1.0},
        losses=(Captioning(), Contrastive(weight=0.5)),
        data=Mixture(
            sources=(
                Source(
                    name="cc",
                    dataset="cc3m",
                    prompts=("What is it?", "Describe it, briefly (please)"),
                ),
                Source(name="coco", dataset="s3://b/coco", max_epochs=3.0),
            ),
            lanes=8,
        ),
        budget=Budget(steps=10, batch=16),
        optim=AdamW(peak_lr=1e-3),
        evals=(Eval(),),
    )
    instruct = replace(
        align,
        name="instruct",
        starts_from="align",
        trains={"language.*": 1.0, "language.layers.0.*": 0.0},
        zero=ZeRO(stage=3, config={"zero_optimization.overlap_comm": True}),
    )
    return System(name="toy", paper="none", stages=(align, instruct))
