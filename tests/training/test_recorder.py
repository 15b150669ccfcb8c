"""Flight recorder: samples of every step, replay, and skips."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from bridgework.data.collate import collate
from bridgework.data.dataset import write
from bridgework.data.reader import ReaderConfig, local
from bridgework.data.samples import Part
from bridgework.data.synthetic import shapes
from bridgework.errors import RunError, SpecError
from bridgework.system import Budget, Packing, Source
from bridgework.training import flight_recorder
from bridgework.training.flight_recorder import FlightRecorder, read_step, replay
from bridgework.training.skips import Skips
from tests.training.support import Stop, go, llava, losses, stop_at

MADE = {"source": "test", "license": "CC0-1.0", "made_by": "tests"}


def test_recorded_samples_of_a_step_sum_to_its_loss(home: Path, run: str) -> None:
    system = llava(5)
    go(system, home, run)
    folder = home / "runs" / run / "align"
    read = list(local(ReaderConfig.of(system["align"], home), rank=0, world=1, start=0))
    assert [step for step, _ in losses(home, run)] == list(
        range(5)
    )  # one number for a step, in MLflow as here
    for step, loss in losses(home, run):
        noted = read_step(folder, step)
        assert sorted(each.key for each in noted) == sorted(row.key for row in read[step])
        assert [each.loss for each in noted] == sorted((each.loss for each in noted), reverse=True)
        mean = sum(e.loss * e.counted for e in noted) / sum(e.counted for e in noted)
        assert mean == pytest.approx(loss, rel=1e-5)
        lengths = {row.key: len(row.ids) for row in read[step]}
        assert {e.key: e.tokens for e in noted} == lengths


def test_last_attempt_of_a_repeated_step_counts(home: Path, run: str) -> None:
    system = llava(6)
    with pytest.raises(Stop):
        go(system, home, run, checkpoint_every=2, evaluate_every=1, report=stop_at(5))
    go(system, home, run, checkpoint_every=2, evaluate_every=1)
    folder = home / "runs" / run / "align"
    assert len(list((folder / "flight_recorder").glob("*.arrows"))) == 2
    assert all(len(read_step(folder, step)) == 8 for step in range(6))


def test_steps_before_a_checkpoint_are_recorded_with_it(
    home: Path, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps before a checkpoint are never repeated, so their record must be on the disk with it."""
    monkeypatch.setattr(flight_recorder, "FLUSH_S", math.inf)
    seen: list[int] = []

    def look(metrics: object, done: int) -> None:
        seen.extend(len(read_step(home / "runs" / run / "align", step)) for step in range(done))

    go(llava(4), home, run, checkpoint_every=2, evaluate_every=2, report=look)
    assert seen[:2] == [8, 8]


def test_truncated_record_yields_its_complete_batches(home: Path, tmp_path: Path) -> None:
    batch = collate(
        next(local(ReaderConfig.of(llava()["align"], home), rank=0, world=1, start=0)), pad_id=0
    )
    with FlightRecorder(tmp_path, "attempt", 0, start=0) as written:
        for step in range(3):
            written.step(step, [batch], [float(step)] * 8, [1.0] * 8)
            written.flush()
    (file,) = (tmp_path / "flight_recorder").glob("*.arrows")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) - 40])
    assert [each.loss for each in read_step(tmp_path, 1)] == [1.0] * 8
    with pytest.raises(RunError, match="has no step 2; it has steps 0 to 1"):
        read_step(tmp_path, 2)


def test_sample_with_nan_loss_comes_first(home: Path, tmp_path: Path) -> None:
    batch = collate(
        next(local(ReaderConfig.of(llava()["align"], home), rank=0, world=1, start=0)), pad_id=0
    )
    with FlightRecorder(tmp_path, "attempt", 0, start=0) as written:
        written.step(0, [batch], [1.0, 3.0, 2.0, math.nan, 5.0, 4.0, math.inf, 0.0], [1.0] * 8)
    values = [each.loss for each in read_step(tmp_path, 0)]
    assert not any(map(math.isfinite, values[:2])) and values[2:] == [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]


def test_step_skipped_by_a_later_attempt_is_not_read_from_an_earlier_one(
    home: Path, tmp_path: Path
) -> None:
    batch = collate(
        next(local(ReaderConfig.of(llava()["align"], home), rank=0, world=1, start=0)), pad_id=0
    )
    for attempt, start, taken in (
        ("first", 0, range(6)),
        ("second", 4, (5, 6)),
        ("third", 6, (6,)),
    ):
        with FlightRecorder(tmp_path, attempt, 0, start=start) as written:
            for step in taken:
                written.step(step, [batch], [float(start)] * 8, [1.0] * 8)
    assert [{each.loss for each in read_step(tmp_path, step)} for step in (3, 5, 6)] == [
        {0.0},
        {4.0},
        {6.0},
    ]
    with pytest.raises(RunError, match="step 4 did no update"):
        read_step(tmp_path, 4)
    with pytest.raises(RunError, match="has no step 7; it has steps 0 to 6"):
        read_step(tmp_path, 7)


