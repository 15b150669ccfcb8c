"""Documents keep the order in which they are read; images that say nothing go, and are counted."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bridgework.data.dataset import open_dataset, verify
from bridgework.data.importers import interleaved
from bridgework.data.quarantine import Reason, records
from bridgework.data.samples import Sample
from bridgework.errors import DataError

WRONG = [
    None,
    True,
    -1,
    1.5,
    "",
    "x",
    [],
    [1],
    {},
    {"a": 1},
    float("nan"),
    10**400,
    "\ud800",
    [None],
    [[]],
    [{}],
]


def picture(width: int = 70, height: int = 64, *, flat: bool = False) -> bytes:
    file = io.BytesIO()
    shown = (
        Image.new("L", (width, height), 7)
        if flat
        else Image.linear_gradient("L").resize((width, height))
    )
    shown.save(file, "PNG")
    return file.getvalue()


FILES = {
    "a.png": picture(),
    "b.png": picture(64, 192),
    "sub/c.png": picture(65, 65),
    "sub/with space.png": picture(),
    "small.png": picture(63, 100),
    "long.png": picture(193, 64),
    "flat.png": picture(flat=True),
    "cut.png": picture()[:80],
    "page.png": b"<html>",
}


class Import:
    """One run of the importer over the files of a folder, and what came of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder / "src", list[str]()
        self.dest = str(folder / "made")
        (self.folder / "sub").mkdir(parents=True)
        for name, data in FILES.items():
            (self.folder / name).write_bytes(data)

    def pages(
        self, *, how: dict[str, Any] | None = None, **texts: str | bytes
    ) -> dict[str, Sample]:
        for name, text in texts.items():
            path = self.folder / f"{name.replace('__', '/')}.html"
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return self.read(str(self.folder), **(how or {}))

    def rows(self, *rows: Any, **how: Any) -> dict[str, Sample]:
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (self.folder / "rows.jsonl").write_text("\n".join(lines))
        return self.read(str(self.folder / "rows.jsonl"), **how)

    def read(self, source: str, **how: Any) -> dict[str, Sample]:
        self.manifest = interleaved.InterleavedImporter(max_bad=1, **how).run(
            source, self.dest, say=self.said.append
        )
        self.aside = {record.key: record.reason for record in records(f"{self.dest}.quarantine")}
        assert verify(self.dest) == []
        return {sample.key: sample for sample in open_dataset(self.dest).samples()}


@pytest.fixture
def made(tmp_path: Path) -> Import:
    return Import(tmp_path)


def order(sample: Sample) -> list[str | bytes]:
    """Texts and the bytes of images, as they are read."""
    assert {part.role for part in sample.parts} == {"caption"}
    return [
        sample.images[part.image] if part.image is not None else part.text or ""
        for part in sample.parts
    ]


# --- pages -----------------------------------------------------------------------------------------------------------

PAGE = """<?xml version="1.0" encoding="UTF-8"?><!DOCTYPE html><html><head><title>Not shown</title>
<style>p {}</style></head><body class="sidebar"><header><img src="a.png">Site</header><nav>Home</nav>
<div class="navheader"><img src="a.png"/>Next</div><div role="navigation">Up</div>
<article><header><h1>Cats   &amp;
 dogs</h1></header><!-- not shown --><p>A <b>cat</b>s<i>kin</i>,<br>a <img src="small.png" alt="icon">dog.</p>
<p><img alt="A cat." src="a.png"></p><ul><li>one<li>two <img src="./sub/../b.png?x=1#y"> three</ul>
<script>alert("<img src='a.png'>")</script><noscript>x</noscript><footer>By Ann</footer></article>
<table><tr><td>1</td><td>2</td></tr></table><footer>Terms</footer></body></html>"""


def test_a_page_is_read_in_the_order_of_its_elements_without_what_is_of_the_site(
    made: Import,
) -> None:
    found = made.pages(cats=PAGE)["cats.html"]
    assert order(found) == [
        "Cats & dogs\nA catskin,\na dog.",
        FILES["a.png"],
        "one\ntwo",
        FILES["b.png"],
        "three\nBy Ann\n1\n2",
    ]
    assert found.provenance == {"dropped.small": "1"}


