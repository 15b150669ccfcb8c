"""Weights artifacts: what goes from stage to stage, into the tracker, to export and to serving.

A folder of three files: `weights.safetensors` (every tensor that pretrained weights do not bring back: what was
trained here or in the stages before, and what had no pretrained weights), `recipe.json` (the system as resolved) and
`artifact.json` (written last: a folder without it is not an artifact). Nothing in it is unpickled.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bridgework import __version__, old_names
from bridgework.config import from_dict, to_dict
from bridgework.errors import WeightsError, suggest
from bridgework.mixture import DatasetInput
from bridgework.models.vision import remap_state_dict
from bridgework.system import Stage, System

FILE = "artifact.json"


@dataclass(frozen=True)
class Info:
    """What an artifact says of itself."""

    system: str
    stage: str
    fingerprint: str  # of the whole recipe
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
    """An artifact, open: the stage that made it, the module in eval mode, and what is known of it."""

    stage: Stage
    system: System
    model: nn.Module
    info: Info


def tensors_to_save(
    stage: Stage, names: Iterable[str], trained: Iterable[str], inherited: Iterable[str]
) -> list[str]:
    """The tensors that an artifact must hold, of all tensors of a model."""
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
    """Write an artifact; `folder` appears complete or not at all, and replaces an older one of the same name.

    Raises WeightsError for a NaN or an infinity in a tensor, before anything is written.
    """
    check_finite(state, f"{folder}: the weights to save")
    temporary = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
        save_file(tensors, temporary / "weights.safetensors", metadata={"format": "pt"})
        info = Info(
            system=system.name,
            stage=stage,
            fingerprint=system.fingerprint(),
            digest=_sha256(temporary / "weights.safetensors"),
            parent=parent,
            datasets=tuple(datasets),
            steps=steps,
            tensors=len(tensors),
            parameters=sum(t.numel() for t in tensors.values()),
            created=time.time(),
            version=__version__,
        )
        (temporary / "recipe.json").write_text(json.dumps(to_dict(system), indent=1))
        shutil.copymode(
            temporary / "recipe.json", temporary / "weights.safetensors"
        )  # safetensors' own is 600
        (temporary / FILE).write_text(json.dumps(asdict(info), indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return info


def info_file(folder: Path) -> Path:
    """Return the file that is written last, by its name today or before."""
    before = folder / old_names.ARTIFACT_FILE
    return before if before.is_file() else folder / FILE


def describe(path: str | Path) -> Info:
    """What the artifact under `path` says of itself. Raises WeightsError when there is none."""
    return _info(_json(Path(path), info_file(Path(path)).name))


def recipe(path: str | Path) -> System:
    """The system as resolved when the artifact was made."""
    try:
        system = from_dict(_json(Path(path), "recipe.json"))
    except RecursionError:
        raise WeightsError(f"{path}/recipe.json is nested too deeply to be a recipe") from None
    if not isinstance(system, System):
        raise WeightsError(f"{path}/recipe.json is no system; train the stage again")
    return system


def weights(path: str | Path, globs: Sequence[str] = ("*",)) -> dict[str, Tensor]:
    """Its tensors whose names match, on the CPU.

    Raises WeightsError when the file is not the one that was written, a glob matches nothing in it, or a tensor holds
    a NaN or an infinity.
    """
    info, file = describe(path), Path(path) / "weights.safetensors"
    if not file.is_file() or _sha256(file) != info.digest:
        raise WeightsError(
            f"{file} is missing or not the file that was written (sha256 differs); train the stage again"
        )
    try:
        found: dict[str, Tensor] = load_file(file)
    except SafetensorError as error:
        raise WeightsError(f"{file} cannot be read: {error}; train the stage again") from None
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in found):
            raise WeightsError(
                f"{file} has no tensor {glob!r}"
                + suggest(glob, {n.split(".")[0] + ".*" for n in found})
            )
    wanted = {
        name: tensor
        for name, tensor in found.items()
        if any(fnmatchcase(name, glob) for glob in globs)
    }
    check_finite(wanted, str(file))
    return wanted


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raises WeightsError that names the tensors with a NaN or an infinity in them."""
    wrong = [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and not _is_finite(tensor)
    ]
    if wrong:
        names = _summarize("", wrong)[0].strip()
        raise WeightsError(
            f"{where}: not all numbers are finite. Got NaN or infinity in {len(wrong)} of {len(state)} tensors: {names}"
            "; expected finite weights. Fix: train the stage again, from a checkpoint before its loss diverged"
        )


