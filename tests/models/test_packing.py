"""Packed samples of every kind of language model: isolated from each other, or refused in one line."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bridgework.errors import BridgeworkError, SpecError
from bridgework.mixture import Packing
from bridgework.models import LanguageConfig, LinearConfig, PrefixVLMConfig, ViTConfig
from bridgework.models.prefix_vlm import PrefixVLM
from bridgework.system import IGNORE, IMAGE, load
from tests.models.examples import pixels

VISION = ViTConfig(image_size=16, patch=8, width=16, depth=2, heads=2, ffn=32, layer=-1)
WINDOW = 4
PAD = [IGNORE] * 4
LENGTHS = (13, 18, 10)  # tokens, all longer than the window
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0},
    "phi3": {"sliding_window": WINDOW},
    "starcoder2": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW, "head_dim": 8},
    "gemma3_text": {"sliding_window": WINDOW, "head_dim": 8},
    "cohere2": {"sliding_window": WINDOW, "sliding_window_pattern": 2},
    "gpt_oss": {"sliding_window": WINDOW, "head_dim": 8},
    "llama4_text": {"attention_chunk_size": WINDOW},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
}
MASKED: dict[str, dict[str, Any]] = {
    "opt": {"word_embed_proj_dim": 32},
    "biogpt": {},
    "falcon": {},
    "mpt": {},
}
RECURRENT: dict[str, dict[str, Any]] = {
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "falcon_h1": {},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "minimax": {},
}


def language(arch: str, extra: dict[str, Any] | None = None) -> LanguageConfig:
    ffn = 128 if arch in ("mpt", "openai-gpt") else 48
    return LanguageConfig(
        arch=arch, width=32, depth=2, heads=4, kv_heads=4, ffn=ffn, vocab=97, context=128, tokenizer="bytes",
        tied=arch in ("mpt", "falcon", "t5", "cohere2", "gemma2", "gemma3_text"), extra=extra or {},
    )  # fmt: skip


def build(config: LanguageConfig) -> PrefixVLM:
    """With weights large enough that any attention to another sample shows."""
    torch.manual_seed(0)
    model = (
        PrefixVLMConfig(vision=VISION, bridge=LinearConfig(), language=config)
        .build(pretrained=False)
        .eval()
    )
    for parameter in model.language.parameters():
        if parameter.ndim > 1 and parameter.requires_grad:  # not the angles of sinusoids
            nn.init.normal_(parameter, std=0.15)
    return model


def rows() -> list[list[int]]:
    """Samples of LENGTHS tokens with an image of 4 tokens in each."""
    generator = torch.Generator().manual_seed(1)
    texts = [
        torch.randint(3, 96, (length - 4,), generator=generator).tolist() for length in LENGTHS
    ]
    return [text[:1] + [IMAGE] * 4 + text[1:] for text in texts]


def read(
    model: PrefixVLM, ids_BT: Tensor, images: Tensor, segments_BT: Tensor | None = None
) -> Tensor:
    real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if segments_BT is None else segments_BT >= 0
    logits: Tensor = model(
        ids_BT, real_BT, ids_BT.masked_fill(ids_BT == IMAGE, IGNORE), images, segments=segments_BT
    ).logits_BTV
    return logits


@torch.no_grad()
def packed(model: PrefixVLM) -> tuple[Tensor, ...]:
    """The logits of each sample, of one sequence that all share; there is padding in it."""
    ids = torch.tensor([[token for row in rows() for token in row] + [0, 0]])
    numbers = [number for number, row in enumerate(rows()) for _ in row]
    logits = read(model, ids, pixels(3, size=16), torch.tensor([[*numbers, -1, -1]]))[0]
    return logits[:-2].split(list(LENGTHS))


@torch.no_grad()
def farthest(model: PrefixVLM) -> float:
    """The largest difference between a packed sample's logits and its own alone, as a share of the largest logit."""
    images = pixels(3, size=16)
    alone = [read(model, torch.tensor([row]), images[i : i + 1])[0] for i, row in enumerate(rows())]
    pairs = zip(packed(model), alone, strict=True)
    return float(max((a - b).abs().max() for a, b in pairs) / max(a.abs().max() for a in alone))


@pytest.mark.parametrize("arch", WINDOWED)
def test_packed_samples_longer_than_the_window_are_isolated(arch: str) -> None:
    assert farthest(build(language(arch, WINDOWED[arch]))) < 1e-5


@pytest.mark.parametrize("arch", MASKED)
def test_families_that_ignore_positions_in_their_mask_are_isolated(arch: str) -> None:
    assert farthest(build(language(arch, MASKED[arch]))) < 1e-5


@pytest.mark.parametrize("arch", RECURRENT)
def test_packing_of_a_recurrent_state_is_refused(arch: str) -> None:
    with pytest.raises(
        SpecError, match=f"{arch!r} cannot keep .* its recurrent layers carry a state"
    ):
        packed(build(language(arch, RECURRENT[arch])))


@pytest.mark.parametrize(
    ("arch", "extra", "said"),
    [
        ("falcon", {"alibi": True}, "ALiBi"),
        ("openai-gpt", {}, "masks of its own"),
        ("longt5", {"d_kv": 8}, "blocks of its own"),
        ("switch_transformers", {"d_kv": 8}, "fixed number of tokens"),
    ],
)
def test_packing_that_no_mask_can_isolate_is_refused(
    arch: str, extra: dict[str, Any], said: str
) -> None:
    with pytest.raises(SpecError, match=said):
        packed(build(replace(language(arch, extra), tied=True)))


