"""Conversion of a folder of transformers into an artifact and back, with a certificate that both sides agree.

A family of models is one module of this package: `ARCHITECTURES`, `spec` and `config` (the numbers), `ids` (special
tokens and settings of generation of a model trained here), `names` (the tensors), `stage` (holds them), `processor`
(pictures and texts), `outputs` (both sides of each comparison: numbers closely, token ids exactly).
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from logging import ERROR
from pathlib import Path
from typing import Any, Protocol, cast, get_type_hints

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bridgework import __version__, artifacts
from bridgework.data.tokenization import SampleEncoder, load_tokenizer
from bridgework.errors import SpecError, WeightsError, suggest
from bridgework.hf.common import SPECIAL, fields, is_read, listed, overlay, unequal
from bridgework.inference.generation import StopConditions
from bridgework.models import lora, pretrained
from bridgework.models.language import LanguageConfig, is_tied
from bridgework.models.origin import Origin
from bridgework.models.vision import ViTConfig
from bridgework.plugins import Plugins
from bridgework.system import ModelSpec, Stage, System

CLOSE = 1e-5  # in float32: what two orders of the same arithmetic may differ by, as a share of the largest value
CERTIFICATE = "parity.json"
LISTED = 10  # names in an error
SECOND = "qformer_tokenizer"  # where transformers keeps the tokenizer of a second stream
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.json",
    "*.jinja",
)
TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "*.model", *PROCESSOR_FILES)
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}  # of safetensors
FAMILIES = Plugins(kind="family", package=__package__, attributes=("ARCHITECTURES",))


class Family(Protocol):
    """One module of this package."""

    ARCHITECTURES: tuple[str, ...]

    def spec(self, config: Any, *, tied: bool | None = None) -> ModelSpec: ...
    def config(self, model: Any) -> Any: ...
    def ids(self, model: Any, tokenizer: Any, endings: Sequence[int], built: Any) -> Origin: ...
    def names(self, model: Any) -> Mapping[str, str]: ...
    def stage(self, model: Any) -> Stage: ...
    def processor(self, model: Any, tokenizer: Any, template: str | None) -> Any: ...
    def outputs(
        self, ours: Any, theirs: Any, said: Origin
    ) -> Mapping[str, tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class Text:
    """The continuation that each side wrote of the same prompts: token ids, which are equal or not."""

    ours: list[list[int]]
    theirs: list[list[int]]
    equal: bool


@dataclass(frozen=True)
class Certificate:
    """The comparison after a conversion: both sides on the same random input, in float32 on a CPU.

    There is one only where the fields of both configs, the special ids and the settings of generation are equal too.
    """

    architecture: str
    tensors: int
    parameters: int
    digest: str  # sha256 over names and bytes of the tensors, under transformers' names
    differences: Mapping[str, float]  # of each output, as a share of its largest value
    texts: Mapping[str, Text] = field(default_factory=dict)  # of each output that is token ids
    fields: int = 0  # of the config
    ids: Mapping[str, Any] = field(default_factory=dict)  # special ids by their path in the config
    generation: Mapping[str, Any] = field(default_factory=dict)  # settings of generation
    limit: float = CLOSE
    bridgework: str = __version__
    transformers: str = ""

    @property
    def holds(self) -> bool:
        close = all(difference <= self.limit for difference in self.differences.values())
        return close and all(text.equal for text in self.texts.values())


def families() -> dict[str, Family]:
    """Return the architectures that can be read and written, and the module of each."""
    modules = [cast(Family, module) for module in FAMILIES.modules().values()]
    return {architecture: module for module in modules for architecture in module.ARCHITECTURES}


def imported(folder: Path, home: Path) -> Path:
    """The artifact of a model that `save_pretrained` wrote, kept under <home>/cache. Raises what `import_hf` does."""
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
    """Write the artifact of a model that `save_pretrained` wrote to `folder` under `out`; nothing is fetched.

    Raises WeightsError for a folder that holds no model, an architecture that is not known, missing or extra tensors,
    a field of the config that changes outputs and has no place here, and where the outputs of the two disagree: then
    nothing is written.
    """
    config = _config(folder)
    if not config.architectures:
        raise WeightsError(
            f"{folder}/config.json names no architecture; known: {', '.join(sorted(families()))}"
        )
    architecture, family = _family(config.architectures[0])
    theirs = _load(architecture, folder)
    spec: Any = family.spec(config, tied=_tied(theirs))
    origin = _origin(family, spec, config, theirs)
    names = family.names(spec)
    state = _as_stored(_ours(names, theirs, spec), names, folder)
    artifacts.check_finite(state, str(folder))
    ours = spec.build(pretrained=False)
    artifacts.load_into(ours, {name: tensor.float() for name, tensor in state.items()}, str(folder))
    certificate = certify(family, architecture, ours, theirs, origin)
    with _whole(out) as partial:
        spec = replace(spec, origin=origin)
        stage = family.stage(
            _with_tokenizer(spec, folder, partial / "tokenizer", out / "tokenizer")
        )
        system = System(name=architecture.lower(), paper="", stages=(stage,))
        drawn = {
            name: p for name, p in ours.named_parameters() if name not in state
        }  # no place for it over there
        artifacts.save(partial / "artifact", drawn | state, system=system, stage=stage.name)
        for file in (partial / "artifact").iterdir():
            file.rename(partial / file.name)
        (partial / "artifact").rmdir()
        _write(certificate, partial)
    return certificate


def export_hf(path: Path, out: Path, architecture: str | None = None) -> Certificate:
    """Write a folder under `out` that transformers loads and serves, of the artifact under `path`; adapters merged.

    It holds the weights, the config with every special id, the settings of generation, the tokenizer, the processor
    and the chat template. Raises SpecError where transformers has no such model, or more than one and `architecture`
    names none of them; WeightsError for a field of the loaded weights' config that has no place there, and for a
    folder that does not come back as it was meant.
    """
    loaded = artifacts.load(path)
    model = cast(Any, loaded.model)
    spec = _as_built(lora.merge_adapters(loaded.stage.model, model), model, str(path))
    architecture, family, config = _fitting(spec, architecture)
    tokenizer = load_tokenizer(spec.tokenizer)
    said = _said(family, spec, loaded, tokenizer)
    overlay(config, said.config)
    kept, names = artifacts.weights(path), family.names(spec)  # in the precision that they came in
    state = {hf: kept.get(own, model.get_parameter(own).detach()) for own, hf in names.items()}
    if (
        hasattr(spec, "language")
        and (word := said.config.get("image_token_index")) == spec.language.vocab
    ):
        state |= _longer(model.language, names, state)
        config.text_config.vocab_size = word + 1
    theirs = _empty(architecture, config, state)
    if theirs.can_generate():
        theirs.generation_config = _generation(said)
    certificate = certify(family, architecture, model, theirs, said)
    with _whole(out) as partial:
        _save(theirs, said, partial)
        trained = spec.origin is None or loaded.info.steps > 0
        _write_processor(
            family, spec, loaded.stage.data.template if trained else None, tokenizer, said, partial
        )
        _check_written(theirs, said, partial)
        _write(certificate, partial)
        for file in (file for file in partial.rglob("*") if file.is_file()):
            shutil.copymode(partial / CERTIFICATE, file)  # safetensors' own is 600
    return certificate


# --- special ids and settings of generation --------------------------------------------------------------------------


def _origin(family: Family, spec: Any, config: Any, theirs: Any) -> Origin:
    """The fields of an imported model that no forward reads. Raises WeightsError for others without a place here."""
    made = family.config(spec)
    differ, known, given = unequal(made, config), fields(made.to_dict()), fields(config.to_dict())
    wrong = {
        path: pair
        for path, pair in differ.items()
        if path in known and is_read(path, _unread(family, spec))
    }
    if wrong:
        told = "; ".join(
            f"{path} {other!r} (read: {own!r})" for path, (own, other) in [*wrong.items()][:LISTED]
        )
        raise WeightsError(
            f"this {config.model_type} has fields that change its outputs and have no place here. Got {told}. "
            "Fix: import a model without them"
        )
    ids = {
        path: value
        for path, value in given.items()
        if any(fnmatchcase(path, glob) for glob in SPECIAL)
    }
    kept = ids | {path: other for path, (_, other) in differ.items() if path in given}
    if kept.get("image_token_index", 0) is None:  # of configs before transformers 4.45
        del kept["image_token_index"]
    settings = theirs.generation_config.to_diff_dict() if theirs.can_generate() else {}
    return Origin(config=kept, generation=_settings(settings))


def _settings(said: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in said.items()
        if name[0] != "_" and name != "transformers_version"
    }


def _unread(family: Family, spec: Any) -> tuple[str, ...]:
    """Fields that only this architecture does not read."""
    unread: tuple[str, ...] = getattr(family, "unread", lambda model: ())(spec)
    return unread


def _said(family: Family, spec: Any, loaded: artifacts.Loaded, tokenizer: Any) -> Origin:
    """The special ids and settings of an export: those of the import, and the ends of texts that training added."""
    endings = _endings(loaded.stage, loaded.model, tokenizer)
    drawn, own = family.ids(spec, tokenizer, endings, loaded.model), spec.origin
    if own is None:
        return drawn
    config, generation = dict(own.config), dict(own.generation)
    if (word := drawn.config.get("image_token_index")) is not None:
        config.setdefault("image_token_index", word)
    if loaded.info.steps and endings:
        for path in (path for path in config if path.endswith("eos_token_id")):
            config[path] = _joined(config[path], endings)
        generation["eos_token_id"] = _joined(generation.get("eos_token_id"), endings)
    return Origin(config=config, generation=generation)


def _endings(stage: Stage, model: Any, tokenizer: Any) -> list[int]:
    """Every id that ends an answer of the stage; a stop string counts where it is one token."""
    if not hasattr(model, "language"):
        return []
    ends = StopConditions.of(
        SampleEncoder.of(stage.model, stage.data), getattr(model, "endings", frozenset())
    )
    words = [tokenizer(text, add_special_tokens=False).input_ids for text in ends.strings]
    return sorted({*ends.ids, *(word[0] for word in words if len(word) == 1)})


def _joined(own: Any, endings: Sequence[int]) -> Any:
    known = [] if own is None else [*own] if isinstance(own, list | tuple) else [own]
    every = known + [ending for ending in endings if ending not in known]
    return every[0] if len(every) == 1 else every


def _generation(said: Origin) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(**listed(said.generation))


# --- the exported folder ---------------------------------------------------------------------------------------------


def _save(theirs: Any, said: Origin, folder: Path) -> None:
    """Write the weights, the config and the settings of generation.

    transformers does not save settings that it finds inconsistent (a temperature without sampling), as some published
    folders have: they are written as they came.
    """
    settings = theirs.generation_config if theirs.can_generate() else None
    if settings is not None:
        theirs.generation_config = type(settings)()
    theirs.save_pretrained(folder)
    if settings is not None:
        theirs.generation_config = settings
        written = listed(said.generation) | {"transformers_version": settings.transformers_version}
        (folder / "generation_config.json").write_text(json.dumps(written, indent=2))


def _write_processor(
    family: Family, spec: Any, template: str | None, tokenizer: Any, said: Origin, folder: Path
) -> None:
    """Write the tokenizer and the processor: as they are in the tokenizer's own folder, and what is missing there.

    `template` is the stage's, None for a model that was never trained here: its own chat template stays.
    """
    from transformers import AutoProcessor, ProcessorMixin
    from transformers.utils import logging

    files = _files(Path(spec.tokenizer))
    for file in files:
        shutil.copy2(file, folder / file.name)
    words: Mapping[int, str] = getattr(family, "words", lambda model, said: {})(spec, said)
    if _placed(tokenizer, words, fill=spec.origin is None) or not files:
        tokenizer.save_pretrained(folder)
    whole = template is None and any(file.name in PROCESSOR_FILES for file in files)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        if not whole:
            processor = family.processor(spec, tokenizer, template)
            if getattr(processor, "chat_template", None) is not None:
                tokenizer.chat_template = processor.chat_template
            processor.save_pretrained(folder)
            processor.image_processor.save_pretrained(
                folder
            )  # for readers older than processor_config.json
        elif spec.instruction is not None:
            load_tokenizer(spec.instruction).save_pretrained(folder / SECOND)
        found = AutoProcessor.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise WeightsError(
            f"transformers cannot load a processor from the exported folder: {reason}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if not isinstance(found, ProcessorMixin):
        raise WeightsError(
            f"the exported folder has no processor for pictures. Got a {type(found).__name__}; expected a processor. "
            "Fix: export from an artifact whose tokenizer is complete"
        )


def _files(folder: Path) -> list[Path]:
    """The files of a tokenizer and its processor in a local folder; [] where there is no tokenizer."""
    found = sorted(
        {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()}
    )
    return found if any(file.match("*token*") for file in found) else []


def _placed(tokenizer: Any, words: Mapping[int, str], *, fill: bool) -> bool:
    """Add the words that a tokenizer lacks, each at its id where that is free, and return whether any was added.

    With `fill` unused tokens take the ids in between.
    """
    missing = {
        place: word for place, word in sorted(words.items()) if word not in tokenizer.get_vocab()
    }
    for place, word in missing.items():
        first = max(tokenizer.get_vocab().values()) + 1
        unused = [f"<|unused_{number}|>" for number in range(first, place)] if fill else []
        tokenizer.add_tokens([*unused, word], special_tokens=True)
    return bool(missing)


def _check_written(theirs: Any, said: Origin, folder: Path) -> None:
    """Read the folder again. Raises WeightsError for a field of the config or a setting that is another then."""
    from transformers import AutoConfig, GenerationConfig

    back = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    wrong = {path: pair for path, pair in unequal(theirs.config, back).items()}
    given = fields(back.to_dict())
    wrong |= {
        path: (listed(value), given.get(path))
        for path, value in said.config.items()
        if given.get(path) != listed(value)
    }
    if theirs.can_generate():
        settings = _settings(
            GenerationConfig.from_pretrained(str(folder), local_files_only=True).to_diff_dict()
        )
        expected = _settings(_generation(said).to_diff_dict())
        for name in sorted(expected.keys() | settings.keys()):
            if expected.get(name) != settings.get(name):
                wrong[f"generation_config.{name}"] = expected.get(name), settings.get(name)
    if wrong:
        told = "; ".join(
            f"{path} {there!r} for {meant!r}" for path, (meant, there) in [*wrong.items()][:LISTED]
        )
        raise WeightsError(
            f"the exported folder reads back otherwise than it was written: {told}; nothing was kept"
        )


# --- transformers' side ----------------------------------------------------------------------------------------------


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise WeightsError(
            f"{folder} holds no config.json; give the folder that `save_pretrained` wrote"
        )
    try:
        return AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        StrictDataclassError,
    ) as error:
        raise WeightsError(
            f"{folder}/config.json cannot be read: {str(error).partition(chr(10))[0]}"
        ) from None


def _family(architecture: str) -> tuple[str, Family]:
    known = families()
    if architecture not in known:
        raise WeightsError(
            f"architecture {architecture!r} is not known here" + suggest(architecture, known)
        )
    return architecture, known[architecture]


def _fitting(spec: ModelSpec, architecture: str | None) -> tuple[str, Family, Any]:
    """The one family whose config can hold the spec."""
    fitting: dict[str, tuple[str, Family, Any]] = {}
    refusals = []
    for family in {id(module): module for module in families().values()}.values():
        if not isinstance(spec, get_type_hints(family.config)["model"]):  # another wiring
            continue
        try:
            config = family.config(spec)
        except SpecError as error:
            refusals.append(str(error))
            continue
        name = (getattr(config, "architectures", None) or family.ARCHITECTURES)[0]
        fitting[name] = (name, family, config)
    if architecture is not None and architecture not in fitting:
        raise SpecError(f"the artifact is no {architecture}" + suggest(architecture, fitting))
    if not fitting:
        said = max(refusals, key=len, default="no family is of this wiring")
        raise SpecError(
            f"transformers has no model for a {type(spec).__name__} like this one: {said}"
        )
    if architecture is None and len(fitting) > 1:
        raise SpecError(f"the artifact fits {', '.join(sorted(fitting))}; say which with --as")
    return fitting[architecture or next(iter(fitting))]


def _load(architecture: str, folder: Path) -> Any:
    import transformers

    pretrained.check_files(folder, str(folder))
    cls = getattr(transformers, architecture)
    try:
        model, info = cls.from_pretrained(
            str(folder), dtype="auto", local_files_only=True, output_loading_info=True, use_safetensors=True,
            trust_remote_code=False, ignore_mismatched_sizes=True,  # which are reported below, by name
        )  # fmt: skip
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise WeightsError(
            f"{folder} cannot be read: {str(error).strip().partition(chr(10))[0]}"
        ) from None
    wrong = {what: sorted(info[f"{what}_keys"]) for what in ("missing", "unexpected")}
    wrong["of another shape"] = [
        f"{name} {list(given)} against {list(needed)}"
        for name, given, needed in sorted(info["mismatched_keys"])
    ]
    _check_keys(f"{folder} is not a whole {architecture}", wrong)
    return model.eval()


def _check_keys(said: str, wrong: Mapping[str, list[str]]) -> None:
    """Raises WeightsError that lists names under what is wrong with them, where there are any."""
    few = {what: ", ".join(names[:LISTED]) for what, names in wrong.items() if names}
    more = {
        what: f" and {len(names) - LISTED} more" * (len(names) > LISTED)
        for what, names in wrong.items()
    }
    if few:
        raise WeightsError(
            f"{said}: " + "; ".join(f"{what} {names}{more[what]}" for what, names in few.items())
        )


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
    missing = set(found.missing_keys)
    model.tie_weights(
        missing_keys=missing, recompute_mapping=False
    )  # what `state` has not, to what it has
    wrong = {"missing": sorted(missing), "extra": sorted(set(state) - set(shapes))}
    _check_keys(f"{architecture} and the artifact differ", wrong)
    return model.eval()


def _tied(theirs: Any) -> bool | None:
    """Whether the words of a model go in and out by one matrix; None for one that writes none."""
    try:
        return is_tied(theirs)
    except (AttributeError, RuntimeError):  # a model without words, as transformers says it
        return None


def _longer(
    language: Any, names: Mapping[str, str], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The matrices over the vocabulary with one row more, the mean of the others: for a word that only images are."""
    head = language.get_output_embeddings()
    matrices = {id(language.get_input_embeddings().weight), id(head.weight)}
    longer = {}
    for name, parameter in language.named_parameters():
        hf = names[f"language.{name}"]
        if id(parameter) in matrices:
            longer[hf] = torch.cat(
                [state[hf], state[hf].float().mean(0, keepdim=True).to(state[hf].dtype)]
            )
        elif parameter is getattr(head, "bias", None):
            longer[hf] = torch.cat([state[hf], state[hf].min().view(1)])
    return longer


