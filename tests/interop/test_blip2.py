"""BLIP-2, InstructBLIP and LLaVA against transformers: names, features, logits, generated ids."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from bridgework import artifacts
from bridgework.data.tokenization import load_tokenizer
from bridgework.errors import SpecError, WeightsError
from bridgework.hf import blip2, instructblip, llava
from bridgework.hf.convert import export_hf, import_hf
from bridgework.models import (
    EvaConfig,
    LinearConfig,
    MLPConfig,
    PrefixVLMConfig,
    QFormerConfig,
    ViTConfig,
)
from bridgework.models.language import is_tied
from bridgework.models.origin import Origin
from bridgework.models.prefix_vlm import PrefixVLM
from bridgework.models.qformer_pretrainer import QFormerPretrainer
from bridgework.models.vision import normalize
from bridgework.system import IMAGE
from bridgework.training.step import TrainingModule
from tests.models.examples import LLAMA_7B, pixels, stirred

VOCAB = 120
OPT = {"model_type": "opt", "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48,
       "num_attention_heads": 4, "word_embed_proj_dim": 32, "max_position_embeddings": 64}  # fmt: skip
SMALL_OPT = OPT | {
    "hidden_size": 24,
    "word_embed_proj_dim": 24,
    "do_layer_norm_before": False,
    "num_hidden_layers": 1,
}
T5 = {"model_type": "t5", "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
      "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}  # fmt: skip
FLAN = T5 | {"tie_word_embeddings": False}  # its output matrix is its own: see `untied`
LLAMA = {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 20, "max_position_embeddings": 128}
VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
       "patch_size": 8}  # fmt: skip
WIDE = VIT | {"hidden_size": 48, "num_hidden_layers": 3, "patch_size": 16, "image_size": 48}
QFORMER = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 40,
           "vocab_size": 90, "max_position_embeddings": 20}  # fmt: skip
LONG = QFORMER | {"num_hidden_layers": 3, "cross_attention_frequency": 3, "hidden_size": 40}
WRITERS: dict[str, tuple[str, dict[str, Any]]] = {
    "blip2-opt": ("Blip2", {"vision": VIT, "qformer": QFORMER, "text": OPT, "queries": 4}),
    "blip2-small-opt": ("Blip2", {"vision": WIDE, "qformer": LONG, "text": SMALL_OPT, "queries": 3}),
    "blip2-t5": ("Blip2", {"vision": VIT, "qformer": QFORMER, "text": T5, "queries": 4}),
    "blip2-flan-t5": ("Blip2", {"vision": VIT, "qformer": QFORMER, "text": FLAN, "queries": 4}),
    "instructblip-flan-t5": ("InstructBlip", {"vision": WIDE, "qformer": LONG, "text": FLAN, "queries": 5}),
    "llava-window": ("Llava", {"vision": VIT | {"model_type": "clip_vision_model"}, "text": MISTRAL}),
    "instructblip-llama": ("InstructBlip", {"vision": VIT, "qformer": QFORMER, "text": LLAMA, "queries": 4}),
    "instructblip-t5": ("InstructBlip", {"vision": WIDE, "qformer": LONG, "text": T5, "queries": 5}),
    "llava": ("Llava", {"vision": VIT | {"model_type": "clip_vision_model"}, "text": LLAMA}),
    "llava-whole": ("Llava", {
        "vision": WIDE | {"model_type": "clip_vision_model", "hidden_act": "gelu"}, "text": LLAMA, "layer": -1,
        "strategy": "full",
    }),
    "llava-siglip-tied": ("Llava", {
        "vision": VIT | {"model_type": "siglip_vision_model", "vision_use_head": False},
        "text": LLAMA | {"tie_word_embeddings": True}, "strategy": "full",
    }),
}  # fmt: skip
MODULES: dict[str, ModuleType] = {"Blip2": blip2, "InstructBlip": instructblip, "Llava": llava}
PLACE = VOCAB - 1


def theirs(shape: str) -> Any:
    family, given = WRITERS[shape]
    known = {
        "vision_config": given["vision"],
        "text_config": given["text"],
        "image_token_index": PLACE,
    }
    if family == "Llava":
        known |= {
            "vision_feature_layer": given.get("layer", -2),
            "vision_feature_select_strategy": given.get("strategy", "default"),
        }
    else:
        known |= {"qformer_config": dict(given["qformer"]), "num_query_tokens": given["queries"]}
    config = getattr(transformers, f"{family}Config")(**known)
    torch.manual_seed(0)
    model: Any = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    model.config.architectures = [type(model).__name__]
    if given["text"].get("tie_word_embeddings") is False:
        untied(model)
    return stirred(model).eval()


def untied(model: Any) -> None:
    """Untie the embeddings, as in all published T5s but the first; transformers 5 ties new models."""
    language = model.language_model
    language.lm_head.weight = torch.nn.Parameter(language.shared.weight.detach().flip(0))
    for part, name in ((language, "lm_head.weight"), (model, "language_model.lm_head.weight")):
        part.all_tied_weights_keys.pop(name)


def module_of(shape: str) -> ModuleType:
    return MODULES[WRITERS[shape][0]]


def ours(model: Any, module: ModuleType) -> Any:
    spec = module.model_config(model.config, tied=is_tied(model))
    names, state = module.tensor_names(spec), model.state_dict()
    built = spec.build()
    built.load_state_dict({own: state[name] for own, name in names.items()}, strict=False)
    return built.eval()


def rows(tokens: int) -> tuple[Tensor, Tensor]:
    """Return ids and attention of two prompts with one image each, without padding."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(3, VOCAB - 2, (2, 7), generator=generator)
    ids_BT = torch.cat([text[:, :1], torch.full((2, tokens), IMAGE), text[:, 1:]], dim=1)
    return ids_BT, torch.ones_like(ids_BT, dtype=torch.bool)


