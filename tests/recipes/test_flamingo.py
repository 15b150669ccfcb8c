"""Flamingo's page: sizes, what trains, and one step of the tiny program."""

from pathlib import Path

import torch

from bridgework.data.batch import collate
from bridgework.data.reader import Feed, local
from bridgework.models import freezing
from bridgework.recipes import flamingo
from bridgework.system import END, IMAGE
from bridgework.training.step import Step, by_source

NEW = {"system": 1.2, "b9": 1.6, "b80": 10.0}  # billions of parameters in the blocks (table 5)


def test_the_blocks_are_about_as_large_as_published() -> None:
    """A little smaller: their keys and values read SigLIP's 1152 numbers and not 1536, and 9B has 8 blocks for 10."""
    for variant, published in NEW.items():
        with torch.device("meta"):
            model = getattr(flamingo, variant)()["train"].model.build(pretrained=False)
        size = sum(p.numel() for p in model.gates.parameters()) / 1e9
        assert 0.8 * published < size <= published, variant


def test_one_tiny_step_moves_resampler_gates_and_two_rows_and_sees_every_source(home: Path) -> None:
    stage = flamingo.system().tiny()["train"]
    torch.manual_seed(0)
    model = stage.model.build()
    learning = freezing.apply(model, stage.trains)
    assert {name.split(".")[0] for name in learning} == {"bridge", "gates", "extra"}
    batch = collate(next(local(Feed.of(stage, home), rank=0, world=1, start=0)), pad_id=0)
    assert int((batch.ids_BT == IMAGE).sum()) == len(batch.ids_BT) and bool((batch.labels_BT == END).any())
    step = Step(model, stage.losses)
    lambdas_S = torch.tensor([source.loss_weight for source in stage.data.leaves])
    own_R = torch.tensor(batch.sources)
    sums_LS, counts_LS = (by_source(x, own_R, len(lambdas_S)) for x in (step(batch), step.counts([batch])))
    assert bool((counts_LS > 0).all())
    (lambdas_S * sums_LS / counts_LS).sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {name for name in learning if "alpha" in name or name.startswith("extra")}  # the gates are closed
