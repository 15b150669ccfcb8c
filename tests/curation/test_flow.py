"""What holds for every curation: every row has a verdict, work goes on where it stopped, rows know their source."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bridgework.curation.explain import examples
from bridgework.curation.flow import Making, Rows, Verdict, make
from bridgework.data.manifest import Manifest
from bridgework.data.quarantine import records
from bridgework.data.samples import Sample, pair
from bridgework.data.shards import open_dataset, verify
from bridgework.errors import DataError
from bridgework.spec import spec
from tests.curation.support import flags, written
from tests.curation.vowels import Vowels

IMAGE = next(flags()).images[0]
QUESTIONS = {150, 390}  # 0.5 %: what a quarantine allows
ROWS = [pair(f"row-{i}", IMAGE, "?" if i in QUESTIONS else "banana bandana" if i % 3 else "rhythm") for i in range(400)]


@pytest.fixture
def source(tmp_path: Path) -> str:
    """25 shards."""
    return written(tmp_path / "source", ROWS)


def run(source: str | list[str], dest: Path, home: Path, *, workers: int = 0, **fields: Any) -> Manifest:
    desk = dest.parent / "desk"
    desk.mkdir(exist_ok=True)
    sources = [source] if isinstance(source, str) else source
    return make(Vowels(desk=str(desk), **fields), sources, str(dest), home=home, workers=workers, say=lambda text: None)


def judged(dest: Path) -> list[str]:
    """The rows that were judged since this was last asked."""
    log = dest.parent / "desk" / "judged"
    keys = log.read_text().split() if log.is_file() else []
    log.unlink(missing_ok=True)
    return keys


def rows(path: Path) -> list[Sample]:
    return list(open_dataset(str(path)).samples())


def test_every_row_is_kept_or_dropped_or_put_aside(source: str, home: Path, tmp_path: Path) -> None:
    made = run(source, tmp_path / "made", home)
    counts, aside = made.parameters["counts"], list(records(str(tmp_path / "made.quarantine")))
    kept = [s.key for s in ROWS if s.text == "banana bandana"]
    assert counts == {"kept": len(kept), "too few vowels": 400 - 2 - len(kept)}
    assert sum(counts.values()) + len(aside) == 400 and made.quarantined == {"bad_row": 2}
    assert [(r.key, r.row, r.detail) for r in aside] == [
        (f"row-{i}", i, "a question is no caption") for i in (150, 390)
    ]
    assert [s.key for s in rows(tmp_path / "made")] == kept and not verify(str(tmp_path / "made"))


def test_a_row_knows_where_it_comes_from(source: str, home: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "made", home)
    digest = open_dataset(source).manifest.digest
    for sample in rows(tmp_path / "made"):
        assert sample.provenance == {
            "vowels.score": "6",
            "vowels.dataset": digest,
            "vowels.key": sample.key,
            "vowels.letters": "digest of aeiou",
        }


def test_the_manifest_says_how_it_was_made(source: str, home: Path, tmp_path: Path) -> None:
    made = run(source, tmp_path / "made", home, at_least=2)
    told = {name: made.parameters[name] for name in ("letters", "at_least", "copies")}
    assert told == {"letters": "digest of aeiou", "at_least": 2, "copies": 1}  # a model's digest, not its place
    assert made.made_by == "tests.curation.vowels" and made.parents == (open_dataset(source).manifest.digest,)


def test_a_run_that_was_cut_off_judges_only_what_was_left_and_ends_as_an_unbroken_one(
    source: str, home: Path, tmp_path: Path
) -> None:
    dest = tmp_path / "broken"
    (tmp_path / "desk").mkdir()
    (tmp_path / "desk" / "stop").write_text("row-170")  # in the middle of the eleventh shard
    with pytest.raises(KeyboardInterrupt):
        run(source, dest, home)
    assert not dest.exists() and len(judged(dest)) == 170
    assert not list((tmp_path / "broken.judged").rglob("*.tmp"))
    broken = run(source, dest, home)
    assert judged(dest) == [f"row-{i}" for i in range(160, 400)]
    assert broken.digest == run(source, tmp_path / "whole", home).digest


def test_a_file_of_facts_that_is_gone_is_judged_again_and_no_other(source: str, home: Path, tmp_path: Path) -> None:
    dest = tmp_path / "made"
    first = run(source, dest, home)
    judged(dest)
    (file,) = (tmp_path / "made.judged").rglob("*-00007.jsonl")
    file.unlink()
    shutil.rmtree(dest)
    assert run(source, dest, home).digest == first.digest
    assert judged(dest) == [f"row-{i}" for i in range(112, 128)]


def test_another_threshold_takes_the_same_facts_and_another_letter_does_not(
    source: str, home: Path, tmp_path: Path
) -> None:
    dest = tmp_path / "made"
    run(source, dest, home)
    judged(dest)
    shutil.rmtree(dest)
    assert run(source, dest, home, at_least=6).rows == 266 and not judged(dest)
    shutil.rmtree(dest)
    assert run(source, dest, home, letters="y").parameters["counts"] == {"too few vowels": 266, "kept": 132}
    assert len(judged(dest)) == 400


def test_what_is_there_is_taken_as_it_is(source: str, home: Path, tmp_path: Path) -> None:
    first = run(source, tmp_path / "made", home)
    judged(tmp_path / "made")
    shutil.rmtree(tmp_path / "made.judged")
    assert run(source, tmp_path / "made", home).digest == first.digest and not judged(tmp_path / "made")


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"at_least": 2}, "at_least"),
        ({"letters": "aei"}, "letters"),
        ({"copies": 2, "at_least": 3}, "at_least, copies"),
    ],
)
def test_a_place_that_holds_what_was_made_otherwise_is_refused(
    change: dict[str, Any], differs: str, source: str, home: Path, tmp_path: Path
) -> None:
    run(source, tmp_path / "made", home)
    with pytest.raises(DataError, match=rf"holds another dataset \(it differs in {differs}\); delete it or choose"):
        run(source, tmp_path / "made", home, **change)


def test_a_place_that_holds_other_sources_or_another_curations_work_is_refused(
    source: str, home: Path, tmp_path: Path
) -> None:
    run(source, tmp_path / "made", home)
    other = written(tmp_path / "other", ROWS[:20])
    with pytest.raises(DataError, match="differs in sources"):
        run([source, other], tmp_path / "made", home)
    with pytest.raises(DataError, match="differs in curation"):
        run(source, Path(other), home)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_the_rows_that_come_out_do_not_depend_on_how_the_source_is_cut_into_shards(home: Path, tmp_path: Path) -> None:
    made = []
    for number, (group_rows, shard_rows) in enumerate(((8, 16), (32, 4096), (1, 200))):
        place = written(tmp_path / f"source-{number}", ROWS, group_rows, shard_rows)
        run(place, tmp_path / f"made-{number}", home)
        made.append([replace(s, provenance={}) for s in rows(tmp_path / f"made-{number}")])
    assert made[0] == made[1] == made[2]


def test_rows_of_several_sources_that_share_a_key_stay_apart(home: Path, tmp_path: Path) -> None:
    one = written(tmp_path / "one", ROWS[1:3])
    other = written(tmp_path / "other", [pair("row-1", IMAGE, "aloe"), pair("row-1#2", IMAGE, "anemone")])
    made = run([one, other], tmp_path / "made", home)
    told = {s.key: (s.text, s.provenance["vowels.key"]) for s in rows(tmp_path / "made")}
    assert told == {
        "row-1": ("banana bandana", "row-1"),
        "row-2": ("banana bandana", "row-2"),
        "row-1#2": ("aloe", "row-1"),
        "row-1#2#2": ("anemone", "row-1#2"),
    }
    assert made.parents == tuple(open_dataset(place).manifest.digest for place in (one, other))


def test_a_row_may_become_several(source: str, home: Path, tmp_path: Path) -> None:
    made = run(source, tmp_path / "made", home, copies=3)
    keys = [s.key for s in rows(tmp_path / "made")]
    assert made.rows == 3 * made.parameters["counts"]["kept"] == len(set(keys)) and "row-1#3" in keys


def test_examples_show_some_rows_of_every_reason(source: str, home: Path, tmp_path: Path) -> None:
    made = run(source, tmp_path / "made", home)
    curation = Vowels(desk=str(tmp_path / "desk"))
    making = Making.of(curation, [source], str(tmp_path / "made"), home)
    shown = list(examples(making, made.parameters["counts"]))
    assert Counter(one.why for one in shown) == {"kept": 6, "too few vowels": 6}
    assert all(one.note == f"{6 * one.kept} of at most 6" and one.kept == (one.text != "rhythm") for one in shown)


# --- what is refused -------------------------------------------------------------------------------------------------


@spec
class Short(Vowels):
    """Gives so many verdicts too few or too many."""

    off_by: int

    def decide(self, rows: Rows) -> Iterator[Verdict]:
        verdicts = [Verdict("kept", (sample,)) for sample, _ in rows()]
        yield from [*verdicts, *verdicts][: len(verdicts) + self.off_by]


@pytest.mark.parametrize(("off_by", "words"), [(-1, "fewer verdicts than rows; 'row-399' has none"), (1, "more")])
def test_a_curation_that_forgets_a_row_or_decides_twice_is_an_error(
    off_by: int, words: str, source: str, home: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=words):
        make(Short(desk=str(tmp_path), off_by=off_by), [source], str(tmp_path / "made"), home=home)
    assert not (tmp_path / "made").exists()


def test_too_many_rows_that_cannot_be_judged_are_an_error_that_names_their_table(home: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 199 rows are bad \(1 bad_row\).*read .*made\.quarantine"):
        run(written(tmp_path / "few", ROWS[:199]), tmp_path / "made", home)
    assert len(list(records(str(tmp_path / "made.quarantine")))) == 1 and not (tmp_path / "made").exists()
    enough = written(tmp_path / "enough", ROWS[:200])
    assert run(enough, tmp_path / "right", home).quarantined == {"bad_row": 1}  # 0.5 % exactly


def test_the_share_of_bad_rows_is_of_those_that_come_in(source: str, home: Path, tmp_path: Path) -> None:
    """Of 400 rows 2 are bad; that only one is kept makes them no more."""
    lone = [
        *ROWS[:1],
        *(pair(s.key, IMAGE, "?" if "?" in s.text else "rhythm") for s in ROWS[1:]),
        pair("x", IMAGE, "a"),
    ]
    assert run(written(tmp_path / "lone", lone), tmp_path / "made", home).rows == 1


def test_a_curation_that_keeps_nothing_says_so(source: str, home: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"vowels keeps nothing of 400 rows \(398 too few vowels\), so .*made is not"):
        run(source, tmp_path / "made", home, at_least=9)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda lines: lines[:-1], "15 facts for 16 rows"),
        (lambda lines: [*lines[:3], "{", *lines[4:]], "line 4: no fact"),
        (lambda lines: lines[::-1], "has the key 'row-15' for 'row-0'"),
    ],
)
def test_facts_that_were_changed_by_hand_are_an_error(
    spoil: Callable[[list[str]], list[str]], words: str, source: str, home: Path, tmp_path: Path
) -> None:
    run(source, tmp_path / "made", home)
    shutil.rmtree(tmp_path / "made")
    (file,) = (tmp_path / "made.judged").rglob("*-00000.jsonl")
    file.write_text("\n".join(spoil(file.read_text().splitlines())) + "\n")
    with pytest.raises(DataError, match=f"{words}.*delete the f"):
        run(source, tmp_path / "made", home)


def test_a_source_is_needed_and_stands_once(source: str, home: Path, tmp_path: Path) -> None:
    for sources in ([], [source, source]):
        with pytest.raises(DataError, match="one source or several, each once"):
            run(sources, tmp_path / "made", home)


# --- Ray -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_actors_make_what_one_process_makes_and_raise_what_it_raises(source: str, home: Path, tmp_path: Path) -> None:
    alone = run(source, tmp_path / "alone", home)
    assert run(source, tmp_path / "actors", home, workers=2).digest == alone.digest
    crash = written(tmp_path / "crash", [*ROWS[:20], pair("last", IMAGE, "crash")])
    with pytest.raises(DataError, match=r"^the endpoint does not answer; start it$"):
        run(crash, tmp_path / "none", home, workers=1)
