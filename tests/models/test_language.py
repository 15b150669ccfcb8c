"""Language towers: built from sizes, loaded, and refused if the two disagree."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from bridgework.errors import SpecError, WeightsError
from bridgework.models import LanguageConfig
from tests.models.examples import FLAN_XL, LLAMA_7B, OPT_2_7B

TINY = LLAMA_7B.tiny()


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_arch_of_llamas_shape_builds_with_the_numbers_given(arch: str) -> None:
    config = replace(TINY, arch=arch, kv_heads=2, norm_eps=1e-6, rope_theta=5e5)
    model: Any = config.build()
    assert model.config.model_type == arch
    assert (
        model.config.hidden_size,
        model.config.num_key_value_heads,
        model.config.vocab_size,
    ) == (32, 2, 320)
    assert (model.config.rms_norm_eps, model.config.rope_parameters["rope_theta"]) == (1e-6, 5e5)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 320)


@pytest.mark.parametrize(
    ("arch", "extra", "width", "depth"),
    [
        ("opt", {"do_layer_norm_before": True}, "hidden_size", "num_hidden_layers"),
        ("gpt2", {}, "n_embd", "n_layer"),
        ("gpt_neox", {}, "hidden_size", "num_hidden_layers"),
        ("phi3", {}, "hidden_size", "num_hidden_layers"),
        ("gemma", {"head_dim": 8}, "hidden_size", "num_hidden_layers"),
    ],
)
def test_other_decoders_take_the_same_numbers_under_their_own_names(
    arch: str, extra: dict[str, Any], width: str, depth: str, tmp_path: Path
) -> None:
    config = replace(TINY, arch=arch, kv_heads=4, extra=extra)
    model: Any = config.build()
    assert (
        getattr(model.config, width),
        getattr(model.config, depth),
        model.config.vocab_size,
    ) == (32, 2, 320)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 320)
    assert all(getattr(model.config, name) == value for name, value in extra.items())
    model.save_pretrained(tmp_path)
    assert torch.equal(
        next(replace(config, weights=str(tmp_path)).build().parameters()), next(model.parameters())
    )
    with pytest.raises(WeightsError, match=r"depth 2 \(config 3\)"):
        replace(config, weights=str(tmp_path), depth=3).build()


def test_opt_2_7b_and_flan_t5_xl_have_the_sizes_of_their_numbers() -> None:
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in config.build(pretrained=False).parameters())
            for config in (OPT_2_7B, FLAN_XL)
        ]
    assert sizes == [2_651_596_800, 2_849_757_184]  # Flan-T5's output matrix is its own


def test_flan_t5_keeps_its_own_fields() -> None:
    config = FLAN_XL.tiny().build().config
    assert (config.feed_forward_proj, config.scale_decoder_outputs, config.is_encoder_decoder) == (
        "gated-gelu", False, True,
    )  # fmt: skip
    assert (config.decoder_start_token_id, config.eos_token_id) == (0, None)


def test_extra_that_differs_from_the_weights_is_refused(tmp_path: Path) -> None:
    FLAN_XL.tiny().build().save_pretrained(tmp_path)
    extra = {**FLAN_XL.extra, "feed_forward_proj": "relu"}
    with pytest.raises(WeightsError, match=r"feed_forward_proj gated-gelu \(config relu\)"):
        replace(FLAN_XL.tiny(), weights=str(tmp_path), extra=extra).build()


def test_an_unknown_arch_and_one_of_another_shape_are_refused() -> None:
    with pytest.raises(SpecError, match="no model type 'lama'"):
        replace(TINY, arch="lama").build()
    with pytest.raises(SpecError, match="'bart' is of another shape: it has no ffn"):
        replace(TINY, arch="bart", ffn=128).build()
    with pytest.raises(SpecError, match="'bert' reads a text in both directions"):
        replace(TINY, arch="bert").build()
    with pytest.raises(SpecError, match="'opt' does not group heads; set kv_heads=4"):
        replace(TINY, arch="opt", kv_heads=2).build()


def test_smollm2_135m_has_its_published_size() -> None:
    config = LanguageConfig(
        width=576,
        depth=30,
        heads=9,
        kv_heads=3,
        ffn=1536,
        vocab=49_152,
        context=8192,
        tokenizer="bytes",
        tied=True,
    )
    with torch.device("meta"):
        assert sum(p.numel() for p in config.build().parameters()) == 134_515_008


def test_saved_weights_come_back_and_a_shorter_context_may_be_taken(tmp_path: Path) -> None:
    saved = TINY.build()
    saved.save_pretrained(tmp_path)
    loaded = replace(TINY, weights=str(tmp_path), context=64).build()
    assert all(
        torch.equal(a, b) for a, b in zip(saved.parameters(), loaded.parameters(), strict=True)
    )
    assert next(loaded.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 3, "vocab": 400}, r"depth 2 \(config 3\), vocab 320 \(config 400\)"),
        ({"context": 1024}, r"context 512 \(config 1024\)"),
        ({"rope_theta": 5e5}, r"rope_theta 10000.0 \(config 500000.0\)"),
        ({"tied": True}, r"tied False \(config True\)"),
        ({"arch": "qwen2"}, r"arch llama \(config qwen2\)"),
    ],
)
def test_weights_that_differ_from_the_spec_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    TINY.build().save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=message):
        replace(TINY, weights=str(tmp_path), **changes).build()


def test_pretrained_false_initializes_random_weights(tmp_path: Path) -> None:
    saved = TINY.build()
    saved.save_pretrained(tmp_path)
    drawn = replace(TINY, weights=str(tmp_path)).build(pretrained=False)
    assert not torch.equal(next(saved.parameters()), next(drawn.parameters()))


@pytest.mark.parametrize(("kv_heads", "tiny"), [(32, 4), (8, 1), (16, 2)])
def test_tiny_keeps_the_grouping_of_key_value_heads(kv_heads: int, tiny: int) -> None:
    assert replace(LLAMA_7B, kv_heads=kv_heads).tiny().kv_heads == tiny


def test_tiny_of_smollm2_whose_nine_heads_share_three_builds() -> None:
    smol = replace(TINY, width=576, heads=9, kv_heads=3, ffn=1536)
    assert smol.tiny().build().config.num_key_value_heads == 1


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(SpecError, match="heads of kv_heads 3"):
        replace(TINY, kv_heads=3)


@pytest.mark.parametrize(
    ("arch", "fields"),
    [
        (
            "llama",
            {
                "num_key_value_heads": 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            },
        ),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
        ("gpt2", {"n_inner": None, "eos_token_id": 7}),
        ("t5", {"d_kv": 16, "feed_forward_proj": "gated-gelu", "num_decoder_layers": 1}),
    ],
)
def test_the_spec_of_a_config_builds_the_same_model(arch: str, fields: dict[str, Any]) -> None:
    numbers = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 320,
    }
    config: Any = AutoConfig.for_model(arch, **numbers | fields)
    spec = LanguageConfig.of(config, "bytes")
    ours, theirs = spec.build(), type(spec.build())(config)
    assert {n: p.shape for n, p in ours.named_parameters()} == {
        n: p.shape for n, p in theirs.named_parameters()
    }
    ours.load_state_dict(theirs.state_dict())
    ids_BT = torch.tensor([[1, 2, 3]])
    given = {"decoder_input_ids": ids_BT} if arch == "t5" else {}
    assert torch.equal(ours.eval()(ids_BT, **given).logits, theirs.eval()(ids_BT, **given).logits)
    assert LanguageConfig.of(spec.config(), "bytes") == spec


@pytest.mark.parametrize(
    ("arch", "field"),
    [("bloom", None), ("mpt", None), ("gpt_neox_japanese", "intermediate_multiple_size")],
)
def test_a_feed_forward_without_a_field_is_a_multiple_of_the_width(
    arch: str, field: str | None
) -> None:
    with pytest.raises(SpecError, match=f"language.ffn: {arch!r} has no field for it.*set ffn=128"):
        replace(TINY, arch=arch, kv_heads=4).build()
    model: Any = replace(TINY, arch=arch, kv_heads=4, ffn=128, tied=True).build()
    assert any(p.shape == (128, 32) for p in model.parameters())
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 320)
    assert LanguageConfig.of(model.config, "bytes").ffn == 128
    if field is not None:
        assert replace(TINY, arch=arch, kv_heads=4, ffn=64, extra={field: 2}).build()


@pytest.mark.parametrize("arch", ["gemma3_text", "olmo3", "lfm3"])
def test_rotary_positions_per_kind_of_layer_keep_the_local_theta(arch: str) -> None:
    extra = {"head_dim": 8} if arch == "gemma3_text" else {}
    model: Any = replace(
        TINY, arch=arch, kv_heads=4, tied=arch == "gemma3_text", rope_theta=7e5, extra=extra
    ).build()
    own = model.config.rope_parameters
    known: Any = AutoConfig.for_model(arch)
    assert own["full_attention"]["rope_theta"] == 7e5
    assert own["sliding_attention"] == known.rope_parameters["sliding_attention"]
    spec = LanguageConfig.of(model.config, "bytes")
    assert spec.rope_theta == 7e5 and LanguageConfig.of(spec.config(), "bytes") == spec


@pytest.mark.parametrize(
    ("arch", "fields"),
    [
        ("mistral", {"sliding_window": 7}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 2e4, "factor": 4.0}}),
        ("phi", {"partial_rotary_factor": 0.25}),
        ("gemma3_text", {"sliding_window": 9, "head_dim": 8, "query_pre_attn_scalar": 64}),
        ("gpt_oss", {"head_dim": 8}),
    ],
)
def test_the_spec_of_a_config_keeps_windows_and_scaled_positions(
    arch: str, fields: dict[str, Any]
) -> None:
    numbers = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    config: Any = AutoConfig.for_model(
        arch, **numbers, intermediate_size=48, vocab_size=320, **fields
    )
    before, after = config.to_dict(), LanguageConfig.of(config, "bytes").config().to_dict()
    ids = {"bos_token_id", "eos_token_id", "pad_token_id"}
    assert {k: v for k, v in before.items() if k not in ids} == {
        k: v for k, v in after.items() if k not in ids
    }


def test_an_extra_field_that_no_config_has_is_refused_with_a_suggestion() -> None:
    with pytest.raises(
        SpecError,
        match="the config of 'mistral' has no field 'sliding_windw'; did you mean 'sliding_w",
    ):
        replace(TINY, arch="mistral", extra={"sliding_windw": 4}).build()


@pytest.mark.parametrize(
    ("arch", "extra", "said"),
    [
        ("zamba2", {}, "num_hidden_layers"),
        ("bamba", {}, "mamba_n_heads"),
        ("phi", {"num_key_value_heads": "x"}, "int"),
        ("gptj", {}, "size of tensor"),
    ],
)
def test_numbers_that_transformers_cannot_build_are_one_line(
    arch: str, extra: dict[str, Any], said: str
) -> None:
    with pytest.raises(
        SpecError, match=f"{arch!r}: transformers cannot build it with these sizes: .*{said}"
    ) as raised:
        replace(TINY, arch=arch, kv_heads=4, extra=extra).build()
    assert "\n" not in str(raised.value)


# --- one matrix or two -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["t5", "mt5", "umt5", "llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_output_matrix_is_tied_where_the_spec_says_so(arch: str, tied: bool) -> None:
    extra = {"d_kv": 8} if "t5" in arch else {}
    model: Any = replace(TINY, arch=arch, kv_heads=4, tied=tied, extra=extra).build()
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_an_untied_t5_comes_back_from_its_folder_with_both_matrices(tmp_path: Path) -> None:
    saved: Any = FLAN_XL.tiny().build()
    saved.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert not torch.equal(state["lm_head.weight"], state["shared.weight"])
    loaded: Any = replace(FLAN_XL.tiny(), weights=str(tmp_path)).build()
    assert torch.equal(loaded.lm_head.weight, saved.lm_head.weight)
    assert torch.equal(loaded.shared.weight, saved.shared.weight)
    with pytest.raises(WeightsError, match=r"tied False \(config True\)"):
        replace(FLAN_XL.tiny(), weights=str(tmp_path), tied=True).build()


def test_weights_of_another_kind_of_model_are_refused_in_one_line(tmp_path: Path) -> None:
    AutoConfig.for_model("llava").save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="are of a llava, not of a language model alone"):
        replace(TINY, weights=str(tmp_path)).build()
