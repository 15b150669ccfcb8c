"""Tars as generators: sound ones, and members that were made to harm."""

import tarfile
from typing import Any

from bridgework.data.quarantine import Reason
from bridgework.data.synthetic import shapes

PNG, *PICTURES = [sample.images[0] for sample in shapes(rows=40, size=16)]

Member = tuple[str | tarfile.TarInfo, bytes]


def tar(*members: Member, end: bool = True, form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of (name, content); a TarInfo in place of a name declares what it likes."""
    pieces = []
    for name, data in members:
        info = tarfile.TarInfo(name) if isinstance(name, str) else name
        info.size = len(data) if isinstance(name, str) else info.size
        pieces += [info.tobuf(form), data, b"\0" * (-len(data) % 512)]
    return b"".join(pieces) + b"\0" * (1024 if end else 0)


def samples(first: int, rows: int) -> list[Member]:
    """`rows` samples of a picture and a text, named from 0000 on; their pictures differ."""
    return [
        (f"{row:04d}.{ending}", data)
        for row in range(rows)
        for ending, data in (
            ("png", PICTURES[first + row]),
            ("txt", f"caption {first + row}".encode()),
        )
    ]


def special(name: str, kind: bytes, **fields: Any) -> Member:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info, b""


HOSTILE: dict[str, tuple[Reason, list[Member]]] = {
    "../up": (Reason.OUTSIDE, [("../up.png", PNG), ("../up.txt", b"x")]),
    "a/../../up": (Reason.OUTSIDE, [("a/../../up.png", PNG), ("a/../../up.txt", b"x")]),
    "/etc/passwd": (Reason.OUTSIDE, [("/etc/passwd.png", PNG), ("/etc/passwd.txt", b"x")]),
    "a\\up": (Reason.OUTSIDE, [("a\\up.png", PNG), ("a\\up.txt", b"x")]),
    "C:/up": (Reason.OUTSIDE, [("C:/up.png", PNG), ("C:/up.txt", b"x")]),
    "new\nline": (Reason.OUTSIDE, [("new\nline.png", PNG), ("new\nline.txt", b"x")]),
    "symlink": (
        Reason.OUTSIDE,
        [special("symlink.png", tarfile.SYMTYPE, linkname="/etc/passwd"), ("symlink.txt", b"x")],
    ),
    "hardlink": (
        Reason.OUTSIDE,
        [special("hardlink.png", tarfile.LNKTYPE, linkname="good.png"), ("hardlink.txt", b"x")],
    ),
    "device": (
        Reason.OUTSIDE,
        [special("device.png", tarfile.CHRTYPE, devmajor=1), ("device.txt", b"x")],
    ),
    "pipe": (Reason.OUTSIDE, [special("pipe.png", tarfile.FIFOTYPE), ("pipe.txt", b"x")]),
    "sparse": (
        Reason.BAD_ROW,
        [
            special(
                "sparse.png", tarfile.REGTYPE, pax_headers={"GNU.sparse.realsize": "1000000000000"}
            ),
            ("sparse.txt", b"x"),
        ],
    ),
    "renamed": (
        Reason.OUTSIDE,
        [special("x.png", tarfile.REGTYPE, pax_headers={"path": "../renamed.png"})],
    ),
    "many": (Reason.BAD_ROW, [(f"many.{number}.png", b"") for number in range(1001)]),
}
