"""Weights artifacts: the output of a stage, read by later stages, tracker, export and serving.

A folder of three files, none of which is unpickled:
- `weights.safetensors`: all tensors that cannot be reloaded from the pretrained checkpoint, which
  are tensors trained in this or an earlier stage, and tensors without pretrained weights;
- `recipe.json`: the resolved system;
- `artifact.json`: written last, so a folder without it is not an artifact.
"""

import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bridgework import __version__, old_names, storage
from bridgework.config import from_dict, to_dict
from bridgework.errors import WeightsError, suggest
from bridgework.mixture import DatasetInput
from bridgework.models.vision import remap_state_dict
from bridgework.storage import node_cache
from bridgework.system import Stage, System

FILE = "artifact.json"
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Info:
    """Contents of artifact.json."""

    system: str
    stage: str
    fingerprint: str  # of the complete recipe
    digest: str  # sha256 of weights.safetensors
    parent: str | None  # digest of the artifact that the stage started from
    datasets: tuple[DatasetInput, ...]
    steps: int
    tensors: int
    parameters: int
    created: float  # seconds since the epoch
    version: str  # of bridgework


@dataclass(frozen=True)
class Loaded:
    """An opened artifact: the stage that wrote it, the module in eval mode, and its metadata."""

    stage: Stage
    system: System
    model: nn.Module
    info: Info


@dataclass(frozen=True)
class StageResult:
    """A trained stage: its weights, its evaluations, its run and logged model in the tracker."""

    artifact: Path
    metrics: dict[str, float]
    run_id: str | None = None
    model_id: str | None = None
    version: str | None = None  # "llava:3" if it was registered


def tensors_to_save(
    stage: Stage, names: Iterable[str], trained: Iterable[str], inherited: Iterable[str]
) -> list[str]:
    """Return those of a model's tensor `names` that an artifact must hold."""
    always = {*trained, *inherited}
    return [
        n
        for n in names
        if n in always or not any(fnmatchcase(n, glob) for glob in stage.model.pretrained)
    ]


def save(
    folder: Path,
    state: Mapping[str, Tensor],
    *,
    system: System,
    stage: str,
    parent: str | None = None,
    datasets: Sequence[DatasetInput] = (),
    steps: int = 0,
) -> Info:
    """Write an artifact; `folder` appears complete or not at all, and replaces an older one.

    Raises WeightsError for a NaN or an infinity in a tensor, before anything is written.
    """
    check_finite(state, f"{folder}: the weights to save")
    with _written(folder) as temporary:
        tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        info = Info(
            system=system.name,
            stage=stage,
            fingerprint=system.fingerprint(),
            digest=storage.sha256(temporary / WEIGHTS),
            parent=parent,
            datasets=tuple(datasets),
            steps=steps,
            tensors=len(tensors),
            parameters=sum(t.numel() for t in tensors.values()),
            created=time.time(),
            version=__version__,
        )
        (temporary / "recipe.json").write_text(json.dumps(to_dict(system), indent=1))
        # safetensors creates its files with mode 600
        shutil.copymode(temporary / "recipe.json", temporary / WEIGHTS)
        (temporary / FILE).write_text(json.dumps(asdict(info), indent=1))
    return info


@contextmanager
def _written(folder: Path) -> Iterator[Path]:
    """Yield a local folder for the files of an artifact, which then become `folder`."""
    if not storage.is_local(folder):
        with node_cache.scratch() as temporary:
            yield temporary
            storage.remove(folder, first=FILE)
            for name in (WEIGHTS, "recipe.json", FILE):  # the last one makes it an artifact
                storage.upload(temporary / name, folder / name)
        return
    temporary = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move(folder: Path, target: Path) -> None:
    """Move an artifact; `target` appears complete or not at all, and replaces an older one."""
    if storage.is_local(folder):
        storage.publish(folder, target)
        return
    storage.remove(target, first=FILE)
    for name in (WEIGHTS, "recipe.json", FILE):  # the last one makes it an artifact
        storage.copy(folder / name, target / name)
    storage.remove(folder, first=FILE)


def info_file(folder: Path) -> Path:
    """Return the path of artifact.json, under its old name if the folder has that."""
    old = folder / old_names.ARTIFACT_FILE
    return old if old.is_file() else folder / FILE


def describe(path: str | Path) -> Info:
    """Read the metadata of the artifact under `path`. Raises WeightsError if there is none."""
    folder = storage.locate(path)
    return _info(_json(folder, info_file(folder).name))


def recipe(path: str | Path) -> System:
    """Read the resolved system with which the artifact was trained."""
    try:
        system = from_dict(_json(storage.locate(path), "recipe.json"))
    except RecursionError:
        raise WeightsError(f"{path}/recipe.json is nested too deeply to be a recipe") from None
    if not isinstance(system, System):
        raise WeightsError(
            f"{path}/recipe.json does not hold a system. Got {type(system).__name__}; "
            "expected System. Fix: train the stage again"
        )
    return system


