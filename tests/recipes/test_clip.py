"""CLIP's page against the paper and the release: sizes, optimizer, schedule, tokens."""

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from bridgework.config import override
from bridgework.data.samples import Part
from bridgework.data.tokenization import SampleEncoder
from bridgework.models import base
from bridgework.recipes import clip
from bridgework.system import Stage, System
from bridgework.training.engine import _groups, learning_rate
from bridgework.training.step import TrainingModule


@pytest.mark.parametrize(
    ("system", "parameters"),
    [
        (clip.system(), 151_277_313),  # openai/CLIP's notebook
        (clip.vit_l14(), 427_616_513),
        (clip.rn50(), 102_007_137),
    ],
    ids=["ViT-B/32", "ViT-L/14", "RN50"],
)
def test_parameter_counts_match_the_release(system: System, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in system["contrast"].model.build().parameters()) == parameters


@pytest.mark.parametrize("system", [clip.system(), clip.rn50()], ids=["vit", "resnet"])
def test_all_parameters_train_and_only_matrices_decay(system: System) -> None:
    stage = system.tiny()["contrast"]
    model = stage.model.build()
    multipliers = base.set_trainable(model, stage.trains)
    assert multipliers.keys() == {name for name, _ in model.named_parameters()}
    groups = _groups(TrainingModule(model, stage.losses), multipliers, stage.optim)
    sides = {
        decay: [p for g in groups if g["weight_decay"] == decay for p in g["params"]]
        for decay in (0.0, 0.2)
    }
    assert all(p.ndim > 1 for p in sides[0.2]) and all(p.ndim < 2 for p in sides[0.0])
    assert any(p is model.heads.logit_scale for p in sides[0.0])
    assert {id(p) for side in sides.values() for p in side} == {id(p) for p in model.parameters()}
    assert sum(map(len, sides.values())) == len(list(model.parameters()))


def test_learning_rate_warms_up_for_2000_steps_and_decays_to_zero() -> None:
    stage = clip.system()["contrast"]
    steps, peak = stage.budget.steps, stage.optim.peak_lr
    assert steps * stage.budget.batch == 32 * 400_000_000
    warmup = (
        next(step for step in range(steps) if learning_rate(stage.optim, step, steps) == peak) + 1
    )
    assert warmup == pytest.approx(2_000, abs=1)
    assert learning_rate(stage.optim, 0, steps) == pytest.approx(peak / warmup)
    assert learning_rate(stage.optim, steps // 2, steps) == pytest.approx(peak / 2, rel=0.02)
    assert learning_rate(stage.optim, steps - 1, steps) < 1e-9 * peak


def test_336_px_is_one_more_epoch_from_224() -> None:
    contrast, sharpen = clip.vit_l14_336().stages
    assert (contrast.model.pixels.size, sharpen.model.pixels.size) == (224, 336)
    assert sharpen.starts_from == contrast.name
    assert sharpen.budget.steps * 32 == pytest.approx(contrast.budget.steps, rel=1e-4)


# Tokens


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> SampleEncoder:
    """Return the recipe's encoder; the vocabulary is bytes, final bytes, 4 merges, start, end."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("o", "n</w>"), ("a", "n")]
    words = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *("".join(merge) for merge in merges),
    ]
    words += ["<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges).save_pretrained(
        folder
    )
    stage: Stage = override(clip.system()["contrast"], {"model.text.tokenizer": str(folder)})
    return SampleEncoder.of(stage.model, stage.data)


def encode(streams: SampleEncoder, caption: str) -> list[int]:
    return streams.train([Part("caption", image=0), Part("caption", text=caption)]).ids


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A cat  on\n a MAT", "a cat on a mat"),
        ("Caf\u0065\u0301 on 1st", "caf\u00e9 on 1 st"),  # composed; digits stand alone
        ("\u732b \U0001f408 can", "\u732b \U0001f408 can"),
    ],
)
def test_decoded_caption_is_the_caption_in_lower_case(
    streams: SampleEncoder, caption: str, cleaned: str
) -> None:
    ids = encode(streams, caption)
    assert streams.tokenizer.decode(ids, skip_special_tokens=True) == cleaned
    assert ids == streams.tokenizer(caption).input_ids
    assert (ids[0], ids[-1]) == (streams.tokenizer.bos_token_id, streams.tokenizer.eos_token_id)


def test_long_caption_is_truncated_to_77_tokens_and_keeps_its_end_token(
    streams: SampleEncoder,
) -> None:
    ids = encode(streams, "cat on " * 60)
    assert len(ids) == 77 and ids[-1] == streams.tokenizer.eos_token_id
    assert ids == streams.tokenizer("cat on " * 60, truncation=True, max_length=77).input_ids


def test_end_token_written_in_a_caption_is_plain_text(streams: SampleEncoder) -> None:
    assert encode(streams, "a <|endoftext|> cat").count(streams.tokenizer.eos_token_id) == 1
