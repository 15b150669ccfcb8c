"""Evaluations by name: `KIND:DATASET` arguments, e.g. of `bridgework eval --on` and gate files."""

from collections.abc import Mapping
from typing import Any

from bridgework.config import config_class, override
from bridgework.errors import SpecError, suggest
from bridgework.mixture import unique
from bridgework.plugins import Plugins

EVALUATIONS = Plugins(
    kind="evaluation",
    package="bridgework.evaluation",
    methods=("name", "better", "run"),
    example="my_lab.evals",
)


@config_class
class Evaluations:
    """A set of evaluations with different names, so that `--set` finds each by its name."""

    evals: tuple[Any, ...]

    def __post_init__(self) -> None:
        unique("evaluations", [evaluation.name for evaluation in self.evals])


def kinds() -> dict[str, Any]:
    """Return the evaluations that ship, by their default names."""
    return {cls.name: cls for cls in EVALUATIONS.classes()}


def parse(argument: str, where: str = "--on") -> Any:
    """Return the evaluation of a KIND:DATASET argument. Raises SpecError."""
    kind, colon, dataset = argument.partition(":")
    if not colon or not dataset:
        raise SpecError(
            f"{where}: not of the form KIND:DATASET. Got {argument!r}; "
            "expected e.g. vqa:vqav2-val or retrieval:../my/pairs"
        )
    if "." in kind:
        return EVALUATIONS.load_class(kind)(dataset=dataset)
    known = kinds()
    if kind not in known:
        raise SpecError(f"{where}: no evaluation {kind!r}{suggest(kind, known)}")
    return known[kind](dataset=dataset)


def assign(evaluations: Evaluations, assignments: list[str] | None) -> Evaluations:
    """Apply NAME.FIELD=VALUE arguments. Raises SpecError."""
    changes = {}
    for assignment in assignments or ():
        path, equals, value = assignment.partition("=")
        if not equals:
            raise SpecError(
                f"--set: not of the form NAME.FIELD=VALUE. Got {assignment!r}; "
                "expected e.g. vqa.rows=200"
            )
        changes[f"evals.{path}"] = value
    return override(evaluations, changes)


def of_table(table: Mapping[str, Any], where: str) -> Any:
    """Return the evaluation of a table with `on` and fields, e.g. of a gate file.

    Raises SpecError, with a suggestion, for an unknown kind or field.
    """
    given = dict(table)
    if not isinstance(on := given.pop("on", None), str):
        raise SpecError(
            f"{where}: an evaluation needs `on`. Got {', '.join(table) or 'no field'}; "
            'expected e.g. on = "vqa:vqav2-val"'
        )
    return override(parse(on, where), given)