# --- our side --------------------------------------------------------------------------------------------------------


def _ours(names: Mapping[str, str], theirs: nn.Module, spec: ModelSpec) -> dict[str, Tensor]:
    """The tensors under our names and in our shapes. Raises WeightsError for one too few or too many."""
    state = theirs.state_dict()
    with torch.device("meta"):
        shapes = {
            name: tensor.shape for name, tensor in spec.build(pretrained=False).state_dict().items()
        }
    missing = sorted(hf for hf in names.values() if hf not in state)
    read = {state[hf].data_ptr() for hf in names.values() if hf in state}
    extra = sorted(
        hf
        for hf, tensor in state.items()
        if hf not in names.values() and tensor.data_ptr() not in read
    )
    _check_keys(
        f"{type(theirs).__name__} and the wiring differ", {"missing": missing, "extra": extra}
    )
    return {own: state[hf].reshape(shapes[own]).clone() for own, hf in names.items()}


def _as_stored(
    state: Mapping[str, Tensor], names: Mapping[str, str], folder: Path
) -> dict[str, Tensor]:
    """The tensors in the precision of the file: transformers loads some of float16 as float32 (a Q-Former's, T5's wo).

    A name that transformers has changed since the file was written gets the file's precision where it has only one.
    """
    stored: dict[str, torch.dtype | None] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            stored |= {
                name: DTYPES.get(shard.get_slice(name).get_dtype()) for name in shard.offset_keys()
            }
    only = next(iter(stored.values())) if len(set(stored.values())) == 1 else None
    dtypes = {own: stored.get(hf, only) for own, hf in names.items()}
    return {
        own: tensor if (dtype := dtypes[own]) is None else tensor.to(dtype)
        for own, tensor in state.items()
    }