def test_packing_is_refused_before_a_stage_starts() -> None:
    stage = load("llava")["align"].tiny()
    model = replace(stage.model, language=language("jamba", RECURRENT["jamba"]))
    with pytest.raises(
        SpecError,
        match=r"align\.data\.packing: 'jamba' cannot keep .* Fix: set stages\.align\.data\.packing",
    ):
        replace(stage, model=model, data=replace(stage.data, packing=Packing()))


def test_angles_by_the_length_of_the_text_are_refused_where_samples_would_share_them() -> None:
    scaled = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    assert farthest(build(replace(language("llama", scaled), context=18))) < 1e-5
    with pytest.raises(
        SpecError,
        match=r"rotates all samples of a sequence by the longest\. Got a sample of 18 tokens",
    ):
        farthest(build(replace(language("llama", scaled), context=17)))


# --- padding and caches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["recurrent_gemma", "jamba", "qwen3_next", "lfm2"])
@torch.no_grad()
def test_padding_before_a_text_changes_no_recurrent_state(arch: str) -> None:
    model, images, (row, *_) = build(language(arch, RECURRENT[arch])), pixels(1, size=16), rows()
    alone = read(model, torch.tensor([row]), images)[0]
    padded = torch.tensor([[0] * 5 + row])
    real = torch.tensor([[False] * 5 + [True] * len(row)])
    found = model(padded, real, None, images).logits_BTV[0, 5:]
    torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)


SCALED = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}


@pytest.mark.parametrize(
    "config",
    [language(arch, extra) for arch, extra in RECURRENT.items()]
    + [language(arch, extra) for arch, extra in (WINDOWED | MASKED).items()]
    + [
        replace(language("llama", SCALED), context=16),
        language("openai-gpt"),
        language("llama"),
    ],
    ids=[*RECURRENT, *WINDOWED, *MASKED, "dynamic", "no cache", "in one row"],
)
@pytest.mark.parametrize("columns", [1, 4])
def test_continuations_have_the_logits_of_the_complete_text(
    config: LanguageConfig, columns: int
) -> None:
    assert_continuations(build(config), columns)


@torch.no_grad()
def assert_continuations(model: Any, columns: int = 4) -> None:
    """Each candidate has the logits of the text that it completes, whatever shares its batch."""
    images = pixels(1, size=16)
    prompt = torch.tensor(rows()[:1])
    rest = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0], [12, *PAD[1:]], [13, 14, *PAD[2:]]])
    rest = rest[:, :columns]
    found = model.continuations(prompt, rest, model.vision(images))
    for row, padded in zip(found, rest, strict=True):
        text = padded[padded != IGNORE]
        own = row[: len(text)]
        complete = read(model, torch.cat([prompt, text[None]], dim=1), images)[
            0, prompt.shape[1] - 1 : -1
        ]
        torch.testing.assert_close(own, complete, atol=1e-4, rtol=1e-4)


def test_generation_that_transformers_has_not_is_refused_in_one_line() -> None:
    ids, images = torch.tensor(rows()[:1]), pixels(1, size=16)
    real = torch.ones_like(ids, dtype=torch.bool)
    with pytest.raises(
        SpecError, match="generate: transformers cannot generate with this 'falcon_h1'"
    ):
        build(language("falcon_h1")).generate(ids, real, images, max_new_tokens=2)


def test_padded_prompts_are_refused_where_padding_reaches_the_state() -> None:
    model = build(language("recurrent_gemma", RECURRENT["recurrent_gemma"]))
    ids, images = torch.tensor([[0, *rows()[0]]]), pixels(1, size=16)
    real = torch.ones_like(ids, dtype=torch.bool)
    real[0, 0] = False
    with pytest.raises(SpecError, match="reads padding into its recurrent state"):
        model.generate(ids, real, images, max_new_tokens=2)


# --- every family that transformers has ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_causal_family_isolates_packed_samples_and_candidates_or_is_refused(
    arch: str,
) -> None:
    for changes in ({}, {"kv_heads": 2}, {"tied": True}, {"ffn": 128}):
        try:
            with torch.device("meta"):
                parameters = (
                    PrefixVLMConfig(
                        vision=VISION,
                        bridge=LinearConfig(),
                        language=replace(language(arch), **changes),
                    )
                    .build(pretrained=False)
                    .parameters()
                )
        except BridgeworkError:
            continue
        if sum(p.numel() for p in parameters) > 40_000_000:  # a family whose sizes are not all ours
            pytest.skip("too large for a test")
        with suppress(BridgeworkError):  # a refusal
            model = build(replace(language(arch), **changes))
            assert_continuations(model)
            assert farthest(model) < 1e-4
        return


@torch.no_grad()
def test_pooled_vectors_of_packed_samples_are_those_of_the_samples_alone() -> None:
    model, images = build(language("llama")), pixels(3, size=16)

    def pooled(ids: list[list[int]], images: Tensor, segments: Tensor | None = None) -> Tensor:
        ids_BT = torch.tensor(ids)
        labels_BT = ids_BT.masked_fill(ids_BT == IMAGE, IGNORE)
        attention_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        outputs = model(
            ids_BT, attention_BT, labels_BT, images, segments=segments, requested={"pooled"}
        )
        return torch.stack([outputs.image_BD, outputs.text_BD])

    alone = [pooled([row], images[i : i + 1]) for i, row in enumerate(rows())]
    numbers = [number for number, row in enumerate(rows()) for _ in row]
    together = pooled([[token for row in rows() for token in row]], images, torch.tensor([numbers]))
    torch.testing.assert_close(together, torch.cat(alone, dim=1))