def test_images_are_found_from_the_page_that_names_them(made: Import) -> None:
    page = 'x<img src="c.png"><img src="../a.png"><img src=" with%20space.png "><img src="../sub/c.png">'
    assert order(made.pages(sub__page=page)["sub/page.html"])[1:] == [
        FILES[name] for name in ("sub/c.png", "a.png", "sub/with space.png", "sub/c.png")
    ]


DROPPED = {
    "small.png": "small",
    "long.png": "aspect",
    "flat.png": "flat",
    "cut.png": "truncated",
    "page.png": "not_an_image",
    "gone.png": "missing_image",
    "sub": "missing_image",
    "../outside.png": "outside",
    "/a.png": "outside",
    "sub/../../outside.png": "outside",
    "link.png": "outside",
    "data:image/png;base64,iVBORw0KGgo=": "remote",
    "http://127.0.0.1:9/a.png": "remote",
    "//127.0.0.1:9/a.png": "remote",
    "file:///etc/hostname": "remote",
    "//[": "remote",
}


@pytest.mark.parametrize("name", DROPPED)
def test_an_image_that_says_nothing_or_is_not_there_is_dropped_and_counted(
    name: str, made: Import
) -> None:
    (made.folder.parent / "outside.png").write_bytes(picture())
    (made.folder / "link.png").symlink_to(made.folder.parent / "outside.png")
    page = f'one <img src="{name}"> two <img src="a.png"><img src="{name}">'
    found = made.pages(page=page)["page.html"]
    assert order(found) == ["one two", FILES["a.png"]]
    assert found.provenance == {f"dropped.{DROPPED[name]}": "2"}


def test_documents_without_an_image_or_a_text_left_are_left_out_and_are_not_bad(
    made: Import,
) -> None:
    icons, texts = 'x<img src="small.png"><img src="http://x/y.png">', "x"
    found = made.pages(
        good='x<img src="a.png">', icons=icons, texts=texts, images='<img src="a.png"> '
    )
    assert list(found) == ["good.html"] and made.aside == {} and made.manifest.quarantined == {}
    assert made.manifest.left_out == {
        "documents without a text": 1,
        "documents without an image": 2,
    }
    assert made.said[-1].endswith(
        "; left out: 1 documents without a text; left out: 2 documents without an image"
    )


def test_a_document_none_of_whose_images_can_be_read_is_a_bad_row(made: Import) -> None:
    found = made.pages(
        good='x<img src="a.png"><img src="gone.png">',
        gone='x<img src="small.png"><img src="gone.png">',
        torn='x<img src="cut.png"><img src="gone.png">',
    )
    assert list(found) == ["good.html"]
    assert made.aside == {"gone.html": Reason.MISSING_IMAGE, "torn.html": Reason.TRUNCATED}


def test_when_nothing_is_left_it_is_said_why(made: Import) -> None:
    with pytest.raises(
        DataError, match=r"no samples came out.*; left out: 1 documents without an image"
    ):
        made.pages(icons='x<img src="small.png">')


def test_the_bounds_are_the_callers_to_set(made: Import) -> None:
    page = 'x<img src="small.png"><img src="long.png"><img src="flat.png">'
    found = made.pages(page=page, how={"min_side": 63, "max_aspect": 3.1})["page.html"]
    assert len(found.images) == 2 and made.manifest.parameters["min_side"] == 63
    with pytest.raises(DataError, match=r"images=x goes with a \.jsonl"):
        made.pages(how={"images": "x"})


def test_pages_tell_their_encoding(made: Import) -> None:
    image = b'<img src="a.png">'
    found = made.pages(
        latin=b'<meta charset="iso-8859-1">caf\xe9' + image,
        utf16="caf\u00e9".encode("utf-16") + image.decode().encode("utf-16-le"),
        plain="caf\u00e9".encode() + image,
    )
    assert {sample.text for sample in found.values()} == {"caf\u00e9"} and len(found) == 3


def test_a_bad_page_is_put_aside_and_a_hostile_one_harms_nothing(made: Import) -> None:
    found = made.pages(
        good='x<img src="a.png">',
        place='an &lt;image> <img src="a.png">',
        deep="<div>" * 3_000 + 'x<img src="a.png">',
        inline="<b>x" * 2_000 + '<img src="a.png">',
        noise=bytes(range(256)) * 8,
        declared=b"<?xml version='1.0' encoding='bogus'?><!ENTITY x SYSTEM 'file:///etc/hostname'>&x;<img src=a.png>",
    )
    assert {"good.html", "inline.html"} <= set(found) and made.aside == {
        "place.html": Reason.PLACEHOLDERS
    }
    assert all(
        "root" not in sample.text and "localhost" not in sample.text for sample in found.values()
    )