def _as_built(spec: Any, model: Any, where: str) -> Any:
    """The spec with what the loaded weights' own configs say besides its numbers: windows, scaled positions, epsilons.

    Raises WeightsError for a field of theirs that changes outputs and has no place in the spec.
    """
    pairs: list[tuple[str, Any, Any]] = []
    language = getattr(model, "language", None)
    if language is not None:
        own = LanguageConfig.of(language.config, spec.language.tokenizer, tied=is_tied(language))
        spec = replace(spec, language=own)
        pairs.append(("language", own, language.config))
    tower = getattr(getattr(model.vision, "tower", None), "config", None)
    if isinstance(spec.vision, ViTConfig) and tower is not None:
        eps = ViTConfig.own_norm_eps(tower)
        spec = replace(spec, vision=replace(spec.vision, act=tower.hidden_act, norm_eps=eps))
    pairs.append(("vision", spec.vision, tower))
    texts = getattr(getattr(getattr(model, "text", None), "tower", None), "config", None)
    pairs.append(("text", getattr(spec, "text", None), texts))
    for part, own, config in pairs:
        if config is None or not hasattr(own, "config"):
            continue
        wrong = [path for path in unequal(own.config(), config) if is_read(path)]
        if wrong:
            raise WeightsError(
                f"{where}: the weights of {part} have fields that change its outputs and have no place in a spec. Got "
                f"{', '.join(wrong[:LISTED])} other than the default. Fix: take weights without them"
            )
    return spec