@pytest.mark.parametrize("packing", [None, Packing()])
def test_replay_matches_the_batch_of_the_model(
    home: Path, run: str, packing: Packing | None
) -> None:
    system = llava(4, stages__align__data__packing=packing, stages__align__data__lanes=2)
    go(system, home, run)
    again = replay(f"{run}/align", 2, home)
    read = next(local(ReaderConfig.of(system["align"], home), rank=0, world=1, start=2))
    assert sorted((r.key, tuple(r.ids)) for r in again.rows) == sorted(
        (r.key, tuple(r.ids)) for r in read
    )
    assert [row.key for row in again.rows] == [each.key for each in again.noted]
    assert replay(run, 2, home).noted == again.noted


def test_planted_sample_has_the_highest_loss(home: Path, run: str, tmp_path: Path) -> None:
    """The planted sample has a caption in another language."""
    samples = list(shapes(rows=64, size=16))
    parts = (Part("caption", image=0), Part("caption", text="\u4e00\u4e01\u4e03" * 20))
    samples[17] = replace(samples[17], key="planted", parts=parts)
    write(samples, str(tmp_path / "data"), **MADE, group_rows=8)
    system = llava(16)
    stage = system["instruct"]
    data = replace(
        stage.data, sources=(Source(name="one", dataset=str(tmp_path / "data")),), template="plain"
    )
    planted = replace(
        stage, data=data, starts_from=None, evals=(), budget=Budget(steps=16, batch=8, micro=4)
    )
    go(replace(system, stages=(planted,)), home, run, stages=None)
    folder = home / "runs" / run / "instruct"
    met = [
        step for step in range(8, 16) if any(e.key == "planted" for e in read_step(folder, step))
    ]
    assert met and all(read_step(folder, step)[0].key == "planted" for step in met)


@pytest.mark.parametrize("by_source", [False, True])
def test_skipped_samples_are_replaced_and_all_others_stay(
    by_source: bool, home: Path, run: str
) -> None:
    system = llava(8)
    feed = ReaderConfig.of(system["align"], home)
    before = list(local(feed, rank=0, world=1, start=0))
    with pytest.raises(Stop):
        go(system, home, run, checkpoint_every=2, evaluate_every=1, report=stop_at(4))
    victim = before[6][3]
    name = system["align"].data.leaves[victim.source].name
    go(
        system,
        home,
        run,
        checkpoint_every=2,
        evaluate_every=1,
        skip=(f"{name}/{victim.key}" if by_source else victim.key,),
    )
    folder = home / "runs" / run / "align"
    for step, rows in enumerate(before):
        kept = sorted(row.key for row in rows if step < 4 or row.key != victim.key)
        trained = sorted(each.key for each in read_step(folder, step))
        assert len(trained) == 8 and (step < 4 or victim.key not in trained)
        assert all(key in trained for key in kept)
    assert (folder / "skips.json").is_file()
    assert [row.key for row in replay(run, 6, home).rows]  # the plan as it was edited


def test_skipped_steps_do_no_update_and_are_not_recorded(home: Path, run: str) -> None:
    system = llava(6)
    with pytest.raises(Stop):
        go(system, home, run, checkpoint_every=2, evaluate_every=1, report=stop_at(3))
    go(system, home, run, checkpoint_every=2, evaluate_every=1, skip=("step:3-4",))
    folder = home / "runs" / run / "align"
    assert all(read_step(folder, step) for step in (0, 1, 2, 5))
    assert {step for step, _ in losses(home, run)} == {0, 1, 2, 5}
    for step in (3, 4):
        with pytest.raises(RunError, match=f"step {step} did no update"):
            read_step(folder, step)
    assert all(math.isfinite(loss) for _, loss in losses(home, run))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("nobody", r"--skip 'nobody': no source has a row with this key \(blip558k\)"),
        ("blip558k/nobody", "no source has a row with this key"),
        ("5", "a step is written step:N"),
        (
            "step:900",
            r"--skip step:900 has no effect\. Got 900; expected 2 to 5, from the step at which",
        ),
        ("step:0-1", "--skip step:0 has no effect"),
        ("step:4-9999999999", "--skip step:9999999999 has no effect"),
        ("step:3-", "invalid steps. Got 'step:3-'"),
        ("step:\u00b2", "expected step:120 or step:120-125"),
    ],
)
def test_skip_without_effect_is_rejected(word: str, message: str, home: Path, run: str) -> None:
    with pytest.raises(Stop):
        go(llava(6), home, run, checkpoint_every=2, evaluate_every=1, report=stop_at(3))
    with pytest.raises(SpecError, match=message):
        go(llava(6), home, run, checkpoint_every=2, evaluate_every=1, skip=("step:3", word))
    assert not (home / "runs" / run / "align" / "skips.json").exists()


def test_the_same_command_again_skips_what_it_did(home: Path, run: str) -> None:
    for stop in (2, 5):
        with pytest.raises(Stop):
            go(
                llava(6),
                home,
                run,
                checkpoint_every=2,
                evaluate_every=1,
                report=stop_at(stop),
                skip=("step:3",),
            )
    go(llava(6), home, run, checkpoint_every=2, evaluate_every=1, skip=("step:3",))
    assert [order.steps for order in Skips.read(home / "runs" / run / "align").orders] == [(3,)]


def test_a_finished_run_has_nothing_to_skip(home: Path, run: str) -> None:
    go(llava(2), home, run)
    with pytest.raises(RunError, match="no step left to skip"):
        go(llava(2), home, run, skip=("step:1",))