def weights(path: str | Path, globs: Sequence[str] = ("*",)) -> dict[str, Tensor]:
    """Load the artifact's tensors whose names match a glob, on the CPU.

    Raises WeightsError if the file has changed since it was written, a glob matches no tensor, or a
    tensor holds a NaN or an infinity.
    """
    info, file = describe(path), storage.locate(path) / WEIGHTS
    changed = WeightsError(
        f"{file} is missing or has changed since it was written (sha256 differs). "
        "Fix: train the stage again"
    )
    if not file.is_file():
        raise changed
    with storage.local_copy(file) as local:
        if storage.sha256(local) != info.digest:
            raise changed
        try:
            stored: dict[str, Tensor] = load_file(local)
        except SafetensorError as error:
            raise WeightsError(
                f"{file} cannot be read: {error}. Fix: train the stage again"
            ) from None
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in stored):
            raise WeightsError(
                f"{file} has no tensor {glob!r}"
                + suggest(glob, {n.split(".")[0] + ".*" for n in stored})
            )
    matching = {
        name: tensor
        for name, tensor in stored.items()
        if any(fnmatchcase(name, glob) for glob in globs)
    }
    check_finite(matching, str(file))
    return matching


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raise WeightsError, with their names, if tensors hold a NaN or an infinity."""
    wrong = [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and not _is_finite(tensor)
    ]
    if wrong:
        names = _summarize("", wrong)[0].strip()
        raise WeightsError(
            f"{where}: not all numbers are finite. Got NaN or infinity in {len(wrong)} of "
            f"{len(state)} tensors: {names}; expected finite weights. Fix: train the stage again, "
            "from a checkpoint before its loss diverged"
        )


def _is_finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    # torch has no aminmax for float8. A NaN is both extremes, and aminmax makes no copy.
    wide = tensor.detach() if tensor.itemsize > 1 else tensor.detach().float()
    return bool(torch.stack(wide.aminmax()).isfinite().all())


def load(path: str | Path, device: str | torch.device = "cpu") -> Loaded:
    """Build the artifact's model and load its weights. Raises WeightsError if they do not fit."""
    info, system = describe(path), recipe(path)
    stage = system[info.stage]
    model = stage.model.build()
    state = weights(path)
    # of tied tensors, only the name that was saved
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    missing = [
        n for n in tensors_to_save(stage, model.state_dict(), [], []) if n in own and n not in state
    ]
    if missing:
        raise WeightsError(
            "; ".join(_summarize(f"{path} lacks", missing)) + ". Fix: train the stage again"
        )
    load_into(model, state, str(path))
    return Loaded(stage=stage, system=system, model=model.to(device).eval(), info=info)


def load_into(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load tensors by name into a model.

    Positions of a ViT for another image size are interpolated. A wiring's `adopt`, if it has one,
    first converts weights that another spec of its kind wrote. Raises WeightsError, with the names,
    for extra tensors and other shapes.
    """
    own, state = model.state_dict(), remap_state_dict(model, getattr(model, "adopt", dict)(state))
    extra = sorted(set(state) - set(own))
    wrong = [
        f"{name} {list(tensor.shape)} against {list(own[name].shape)}"
        for name, tensor in state.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if extra or wrong:
        raise WeightsError(
            f"{where} does not fit the model: "
            + "; ".join(_summarize("the model has no", extra) + _summarize("shapes differ:", wrong))
            + ". Fix: start from weights of the same model, or change the stage's model"
        )
    model.load_state_dict(state, strict=False)


def _summarize(title: str, names: list[str]) -> list[str]:
    """Return [] or one text: the title, the first three names and the number of the others."""
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{title} {', '.join(names[:3])}{more}"]


def _json(folder: Path, name: str) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads((folder / name).read_text())
        return value
    except FileNotFoundError:
        raise WeightsError(
            f"{folder} is not an artifact (no {name}). Fix: give the folder that a finished stage "
            "wrote, e.g. <home>/runs/RUN/STAGE/artifact"
        ) from None
    except (NotADirectoryError, ValueError, RecursionError) as error:
        # ValueError: not JSON, or not UTF-8
        raise WeightsError(f"{folder / name} cannot be read: {error}") from None


def _info(value: dict[str, Any]) -> Info:
    try:
        info = Info(**{**value, "datasets": tuple(DatasetInput(**d) for d in value["datasets"])})
        if not all(
            isinstance(text, str)
            for text in (info.system, info.stage, info.fingerprint, info.digest)
        ):
            raise TypeError("system, stage, fingerprint and digest must be strings")
        return info
    except (TypeError, KeyError, AttributeError) as error:
        raise WeightsError(
            f"artifact.json does not have the fields of this version of bridgework: {error}"
        ) from None
