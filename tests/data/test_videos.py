"""A video is one place in the text and one picture for the model, in training as at inference."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bridgework.data.collate import Batch, collate
from bridgework.data.dataset import write
from bridgework.data.reader import ReaderConfig, local
from bridgework.data.samples import Part, Sample
from bridgework.data.synthetic import shapes
from bridgework.inference.pipeline import Pipeline
from bridgework.system import IMAGE, Layout, Source, Stage, load

MADE = {"source": "test", "license": "CC0-1.0", "made_by": "tests"}
FRAMES = 3


def video(number: int) -> Sample:
    frames = tuple(sample.images[0] for sample in shapes(rows=FRAMES, size=16, seed=number))
    parts = (
        *(Part("caption", image=i) for i in range(FRAMES)),
        Part("caption", text=f"clip {number}"),
    )
    return Sample(f"video-{number}", frames, parts, times_s=(0.0, 1.0, 2.0))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Flamingo over videos and pairs, half of each."""
    folder: Path = tmp_path_factory.mktemp("clips")
    write((video(n) for n in range(24)), str(folder / "clips"), **MADE, group_rows=4)
    write(shapes(rows=24, size=16), str(folder / "pairs"), **MADE, group_rows=4)
    tiny = load("flamingo").tiny()["train"]
    sources = (
        Source(
            name="clips", dataset=str(folder / "clips"), images=2, loss_weight=1.0
        ),  # of a document, not of a video
        Source(name="pairs", dataset=str(folder / "pairs"), loss_weight=1.0),
    )
    return replace(tiny, data=replace(tiny.data, sources=sources, alpha=0.0))


@pytest.fixture(scope="module")
def batch(stage: Stage, home: Path) -> Batch:
    return collate(next(local(ReaderConfig.of(stage, home), rank=0, world=1, start=0)), pad_id=0)


def test_a_video_has_one_place_and_all_its_frames(stage: Stage, batch: Batch) -> None:
    videos = batch.sources.count(0)
    assert 0 < videos < 8
    assert (batch.ids_BT == IMAGE).sum(1).tolist() == [1] * 8
    assert batch.pixels_N3HW is not None and len(batch.pixels_N3HW) == videos * FRAMES + 8 - videos
    assert batch.layouts_N4 is not None and len(batch.layouts_N4) == 8
    shown = [Layout(*layout)[:2] for layout in batch.layouts_N4.tolist()]
    assert shown == [(1, FRAMES - 1) if source == 0 else (0, 0) for source in batch.sources]


def test_every_frame_changes_what_the_model_says(stage: Stage, batch: Batch) -> None:
    torch.manual_seed(0)
    model = stage.model.build().eval()
    for gate in model.gates.values():
        torch.nn.init.constant_(gate.alpha, 0.5)
    first = batch.sources.index(0)
    at = sum(FRAMES if source == 0 else 1 for source in batch.sources[:first])
    with torch.no_grad():
        before = model(**batch.inputs()).logits_BTV
        for frame in range(FRAMES):
            pixels = batch.pixels_N3HW.clone()
            pixels[at + frame] = 255 - pixels[at + frame]
            after = model(**replace(batch, pixels_N3HW=pixels).inputs()).logits_BTV
            changed = (before - after).abs().amax(dim=(1, 2)) > 1e-6
            assert changed.tolist() == [row == first for row in range(8)]


def test_a_video_is_judged_as_it_was_trained(stage: Stage, batch: Batch) -> None:
    torch.manual_seed(0)
    model = stage.model.build().eval()
    samples = {
        sample.key: sample for sample in (*(video(n) for n in range(24)), *shapes(rows=24, size=16))
    }
    judged = Pipeline(model, stage).loglik([samples[key] for key in batch.keys])
    with torch.no_grad():
        (loss,) = stage.losses
        trained = loss(model(**batch.inputs()))
    torch.testing.assert_close(torch.tensor(judged), -trained, rtol=1e-4, atol=1e-4)
