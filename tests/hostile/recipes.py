"""Words of a command line and recipes of an artifact that are wrong, odd, or written to run something."""

import json
import pickle
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# --- `--set PATH=VALUE` ----------------------------------------------------------------------------------------------

MARK = "{mark}"  # a folder that is there if any of these ever ran

CODE: tuple[str, ...] = (
    "__import__('os').mkdir({mark!r})",
    "(lambda: __import__('os').mkdir({mark!r}))()",
    "[__import__('os').mkdir({mark!r}) for x in (1,)]",
    "mlp(depth=__import__('os').mkdir({mark!r}))",
    "f'{{__import__(\"os\").mkdir({mark!r})}}'",
    "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}",
    "!!python/object/apply:os.mkdir [{mark!r}]",
    "cos\nmkdir\n(S{mark!r}\ntR.",
    "os:mkdir",
    "$(mkdir {mark})",
    "; mkdir {mark}",
)
ODD: tuple[str, ...] = (
    *(
        "",
        " ",
        "none",
        "{}",
        "[]",
        "()",
        "{[]: 1}",
        "b'x'",
        "...",
        "1j",
        "\0",
        "a\0b",
        "True",
        "0x10",
        "1_000",
        "\u0967",
    ),
    *(
        "nan",
        "inf",
        "-inf",
        "1e999",
        "-1e999",
        "-1",
        "0",
        "99999999999999999999999999",
        "mlp(depth=1e999)",
    ),
    *(
        "mlp(",
        "mlp()",
        "mlp(1)",
        "mlp(*[1])",
        "mlp(**{'depth': 1})",
        "mlp(depth=1, depth=2)",
        "mlp(depht=1)",
    ),
    *(
        "x" * 100_000,
        "9" * 100_000,
        "(" * 100_000,
        "-" * 100_000 + "1",
        "[" * 5_000 + "]" * 5_000,
        "mlp(" * 5_000,
    ),
    *(
        "{'a':" * 2_000 + "1" + "}" * 2_000,
        "mlp(depth=" + "9" * 10_000 + ")",
        "not " * 50_000 + "1",
    ),
)
DEEP: tuple[str, ...] = (
    *(
        "",
        ".",
        "..",
        "stages",
        "stages.",
        ".stages",
        "stages..optim",
        "stages.*",
        "stages.*.*",
        "*.*.*",
        "stages.nope",
    ),
    *(
        "stages.align.__class__",
        "stages.align.__init__.__globals__",
        "stages.align.model.build",
        "__dict__",
        "stages.0",
    ),
    *(
        "stages.align.optim.peak_lr.real",
        "stages.align.optim.peak_lr.__class__.__mro__",
        "stages.align.budget.steps.x",
    ),
    *(".".join(["stages"] * 10_000), "stages." + "x" * 100_000, "stages.align.\0"),
)

NEARLY: Mapping[str, tuple[str, str, str]] = {  # what is misspelled -> path, value, what was meant
    "a stage": ("stages.allign.optim.peak_lr", "1e-3", "align"),
    "a field": ("stages.align.optim.peek_lr", "1e-3", "peak_lr"),
    "a field of a field": ("stages.align.model.bridge.dept", "2", "depth"),
    "a source": ("stages.align.data.sources.coca.factor", "2", "coco"),
    "a kind of bridge": ("stages.align.model.bridge", "lineer", "linear"),
    "a word of a kind": ("stages.align.model.bridge", "mlp(dept=2)", "depth"),
    "a choice": ("stages.align.optim.decay", "cosin", "cosine"),
    "a precision": ("stages.align.zero.precision", "bf61", "bf16"),
}
OUT_OF_RANGE: tuple[tuple[str, str], ...] = (
    *(
        ("stages.align.budget.steps", value)
        for value in ("0", "-1", "1.5", "nan", "inf", "1e3", "many")
    ),
    *(("stages.align.budget.batch", value) for value in ("0", "-16", "17")),
    *(("stages.align.budget.micro", value) for value in ("0", "-1")),
    *(("stages.align.optim.peak_lr", value) for value in ("0", "-1e-3", "nan", "inf", "fast")),
    *(("stages.align.optim.final_lr", value) for value in ("1", "nan")),
    *(("stages.align.optim.warmup", value) for value in ("1", "-0.1", "nan")),
    *(("stages.align.data.alpha", value) for value in ("-1", "3", "nan", "inf")),
    *(("stages.align.data.lanes", value) for value in ("0", "-4", "3")),
    *(("stages.align.data.window", value) for value in ("0", "-1")),
    *(("stages.align.data.max_tokens", value) for value in ("0", "7")),
    *(("stages.align.data.sources.cc.factor", value) for value in ("0", "-1", "nan", "inf")),
    *(("stages.align.data.sources.cc.max_epochs", value) for value in ("0", "-1", "nan")),
    *(("stages.align.data.sources.cc.following", value) for value in ("-0.1", "1.1", "nan")),
    ("stages.align.data.sources.cc.images", "0"),
    ("stages.align.zero.stage", "4"),
    ("stages.align.name", "instruct"),
    ("stages.align.name", ""),
    ("stages.align.name", "../../align"),
    ("stages.align.name", "a\nb"),
    ("stages.align.trains", "{}"),
    ("stages.instruct.starts_from", "nowhere"),
)

