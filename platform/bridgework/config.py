"""Specs: frozen dataclasses of configuration that are read, changed and named by dotted path.

One dotted path is the `--set` argument, the search key of a sweep and the parameter in MLflow:
`override` accepts the output of `flat`.
"""

import ast
import os
import re
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from importlib import import_module
from math import isfinite
from typing import Any, Literal, TypeVar, Union, cast, dataclass_transform

from bridgework import old_names
from bridgework.errors import SpecError, suggest

T = TypeVar("T")
Change = tuple[list[str], Any, str]  # rest of the path, new value, complete path for messages
# Environment variable: packages other than bridgework whose specs a recipe may name,
# comma-separated.
TRUST = "BRIDGEWORK_TRUST"
FLOAT32_MAX = 3.4028234e38
FLOAT32_TINY = 1.1754944e-38  # the smallest number of full precision
ADDED = "added"  # key of a field's metadata: `to_dict` omits the field at its default
BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
_NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*", re.ASCII)


def option(*, default: Any = MISSING) -> Any:
    """Return a spec's field that does not affect the training result.

    A run may resume with another value of it.
    """
    return field(default=default, metadata={"option": True})


def added(*, default: T) -> T:
    """Return a field that was added to a spec after recipes and artifacts with the spec existed.

    It is not written at its default, so fingerprints of recipes that do not set it stay the same.
    """
    return field(default=default, metadata={ADDED: True})


@dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(field, option, added)
)
def config_class(cls: type[T]) -> type[T]:
    """Decorate a class as a frozen, keyword-only dataclass.

    A plain alias of `dataclass(...)` would hide the fields from mypy.
    """
    return dataclass(frozen=True, kw_only=True)(cls)


