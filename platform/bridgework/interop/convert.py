"""A folder of transformers into an artefact, an artefact into such a folder, and a certificate that both agree.

What a family of models needs for it is one module of this package: `ARCHITECTURES`, `spec` and `config` (the numbers),
`names` (the tensors), `stage` (what holds them), `outputs` (what is compared: numbers closely, token ids exactly).
"""

import hashlib
import json
import pkgutil
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bridgework import __version__
from bridgework.data.tokens import load_tokenizer
from bridgework.errors import SpecError, WeightsError, suggest
from bridgework.models import lora
from bridgework.system import ModelSpec, Stage, System
from bridgework.training import artefact

CLOSE = 1e-5  # in float32: what two orders of the same arithmetic may differ by, as a share of the largest value
CERTIFICATE = "parity.json"
LISTED = 10  # names in an error
SECOND = "qformer_tokenizer"  # where transformers keeps the tokenizer of a second stream
TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "*.model", "*.jinja", "preprocessor_config.json")


class Family(Protocol):
    """One module of this package."""

    ARCHITECTURES: tuple[str, ...]

    def spec(self, config: Any) -> ModelSpec: ...
    def config(self, model: Any) -> Any: ...
    def names(self, model: Any) -> Mapping[str, str]: ...
    def stage(self, model: Any) -> Stage: ...
    def outputs(self, ours: Any, theirs: Any) -> Mapping[str, tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class Text:
    """What each side wrote behind the same prompts: token ids, which are equal or not."""

    ours: list[list[int]]
    theirs: list[list[int]]
    equal: bool


@dataclass(frozen=True)
class Certificate:
    """What was compared after a conversion: both sides on the same random input, in float32 on a CPU."""

    architecture: str
    tensors: int
    parameters: int
    digest: str  # sha256 over names and bytes of the tensors, under transformers' names
    differences: Mapping[str, float]  # of each output, as a share of its largest value
    texts: Mapping[str, Text] = field(default_factory=dict)  # of each output that is token ids
    limit: float = CLOSE
    bridgework: str = __version__
    transformers: str = ""

    @property
    def holds(self) -> bool:
        close = all(difference <= self.limit for difference in self.differences.values())
        return close and all(text.equal for text in self.texts.values())


def families() -> dict[str, Family]:
    """The architectures that can be read and written, and the module of each."""
    package = import_module(__package__)
    found = [import_module(f"{__package__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    modules = [cast(Family, module) for module in found if hasattr(module, "ARCHITECTURES")]
    return {architecture: module for module in modules for architecture in module.ARCHITECTURES}


def imported(folder: Path, home: Path) -> Path:
    """The artefact of a model that `save_pretrained` wrote, kept under <home>/cache. Raises what `import_hf` does."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        state = file.stat()
        digest.update(f"{file.absolute()}:{state.st_size}:{state.st_mtime_ns}\n".encode())
    kept = home.absolute() / "cache" / "imported" / f"{folder.name}-{digest.hexdigest()[:12]}"
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        import_hf(folder, kept)
    return kept


def import_hf(folder: Path, out: Path) -> Certificate:
    """The artefact under `out` of a model that `save_pretrained` wrote to `folder`; nothing is fetched.

    Raises WeightsError for a folder that holds no model, an architecture that is not known, missing or extra tensors,
    and where the outputs of the two disagree: then nothing is written.
    """
    config = _config(folder)
    if not config.architectures:
        raise WeightsError(f"{folder}/config.json names no architecture; known: {', '.join(sorted(families()))}")
    architecture, family = _family(config.architectures[0])
    spec = family.spec(config)
    theirs = _load(architecture, folder)
    state = _ours(family.names(spec), theirs, spec)
    ours = spec.build(pretrained=False)
    artefact.put(ours, {name: tensor.float() for name, tensor in state.items()}, str(folder))
    certificate = certify(family, architecture, ours, theirs)
    with _whole(out) as partial:
        named = _with_tokenizer(spec, folder, partial / "tokenizer", out / "tokenizer")
        stage = family.stage(named)
        system = System(name=architecture.lower(), paper="", stages=(stage,))
        drawn = {name: p for name, p in ours.named_parameters() if name not in state}  # no place for it over there
        artefact.save(partial / "artefact", drawn | state, system=system, stage=stage.name)
        for file in (partial / "artefact").iterdir():
            file.rename(partial / file.name)
        (partial / "artefact").rmdir()
        _write(certificate, partial)
    return certificate


def export_hf(path: Path, out: Path, architecture: str | None = None) -> Certificate:
    """A folder under `out` that transformers loads, of the artefact under `path`, with its tokenizer; adapters merged.

    Raises SpecError where transformers has no such model, or more than one and `architecture` names none of them.
    """
    loaded = artefact.load(path)
    spec = lora.merged(loaded.stage.model, loaded.model)
    architecture, family, config = _fitting(spec, architecture)
    kept = artefact.weights(path)  # in the precision that they came in
    state = {name: kept.get(name, tensor) for name, tensor in loaded.model.state_dict().items()}
    theirs = _empty(architecture, config, {hf: state[own] for own, hf in family.names(spec).items()})
    certificate = certify(family, architecture, loaded.model, theirs)
    with _whole(out) as partial:
        theirs.save_pretrained(partial)
        load_tokenizer(spec.tokenizer).save_pretrained(partial)
        if spec.instruction is not None:
            load_tokenizer(spec.instruction).save_pretrained(partial / SECOND)
        _write(certificate, partial)
    return certificate


# --- transformers' side ----------------------------------------------------------------------------------------------


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise WeightsError(f"{folder} holds no config.json; give the folder that `save_pretrained` wrote")
    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder}/config.json cannot be read: {str(error).partition(chr(10))[0]}") from None


def _family(architecture: str) -> tuple[str, Family]:
    known = families()
    if architecture not in known:
        raise WeightsError(f"architecture {architecture!r} is not known here" + suggest(architecture, known))
    return architecture, known[architecture]


def _fitting(spec: ModelSpec, architecture: str | None) -> tuple[str, Family, Any]:
    """The one family whose config can hold the spec."""
    fitting: dict[str, tuple[str, Family, Any]] = {}
    refusals = []
    for family in {id(module): module for module in families().values()}.values():
        try:
            config = family.config(spec)
        except (SpecError, AttributeError) as error:  # a spec of another wiring has other fields
            refusals.append(str(error))
            continue
        name = (getattr(config, "architectures", None) or family.ARCHITECTURES)[0]
        fitting[name] = (name, family, config)
    if architecture is not None and architecture not in fitting:
        raise SpecError(f"the artefact is no {architecture}" + suggest(architecture, fitting))
    if not fitting:
        said = max((text for text in refusals if "attribute" not in text), key=len, default="")
        raise SpecError(f"transformers has no model for a {type(spec).__name__} like this one: {said}")
    if architecture is None and len(fitting) > 1:
        raise SpecError(f"the artefact fits {', '.join(sorted(fitting))}; say which with --as")
    return fitting[architecture or next(iter(fitting))]


def _load(architecture: str, folder: Path) -> Any:
    import transformers

    if not any(folder.glob("*.safetensors")):
        raise WeightsError(f"{folder} holds no *.safetensors, and weights in other files are not read: save it again")
    cls = getattr(transformers, architecture)
    try:
        model, info = cls.from_pretrained(
            str(folder), dtype="auto", local_files_only=True, output_loading_info=True, use_safetensors=True,
            ignore_mismatched_sizes=True,  # which are told below, by name
        )  # fmt: skip
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise WeightsError(f"{folder} cannot be read: {str(error).strip().partition(chr(10))[0]}") from None
    wrong = {what: sorted(info[f"{what}_keys"]) for what in ("missing", "unexpected")}
    wrong["of another shape"] = [
        f"{name} {list(given)} against {list(needed)}" for name, given, needed in sorted(info["mismatched_keys"])
    ]
    _check_keys(f"{folder} is not a whole {architecture}", wrong)
    return model.eval()


def _check_keys(said: str, wrong: Mapping[str, list[str]]) -> None:
    """Raises WeightsError that lists names under what is wrong with them, where there are any."""
    few = {what: ", ".join(names[:LISTED]) for what, names in wrong.items() if names}
    more = {what: f" and {len(names) - LISTED} more" * (len(names) > LISTED) for what, names in wrong.items()}
    if few:
        raise WeightsError(f"{said}: " + "; ".join(f"{what} {names}{more[what]}" for what, names in few.items()))


def _empty(architecture: str, config: Any, state: Mapping[str, Tensor]) -> Any:
    """The model of a config with `state` in it, in the precision of `state`."""
    import transformers

    model = getattr(transformers, architecture)(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = model.load_state_dict(
        {name: tensor.reshape(shapes[name]) for name, tensor in state.items() if name in shapes},
        strict=False,
        assign=True,
    )
    model.tie_weights()
    tied = {name for name in found.missing_keys if _is_tied(model, name, state)}
    wrong = {"missing": sorted(set(found.missing_keys) - tied), "extra": sorted(set(state) - set(shapes))}
    _check_keys(f"{architecture} and the artefact differ", wrong)
    return model.eval()


def _is_tied(model: nn.Module, name: str, state: Mapping[str, Tensor]) -> bool:
    own = model.state_dict()
    return any(own[other].data_ptr() == own[name].data_ptr() for other in state if other in own and other != name)


# --- our side --------------------------------------------------------------------------------------------------------


def _ours(names: Mapping[str, str], theirs: nn.Module, spec: ModelSpec) -> dict[str, Tensor]:
    """The tensors under our names and in our shapes. Raises WeightsError for one too few or too many."""
    state = theirs.state_dict()
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in spec.build(pretrained=False).state_dict().items()}
    missing = sorted(hf for hf in names.values() if hf not in state)
    read = {state[hf].data_ptr() for hf in names.values() if hf in state}
    extra = sorted(hf for hf, tensor in state.items() if hf not in names.values() and tensor.data_ptr() not in read)
    _check_keys(f"{type(theirs).__name__} and the wiring differ", {"missing": missing, "extra": extra})
    return {own: state[hf].reshape(shapes[own]).clone() for own, hf in names.items()}


def _with_tokenizer(spec: Any, folder: Path, into: Path, final: Path) -> Any:
    """The spec with the folder's tokenizers, copied beside the weights; where there is none, bytes."""
    return _named(spec, _copied(folder, into, final), _copied(folder / SECOND, into / SECOND, final / SECOND))


def _copied(folder: Path, into: Path, final: Path) -> str:
    files = sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})
    if not any(file.match("*token*") for file in files):
        return "bytes"
    into.mkdir(parents=True)
    for file in (*files, *folder.glob("config.json")):
        shutil.copy2(file, into / file.name)
    return str(final)


def _named(spec: Any, tokenizer: str, second: str) -> Any:
    """The spec with its tokenizers' names changed, in whichever part holds them."""
    names = {part: tokenizer for part in ("language", "text") if hasattr(spec, part)}
    if hasattr(getattr(spec, "bridge", None), "tokenizer"):  # of a Q-Former: beside a language model the second
        names["bridge"] = second if names else tokenizer
    if not names:
        return replace(spec, tokenizer=tokenizer)
    return replace(spec, **{part: replace(getattr(spec, part), tokenizer=name) for part, name in names.items()})


# --- what both have in common ----------------------------------------------------------------------------------------


def certify(family: Family, architecture: str, ours: Any, theirs: Any) -> Certificate:
    """The certificate of two models, ours and transformers'. Raises WeightsError where their outputs disagree."""
    import transformers

    state = theirs.state_dict()
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().contiguous().flatten().view(torch.uint8).numpy().data)
    with torch.no_grad():
        pairs = family.outputs(ours.float().eval(), _float(theirs))
    ids = {name: pair for name, pair in pairs.items() if not pair[0].is_floating_point()}
    certificate = Certificate(
        architecture=architecture,
        tensors=len(state),
        parameters=sum(p.numel() for p in theirs.parameters()),
        digest=digest.hexdigest(),
        differences={name: _difference(*pair) for name, pair in pairs.items() if name not in ids},
        texts={name: Text(own.tolist(), other.tolist(), torch.equal(own, other)) for name, (own, other) in ids.items()},
        transformers=transformers.__version__,
    )
    if not certificate.holds:
        wrong = [f"{name} {n:.1e}" for name, n in certificate.differences.items() if not n <= CLOSE]
        wrong += [f"{name} {t.ours} against {t.theirs}" for name, t in certificate.texts.items() if not t.equal]
        raise WeightsError(
            f"{architecture}: the outputs of the two disagree: {'; '.join(wrong)} (of the largest value at most "
            f"{CLOSE:g}, of written ids nothing); nothing was written"
        )
    return certificate


def _float(model: Any) -> Any:
    """A float32 twin, where the weights are of another precision: they themselves stay as they are."""
    if all(p.dtype == torch.float32 for p in model.parameters()):
        return model
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict(), strict=False)
    return twin.float().eval()


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    scale = float(theirs.abs().max()) or 1.0
    return float((ours.double() - theirs.double()).abs().max()) / scale


def _write(certificate: Certificate, folder: Path) -> None:
    (folder / CERTIFICATE).write_text(json.dumps(asdict(certificate), indent=1))


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder that takes the name `out` when the block ends well, and else is gone."""
    if out.exists():
        raise WeightsError(f"{out} exists; remove it first, or give another folder")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