BLANK = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
LAZY = {
    "data-src": f'<img src="{BLANK}" data-src="a.png">',
    "no source": '<img data-src="a.png">',
    "an empty source": '<img src="" data-src="a.png">',
    "a small placeholder": '<img src="small.png" data-original="a.png">',
    "a missing placeholder": '<img src="gone.png" data-lazy-src="a.png">',
    "lazy sizes": f'<img src="{BLANK}" data-srcset="small.png 320w, a.png 640w" data-sizes="auto">',
    "several": f'<img src="{BLANK}" data-thumb-src="small.png" data-full-src="a.png">',
    "other data": f'<img src="{BLANK}" data-id="5" data-url="/x/5" data-image="a.png">',
    "loaded when it was saved": '<img src="a.png" data-src="https://x.org/a.png">',
    "a list of sizes": '<img srcset="small.png 1x, a.png 2x">',
    "a source and a list": '<img src="a.png" srcset="https://x.org/b.png 640w">',
    "a remote source and a list": '<img src="https://x.org/b.png" srcset="a.png 640w, x.png 9w">',
    "a list with data": f'<img srcset="{BLANK} 1x, a.png 2x">',
    "a picture": '<picture><source srcset="a.avif"><source srcset="a.png"><img src=""></picture>',
    "a lazy picture": f'<picture><source data-srcset="a.png 2x"><img src="{BLANK}"></picture>',
    "a page without scripts": f'<img src="{BLANK}"><noscript><img src="a.png"></noscript>',
    "before it": f'<noscript><img src="a.png"></noscript><img src="{BLANK}">',
    "AMP": '<amp-img src="a.png" width="70"></amp-img>',
}


@pytest.mark.parametrize("name", LAZY)
def test_images_that_are_loaded_late_or_for_a_screen_are_found(name: str, made: Import) -> None:
    found = made.pages(page=f"<article><p>Before.</p>{LAZY[name]}<p>After.</p></article>")
    assert order(found["page.html"]) == ["Before.", FILES["a.png"], "After."]
    assert found["page.html"].provenance == {}


def test_a_source_that_can_be_used_stays_the_picture(made: Import) -> None:
    page = 'x<img src="a.png" srcset="b.png 2x"><img src="sub/c.png" data-id="7" data-url="/b.png">'
    assert order(made.pages(page=page)["page.html"])[1:] == [FILES["a.png"], FILES["sub/c.png"]]


def test_an_image_none_of_whose_names_can_be_used_is_dropped_once(made: Import) -> None:
    page = (
        f'x<img src="a.png"><img src="{BLANK}" data-src="https://x.org/b.png">'
        f'<img src="{BLANK}" data-src="gone.png"><img src="{BLANK}">'
    )
    found = made.pages(page=page)["page.html"]
    assert found.provenance == {"dropped.remote": "2", "dropped.missing_image": "1"}


def test_no_name_of_an_image_leads_out_of_the_folder(made: Import) -> None:
    (made.folder.parent / "outside.png").write_bytes(picture())
    names = ("../outside.png", "/etc/passwd", "..%2foutside.png", "file:///etc/passwd")
    tags = [f'<img src="{BLANK}" data-src="{name}" srcset="{name} 2x">' for name in names]
    found = made.pages(page='x<img src="a.png">' + "".join(tags))["page.html"]
    assert found.images == (FILES["a.png"],)
    assert found.provenance == {"dropped.outside": "3", "dropped.remote": "1"}


def test_pages_that_are_not_read_are_counted(made: Import) -> None:
    for name in ("a.mhtml", "b.MHT", "c.webarchive", "._page.html", ".ipynb_checkpoints/x.html"):
        (made.folder / name).parent.mkdir(exist_ok=True)
        (made.folder / name).write_text("x")
    made.pages(page='x<img src="a.png">')
    assert made.manifest.left_out == {
        "hidden files": 2,
        "pages of .mht": 1,
        "pages of .mhtml": 1,
        "pages of .webarchive": 1,
    }


