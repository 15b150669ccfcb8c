"""Conversion of a transformers checkpoint to an artifact and back, verified by a certificate.

A model family is one module of this package with the functions of `Family`, e.g. llava.py.
`import_hf` and `export_hf` compare the outputs of both models on random input: numbers within
CLOSE, token ids exactly.
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
from bridgework.hf.common import (
    TOKEN_FIELDS,
    config_diff,
    flatten_config,
    is_read,
    overlay,
    to_json,
)
from bridgework.inference.generation import StopConditions
from bridgework.models import lora, pretrained
from bridgework.models.language import LanguageConfig, is_tied
from bridgework.models.origin import Origin
from bridgework.models.vision import ViTConfig
from bridgework.plugins import Plugins
from bridgework.system import ModelSpec, Stage, System
from bridgework.tracking.card import FILE as CARD
from bridgework.tracking.card import model_card

CLOSE = 1e-5  # largest difference in float32 between two orders of the same arithmetic, relative
CERTIFICATE = "parity.json"
MAX_LISTED = 10  # names in an error
SECOND = "qformer_tokenizer"  # transformers' folder of a second tokenizer
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.json",
    "*.jinja",
)
TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "*.model", *PROCESSOR_FILES)
DTYPES = {  # of safetensors
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
FAMILIES = Plugins(kind="family", package=__package__, attributes=("ARCHITECTURES",))


class Family(Protocol):
    """A model family: one module of this package. `model` is a model config, `built` its module.

    Optional: `unread(model)`, config fields that this architecture does not read, and
    `added_tokens(model, origin)`, tokens by id that the tokenizer needs.
    """

    ARCHITECTURES: tuple[str, ...]

    def model_config(self, config: Any, *, tied: bool | None = None) -> ModelSpec:
        """Return the model config of a transformers config."""

    def hf_config(self, model: Any) -> Any:
        """Return the transformers config of a model config."""

    def special_ids(self, model: Any, tokenizer: Any, endings: Sequence[int], built: Any) -> Origin:
        """Return the special ids and generation settings of a model that was trained here."""

    def tensor_names(self, model: Any) -> Mapping[str, str]:
        """Return our tensor names -> transformers'."""

    def stage(self, model: Any) -> Stage:
        """Return the stage for imported weights."""

    def processor(self, model: Any, tokenizer: Any, template: str | None) -> Any:
        """Return the transformers processor of images and text."""

    def outputs(
        self, ours: Any, theirs: Any, origin: Origin
    ) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return the compared outputs as name -> (ours, transformers')."""


@dataclass(frozen=True)
class Text:
    """The token ids that each side generated for the same prompts."""

    ours: list[list[int]]
    theirs: list[list[int]]
    equal: bool


@dataclass(frozen=True)
class Certificate:
    """Result of a conversion: both models compared on the same random input, in float32 on a CPU.

    It exists only if the config fields, the special ids and the generation settings of both are
    equal too.
    """

    architecture: str
    tensors: int
    parameters: int
    digest: str  # sha256 over names and bytes of the tensors, under transformers' names
    differences: Mapping[str, float]  # by output, relative to its largest value
    texts: Mapping[str, Text] = field(default_factory=dict)  # by output of token ids
    fields: int = 0  # of the config
    ids: Mapping[str, Any] = field(default_factory=dict)  # special ids by their path in the config
    generation: Mapping[str, Any] = field(default_factory=dict)  # generation settings
    limit: float = CLOSE
    bridgework: str = __version__
    transformers: str = ""

    @property
    def holds(self) -> bool:
        """True if all differences are within `limit` and all texts are equal."""
        close = all(difference <= self.limit for difference in self.differences.values())
        return close and all(text.equal for text in self.texts.values())


def families() -> dict[str, Family]:
    """Return the architectures that can be read and written, and the module of each."""
    modules = [cast(Family, module) for module in FAMILIES.modules().values()]
    return {architecture: module for module in modules for architecture in module.ARCHITECTURES}


def imported(folder: Path, home: Path) -> Path:
    """Return the artifact of a checkpoint, imported to <home>/cache once.

    Raises as `import_hf` does.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        state = file.stat()
        digest.update(f"{file.absolute()}:{state.st_size}:{state.st_mtime_ns}\n".encode())
    cached = home.absolute() / "cache" / "imported" / f"{folder.name}-{digest.hexdigest()[:12]}"
    if not cached.is_dir():
        cached.parent.mkdir(parents=True, exist_ok=True)
        import_hf(folder, cached)
    return cached


def import_hf(folder: Path, out: Path) -> Certificate:
    """Convert the checkpoint in `folder`, as `save_pretrained` writes it, to an artifact in `out`.

    Works offline. Raises WeightsError, and writes nothing, for a folder without a model, an unknown
    architecture, missing or extra tensors, a config field that changes outputs and is not supported
    here, and outputs that disagree.
    """
    config = _config(folder)
    if not config.architectures:
        raise WeightsError(
            f"{folder}/config.json: no architecture. "
            f"Expected one of {', '.join(sorted(families()))}"
        )
    architecture, family = _family(config.architectures[0])
    theirs = _load(architecture, folder)
    spec: Any = family.model_config(config, tied=_tied(theirs))
    origin = _origin(family, spec, config, theirs)
    names = family.tensor_names(spec)
    state = _as_stored(_ours(names, theirs, spec), names, folder)
    artifacts.check_finite(state, str(folder))
    ours = spec.build(pretrained=False)
    artifacts.load_into(ours, {name: tensor.float() for name, tensor in state.items()}, str(folder))
    certificate = certify(family, architecture, ours, theirs, origin)
    with _atomic_folder(out) as partial:
        spec = replace(spec, origin=origin)
        stage = family.stage(
            _with_tokenizer(spec, folder, partial / "tokenizer", out / "tokenizer")
        )
        system = System(name=architecture.lower(), paper="", stages=(stage,))
        # parameters that transformers' model does not have
        initialized = {name: p for name, p in ours.named_parameters() if name not in state}
        artifacts.save(partial / "artifact", initialized | state, system=system, stage=stage.name)
        for file in (partial / "artifact").iterdir():
            file.rename(partial / file.name)
        (partial / "artifact").rmdir()
        _write(certificate, partial)
    return certificate


def export_hf(path: Path, out: Path, architecture: str | None = None) -> Certificate:
    """Convert the artifact at `path` to a transformers checkpoint in `out`, with merged adapters.

    The folder contains the weights, the config with every special id, the generation settings, the
    tokenizer, the processor and the chat template. Raises SpecError if transformers has no such
    model, or several and `architecture` is none of them; WeightsError for a config field that
    transformers does not support, and for a folder that reads back differently.
    """
    loaded = artifacts.load(path)
    model = cast(Any, loaded.model)
    spec = _as_built(lora.merge_adapters(loaded.stage.model, model), model, str(path))
    architecture, family, config = _choose_family(spec, architecture)
    tokenizer = load_tokenizer(spec.tokenizer)
    origin = _export_origin(family, spec, loaded, tokenizer)
    overlay(config, origin.config)
    stored, names = artifacts.weights(path), family.tensor_names(spec)  # stored in their own dtype
    state = {hf: stored.get(own, model.get_parameter(own).detach()) for own, hf in names.items()}
    if (
        hasattr(spec, "language")
        and (image_token := origin.config.get("image_token_index")) == spec.language.vocab
    ):
        state |= _append_row(model.language, names, state)
        config.text_config.vocab_size = image_token + 1
    theirs = _empty(architecture, config, state)
    if theirs.can_generate():
        theirs.generation_config = _generation_config(origin)
    certificate = certify(family, architecture, model, theirs, origin)
    with _atomic_folder(out) as partial:
        _save(theirs, origin, partial)
        trained = spec.origin is None or loaded.info.steps > 0
        _write_processor(
            family,
            spec,
            loaded.stage.data.template if trained else None,
            tokenizer,
            origin,
            partial,
        )
        _check_reads_back(theirs, origin, partial)
        _write(certificate, partial)
        card = model_card(path, library="transformers")
        (partial / CARD).write_text(card, encoding="utf-8")
        for file in (file for file in partial.rglob("*") if file.is_file()):
            shutil.copymode(partial / CERTIFICATE, file)  # safetensors writes with mode 600
    return certificate


# --- special ids and generation settings


def _origin(family: Family, spec: Any, config: Any, theirs: Any) -> Origin:
    """Return the config fields of an imported model that no forward reads.

    Raises WeightsError for other fields that are not supported here.
    """
    ours = family.hf_config(spec)
    differ = config_diff(ours, config)
    known, given = flatten_config(ours.to_dict()), flatten_config(config.to_dict())
    wrong = {
        path: pair
        for path, pair in differ.items()
        if path in known and is_read(path, _unread(family, spec))
    }
    if wrong:
        listed = "; ".join(
            f"{path} {other!r} (supported: {own!r})"
            for path, (own, other) in [*wrong.items()][:MAX_LISTED]
        )
        raise WeightsError(
            f"{config.model_type}: config fields change the outputs and are not supported. "
            f"Got {listed}. Fix: import a model without them"
        )
    ids = {
        path: value
        for path, value in given.items()
        if any(fnmatchcase(path, glob) for glob in TOKEN_FIELDS)
    }
    unread = ids | {path: other for path, (_, other) in differ.items() if path in given}
    if unread.get("image_token_index", 0) is None:  # of configs before transformers 4.45
        del unread["image_token_index"]
    settings = theirs.generation_config.to_diff_dict() if theirs.can_generate() else {}
    return Origin(config=unread, generation=_settings(settings))


def _settings(generation: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in generation.items()
        if name[0] != "_" and name != "transformers_version"
    }


def _unread(family: Family, spec: Any) -> tuple[str, ...]:
    """Return the config fields that only this architecture does not read."""
    unread: tuple[str, ...] = getattr(family, "unread", lambda model: ())(spec)
    return unread


def _export_origin(family: Family, spec: Any, loaded: artifacts.Loaded, tokenizer: Any) -> Origin:
    """Return the special ids and settings of an export: the imported ones and trained end ids."""
    endings = _endings(loaded.stage, loaded.model, tokenizer)
    new, imported = family.special_ids(spec, tokenizer, endings, loaded.model), spec.origin
    if imported is None:
        return new
    config, generation = dict(imported.config), dict(imported.generation)
    if (image_token := new.config.get("image_token_index")) is not None:
        config.setdefault("image_token_index", image_token)
    if loaded.info.steps and endings:
        for path in (path for path in config if path.endswith("eos_token_id")):
            config[path] = _joined(config[path], endings)
        generation["eos_token_id"] = _joined(generation.get("eos_token_id"), endings)
    return Origin(config=config, generation=generation)


def _endings(stage: Stage, model: Any, tokenizer: Any) -> list[int]:
    """Return all ids that end an answer of the stage, including stop strings of one token."""
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


def _generation_config(origin: Origin) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(**to_json(origin.generation))


# --- the exported folder


def _save(theirs: Any, origin: Origin, folder: Path) -> None:
    """Write the weights, the config and the generation settings.

    transformers refuses to save inconsistent settings, e.g. a temperature without sampling. Some
    published folders have them, so they are written unchanged.
    """
    settings = theirs.generation_config if theirs.can_generate() else None
    if settings is not None:
        theirs.generation_config = type(settings)()
    theirs.save_pretrained(folder)
    if settings is not None:
        theirs.generation_config = settings
        written = to_json(origin.generation) | {
            "transformers_version": settings.transformers_version
        }
        (folder / "generation_config.json").write_text(json.dumps(written, indent=2))


def _write_processor(
    family: Family, spec: Any, template: str | None, tokenizer: Any, origin: Origin, folder: Path
) -> None:
    """Write the tokenizer and processor: copies of the tokenizer's files, and missing ones.

    `template` is the stage's; None for a model that was never trained here, which keeps its own
    chat template.
    """
    from transformers import AutoProcessor, ProcessorMixin
    from transformers.utils import logging

    files = _files(Path(spec.tokenizer))
    for file in files:
        shutil.copy2(file, folder / file.name)
    added: Mapping[int, str] = getattr(family, "added_tokens", lambda model, origin: {})(
        spec, origin
    )
    if _add_tokens(tokenizer, added, fill=spec.origin is None) or not files:
        tokenizer.save_pretrained(folder)
    complete = template is None and any(file.name in PROCESSOR_FILES for file in files)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        if not complete:
            processor = family.processor(spec, tokenizer, template)
            if getattr(processor, "chat_template", None) is not None:
                tokenizer.chat_template = processor.chat_template
            processor.save_pretrained(folder)
            # for transformers versions that do not read processor_config.json
            processor.image_processor.save_pretrained(folder)
        elif spec.instruction is not None:
            load_tokenizer(spec.instruction).save_pretrained(folder / SECOND)
        loaded = AutoProcessor.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise WeightsError(
            f"transformers cannot load a processor from the exported folder: {reason}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if not isinstance(loaded, ProcessorMixin):
        raise WeightsError(
            f"the exported folder has no processor. Got a {type(loaded).__name__}; "
            "expected one for images and text. Fix: export an artifact with a complete tokenizer"
        )


def _files(folder: Path) -> list[Path]:
    """Return the files of a tokenizer and its processor in a folder; [] without a tokenizer."""
    found = sorted(
        {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()}
    )
    return found if any(file.match("*token*") for file in found) else []


def _add_tokens(tokenizer: Any, tokens: Mapping[int, str], *, fill: bool) -> bool:
    """Add missing tokens, each at its id if that is free. Returns True if any was added.

    With `fill`, unused tokens get the ids in between.
    """
    missing = {
        id_: token for id_, token in sorted(tokens.items()) if token not in tokenizer.get_vocab()
    }
    for id_, token in missing.items():
        first = max(tokenizer.get_vocab().values()) + 1
        unused = [f"<|unused_{number}|>" for number in range(first, id_)] if fill else []
        tokenizer.add_tokens([*unused, token], special_tokens=True)
    return bool(missing)


def _check_reads_back(theirs: Any, origin: Origin, folder: Path) -> None:
    """Load the config and settings of the folder. Raises WeightsError if a value differs."""
    from transformers import AutoConfig, GenerationConfig

    back = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    wrong = {path: pair for path, pair in config_diff(theirs.config, back).items()}
    given = flatten_config(back.to_dict())
    wrong |= {
        path: (to_json(value), given.get(path))
        for path, value in origin.config.items()
        if given.get(path) != to_json(value)
    }
    if theirs.can_generate():
        settings = _settings(
            GenerationConfig.from_pretrained(str(folder), local_files_only=True).to_diff_dict()
        )
        expected = _settings(_generation_config(origin).to_diff_dict())
        for name in sorted(expected.keys() | settings.keys()):
            if expected.get(name) != settings.get(name):
                wrong[f"generation_config.{name}"] = expected.get(name), settings.get(name)
    if wrong:
        listed = "; ".join(
            f"{path} {read!r}, expected {written!r}"
            for path, (written, read) in [*wrong.items()][:MAX_LISTED]
        )
        raise WeightsError(
            f"the exported folder reads back differently, and was removed. Got {listed}"
        )


# --- transformers' side


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise WeightsError(
            f"{folder}: no config.json. Fix: give a folder that `save_pretrained` wrote"
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
            f"architecture {architecture!r} is not supported" + suggest(architecture, known)
        )
    return architecture, known[architecture]


def _choose_family(spec: ModelSpec, architecture: str | None) -> tuple[str, Family, Any]:
    """Return (architecture, family, transformers config) for a model config. Raises SpecError."""
    fitting: dict[str, tuple[str, Family, Any]] = {}
    reasons = []
    for family in {id(module): module for module in families().values()}.values():
        if not isinstance(
            spec, get_type_hints(family.hf_config)["model"]
        ):  # another class of model
            continue
        try:
            config = family.hf_config(spec)
        except SpecError as error:
            reasons.append(str(error))
            continue
        name = (getattr(config, "architectures", None) or family.ARCHITECTURES)[0]
        fitting[name] = (name, family, config)
    if architecture is not None and architecture not in fitting:
        raise SpecError(
            f"--as: the artifact does not fit {architecture}" + suggest(architecture, fitting)
        )
    if not fitting:
        reason = max(reasons, key=len, default="no model family supports this class")
        raise SpecError(f"transformers has no model for this {type(spec).__name__}: {reason}")
    if architecture is None and len(fitting) > 1:
        raise SpecError(
            f"the artifact fits {', '.join(sorted(fitting))}. Fix: choose one with --as"
        )
    return fitting[architecture or next(iter(fitting))]


def _load(architecture: str, folder: Path) -> Any:
    import transformers

    pretrained.check_files(folder, str(folder))
    cls = getattr(transformers, architecture)
    try:
        model, info = cls.from_pretrained(
            str(folder),
            dtype="auto",
            local_files_only=True,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are reported below, by name
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise WeightsError(
            f"{folder} cannot be read: {str(error).strip().partition(chr(10))[0]}"
        ) from None
    wrong = {what: sorted(info[f"{what}_keys"]) for what in ("missing", "unexpected")}
    wrong["of another shape"] = [
        f"{name} {list(given)} against {list(needed)}"
        for name, given, needed in sorted(info["mismatched_keys"])
    ]
    _check_keys(f"{folder} is not a complete {architecture}", wrong)
    return model.eval()


def _check_keys(message: str, wrong: Mapping[str, list[str]]) -> None:
    """Raise WeightsError if `wrong` (problem -> names) has any names."""
    listed = [
        f"{problem} {', '.join(names[:MAX_LISTED])}"
        + f" and {len(names) - MAX_LISTED} more" * (len(names) > MAX_LISTED)
        for problem, names in wrong.items()
        if names
    ]
    if listed:
        raise WeightsError(f"{message}: {'; '.join(listed)}")


def _empty(architecture: str, config: Any, state: Mapping[str, Tensor]) -> Any:
    """Return the transformers model of a config with the tensors of `state`, in their dtypes."""
    import transformers

    model = getattr(transformers, architecture)(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    result = model.load_state_dict(
        {name: tensor.reshape(shapes[name]) for name, tensor in state.items() if name in shapes},
        strict=False,
        assign=True,
    )
    missing = set(result.missing_keys)
    # ties missing tensors to those of `state`, and removes them from `missing`
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    wrong = {"missing": sorted(missing), "extra": sorted(set(state) - set(shapes))}
    _check_keys(f"{architecture} and the artifact differ", wrong)
    return model.eval()


def _tied(theirs: Any) -> bool | None:
    """Return True if input and output embeddings are tied, None without a vocabulary."""
    try:
        return is_tied(theirs)
    except (AttributeError, RuntimeError):  # raised by transformers without a vocabulary
        return None


def _append_row(
    language: Any, names: Mapping[str, str], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the embeddings with one more row, the mean of the others, for the image token."""
    head = language.get_output_embeddings()
    matrices = {id(language.get_input_embeddings().weight), id(head.weight)}
    extended = {}
    for name, parameter in language.named_parameters():
        hf = names[f"language.{name}"]
        if id(parameter) in matrices:
            extended[hf] = torch.cat(
                [state[hf], state[hf].float().mean(0, keepdim=True).to(state[hf].dtype)]
            )
        elif parameter is getattr(head, "bias", None):
            extended[hf] = torch.cat([state[hf], state[hf].min().view(1)])
    return extended


# --- our side


def _ours(names: Mapping[str, str], theirs: nn.Module, spec: ModelSpec) -> dict[str, Tensor]:
    """Return the tensors with our names and shapes.

    Raises WeightsError for missing or extra ones.
    """
    state = theirs.state_dict()
    with torch.device("meta"):
        shapes = {
            name: tensor.shape for name, tensor in spec.build(pretrained=False).state_dict().items()
        }
    missing = sorted(hf for hf in names.values() if hf not in state)
    # tensors by memory address, because a tied tensor has a second name
    read = {state[hf].data_ptr() for hf in names.values() if hf in state}
    extra = sorted(
        hf
        for hf, tensor in state.items()
        if hf not in names.values() and tensor.data_ptr() not in read
    )
    _check_keys(
        f"{type(theirs).__name__} and our model differ", {"missing": missing, "extra": extra}
    )
    return {own: state[hf].reshape(shapes[own]).clone() for own, hf in names.items()}


def _as_stored(
    state: Mapping[str, Tensor], names: Mapping[str, str], folder: Path
) -> dict[str, Tensor]:
    """Return the tensors in the dtypes of the file.

    transformers loads some float16 tensors as float32, e.g. those of a Q-Former and T5's `wo`. A
    tensor that transformers has renamed since the file was written gets the file's dtype if it has
    only one.
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
    """Return the model config with the other fields of the pretrained weights' configs.

    For example attention windows, scaled positions and epsilons. Raises WeightsError for a field
    that changes outputs and is not supported.
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
        wrong = [path for path in config_diff(own.config(), config) if is_read(path)]
        if wrong:
            raise WeightsError(
                f"{where}: config fields of the {part} weights change the outputs and are not "
                f"supported. Got {', '.join(wrong[:MAX_LISTED])} other than the default. "
                "Fix: use weights without them"
            )
    return spec


def _with_tokenizer(spec: Any, folder: Path, into: Path, final: Path) -> Any:
    """Copy the folder's tokenizers next to the weights and return the model config with them.

    Without a tokenizer, the byte tokenizer is set.
    """
    first = _copy_tokenizer(folder, into, final)
    second = _copy_tokenizer(folder / SECOND, into / SECOND, final / SECOND)
    return _set_tokenizers(spec, first, second)


def _copy_tokenizer(folder: Path, into: Path, final: Path) -> str:
    files = _files(folder)
    if not files:
        return "bytes"
    into.mkdir(parents=True)
    for file in (*files, *folder.glob("config.json")):
        shutil.copy2(file, into / file.name)
    return str(final)


def _set_tokenizers(spec: Any, tokenizer: str, second: str) -> Any:
    """Return the model config with other tokenizers, in the parts that have one."""
    names = {part: tokenizer for part in ("language", "text") if hasattr(spec, part)}
    # a Q-Former has the second tokenizer if there is a language model
    if hasattr(getattr(spec, "bridge", None), "tokenizer"):
        names["bridge"] = second if names else tokenizer
    if not names:
        return replace(spec, tokenizer=tokenizer)
    return replace(
        spec, **{part: replace(getattr(spec, part), tokenizer=name) for part, name in names.items()}
    )


# --- comparison


def certify(
    family: Family, architecture: str, ours: Any, theirs: Any, origin: Origin
) -> Certificate:
    """Compare our model with transformers'. Raises WeightsError if their outputs disagree.

    `origin` has the special ids and generation settings of both sides.
    """
    import transformers

    state = theirs.state_dict()
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().contiguous().flatten().view(torch.uint8).numpy().data)
    with torch.no_grad():
        pairs = family.outputs(ours.float().eval(), _float(theirs), origin)
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
        fields=len(flatten_config(theirs.config.to_dict())),
        ids={
            path: to_json(v)
            for path, v in origin.config.items()
            if any(fnmatchcase(path, glob) for glob in TOKEN_FIELDS)
        },
        generation=to_json(origin.generation),
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
            f"{architecture}: the outputs disagree, so nothing was written. "
            f"Got {'; '.join(wrong)}; "
            f"expected at most {CLOSE:g} of the largest value, and equal token ids"
        )
    return certificate


def _float(model: Any) -> Any:
    """Return a float32 model: the model itself, or a copy if it has another dtype."""
    if all(p.dtype == torch.float32 for p in model.parameters()):
        return model
    return deepcopy(model).float().eval()


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    if ours.shape != theirs.shape:
        return float("inf")
    scale = float(theirs.abs().max()) or 1.0
    return float((ours.double() - theirs.double()).abs().max()) / scale


def _write(certificate: Certificate, folder: Path) -> None:
    (folder / CERTIFICATE).write_text(json.dumps(asdict(certificate), indent=1))


@contextmanager
def _atomic_folder(out: Path) -> Iterator[Path]:
    """Yield a folder that is renamed to `out` if the block succeeds, else removed."""
    if out.exists():
        raise WeightsError(f"{out} exists. Fix: remove it first, or give another folder")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
