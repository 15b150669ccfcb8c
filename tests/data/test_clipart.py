"""What is wrong with one drawing's SVG is a bad row; what is wrong with the command is said in one line."""

from pathlib import Path

import pytest

from bridgework.data.dataset import open_dataset
from bridgework.data.importers import clipart
from bridgework.data.quarantine import Reason, records
from bridgework.data.synthetic import shapes
from bridgework.errors import DataError

SVG = """<svg xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"><cc:Work>
<dc:title>a red apple</dc:title><cc:license resource="http://web.resource.org/cc/PublicDomain"/></cc:Work></svg>"""
ENCODINGS = ("foo-bar", "shift_jis", "utf-7", "x" * 300)


@pytest.fixture
def art(tmp_path: Path) -> Path:
    """One sound drawing, and one of each encoding that the parser cannot read."""
    for part in ("png", "svg"):
        (tmp_path / "art" / part).mkdir(parents=True)
    svgs = [SVG, *(f'<?xml version="1.0" encoding="{encoding}"?>{SVG}' for encoding in ENCODINGS)]
    for sample, svg in zip(shapes(rows=len(svgs), size=16), svgs, strict=True):
        (tmp_path / "art" / "png" / f"{svgs.index(svg)}.png").write_bytes(sample.images[0])
        (tmp_path / "art" / "svg" / f"{svgs.index(svg)}.svg").write_text(svg)
    return tmp_path / "art"


def test_an_svg_of_an_encoding_that_cannot_be_read_is_a_bad_row(art: Path) -> None:
    dest = str(art.parent / "made")
    clipart.ClipartImporter(max_bad=1).run(str(art), dest, say=lambda _: None)
    assert [sample.key for sample in open_dataset(dest).samples()] == ["0.png"]
    assert [record.reason for record in records(f"{dest}.quarantine")] == [Reason.LICENSE] * len(
        ENCODINGS
    )


@pytest.mark.parametrize("side", [0, -1, 16_384])
def test_a_side_that_no_picture_has_is_refused(side: int, art: Path) -> None:
    with pytest.raises(DataError, match=f"side={side}: .* 1 to 16383 pixels"):
        clipart.ClipartImporter(side=side).run(str(art), str(art.parent / "made"))