def is_spec(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def kind(cls: type) -> str:
    """Return the command-line name of a spec class: `MLP` -> mlp, `QFormerConfig` -> qformer."""
    return cls.__name__.removesuffix("Config").lower()


def to_dict(value: Any, *, options: bool = True) -> Any:
    """Return a JSON-ready copy; a spec becomes {"_": "module:Class", field: ...}.

    A mapping keeps its order, because the order of `trains` matters. Without `options` the fields
    made by `option` are omitted: the rest is the identity of the recipe.
    """
    if is_spec(value):
        head = {"_": f"{type(value).__module__}:{type(value).__qualname__}"}
        items = {
            f.name: getattr(value, f.name)
            for f in fields(value)
            if options or not f.metadata.get("option")
        }
        omitted = {
            f.name
            for f in fields(value)
            if ADDED in f.metadata and getattr(value, f.name) == f.default
        }
        return head | {
            n: to_dict(item, options=options) for n, item in items.items() if n not in omitted
        }
    if isinstance(value, Mapping):
        return {str(k): to_dict(v, options=options) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_dict(v, options=options) for v in value]
    return value


def from_dict(value: Any) -> Any:
    """Invert `to_dict`. Raises SpecError for a class that does not exist or is not a spec.

    A recipe may come from a stranger, e.g. with downloaded weights. Its classes are therefore
    called only if they are specs, and imported only from bridgework, from modules that this process
    has already imported, and from the packages in $BRIDGEWORK_TRUST.
    """
    if isinstance(value, list):
        return tuple(from_dict(v) for v in value)
    if not isinstance(value, Mapping):
        return value
    if "_" not in value:
        return {k: from_dict(v) for k, v in value.items()}
    cls = _import_spec(value["_"])
    own = {f.name for f in fields(cls)}
    given: dict[str, Any] = {}
    for key, item in value.items():
        if key != "_":
            name = str(key)
            given[name if name in own else old_names.FIELDS.get(name, name)] = from_dict(item)
    try:
        return cls(**given)
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise SpecError(f"the recipe does not fit {value['_']}: {error}") from None


def _import_spec(name: Any) -> type:
    """Import the spec class `module:Class`."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SpecError(
            f"the recipe names a class that cannot be read. Got {str(name)[:100]!r}; "
            "expected module:Class"
        )
    name = old_names.current_class(name)
    module, _, attribute = name.partition(":")
    trusted = {"bridgework", *os.environ.get(TRUST, "").split(",")}
    package = module.partition(".")[0]
    if module not in sys.modules and package not in trusted:
        raise SpecError(
            f"the recipe names {name!r}, and only specs of bridgework are imported. "
            f"Fix: if you trust that package, set {TRUST}={package}"
        )
    try:
        cls = getattr(import_module(module), attribute)
    except (ImportError, AttributeError):
        raise SpecError(
            f"the recipe names {name!r}, which this version of bridgework does not have"
        ) from None
    if not (isinstance(cls, type) and is_dataclass(cls) and all(f.kw_only for f in fields(cls))):
        raise SpecError(f"the recipe names {name!r}, which is not a spec")
    return cls


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return every leaf by its dotted path, e.g. {"stages.align.optim.peak_lr": 0.002}.

    `override` accepts the result. A field that may hold several kinds of spec also yields its kind:
    {"model.bridge": "mlp", "model.bridge.depth": 2}.
    """
    leaves: dict[str, Any] = {}
    if is_spec(value):
        hints = typing.get_type_hints(type(value))
        for name, item in ((f.name, getattr(value, f.name)) for f in fields(value)):
            if is_spec(item) and len(_kinds(hints[name])) > 1:
                leaves[_join(prefix, name)] = kind(type(item))
            leaves |= flat(item, _join(prefix, name))
    elif names := _names(value):
        for name, item in zip(names, value, strict=True):
            leaves |= flat(item, _join(prefix, name))
    elif isinstance(value, Mapping):
        leaves = {_join(prefix, name): item for name, item in value.items()}
    else:
        leaves[prefix] = list(value) if isinstance(value, tuple) else value
    return leaves


def override(value: T, changes: Mapping[str, Any]) -> T:
    """Return a copy of `value` with other values at dotted paths.

    changes: path -> value, e.g. {"stages.align.optim.peak_lr": 3e-5}. `*` means every element
    (`stages.*.model.bridge`). A string is parsed by the field's type, so command-line arguments
    work unchanged. A field with several kinds of spec is switched by name (`bridge=linear`,
    `bridge=mlp(depth=3)`). All changes are applied at once, so values that must match each other
    may change together; a complete value is replaced before its fields.

    Raises SpecError, with a suggestion, for a path or a value that does not fit.

    Example:
        >>> import bridgework as bw
        >>> system = bw.override(bw.load("llava"), {"stages.*.model.bridge": "mlp(depth=3)"})
        >>> [stage.model.bridge.depth for stage in system.stages]
        [3, 3]
        >>> bw.override(system, {"stages.align.optim.peek_lr": 1e-3})
        Traceback (most recent call last):
        bridgework.errors.SpecError: stages.align.optim.peek_lr: AdamW has no field 'peek_lr'; did you mean 'peak_lr'?
    """
    return cast(
        T,
        _apply(value, type(value), [(path.split("."), new, path) for path, new in changes.items()]),
    )


def positive(what: str, value: Any, *names: str) -> None:
    """Raise SpecError if a field in `names` is below 1; what: the spec's name in messages."""
    for name in names:
        if getattr(value, name) < 1:
            raise SpecError(f"{what}.{name} must be at least 1, got {getattr(value, name)}")


def bounded(
    what: str,
    value: float,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
) -> None:
    """Raise SpecError for a number that is not finite in float32 or out of its range.

    what: the number's dotted name in the message.
    """
    low = (above is None or value > above) and (least is None or value >= least)
    high = (below is None or value < below) and abs(value) <= FLOAT32_MAX
    if isfinite(value) and low and high:
        return
    limits = {"above": above, "at least": least, "below": below}
    text = " and ".join(f"{name} {limit:g}" for name, limit in limits.items() if limit is not None)
    raise SpecError(f"{what} must be {text or 'a number'}, finite in float32, got {value:g}")


def _join(prefix: str, name: Any) -> str:
    return f"{prefix}.{name}" if prefix else str(name)


def path_name(value: Any) -> str:
    """Return the name of a config in a dotted path: its `name`, else its kind."""
    return str(getattr(value, "name", kind(type(value))))


def _names(value: Any) -> list[str]:
    """Return the path names of a tuple's specs: `name`, else the kind; [] if these are not unique.

    [] for any other value, too.
    """
    if not isinstance(value, tuple) or not all(is_spec(v) for v in value):
        return []
    names = [path_name(v) for v in value]
    return names if len(set(names)) == len(names) else []


def _apply(value: Any, hint: Any, changes: list[Change]) -> Any:
    for parts, new, path in changes:
        unchanged = is_spec(value) and new == kind(type(value))  # the kind that it already has
        if not parts and not unchanged:
            value = _coerce(new, hint, path)
    inner = [change for change in changes if change[0]]
    if not inner:
        return value
    if is_spec(value):
        return _apply_fields(value, inner)
    if names := _names(value):
        return _apply_elements(value, names, inner)
    if isinstance(value, Mapping):  # keys are globs with dots: the rest of the path is the key
        item = (*typing.get_args(hint), Any, Any)[1]
        new_items = {".".join(parts): _coerce(new, item, path) for parts, new, path in inner}
        return {**value, **new_items}
    parts, _, path = inner[0]
    raise SpecError(
        f"{path}: {parts[0]!r} is inside a plain {type(value).__name__}, which has no fields"
    )


def _apply_fields(value: Any, changes: list[Change]) -> Any:
    hints, names = typing.get_type_hints(type(value)), [f.name for f in fields(value)]
    below: dict[str, list[Change]] = {}
    for (head, *rest), new, path in changes:
        if head not in names:
            raise SpecError(
                f"{path}: {type(value).__name__} has no field {head!r}" + suggest(head, names)
            )
        below.setdefault(head, []).append((rest, new, path))
    return replace(
        value,
        **{head: _apply(getattr(value, head), hints[head], own) for head, own in below.items()},
    )


def _apply_elements(
    value: tuple[Any, ...], names: list[str], changes: list[Change]
) -> tuple[Any, ...]:
    below: dict[str, list[Change]] = {name: [] for name in names}
    for (head, *rest), new, path in changes:
        if head != "*" and head not in names:
            raise SpecError(f"{path}: no element {head!r}" + suggest(head, names))
        if not rest:
            raise SpecError(
                f"{path}: {head!r} is a complete {type(value[0]).__name__}. "
                "Fix: name one of its fields"
            )
        for name in names if head == "*" else [head]:
            below[name].append((rest, new, path))
    return tuple(_apply(v, type(v), below[name]) for name, v in zip(names, value, strict=True))


def _coerce(new: Any, hint: Any, path: str) -> Any:
    """Convert `new` to the type `hint`; a string is read as a command-line argument."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _literal(new) if isinstance(new, str) else new
    if origin in (Union, types.UnionType):
        return _coerce_union(new, args, path)
    if origin is Literal:
        allowed = {str(a): a for a in args}
        if str(new) in allowed:
            return allowed[str(new)]
        raise SpecError(f"{path}: {new!r} is not allowed" + suggest(str(new), allowed))
    if is_dataclass(hint):
        return _variant(new, (cast(type, hint),), path)
    if origin is tuple:
        return _coerce_tuple(new, args, path)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return _coerce_mapping(new, args[1], path)
    return _scalar(new, hint, path)


def _kinds(hint: Any) -> tuple[type, ...]:
    """Return the spec classes that a field may hold."""
    args = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(a for a in args if is_dataclass(a) and isinstance(a, type))


def _coerce_union(new: Any, args: tuple[Any, ...], path: str) -> Any:
    if type(None) in args and (new is None or new in ("none", "None", "null")):
        return None
    rest = tuple(a for a in args if a is not type(None))
    if all(is_dataclass(a) for a in rest):
        return _variant(new, rest, path)
    if len(rest) == 1:
        return _coerce(new, rest[0], path)
    for hint in rest:
        try:
            return _coerce(new, hint, path)
        except SpecError:
            continue
    raise SpecError(
        f"{path}: {new!r} is none of {', '.join(getattr(a, '__name__', str(a)) for a in args)}"
    )


def _variant(new: Any, classes: tuple[type, ...], path: str) -> Any:
    """Parse `linear` or `mlp(depth=3)` as one of the classes that the field may hold."""
    if isinstance(new, classes):
        return new
    known = {kind(c): c for c in classes}
    if not isinstance(new, str):
        raise SpecError(f"{path}: {new!r} is not one of {', '.join(known)}")
    name, given = _call(new, path)
    if name not in known:
        raise SpecError(f"{path}: no kind {name!r}" + suggest(name, known))
    cls = known[name]
    hints, own = typing.get_type_hints(cls), fields(cast(Any, cls))
    for key in given:
        if key not in hints:
            raise SpecError(
                f"{path}: {name} has no field {key!r}" + suggest(key, [f.name for f in own])
            )
    missing = [
        f.name
        for f in own
        if f.default is MISSING and f.default_factory is MISSING and f.name not in given
    ]
    if missing:
        raise SpecError(
            f"{path}: {name} needs {', '.join(missing)}. "
            f"Fix: write it like {name}({missing[0]}=VALUE)"
        )
    return cls(**{key: _coerce(v, hints[key], path) for key, v in given.items()})


def _call(text: str, path: str) -> tuple[str, dict[str, Any]]:
    """Parse `mlp(depth=3)` to ("mlp", {"depth": 3}); a bare name has no arguments."""
    try:
        call = ast.parse(text if "(" in text else f"{text}()", mode="eval").body
    except (SyntaxError, ValueError):
        call = None
    except (MemoryError, RecursionError):  # endless brackets
        call = None
    match call:
        case ast.Call(func=ast.Name(id=name), args=[], keywords=given) if all(k.arg for k in given):
            return name, {str(k.arg): _literal(ast.unparse(k.value)) for k in given}
    raise SpecError(f"{path}: cannot read {text!r}. Fix: write it like mlp(depth=3)")


def _coerce_tuple(new: Any, args: tuple[Any, ...], path: str) -> tuple[Any, ...]:
    """Parse a tuple or list, or `0.9,0.95` with or without brackets.

    Items that contain commas need quotes.
    """
    if isinstance(new, str):
        parsed = _literal(new)
        bare = new[1:-1] if new[:1] in ("(", "[") else new
        new = (
            parsed
            if isinstance(parsed, tuple | list)
            else [i.strip() for i in bare.split(",") if i.strip()]
        )
    if not isinstance(new, tuple | list):
        raise SpecError(f"{path} takes a list of values such as 0.9,0.95, got {new!r}")
    inner = args[:1] * len(new) if args[-1] is Ellipsis else args
    if len(inner) != len(new):
        raise SpecError(f"{path} takes {len(args)} values, got {len(new)}: {new!r}")
    return tuple(_coerce(item, hint, path) for item, hint in zip(new, inner, strict=True))


def _coerce_mapping(new: Any, hint: Any, path: str) -> Mapping[str, Any]:
    if isinstance(new, str):
        new = _literal(new)
    if not isinstance(new, Mapping):
        raise SpecError(f"{path} takes a mapping such as {{'bridge.*': 1.0}}, got {new!r}")
    return {str(k): _coerce(v, hint, path) for k, v in new.items()}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return text


def _scalar(new: Any, hint: Any, path: str) -> Any:
    if hint is str:
        if isinstance(new, str):
            return new
    elif hint is bool:
        if isinstance(new, bool):
            return new
        if isinstance(new, str) and new.lower() in BOOLEANS:
            return BOOLEANS[new.lower()]
    elif hint in (int, float):
        try:
            number = hint(new)
            if (
                isfinite(number)
                and not isinstance(new, bool)
                and (isinstance(new, str) or number == new)
            ):
                return number
        except (TypeError, ValueError, OverflowError):
            pass
    elif isinstance(new, str):
        raise SpecError(
            f"{path} holds a complete {getattr(hint, '__name__', hint)}. "
            "Fix: name one of its fields"
        )
    else:
        return new
    raise SpecError(f"{path} must be {hint.__name__}, got {new!r}")