def _is_finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    wide = (
        tensor.detach() if tensor.itemsize > 1 else tensor.detach().float()
    )  # float8 has no extremes in torch
    return bool(
        torch.stack(wide.aminmax()).isfinite().all()
    )  # a NaN is both extremes, and it takes no copy


def load(path: str | Path, device: str | torch.device = "cpu") -> Loaded:
    """Build the artifact's model and put its weights in. Raises WeightsError when they do not fit."""
    info, system = describe(path), recipe(path)
    stage = system[info.stage]
    model = stage.model.build()
    state = weights(path)
    own = dict(model.named_parameters()) | dict(
        model.named_buffers()
    )  # of tied tensors, the name that was saved
    missing = [
        n for n in tensors_to_save(stage, model.state_dict(), [], []) if n in own and n not in state
    ]
    if missing:
        raise WeightsError(
            "; ".join(_summarize(f"{path} lacks", missing)) + "; train the stage again"
        )
    load_into(model, state, str(path))
    return Loaded(stage=stage, system=system, model=model.to(device).eval(), info=info)


def load_into(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load tensors by name into a model; positions of a ViT for another image size are interpolated.

    A wiring with an `adopt` says first what becomes of weights that another spec of its kind left. Raises WeightsError
    that names what is too much or has another shape.
    """
    own, state = model.state_dict(), remap_state_dict(model, getattr(model, "adopt", dict)(state))
    extra = sorted(set(state) - set(own))
    wrong = [f"{n} {list(state[n].shape)} against {list(own[n].shape)}" for n in state if n in own]
    wrong = [
        w
        for n, w in zip([n for n in state if n in own], wrong, strict=True)
        if state[n].shape != own[n].shape
    ]
    if extra or wrong:
        raise WeightsError(
            f"{where} does not fit the model: "
            + "; ".join(_summarize("the model has no", extra) + _summarize("shapes differ:", wrong))
            + "; start from weights of the same model, or change the stage's model"
        )
    model.load_state_dict(state, strict=False)


def _summarize(what: str, names: list[str]) -> list[str]:
    return (
        [
            f"{what} {', '.join(names[:3])}"
            + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        ]
        if names
        else []
    )


def _json(folder: Path, name: str) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads((folder / name).read_text())
        return value
    except FileNotFoundError:
        raise WeightsError(
            f"{folder} is not an artifact (no {name}); give the folder that a finished stage wrote, "
            "e.g. <home>/runs/RUN/STAGE/artifact"
        ) from None
    except (
        NotADirectoryError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: no JSON, or no text
        raise WeightsError(f"{folder / name} cannot be read: {error}") from None


def _info(value: dict[str, Any]) -> Info:
    try:
        info = Info(**{**value, "datasets": tuple(DatasetInput(**d) for d in value["datasets"])})
        if not all(
            isinstance(text, str)
            for text in (info.system, info.stage, info.fingerprint, info.digest)
        ):
            raise TypeError("system, stage, fingerprint and digest are texts")
        return info
    except (TypeError, KeyError, AttributeError) as error:
        raise WeightsError(
            f"artifact.json does not have the fields of this version of bridgework: {error}"
        ) from None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class StageResult:
    """A trained stage: its weights, its evaluations, its run and logged model in the tracker."""

    artifact: Path
    metrics: dict[str, float]
    run_id: str | None = None
    model_id: str | None = None