# --- JSON ------------------------------------------------------------------------------------------------------------


def mmc4(*matched: tuple[Any, Any], texts: Any = ("One.", "Two.", "Three.")) -> dict[str, Any]:
    shown = [
        {"image_name": name, "matched_text_index": at, "raw_url": "http://x/y.png"}
        for name, at in matched
    ]
    return {"url": "http://x/", "text_list": texts, "image_info": shown, "similarity_matrix": []}


def test_mmc4s_images_stand_before_the_text_they_match_whatever_their_order_in_the_file(
    made: Import,
) -> None:
    row = mmc4(("sub/c.png", 2), ("a.png", 0), ("b.png", 2), ("small.png", 1))
    found = made.rows(row)["row-00000000"]
    assert order(found) == [
        FILES["a.png"],
        "One. Two.",
        FILES["sub/c.png"],
        FILES["b.png"],
        "Three.",
    ]
    assert found.provenance == {"url": "http://x/", "dropped.small": "1"}


def test_obelics_texts_and_images_share_one_order(made: Import, tmp_path: Path) -> None:
    row = {
        "texts": ["One.\n\nTwo.", None, None, "Three."],
        "images": [None, "a.png", "http://x/y.png", None],
    }
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(picture(90, 90))
    found = made.rows(row, images=str(tmp_path / "pictures"))["row-00000000"]
    assert order(found) == ["One.\n\nTwo.", picture(90, 90), "Three."]
    assert found.provenance == {"dropped.remote": "1"}


BAD = {
    "no JSON": ("{", Reason.BAD_ROW),
    "no object": ([1], Reason.BAD_ROW),
    "no texts": ({"images": ["a.png"]}, Reason.BAD_ROW),
    "unequal": ({"texts": ["x"], "images": [None, "a.png"]}, Reason.BAD_ROW),
    "text is a number": ({"texts": [4, None], "images": [None, "a.png"]}, Reason.BAD_ROW),
    "image is a list": ({"texts": ["x", None], "images": [None, []]}, Reason.BAD_ROW),
    "no image_info": ({"text_list": ["x"]}, Reason.BAD_ROW),
    "matched to none": (mmc4(("a.png", 3)), Reason.BAD_ROW),
    "matched to -1": (mmc4(("a.png", -1)), Reason.BAD_ROW),
    "no name": (mmc4((None, 0)), Reason.BAD_ROW),
    "placeholder": (mmc4(("a.png", 0), texts=["an <image>"]), Reason.PLACEHOLDERS),
}


@pytest.mark.parametrize(
    "how",
    [
        {"min_side": -1},
        {"max_aspect": 0.0},
        {"max_aspect": -1.0},
        {"max_aspect": 0.99},
        {"max_aspect": float("nan")},
    ],
)
def test_a_rule_that_no_image_can_keep_is_refused(how: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=f"{next(iter(how))}=.*0 pixels or more, and the long one at least 1 times"
    ):
        interleaved.InterleavedImporter(**how).run(str(tmp_path), str(tmp_path / "made"))


def test_every_bad_document_is_put_aside_with_its_reason(made: Import) -> None:
    assert list(made.rows(mmc4(("a.png", 0)), *(row for row, _ in BAD.values()))) == [
        "row-00000000"
    ]
    assert list(made.aside.values()) == [reason for _, reason in BAD.values()]


def test_whatever_stands_in_a_field_every_document_goes_one_way_or_another(made: Import) -> None:
    good = mmc4(("a.png", 0))
    rows = [good | {name: value} for name in good for value in WRONG]
    rows += [mmc4((name, at)) for value in WRONG for name, at in ((value, 0), ("a.png", value))]
    rows += [
        {"texts": a, "images": b}
        for value in WRONG
        for a, b in ((value, ["a.png"]), (["x"], value))
    ]
    rows += [{"texts": [value, "x"], "images": [None, "a.png"]} for value in WRONG]
    made.rows(good, *rows, *map(json.dumps, WRONG))
    counts = (*made.manifest.quarantined.values(), *made.manifest.left_out.values())
    assert made.manifest.rows + sum(counts) == 1 + len(rows) + len(WRONG)
