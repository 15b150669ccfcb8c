"""The table of docs/parity.md: `python -m tests.interop.parity`, a minute.

Small random models of every architecture, in several shapes: saved by transformers, imported,
exported, compared.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from bridgework.hf.convert import Certificate, export_hf, import_hf
from tests.interop import test_blip, test_blip2, test_clip, test_idefics, test_llava_next


def models() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield (shape, function that builds the transformers model)."""
    for module in (test_clip, test_idefics, test_llava_next):
        for shape in module.SHAPES:
            yield shape, lambda make=module.theirs, shape=shape: make(shape)
    for architecture in test_blip.blip.ARCHITECTURES:
        yield "small", lambda architecture=architecture: test_blip.both(architecture)[1]
    for shape in test_blip2.WRITERS:
        yield shape.partition("-")[2] or "small", lambda shape=shape: test_blip2.theirs(shape)
    yield "small", lambda: test_blip2.finder(test_blip2.VIT, test_blip2.QFORMER, 16)
    yield "wide", lambda: test_blip2.finder(test_blip2.WIDE, test_blip2.LONG, 24)


def compared(model: Any, folder: Path) -> tuple[Certificate, bool]:
    """Import and export a model; return the certificate, and True if all tensors are bit-equal."""
    model.save_pretrained(folder / "in")
    certificate = import_hf(folder / "in", folder / "artifact")
    export_hf(folder / "artifact", folder / "out", certificate.architecture)
    before, after = (load_file(folder / side / "model.safetensors") for side in ("in", "out"))
    return certificate, before.keys() == after.keys() and all(
        torch.equal(t, after[n]) for n, t in before.items()
    )


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    rows = []
    for shape, make in models():
        with tempfile.TemporaryDirectory() as folder:
            certificate, equal = compared(make(), Path(folder))
        outputs = ", ".join(
            f"{name} {value:.0e}" for name, value in certificate.differences.items()
        )
        texts = ", ".join(
            f"{name} {sum(map(len, t.ours))} {'equal' if t.equal else 'DIFFER'}"
            for name, t in certificate.texts.items()
        )
        same = f"{certificate.fields} fields, {len(certificate.ids) + len(certificate.generation)} ids and settings"
        bits = "equal" if equal else "DIFFER"
        name = certificate.architecture
        rows.append(
            (
                name,
                f"| {name} | {shape} | {outputs} | {texts or 'writes nothing'} | {same} | {bits} |",
            )
        )
    print(
        "| architecture | shape | largest difference, of the largest value | written ids | config, equal "
        "| bits, in and out again |"
    )
    print("|---|---|---|---|---|---|")
    print("\n".join(row for _, row in sorted(rows)))


if __name__ == "__main__":
    main()