def heard(shape: str) -> dict[str, Tensor]:
    if WRITERS[shape][0] != "InstructBlip":
        return {}
    attention = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return {
        "instruction": torch.tensor([[5, 6, 7, 8, 9], [5, 9, 6, 0, 0]]),
        "instruction_attention": attention,
    }


def to_theirs(given: dict[str, Tensor]) -> dict[str, Tensor]:
    known = {"instruction": "qformer_input_ids", "instruction_attention": "qformer_attention_mask"}
    return {known[name]: tensor.long() for name, tensor in given.items()}


@pytest.mark.parametrize("shape", WRITERS)
def test_names_are_a_bijection_on_all_parameters(shape: str) -> None:
    model, module = theirs(shape), module_of(shape)
    names = module.tensor_names(module.model_config(model.config, tied=is_tied(model)))
    assert set(names.values()) == {name for name, _ in model.named_parameters()}
    assert len(set(names.values())) == len(names)
    assert names.keys() == {
        name
        for name, _ in module.model_config(model.config, tied=is_tied(model))
        .build()
        .named_parameters()
    }


@pytest.mark.parametrize("shape", WRITERS)
def test_logits_and_greedy_ids_agree(shape: str) -> None:
    model, module = theirs(shape), module_of(shape)
    built, tokens = (
        ours(model, module),
        module.model_config(model.config, tied=is_tied(model)).image_tokens,
    )
    images = pixels(2, size=built.vision.config.pixels.size)
    ids_BT, attention_BT = rows(tokens)
    places_BT = ids_BT.masked_fill(ids_BT == IMAGE, PLACE)
    given = to_theirs(heard(shape)) | {
        "pixel_values": normalize(images, built.vision.config.pixels)
    }
    with torch.no_grad():
        for found, expected in module.outputs(built, model, Origin()).values():
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        own = getattr(
            getattr(model, "language_model", model), "generation_config", model.generation_config
        )
        how = {
            "max_new_tokens": 5,
            "do_sample": False,
            "eos_token_id": own.eos_token_id,
            "pad_token_id": own.pad_token_id,
        }
        written = built.generate(ids_BT, attention_BT, images, **heard(shape), **how)
        begun = {"attention_mask": torch.ones_like(places_BT)}
        reference = model.generate(
            input_ids=places_BT, **given, **begun, max_new_tokens=5, do_sample=False
        )
    assert torch.equal(written, reference[:, -written.shape[1] :])


@pytest.mark.parametrize("shape", WRITERS)
def test_round_trip_is_bit_equal(shape: str, tmp_path: Path) -> None:
    theirs(shape).save_pretrained(tmp_path / "in")
    assert import_hf(tmp_path / "in", tmp_path / "artifact").holds
    assert export_hf(tmp_path / "artifact", tmp_path / "out").holds
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("in", "out"))
    assert before.keys() == after.keys() and all(
        torch.equal(t, after[name]) for name, t in before.items()
    )


