"""Frozen parts: bitwise unchanged and in eval mode after a step on the recipe's data path."""

from pathlib import Path

import pytest
import torch

from bridgework.data.collate import collate
from bridgework.data.reader import ReaderConfig, local
from bridgework.data.tokenization import load_tokenizer
from bridgework.models import base
from bridgework.system import load
from bridgework.training.step import TrainingModule

FROZEN = {  # stage -> frozen parts
    ("blip2", "represent"): {"vision"},
    ("blip2", "generate"): {"vision", "language"},
    ("blip2:vqa", "vqa"): {"language"},
    ("blip2:caption", "caption"): {"language"},
    ("clip:linear_probe", "probe"): {"vision"},
    ("instructblip", "instruct"): {"vision", "language"},
    ("minigpt4", "align"): {"vision", "language"},
    ("minigpt4", "polish"): {"vision", "language"},
    ("flamingo", "train"): {"vision", "language"},
    ("llava", "align"): {"vision", "language"},
    ("llava", "instruct"): {"vision"},
    ("llava:science_qa", "science_qa"): {"vision"},
    ("xgen_mm", "pretrain"): {"vision"},
    ("xgen_mm", "instruct"): {"vision"},
    ("xgen_mm", "safety"): {"vision", "bridge"},
}


@pytest.mark.parametrize(
    ("system", "name"), FROZEN, ids=[f"{system}/{name}" for system, name in FROZEN]
)
def test_frozen_parts_are_bitwise_unchanged_and_in_eval_mode_after_a_step(
    system: str, name: str, home: Path
) -> None:
    stage = load(system).tiny()[name]
    torch.manual_seed(0)
    model = stage.model.build()
    learning = base.set_trainable(model, stage.trains)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    pad_id = load_tokenizer(stage.model.tokenizer).pad_token_id
    batch = collate(
        next(local(ReaderConfig.of(stage, home), rank=0, world=1, start=0)), pad_id=pad_id
    )
    TrainingModule(model.train(), stage.losses)(batch).sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    moved = {
        key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])
    }
    tied = {key for key, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert moved and moved <= set(learning) | tied
    for part in FROZEN[system, name]:
        assert not {key for key in moved if key.startswith(f"{part}.")}
        assert not [
            key for key, child in model.get_submodule(part).named_modules() if child.training
        ], part
