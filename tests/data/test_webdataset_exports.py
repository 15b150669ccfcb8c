"""What looks like an export comes back whole if it is one, and otherwise keeps the rules of every format."""

import json
from pathlib import Path
from typing import Any

from bridgework.data.dataset import open_dataset, write
from bridgework.data.exporters import webdataset as exporter
from bridgework.data.importers import webdataset
from bridgework.data.quarantine import Reason, records
from bridgework.data.samples import Part, Sample
from tests.data.tars import PNG, samples, tar


def bring(source: Path, dest: Path, max_bad: float) -> list[Sample]:
    webdataset.WebDatasetImporter(max_bad=max_bad).run(str(source), str(dest), say=lambda _: None)
    return list(open_dataset(str(dest)).samples())


def exported(*said: dict[str, Any], **fields: Any) -> bytes:
    """A .json as our exporter writes it, of an image and what is said."""
    shown = {"role": said[0]["role"] if said else "caption", "image": 0}
    return json.dumps({"key": "k", "images": ["png"], "parts": [shown, *said], **fields}).encode()


def say(role: str, text: Any) -> dict[str, Any]:
    return {"role": role, "text": text}


TOLD: dict[
    str, tuple[Reason, bytes]
] = {  # samples in the exporter's form that no importer would have let in
    "empty": (Reason.EMPTY_TEXT, exported(say("caption", ""))),
    "blank": (Reason.EMPTY_TEXT, exported(say("caption", "   "))),
    "blanks": (Reason.EMPTY_TEXT, exported(say("caption", " "), say("caption", "\n"))),
    "mute": (Reason.EMPTY_TEXT, exported(say("user", "?"), say("assistant", " "))),
    "shown": (Reason.EMPTY_TEXT, exported(say("user", "?"), {"role": "assistant", "image": 0})),
    "unasked": (
        Reason.EMPTY_TEXT,
        exported(say("user", "?"), say("assistant", "!"), say("user", "")),
    ),
    "nothing": (Reason.EMPTY_TEXT, exported(key="k", images=[], parts=[])),
    "worse": (Reason.EMPTY_TEXT, exported(say("user", "?"), say("assistant", "!"), rejected=" ")),
    "place": (Reason.PLACEHOLDERS, exported(say("caption", "an <image>"))),
    "asked": (Reason.PLACEHOLDERS, exported(say("user", "<image>?"), say("assistant", "!"))),
    "system": (
        Reason.PLACEHOLDERS,
        exported(say("user", "?"), say("assistant", "!"), say("system", "<image>")),
    ),
    "rejected": (
        Reason.PLACEHOLDERS,
        exported(say("user", "?"), say("assistant", "!"), rejected="<image>"),
    ),
    "number": (Reason.BAD_ROW, exported(say("caption", 5))),
    "list": (Reason.BAD_ROW, exported(say("caption", ["a cat"]))),
    "up": (Reason.BAD_ROW, exported(say("caption", "a cat"), key="../../x")),
    "root": (Reason.BAD_ROW, exported(say("caption", "a cat"), key="/etc/passwd")),
    "drive": (Reason.BAD_ROW, exported(say("caption", "a cat"), key="C:/x")),
    "lines": (Reason.BAD_ROW, exported(say("caption", "a cat"), key="a\nb")),
    "half": (Reason.BAD_ROW, exported(say("caption", "a cat"), key="\ud800")),
    "no": (Reason.BAD_ROW, exported(say("caption", "a cat"), key="")),
    "seven": (Reason.BAD_ROW, exported(say("caption", "a cat"), key=7)),
}


def test_what_looks_like_an_export_is_held_to_the_rules_of_every_format(tmp_path: Path) -> None:
    members = [
        (f"{name}.{end}", data)
        for name, (_, told) in TOLD.items()
        for end, data in (("png", PNG), ("json", told))
    ]
    (tmp_path / "a.tar").write_bytes(tar(*members, *samples(0, 1)))
    assert [sample.key for sample in bring(tmp_path / "a.tar", tmp_path / "d", max_bad=1)] == [
        "0000"
    ]
    aside = {record.key: record.reason for record in records(f"{tmp_path}/d.quarantine")}
    assert aside == {name: reason for name, (reason, _) in TOLD.items()}


def test_blank_texts_and_odd_keys_that_other_formats_let_in_come_back_from_an_export(
    tmp_path: Path,
) -> None:
    image, said = Part("user", image=0), Part("assistant", text="Yes.")
    kept = [
        Sample("boxes alone", (PNG,), (Part("caption", image=0),)),
        Sample("system", (), (Part("system", text=" "), Part("user", text="?"), said)),
        Sample("an image asks", (PNG,), (image, said)),
        Sample(
            "between", (PNG, PNG), (image, Part("user", text="\n"), Part("user", image=1), said)
        ),
        *(
            Sample(key, (PNG,), (image, said))
            for key in ("../../x", "/etc/x", "http://x.org/a.png", "a\nb", "C:\\x")
        ),
    ]
    write(kept, str(tmp_path / "d"), source="s", license="unknown", made_by="t")
    exporter.WebDatasetExporter().run(str(tmp_path / "d"), str(tmp_path / "out"))
    assert bring(tmp_path / "out", tmp_path / "back", max_bad=0) == kept