@pytest.mark.parametrize("shape", [shape for shape in WRITERS if not shape.startswith("llava")])
def test_features_and_bridge_tokens_agree(shape: str) -> None:
    model, module = theirs(shape), module_of(shape)
    built: PrefixVLM = ours(model, module)
    images = pixels(2, size=built.vision.config.pixels.size)
    with torch.no_grad():
        found = model.get_image_features(
            normalize(images, built.vision.config.pixels), **to_theirs(heard(shape))
        )
        features = built.vision(images)
        tokens = built.images(None, features, *heard(shape).values())
    torch.testing.assert_close(
        built.bridge.ln_vision(features), found.last_hidden_state, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(tokens, found.pooler_output, atol=1e-5, rtol=1e-4)


def test_instructblip_keeps_both_tokenizers(tmp_path: Path) -> None:
    theirs("instructblip-llama").save_pretrained(tmp_path / "in")
    for folder in (tmp_path / "in", tmp_path / "in" / "qformer_tokenizer"):
        load_tokenizer("bytes").save_pretrained(folder)
    import_hf(tmp_path / "in", tmp_path / "artifact")
    shutil.rmtree(tmp_path / "in")
    model = artifacts.load(tmp_path / "artifact").stage.model
    assert model.tokenizer == str(tmp_path / "artifact" / "tokenizer")
    assert model.instruction == str(tmp_path / "artifact" / "tokenizer" / "qformer_tokenizer")
    export_hf(tmp_path / "artifact", tmp_path / "out")
    said = [
        load_tokenizer(str(tmp_path / "out" / place))("a dog").input_ids
        for place in ("", "qformer_tokenizer")
    ]
    assert said[0] == said[1] == load_tokenizer("bytes")("a dog").input_ids


@pytest.mark.parametrize("shape", WRITERS)
def test_config_round_trip_is_equal(shape: str, tmp_path: Path) -> None:
    module = module_of(shape)
    given = theirs(shape)
    spec = module.model_config(given.config, tied=is_tied(given))
    assert module.model_config(module.hf_config(spec), tied=is_tied(given)) == spec
    model: Any = getattr(transformers, module.ARCHITECTURES[0])(module.hf_config(spec))
    names, state = module.tensor_names(spec), spec.build().state_dict()
    absent = model.load_state_dict(
        {theirs: state[own] for own, theirs in names.items()}, strict=False
    )
    assert not absent.unexpected_keys
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert loaded.architectures == [module.ARCHITECTURES[0]]
    assert module.model_config(loaded).tokenizer == str(tmp_path)


@pytest.mark.parametrize("shape", WRITERS)
def test_stage_has_the_config_and_computes_its_loss(shape: str) -> None:
    module = module_of(shape)
    stage = module.stage(module.model_config(theirs(shape).config))
    assert (stage.evals, stage.budget.steps, stage.data.max_tokens) == ((), 1, stage.model.context)
    assert TrainingModule(stage.model.build(), stage.losses).requested == {"logits"}


# --- retrieval -------------------------------------------------------------------------------------------------------


def finder(vision: dict[str, Any], qformer: dict[str, Any], embed: int) -> Any:
    config = transformers.Blip2Config(
        vision_config=vision, qformer_config=qformer | {"use_qformer_text_input": True}, num_query_tokens=4,
        image_text_hidden_size=embed, text_config=OPT,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.Blip2ForImageTextRetrieval(config)
    model.config.architectures = [type(model).__name__]
    return stirred(model).eval()


@pytest.mark.parametrize("sizes", [(VIT, QFORMER, 16), (WIDE, LONG, 24)], ids=["small", "wide"])
def test_contrast_and_matching_agree_with_transformers_retrieval(sizes: Any) -> None:
    """With padding; each image and text are compared by the best query."""
    model = finder(*sizes)
    built: QFormerPretrainer = ours(model, blip2)
    images = pixels(3, size=built.vision.config.pixels.size)
    ids = torch.randint(1, 90, (3, 6), generator=torch.Generator().manual_seed(3))
    attention = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    pixel_values = normalize(images, built.vision.config.pixels)
    given = {"pixel_values": pixel_values, "input_ids": ids, "attention_mask": attention}
    with torch.no_grad():
        features = built.vision(images)
        found, judged = model(**given), model(**given, use_image_text_matching_head=True)
        image, text = built.embed_images(features), built.embed_texts(ids, attention.bool())
        own = built.match(ids, attention.bool(), features)
        pairs = [*blip2.outputs(built, model, Origin()).values()]
    pairs += [
        (image, found.image_embeds),
        (text, found.text_embeds),
        (torch.einsum("iqd,td->itq", image, text).amax(-1), found.logits_per_image),
        (own, judged.logits_per_image.diff(dim=1)[:, 0]),
    ]
    for ours_found, expected in pairs:
        torch.testing.assert_close(ours_found, expected, atol=1e-5, rtol=1e-5)


def test_retrieval_model_round_trip_is_bit_equal(tmp_path: Path) -> None:
    finder(VIT, QFORMER, 16).save_pretrained(tmp_path / "in")
    assert import_hf(tmp_path / "in", tmp_path / "artifact").holds
    assert export_hf(tmp_path / "artifact", tmp_path / "out").holds
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("in", "out"))
    assert before.keys() == after.keys() and all(
        torch.equal(t, after[name]) for name, t in before.items()
    )


def test_temperature_and_lm_head_are_not_exported() -> None:
    model = finder(VIT, QFORMER, 16)
    spec = blip2.model_config(model.config)
    names = blip2.tensor_names(spec)
    assert set(names.values()) == {name for name, _ in model.named_parameters()}
    rest = {name for name, _ in spec.build().named_parameters()} - names.keys()
    assert rest and all(name.startswith(("heads.lm.", "heads.temperature")) for name in rest)
    assert blip2.model_config(blip2.hf_config(spec)) == spec
    stage = blip2.stage(spec)
    assert stage.data.template == "caption" and TrainingModule(spec.build(), stage.losses).requested == {
        "pooled", "match_all", "logits",
    }  # fmt: skip


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_models_that_transformers_lacks_are_rejected() -> None:
    spec = blip2.model_config(theirs("blip2-opt").config)
    assert isinstance(spec, PrefixVLMConfig) and isinstance(spec.bridge, QFormerConfig)
    with pytest.raises(SpecError, match="Got ViTConfig and QFormer"):
        blip2.hf_config(replace(spec, vision=ViTConfig().tiny()))
    with pytest.raises(SpecError, match="export the model as InstructBLIP"):
        blip2.hf_config(replace(spec, bridge=replace(spec.bridge, text=True)))
    with pytest.raises(SpecError, match="export the model as BLIP-2"):
        instructblip.hf_config(spec)
    for bridge, vision in ((LinearConfig(), ViTConfig()), (MLPConfig(), EvaConfig())):
        with pytest.raises(SpecError, match="an MLP of two matrices"):
            llava.hf_config(PrefixVLMConfig(vision=vision, bridge=bridge, language=LLAMA_7B))


@pytest.mark.parametrize(
    ("shape", "part", "field", "value", "message"),
    [
        (
            "blip2-opt",
            "vision_config",
            "layer_norm_eps",
            1e-5,
            r"layer_norm_eps is not supported\. Got 1e-05",
        ),
        (
            "blip2-opt",
            "qformer_config",
            "hidden_act",
            "relu",
            r"hidden_act is not supported\. Got relu",
        ),
        (
            "blip2-opt",
            "qformer_config",
            "use_qformer_text_input",
            True,
            "use_qformer_text_input does not fit",
        ),
        (
            "llava",
            "",
            "projector_hidden_act",
            "relu",
            r"projector_hidden_act is not supported\. Got relu",
        ),
        ("llava", "", "vision_feature_layer", [-2, -1], "Got layer"),
        (
            "llava-siglip-tied",
            "",
            "vision_feature_select_strategy",
            "default",
            "first patch of a SigLIP",
        ),
    ],
)
def test_unsupported_fields_are_rejected(
    shape: str, part: str, field: str, value: Any, message: str
) -> None:
    config = theirs(shape).config
    setattr(getattr(config, part) if part else config, field, value)
    with pytest.raises(WeightsError, match=message):
        module_of(shape).model_config(config)