# --- recipe.json -----------------------------------------------------------------------------------------------------

NAMES: tuple[
    Any, ...
] = (  # none of them is a spec, and most of them do something when they are called
    *(
        "os:mkdir",
        "os:system",
        "subprocess:Popen",
        "builtins:eval",
        "builtins:exec",
        "builtins:Exception",
        "io:open",
    ),
    *(
        "builtins:KeyboardInterrupt",
        "builtins:SystemExit",
        "pathlib:Path",
        "types:FunctionType",
        "pickle:loads",
    ),
    *(
        "bridgework.errors:SpecError",
        "bridgework.system:load",
        "bridgework.system:System.__init__",
        "bridgework:spec",
    ),
    *(
        "bridgework.artifacts:Info",
        "bridgework.artifacts:load",
        "bridgework.training.loop:TrainJob",
    ),
    *(
        "bridgework.data.dataset:Dataset",
        "bridgework.data.reader:ReaderConfig",
        "bridgework.recipes.llava:system",
    ),
    *(
        "bridgework.nothing:X",
        "bridgework.system:Nothing",
        "bridgework..system:System",
        "bridgework.system",
    ),
    *(
        "",
        ":",
        "::",
        ".:",
        "..:x",
        ".system:System",
        "a:b:c",
        "x" * 10_000,
        "\0:x",
        "os\n:mkdir",
        7,
        None,
        [],
        {},
        True,
    ),
)
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1.5,
        float("nan"),
        float("inf"),
        10**30,
        "",
        "x" * 1_000,
        "../x",
        [],
        {},
        [[]],
        [None],
    ),
    *({"_": 1}, {"_": "os:mkdir"}, {"a": {"_": "builtins:exit"}}),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a nest of lists and mappings."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for step, below in inner:
        yield (*at, step)
        yield from places(below, (*at, step))


def put(whole: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of `whole` with `value` at `path`."""
    copy = json.loads(json.dumps(whole))
    at = copy
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return copy


# --- the files of an artifact ----------------------------------------------------------------------------------------

NOT_JSON: Mapping[str, bytes] = {
    "no bytes": b"",
    "HTML": b"<html>404</html>",
    "no text": b"\xff\xfe\0",
    "brackets": b"[" * 200_000,
    "a nest": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "NaN": b"NaN",
    "an empty object": b"{}",
}


def safetensors(header: Mapping[str, Any], body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


class Harmful:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.folder,)


def weights(mark: Path) -> dict[str, bytes]:
    """Files in the place of weights.safetensors; the first two would make `mark` if they were unpickled."""
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return {
        "a pickle": pickle.dumps(Harmful(mark)),
        "a pickle behind a header": safetensors({}, pickle.dumps(Harmful(mark))),
        "no bytes": b"",
        "HTML": b"<html>404</html>",
        "a header of 2^60 bytes": struct.pack("<Q", 2**60) + b"{}",
        "a header that is no JSON": struct.pack("<Q", 4) + b"<htm",
        "a tensor of 2^60 numbers": safetensors(
            {"bridge.x": tensor | {"shape": [2**60]}}, bytes(8)
        ),
        "a tensor behind the end": safetensors(
            {"bridge.x": tensor | {"data_offsets": [8, 16]}}, bytes(8)
        ),
        "tensors on each other": safetensors({"a": tensor, "b": tensor}, bytes(8)),
        "a tensor below zero": safetensors({"bridge.x": tensor | {"shape": [-2]}}, bytes(8)),
        "a tensor of an unknown kind": safetensors(
            {"bridge.x": tensor | {"dtype": "PICKLE"}}, bytes(8)
        ),
        "a tensor of another model": safetensors({"harm.x": tensor}, bytes(8)),
        "cut": safetensors({"bridge.x": tensor}, bytes(4)),
    }