def _with_tokenizer(spec: Any, folder: Path, into: Path, final: Path) -> Any:
    """The spec with the folder's tokenizers, copied next to the weights; where there is none, bytes."""
    return _named(
        spec, _copied(folder, into, final), _copied(folder / SECOND, into / SECOND, final / SECOND)
    )


def _copied(folder: Path, into: Path, final: Path) -> str:
    files = _files(folder)
    if not files:
        return "bytes"
    into.mkdir(parents=True)
    for file in (*files, *folder.glob("config.json")):
        shutil.copy2(file, into / file.name)
    return str(final)


def _named(spec: Any, tokenizer: str, second: str) -> Any:
    """The spec with its tokenizers' names changed, in whichever part holds them."""
    names = {part: tokenizer for part in ("language", "text") if hasattr(spec, part)}
    if hasattr(
        getattr(spec, "bridge", None), "tokenizer"
    ):  # of a Q-Former: beside a language model the second
        names["bridge"] = second if names else tokenizer
    if not names:
        return replace(spec, tokenizer=tokenizer)
    return replace(
        spec, **{part: replace(getattr(spec, part), tokenizer=name) for part, name in names.items()}
    )


# --- what both have in common ----------------------------------------------------------------------------------------


def certify(family: Family, architecture: str, ours: Any, theirs: Any, said: Origin) -> Certificate:
    """The certificate of two models, ours and transformers'. Raises WeightsError where their outputs disagree.

    `said` are the special ids and settings of generation that both sides are to have.
    """
    import transformers

    state = theirs.state_dict()
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().contiguous().flatten().view(torch.uint8).numpy().data)
    with torch.no_grad():
        pairs = family.outputs(ours.float().eval(), _float(theirs), said)
    ids = {name: pair for name, pair in pairs.items() if not pair[0].is_floating_point()}
    certificate = Certificate(
        architecture=architecture,
        tensors=len(state),
        parameters=sum(p.numel() for p in theirs.parameters()),
        digest=digest.hexdigest(),
        differences={name: _difference(*pair) for name, pair in pairs.items() if name not in ids},
        texts={
            name: Text(own.tolist(), other.tolist(), torch.equal(own, other))
            for name, (own, other) in ids.items()
        },
        fields=len(fields(theirs.config.to_dict())),
        ids={
            path: listed(v)
            for path, v in said.config.items()
            if any(fnmatchcase(path, glob) for glob in SPECIAL)
        },
        generation=listed(said.generation),
        transformers=transformers.__version__,
    )
    if not certificate.holds:
        wrong = [f"{name} {n:.1e}" for name, n in certificate.differences.items() if not n <= CLOSE]
        wrong += [
            f"{name} {t.ours} against {t.theirs}"
            for name, t in certificate.texts.items()
            if not t.equal
        ]
        raise WeightsError(
            f"{architecture}: the outputs of the two disagree: {'; '.join(wrong)} (of the largest value at most "
            f"{CLOSE:g}, of written ids nothing); nothing was written"
        )
    return certificate


def _float(model: Any) -> Any:
    """A float32 twin, where the weights are of another precision: they themselves stay as they are."""
    if all(p.dtype == torch.float32 for p in model.parameters()):
        return model
    return deepcopy(model).float().eval()


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    scale = float(theirs.abs().max()) or 1.0
    return float((ours.double() - theirs.double()).abs().max()) / scale


def _write(certificate: Certificate, folder: Path) -> None:
    (folder / CERTIFICATE).write_text(json.dumps(asdict(certificate), indent=1))


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder that takes the name `out` when the block ends without an error, and else is removed."""
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
