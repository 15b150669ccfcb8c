"""bridgework: vision-language systems from raw image-text pairs to a served endpoint, on Ray.

    import bridgework as bw

    system = bw.override(bw.load("llava").tiny(), {"stages.*.model.bridge": "linear"})
    result = bw.train(system, stages=["align"])
    print(bw.Pipeline.load(result["align"].artifact).ask("photo.jpg", "What is this?"))

Names load on first use: importing the package imports neither torch nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bridgework.api import (
        curate,
        evaluate,
        import_dataset,
        open_dataset,
        promote,
        serve,
        sweep,
        train,
    )
    from bridgework.config import override
    from bridgework.inference.pipeline import Pipeline
    from bridgework.mixture import Mixture, Source
    from bridgework.system import AdamW, Budget, Stage, System, load
    from bridgework.training.options import RunOptions

_PUBLIC = {  # name -> module
    "AdamW": "system",
    "Budget": "system",
    "Mixture": "mixture",
    "Pipeline": "inference.pipeline",
    "RunOptions": "training.options",
    "Source": "mixture",
    "Stage": "system",
    "System": "system",
    "curate": "api",
    "evaluate": "api",
    "import_dataset": "api",
    "load": "system",
    "open_dataset": "api",
    "override": "config",
    "promote": "api",
    "serve": "api",
    "sweep": "api",
    "train": "api",
}
__all__ = [
    "AdamW",
    "Budget",
    "Mixture",
    "Pipeline",
    "RunOptions",
    "Source",
    "Stage",
    "System",
    "curate",
    "evaluate",
    "import_dataset",
    "load",
    "open_dataset",
    "override",
    "promote",
    "serve",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        from bridgework.errors import suggest

        raise AttributeError(
            f"module 'bridgework' has no attribute {name!r}" + suggest(name, _PUBLIC)
        )
    value = getattr(import_module(f"bridgework.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
