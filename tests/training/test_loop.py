"""The training loop against plain torch, and resumed runs against unbroken ones."""

from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bridgework.data import reader
from bridgework.data.collate import collate
from bridgework.errors import RunError
from bridgework.losses import Contrastive
from bridgework.system import System
from bridgework.training import loop
from bridgework.training.engine import learning_rate
from tests.training.support import Stop, fresh, go, llava, losses, same, stop_at, weights

BOTH = {"bridge.*": 1.0, "language.*": 0.1}  # two learning rates
DECAY: dict[str, Any] = {"stages__align__optim__weight_decay": 0.1, "stages__align__trains": BOTH}


def test_stage_1_trains_the_bridge_alone(home: Path, run: str) -> None:
    system = llava()
    go(system, home, run)
    before, after = fresh(system["align"]).state_dict(), weights(home, run)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) is not name.startswith("bridge."), name


def test_stage_2_trains_bridge_and_language_model_and_leaves_the_tower(
    home: Path, run: str
) -> None:
    go(llava(), home, run, stages=None)
    before, after = weights(home, run), weights(home, run, "instruct")
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in after if not name.startswith("vision.")}


def plainly(system: System, home: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Train the stage in ten lines of torch; returns losses and weights."""
    stage = system["align"]
    model, found = fresh(stage).train(), []
    groups = []
    for name, parameter in model.named_parameters():
        rates = [rate for glob, rate in stage.trains.items() if fnmatchcase(name, glob)]
        parameter.requires_grad_(bool(rates))
        decay = stage.optim.weight_decay if parameter.ndim > 1 else 0.0
        groups += [{"params": [parameter], "rate": rate, "weight_decay": decay} for rate in rates]
    optimizer = torch.optim.AdamW(groups, betas=stage.optim.betas)
    for step, rows in enumerate(
        reader.local(reader.ReaderConfig.of(stage, home), rank=0, world=1, start=0)
    ):
        batch = collate(rows, pad_id=0)
        logits_BTV = model(**batch.inputs()).logits_BTV
        loss = nn.functional.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1), batch.labels_BT[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), stage.optim.clip)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * learning_rate(stage.optim, step, stage.budget.steps)
        optimizer.step()
        found.append(loss.item())
    return found, dict(model.state_dict())


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_three_steps_match_plain_torch(home: Path, run: str, zero: int) -> None:
    system = llava(3, stages__align__zero__stage=zero, stages__align__optim__clip=0.05, **DECAY)
    expected, plain = plainly(system, home)
    go(system, home, run)
    assert [value for _, value in losses(home, run)] == pytest.approx(expected, rel=1e-5)
    for name, tensor in weights(home, run).items():
        torch.testing.assert_close(tensor, plain[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_micro_batches_change_nothing(home: Path, run: str, zero: int) -> None:
    for micro in (2, 3, 8):
        changes = {"stages__align__budget__micro": micro, "stages__align__zero__stage": zero}
        go(llava(3, **changes, **DECAY), home, f"{run}-{micro}")
    whole = weights(home, f"{run}-8")
    for micro in (2, 3):
        assert dict(losses(home, f"{run}-{micro}")) == pytest.approx(
            dict(losses(home, f"{run}-8")), rel=1e-5
        )
        for name, tensor in weights(home, f"{run}-{micro}").items():
            torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_resumed_run_matches_unbroken_run(home: Path, run: str, zero: int) -> None:
    system = llava(7, stages__align__zero__stage=zero, **DECAY)
    go(system, home, f"{run}-whole")
    with pytest.raises(Stop):
        go(system, home, run, checkpoint_every=2, evaluate_every=1, report=stop_at(5))
    go(system, home, run, checkpoint_every=2)
    assert same(weights(home, run), weights(home, f"{run}-whole"))
    seen, unbroken = losses(home, run), dict(losses(home, f"{run}-whole"))
    assert all(unbroken[step] == value for step, value in seen)
    assert [step for step, _ in seen][-3:] == [4, 5, 6]


def test_missing_rows_are_an_error(process_group: None, home: Path, tmp_path: Path) -> None:
    system = llava(6)
    feed = reader.ReaderConfig.of(system["align"], home)
    job = loop.TrainJob(system, "align", feed, tmp_path / "align", home)
    job.folder.mkdir()
    with pytest.raises(
        RunError, match=r"align: its rows ended after 3 of 6 steps\. Fix: run it again"
    ):
        rows = islice(reader.local(feed, rank=0, world=1, start=0), 3)
        loop.run(job, lambda start: rows, lambda metrics, step: None, rank=0, world=1)
    assert not (job.folder / "artifact").exists()


def test_stop_repeats_only_steps_since_the_checkpoint(home: Path, run: str) -> None:
    system, taken = llava(9), []

    def report(metrics: dict[str, float], done: int) -> None:
        taken.append(done)
        if len(taken) in (4, 8):
            raise Stop

    for _ in range(2):
        with pytest.raises(Stop):
            go(system, home, run, checkpoint_every=3, evaluate_every=1, report=report)
    go(system, home, run, checkpoint_every=3, evaluate_every=1, report=report)
    # the evaluation of the checkpoint's step is reported again
    assert taken == [1, 2, 3, 4, 3, 4, 5, 6, 6, 7, 8, 9]


def test_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    home: Path, run: str, caplog: pytest.LogCaptureFixture
) -> None:
    system, taken = llava(7), []
    with pytest.raises(Stop):
        go(system, home, run, checkpoint_every=2, evaluate_every=1, report=stop_at(5))
    (newest,) = (home / "runs" / run / "align/checkpoints").glob("00000004-*")
    file = next((newest / "state").glob("*optim_states.pt"))
    file.write_bytes(file.read_bytes()[:-1])
    go(
        system,
        home,
        run,
        checkpoint_every=2,
        evaluate_every=1,
        report=lambda metrics, done: taken.append(done),
    )
    # the evaluation of the checkpoint's step is reported again
    assert taken == [2, 3, 4, 5, 6, 7]
    assert "checkpoint of step 4 is damaged" in caplog.text
    assert not newest.exists()


def test_nonfinite_loss_stops_with_its_samples_and_without_checkpoint(home: Path, run: str) -> None:
    stage = llava(6)["align"]
    rows = list(reader.local(reader.ReaderConfig.of(stage, home), rank=0, world=1, start=0))
    system = llava(6, stages__align__optim__peak_lr=1e30, stages__align__optim__clip=0.0)
    with pytest.raises(
        RunError, match=r"not finite at step \d\. Got (nan|inf).*no checkpoint was written"
    ) as stopped:
        go(system, home, run, checkpoint_every=1)
    step = int(str(stopped.value).split("at step ")[1][0])
    named = str(stopped.value).split("Most likely samples: ")[1].split(". Fix")[0].split(", ")
    assert len(named) == 4 and set(named) <= {row.key for row in rows[step]}
    assert f"--run {run}/align --step {step}" in str(stopped.value)
    folder = home / "runs" / run / "align"
    assert not (folder / "artifact").exists()
    assert not list((folder / "checkpoints").glob(f"{step + 1:08d}-*"))
    assert [taken for taken, _ in losses(home, run)] == list(range(step))  # how it came to this


def test_contrast_in_micro_batches_matches_one_batch(home: Path, run: str) -> None:
    for name, micro in ((f"{run}-whole", 8), (f"{run}-parts", 3)):
        go(
            llava(3, stages__align__losses=(Contrastive(),), stages__align__budget__micro=micro),
            home,
            name,
        )
    whole, parts = (losses(home, f"{run}-{kind}") for kind in ("whole", "parts"))
    assert [loss for _, loss in parts] == pytest.approx([loss for _, loss in whole], rel=1e-4)


def test_every_loss_is_reported_with_its_weight(home: Path, run: str) -> None:
    captioning = llava()["align"].losses
    go(llava(2, stages__align__losses=(*captioning, Contrastive(weight=0.5))), home, run)
    total, words, contrast = (
        losses(home, run, key=k) for k in ("loss", "loss.language_modeling", "loss.contrastive")
    )
    for (_, a), (_, b), (_, c) in zip(total, words, contrast, strict=True):
        assert a == pytest.approx(b + 0.5 * c)
