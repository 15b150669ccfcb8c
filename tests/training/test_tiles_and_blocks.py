"""Tiny systems with cross-attention, tiles, adapters and DPO, trained to their artifacts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bridgework import artifacts
from bridgework.config import override
from bridgework.system import System, load
from tests.recipes.test_xgen_mm import preferences
from tests.training.support import go, losses, weights


def short(name: str, *, zero: int, steps: int = 2) -> System:
    system = override(
        load(name).tiny(), {"stages.*.zero.stage": zero, "stages.*.budget.steps": steps}
    )
    return replace(
        system, stages=tuple(replace(stage, evals=stage.evals[:1]) for stage in system.stages)
    )


@pytest.mark.parametrize("zero", [1, 3])
def test_flamingo_trains_cross_attention_between_frozen_layers(
    zero: int, home: Path, run: str
) -> None:
    system = short("flamingo", zero=zero)
    go(system, home, run, stages=None)
    kept = weights(home, run, "train")
    opened = [name for name in kept if name.endswith("alpha")]
    assert opened and all(bool(kept[name].any()) for name in opened)
    loaded = artifacts.load(home / "runs" / run / "train" / "artifact")
    assert isinstance(loaded.model, torch.nn.Module) and len(losses(home, run, "train")) == 2


@pytest.mark.parametrize("zero", [2, 3])
def test_dpo_trains_adapters_from_the_instruction_stage(
    zero: int, home: Path, run: str, tmp_path: Path
) -> None:
    system = short("xgen_mm", zero=zero)
    prefer = system["prefer"]
    source = replace(prefer.data.sources[0], dataset=preferences(tmp_path / "pairs"))
    prefer = replace(prefer, data=replace(prefer.data, sources=(source,)))
    system = replace(system, stages=(system["pretrain"], system["instruct"], prefer))
    go(system, home, run, stages=None)
    before, after = weights(home, run, "instruct"), weights(home, run, "prefer")
    assert losses(home, run, "prefer")[0][1] == pytest.approx(0.6931, abs=1e-3)
    adapters = {name for name in after if "lora_" in name}
    assert (
        adapters
        and {name.replace(".base_layer.", ".") for name in after.keys() - adapters} == before.keys()
    )
    for name, tensor in after.items():
        if name not in adapters:
            torch.testing.assert_close(
                tensor, before[name.replace(".base_layer.", ".")], atol=0, rtol=0
            )
    assert any(bool(after[name].any()) for name in adapters if "lora_B" in name)
    artifacts.load(home / "runs" / run / "prefer" / "artifact")


def test_llava_next_trains_everything_over_tiles(home: Path, run: str) -> None:
    go(short("llava:next", zero=3), home, run, stages=None)
    assert "tiles.newline" in weights(home, run, "instruct")
