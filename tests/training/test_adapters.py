"""Adapters in artifacts: saved by one stage and loaded by the next."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bridgework import artifacts
from bridgework.models import base, lora
from bridgework.recipes import xgen_mm
from bridgework.system import System

IDS = torch.tensor([[5, 6, 7, 8]])


def logits(model: nn.Module) -> Tensor:
    out: Tensor = model.eval()(IDS, torch.ones_like(IDS, dtype=torch.bool)).logits_BTV
    return out


def save(system: System, name: str, model: nn.Module, folder: Path, inherited: list[str]) -> Path:
    stage = system[name]
    multipliers = base.set_trainable(model, stage.trains)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    kept = artifacts.tensors_to_save(stage, model.state_dict(), multipliers, inherited)
    artifacts.save(folder, {n: tensors[n] for n in kept if n in tensors}, system=system, stage=name)
    return folder


def test_stage_with_adapters_starts_from_one_without_and_its_artifact_loads(
    tmp_path: Path,
) -> None:
    system = xgen_mm.system().tiny()
    torch.manual_seed(0)
    before = system["instruct"].model.build()
    first = save(system, "instruct", before, tmp_path / "instruct", [])

    model = system["prefer"].model.build()
    inherited = lora.remap_adapters(model, artifacts.weights(first))
    artifacts.load_into(model, inherited, str(first))
    torch.testing.assert_close(logits(model), logits(before))

    for parameter in (p for name, p in model.named_parameters() if "lora_B" in name):
        nn.init.normal_(parameter, std=0.2)
    second = save(system, "prefer", model, tmp_path / "prefer", list(inherited))
    torch.testing.assert_close(logits(artifacts.load(second).model), logits(model))

    merged = artifacts.load(second).model
    lora.merge(merged)
    plain = replace(system["prefer"].model, language=system["instruct"].model.language).build()
    plain.load_state_dict(merged.state_dict())
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=1e-5)
