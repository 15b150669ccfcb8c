"""What holds for every curation: every row has a verdict, work goes on where it stopped, rows know their source."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from bridgework.config import config_class
from bridgework.curation import annotations
from bridgework.curation.contact_sheet import examples
from bridgework.curation.runner import (
    LIMITS,
    CurationLimits,
    CurationRun,
    Decision,
    Rows,
    Say,
    make,
)
from bridgework.data.dataset import open_dataset, verify, write
from bridgework.data.manifest import Manifest
from bridgework.data.quarantine import records
from bridgework.data.samples import Sample, pair
from bridgework.errors import DataError, SpecError
from tests.curation.support import flags, written
from tests.curation.vowels import Vowels
from tests.house.source import ROOT

IMAGE = next(flags()).images[0]
QUESTIONS = {150, 390}  # 0.5 %: what a quarantine allows
ROWS = [
    pair(f"row-{i}", IMAGE, "?" if i in QUESTIONS else "banana bandana" if i % 3 else "rhythm")
    for i in range(400)
]


@pytest.fixture
def source(tmp_path: Path) -> str:
    """25 shards."""
    return written(tmp_path / "source", ROWS)


def run(
    source: str | list[str], dest: Path, home: Path, *, workers: int = 0,
    limits: CurationLimits = LIMITS, say: Say = str,
    **fields: Any,
) -> Manifest:  # fmt: skip
    desk = dest.parent / "desk"
    desk.mkdir(exist_ok=True)
    sources = [source] if isinstance(source, str) else source
    vowels = Vowels(desk=str(desk), **fields)
    return make(vowels, sources, str(dest), home=home, limits=limits, workers=workers, say=say)


def judged(dest: Path) -> list[str]:
    """The rows that were judged since this was last asked."""
    log = dest.parent / "desk" / "judged"
    keys = log.read_text().split() if log.is_file() else []
    log.unlink(missing_ok=True)
    return keys


def files(dest: Path) -> list[str]:
    """What lies in the folder of facts, without the digest of the source."""
    return sorted(
        file.name.partition("-")[2] for file in Path(f"{dest}.judged").rglob("*") if file.is_file()
    )


def rows(path: Path) -> list[Sample]:
    return list(open_dataset(str(path)).samples())


def test_every_row_is_kept_dropped_or_quarantined(source: str, home: Path, tmp_path: Path) -> None:
    made = run(source, tmp_path / "made", home)
    counts, aside = made.parameters["counts"], list(records(str(tmp_path / "made.quarantine")))
    kept = [s.key for s in ROWS if s.text == "banana bandana"]
    assert counts == {"kept": len(kept), "too few vowels": 400 - 2 - len(kept)}
    assert sum(counts.values()) + len(aside) == 400 and made.quarantined == {"bad_row": 2}
    assert [(r.key, r.row, r.detail) for r in aside] == [
        (f"row-{i}", i, "a question is no caption") for i in (150, 390)
    ]
    assert [s.key for s in rows(tmp_path / "made")] == kept and not verify(str(tmp_path / "made"))


def test_row_has_provenance(source: str, home: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "made", home)
    digest = open_dataset(source).manifest.digest
    for sample in rows(tmp_path / "made"):
        assert sample.provenance == {
            "vowels.score": "6",
            "vowels.dataset": digest,
            "vowels.key": sample.key,
            "vowels.letters": "digest of aeiou",
        }


def test_manifest_records_the_parameters(source: str, home: Path, tmp_path: Path) -> None:
    made = run(source, tmp_path / "made", home, at_least=2)
    told = {name: made.parameters[name] for name in ("letters", "at_least", "copies")}
    assert told == {
        "letters": "digest of aeiou",
        "at_least": 2,
        "copies": 1,
    }  # a model's digest, not its place
    assert made.made_by == "tests.curation.vowels" and made.parents == (
        open_dataset(source).manifest.digest,
    )


def test_a_run_that_was_cut_off_judges_only_what_was_left_and_ends_as_an_unbroken_one(
    source: str, home: Path, tmp_path: Path
) -> None:
    dest = tmp_path / "broken"
    (tmp_path / "desk").mkdir()
    (tmp_path / "desk" / "stop").write_text("row-170")  # in the middle of the eleventh shard
    with pytest.raises(KeyboardInterrupt):
        run(source, dest, home)
    assert not dest.exists() and len(judged(dest)) == 170
    said = list[str]()
    broken = run(source, dest, home, say=said.append)
    assert judged(dest) == [
        f"row-{i}" for i in range(168, 400)
    ]  # but for the row group in which it stopped
    assert said[0] == (
        "vowels: 400 rows to annotate; 10 of 25 shards are already annotated; an interrupted shard resumes"
    )
    assert files(dest) == [f"{n:05d}.jsonl" for n in range(25)]
    assert broken.digest == run(source, tmp_path / "whole", home).digest


def test_killed_run_loses_only_the_current_row_group(home: Path, tmp_path: Path) -> None:
    source, dest, desk = (
        written(tmp_path / "one-shard", ROWS[:100], shard_rows=4096),
        tmp_path / "made",
        tmp_path / "desk",
    )
    desk.mkdir()
    (desk / "kill").write_text("row-70")
    words = ["curate", "tests.curation.vowels", source, str(dest), f"desk={desk}"]
    killed = subprocess.run(
        [sys.executable, "-c", "from bridgework.cli import main; main()", *words],
        env={**os.environ, "PYTHONPATH": "platform:."}, cwd=ROOT, capture_output=True,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL and len(judged(dest)) == 70 and not dest.exists()
    run(source, dest, home)
    assert judged(dest) == [f"row-{i}" for i in range(64, 100)] and files(dest) == ["00000.jsonl"]


@pytest.mark.parametrize("scheme", ["", "memory:/"])
def test_incomplete_file_counts_up_to_its_last_complete_row_group(
    scheme: str, tmp_path: Path
) -> None:
    path = f"{scheme}{tmp_path}/facts/0.jsonl"
    told = [annotations.AnnotatedRow(f"row-{n}", {"n": n}) for n in range(7)]
    lines = [json.dumps(one._asdict()) for one in told]
    fs, root = fsspec.core.url_to_fs(f"{scheme}{tmp_path}/facts")
    fs.makedirs(root)
    fs.pipe_file(f"{root}/0.jsonl.11111111.part", "\n".join([*lines[:5], lines[5][:9]]).encode())
    fs.pipe_file(
        f"{root}/0.jsonl.22222222.tmp", "\n".join(lines[:3]).encode()
    )  # as they were called once
    fs.pipe_file(f"{root}/1.jsonl.33333333.part", "\n".join(lines[:6]).encode())
    asked = list[int]()

    def rest(known: int) -> Iterator[list[annotations.AnnotatedRow]]:
        asked.append(known)
        yield from (told[start : start + 2] for start in range(2 * known, 7, 2))

    assert annotations.has_parts(path.rpartition("/")[0])
    annotations.save(path, 2, rest)
    assert asked == [2] and list(annotations.read(path, 7)) == told
    left = sorted(str(file).rpartition("/")[2] for file in fs.ls(root, detail=False))
    assert left == ["0.jsonl", "1.jsonl.33333333.part"]


def test_only_a_missing_annotation_file_is_written_again(
    source: str, home: Path, tmp_path: Path
) -> None:
    dest = tmp_path / "made"
    first = run(source, dest, home)
    judged(dest)
    (file,) = (tmp_path / "made.judged").rglob("*-00007.jsonl")
    file.unlink()
    shutil.rmtree(dest)
    assert run(source, dest, home).digest == first.digest
    assert judged(dest) == [f"row-{i}" for i in range(112, 128)]


def test_another_threshold_reuses_annotations_and_another_letter_does_not(
    source: str, home: Path, tmp_path: Path
) -> None:
    dest = tmp_path / "made"
    run(source, dest, home)
    judged(dest)
    shutil.rmtree(dest)
    assert run(source, dest, home, at_least=6).rows == 266 and not judged(dest)
    shutil.rmtree(dest)
    assert run(source, dest, home, letters="y").parameters["counts"] == {
        "too few vowels": 266,
        "kept": 132,
    }
    assert len(judged(dest)) == 400


def test_existing_dataset_is_reused(source: str, home: Path, tmp_path: Path) -> None:
    first = run(source, tmp_path / "made", home)
    judged(tmp_path / "made")
    shutil.rmtree(tmp_path / "made.judged")
    assert run(source, tmp_path / "made", home).digest == first.digest and not judged(
        tmp_path / "made"
    )


@pytest.mark.parametrize(
    ("change", "had", "wanted"),
    [
        ({"at_least": 2}, "at_least=1", "at_least=2"),
        ({"letters": "aei"}, "'letters=digest of aeiou'", "'letters=digest of aei'"),
        ({"letters": "a" * 300}, "'letters=digest of aeiou'", f"'letters=digest of {'a' * 90}..'"),
        (
            {"copies": 2, "at_least": 3, "model": "m"},
            "at_least=1 copies=1 model=none",
            "at_least=3 copies=2 model=m",
        ),
    ],
)
def test_dest_made_with_other_fields_is_rejected_with_both_values(
    change: dict[str, Any], had: str, wanted: str, source: str, home: Path, tmp_path: Path
) -> None:
    run(source, tmp_path / "made", home)
    with pytest.raises(DataError) as caught:
        run(source, tmp_path / "made", home, **change)
    assert str(caught.value) == (
        f"{tmp_path / 'made'}: it holds another dataset. It was made with `{had}`; expected `{wanted}`. "
        "Fix: delete it or choose another DEST"
    )


def test_a_place_that_holds_other_sources_or_another_curations_work_is_refused(
    source: str, home: Path, tmp_path: Path
) -> None:
    run(source, tmp_path / "made", home)
    other = written(tmp_path / "other", ROWS[:20])
    one, two = (open_dataset(place).manifest.digest[:8] for place in (source, other))
    with pytest.raises(
        DataError,
        match=rf"with `'sources={one} of /[^`]*`; expected `'sources={one}, {two} of /",
    ):
        run([source, other], tmp_path / "made", home)
    with pytest.raises(
        DataError,
        match=r"made with `curation=tests`; expected `curation=tests.curation.vow",
    ):
        run(source, Path(other), home)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_the_rows_that_come_out_do_not_depend_on_how_the_source_is_cut_into_shards(
    home: Path, tmp_path: Path
) -> None:
    made = []
    for number, (group_rows, shard_rows) in enumerate(((8, 16), (32, 4096), (1, 200))):
        place = written(tmp_path / f"source-{number}", ROWS, group_rows, shard_rows)
        run(place, tmp_path / f"made-{number}", home)
        made.append([replace(s, provenance={}) for s in rows(tmp_path / f"made-{number}")])
    assert made[0] == made[1] == made[2]


def test_rows_of_several_sources_that_share_a_key_stay_apart(home: Path, tmp_path: Path) -> None:
    one = written(tmp_path / "one", ROWS[1:3])
    other = written(
        tmp_path / "other", [pair("row-1", IMAGE, "aloe"), pair("row-1#2", IMAGE, "anemone")]
    )
    made = run([one, other], tmp_path / "made", home)
    told = {s.key: (s.text, s.provenance["vowels.key"]) for s in rows(tmp_path / "made")}
    assert told == {
        "row-1": ("banana bandana", "row-1"),
        "row-2": ("banana bandana", "row-2"),
        "row-1#2": ("aloe", "row-1"),
        "row-1#2#2": ("anemone", "row-1#2"),
    }
    assert made.parents == tuple(open_dataset(place).manifest.digest for place in (one, other))


def test_rows_of_sources_with_several_licenses_know_their_own(home: Path, tmp_path: Path) -> None:
    one, other = written(tmp_path / "one", ROWS[1:3]), str(tmp_path / "other")
    own = [pair("own", IMAGE, "aloe", license="MIT"), pair("none", IMAGE, "anemone")]
    write(own, other, source="flags", license="CC-BY-4.0", made_by="tests")
    made = run([one, other], tmp_path / "made", home)
    assert made.license == "CC0-1.0, CC-BY-4.0"
    assert [s.license for s in rows(tmp_path / "made")] == [
        "CC0-1.0",
        "CC0-1.0",
        "MIT",
        "CC-BY-4.0",
    ]
    run(one, tmp_path / "alone", home)
    assert {s.license for s in rows(tmp_path / "alone")} == {None}  # the manifest tells that of all


def test_a_row_may_become_several(source: str, home: Path, tmp_path: Path) -> None:
    made = run(source, tmp_path / "made", home, copies=3)
    keys = [s.key for s in rows(tmp_path / "made")]
    assert (
        made.rows == 3 * made.parameters["counts"]["kept"] == len(set(keys)) and "row-1#3" in keys
    )


def test_examples_contain_rows_of_every_reason(source: str, home: Path, tmp_path: Path) -> None:
    made = run(source, tmp_path / "made", home)
    curation = Vowels(desk=str(tmp_path / "desk"))
    making = CurationRun.of(curation, [source], str(tmp_path / "made"), home)
    shown = list(examples(making, made.parameters["counts"]))
    assert Counter(one.why for one in shown) == {"kept": 6, "too few vowels": 6}
    assert all(
        one.note == f"{6 * one.kept} of at most 6" and one.kept == (one.text != "rhythm")
        for one in shown
    )
    shutil.rmtree(tmp_path / "made.judged")
    with pytest.raises(DataError, match=r"is gone\. Fix: delete the dataset and curate it again"):
        list(examples(making, made.parameters["counts"]))


# --- what is refused -------------------------------------------------------------------------------------------------


@config_class
class Short(Vowels):
    """Gives so many verdicts too few or too many."""

    off_by: int

    def decide(self, rows: Rows) -> Iterator[Decision]:
        verdicts = [Decision("kept", (sample,)) for sample, _ in rows()]
        yield from [*verdicts, *verdicts][: len(verdicts) + self.off_by]


@pytest.mark.parametrize(
    ("off_by", "words"), [(-1, "fewer decisions than rows. Got none for 'row-399'"), (1, "more")]
)
def test_too_few_or_too_many_decisions_raise(
    off_by: int, words: str, source: str, home: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=words):
        make(Short(desk=str(tmp_path), off_by=off_by), [source], str(tmp_path / "made"), home=home)
    assert not (tmp_path / "made").exists()


def test_too_many_quarantined_rows_raise_with_their_table(home: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"1 of 199 rows are bad \(1 bad_row\).*read .*made\.quarantine"
    ):
        run(written(tmp_path / "few", ROWS[:199]), tmp_path / "made", home)
    assert (
        len(list(records(str(tmp_path / "made.quarantine")))) == 1
        and not (tmp_path / "made").exists()
    )
    enough = written(tmp_path / "enough", ROWS[:200])
    assert run(enough, tmp_path / "right", home).quarantined == {"bad_row": 1}  # 0.5 % exactly


def test_larger_max_bad_reuses_the_annotations(home: Path, tmp_path: Path) -> None:
    few, dest = written(tmp_path / "few", ROWS[:160]), tmp_path / "made"
    with pytest.raises(DataError, match="1 of 160 rows are bad"):
        run(few, dest, home)
    judged(dest)
    made = run(few, dest, home, limits=CurationLimits(max_bad=0.01))
    assert made.quarantined == {"bad_row": 1} and not judged(dest)
    assert run(few, dest, home).digest == made.digest  # what is there is taken as it is
    for share in (-0.1, 1.5):
        with pytest.raises(
            SpecError, match=rf"max_bad is a share of the rows, from 0 to 1; got {share}"
        ):
            CurationLimits(max_bad=share)


def test_messages_count_source_rows_and_new_samples(
    source: str, home: Path, tmp_path: Path
) -> None:
    said = list[str]()
    run(source, tmp_path / "one", home, say=said.append)
    run(source, tmp_path / "several", home, say=said.append, copies=3)
    assert (
        said[1]
        == "vowels: kept 266 of 400 rows (266 kept; 132 too few vowels; 2 quarantined: bad_row)"
    )
    assert said[3] == said[1].replace(" rows (", " rows as 798 samples (")


def test_max_bad_is_a_share_of_source_rows(source: str, home: Path, tmp_path: Path) -> None:
    """Of 400 rows 2 are bad; that only one is kept makes them no more."""
    lone = [
        *ROWS[:1],
        *(pair(s.key, IMAGE, "?" if "?" in s.text else "rhythm") for s in ROWS[1:]),
        pair("x", IMAGE, "a"),
    ]
    assert run(written(tmp_path / "lone", lone), tmp_path / "made", home).rows == 1


def test_curation_that_keeps_nothing_raises(source: str, home: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"nothing of 400 rows \(398 too few vowels; 2 quarantined: bad_row\), so .*made is not",
    ):
        run(source, tmp_path / "made", home, at_least=9)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda lines: lines[:-1], "wrong number of annotations. Got 15; expected 16"),
        (lambda lines: [*lines[:3], "{", *lines[4:]], "line 4: not an annotation"),
        (lambda lines: lines[::-1], "Got key 'row-15'; expected 'row-0'"),
    ],
)
def test_edited_annotations_raise(
    spoil: Callable[[list[str]], list[str]], words: str, source: str, home: Path, tmp_path: Path
) -> None:
    run(source, tmp_path / "made", home)
    shutil.rmtree(tmp_path / "made")
    (file,) = (tmp_path / "made.judged").rglob("*-00000.jsonl")
    file.write_text("\n".join(spoil(file.read_text().splitlines())) + "\n")
    with pytest.raises(DataError, match=f"{words}.*delete the f"):
        run(source, tmp_path / "made", home)


def test_dest_inside_a_dataset_is_rejected(source: str, home: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"deep/made is inside the dataset .*source, which must not change"
    ):
        make(Vowels(desk=str(tmp_path)), [source], f"{source}/deep/made", home=home, say=str)
    assert verify(source) == []


def test_sources_are_required_and_unique(source: str, home: Path, tmp_path: Path) -> None:
    for sources in ([], [source, source]):
        with pytest.raises(DataError, match="one source or several, each once"):
            run(sources, tmp_path / "made", home)


# --- Ray -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_actors_match_one_process_in_results_and_errors(
    source: str, home: Path, tmp_path: Path
) -> None:
    alone = run(source, tmp_path / "alone", home)
    assert run(source, tmp_path / "actors", home, workers=2).digest == alone.digest
    crash = written(tmp_path / "crash", [*ROWS[:20], pair("last", IMAGE, "crash")])
    with pytest.raises(DataError, match=r"^the endpoint does not answer; start it$"):
        run(crash, tmp_path / "none", home, workers=1)
