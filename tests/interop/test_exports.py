"""Exported folders: special ids, settings, config fields, processor, and errors that name a field."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, GenerationConfig

from bridgework import artifacts
from bridgework.data.samples import Part
from bridgework.data.tokenization import load_tokenizer
from bridgework.errors import SpecError, WeightsError
from bridgework.hf.common import config_diff, flatten_config
from bridgework.hf.convert import export_hf, import_hf
from bridgework.inference.pipeline import Pipeline
from bridgework.models import LanguageConfig, ViTConfig
from bridgework.system import System, load
from tests.interop import test_blip, test_blip2, test_clip, test_idefics, test_llava_next
from tests.models.examples import stirred

FILE, CONFIG = "model.safetensors", "config.json"
MODELS: dict[str, Callable[[], Any]] = {
    "clip": lambda: test_clip.theirs("gelu"),
    "blip": lambda: test_blip.both("BlipForConditionalGeneration")[1],
    "blip-answers": lambda: test_blip.both("BlipForQuestionAnswering")[1],
    "blip-finds": lambda: test_blip.both("BlipForImageTextRetrieval")[1],
    "blip2": lambda: test_blip2.theirs("blip2-opt"),
    "blip2-t5": lambda: test_blip2.theirs("blip2-t5"),
    "blip2-finds": lambda: test_blip2.finder(test_blip2.VIT, test_blip2.QFORMER, 16),
    "instructblip": lambda: test_blip2.theirs("instructblip-llama"),
    "llava": lambda: test_blip2.theirs("llava"),
    "llava-siglip": lambda: test_blip2.theirs("llava-siglip-tied"),
    "llava-next": lambda: test_llava_next.theirs("mistral"),
    "idefics": lambda: test_idefics.theirs("9b"),
}
IDS = {"bos_token_id": 11, "eos_token_id": 13, "pad_token_id": 17, "sep_token_id": 19}
SETTINGS = {
    "temperature": 0.7,
    "top_p": 0.8,
    "do_sample": True,
    "repetition_penalty": 1.3,
    "max_length": 77,
}


def with_ids(model: Any) -> Any:
    """Set distinct special ids in the config and its parts, and generation settings."""
    for part in (model.config, getattr(model.config, "text_config", None)):
        for name, value in IDS.items():
            marked = hasattr(part, name) and not (
                name == "bos_token_id" and "Blip" in type(part).__name__
            )
            if marked and not (name == "eos_token_id" and "CLIP" in type(part).__name__):
                setattr(part, name, value)
    if model.can_generate():
        ids = {name: value for name, value in IDS.items() if name != "sep_token_id"} | {
            "eos_token_id": [13, 23]
        }
        model.generation_config = GenerationConfig(**ids, **SETTINGS)
    return model


def round_trip(
    model: Any, folder: Path, prepare: Callable[[Path], object] = lambda folder: None
) -> Path:
    model.save_pretrained(folder / "in")
    prepare(folder / "in")
    import_hf(folder / "in", folder / "artifact")
    export_hf(folder / "artifact", folder / "out", type(model).__name__)
    return folder / "out"


@pytest.mark.parametrize("tokenizer", [True, False], ids=["tokenizer", "no tokenizer"])
@pytest.mark.parametrize("name", MODELS)
def test_exported_model_keeps_special_ids_and_settings(
    name: str, tokenizer: bool, tmp_path: Path
) -> None:
    model = with_ids(MODELS[name]())

    def with_tokenizer(folder: Path) -> None:
        if tokenizer:
            load_tokenizer("bytes").save_pretrained(folder)

    out = round_trip(model, tmp_path, with_tokenizer)
    before, after = (AutoConfig.from_pretrained(tmp_path / side) for side in ("in", "out"))
    assert config_diff(before, after) == {}
    assert before.to_dict()["architectures"] == after.to_dict()["architectures"]
    if model.can_generate():
        settings = [
            GenerationConfig.from_pretrained(tmp_path / side).to_diff_dict()
            for side in ("in", "out")
        ]
        assert settings[0] == settings[1] and SETTINGS.items() <= settings[0].items()
    processor = AutoProcessor.from_pretrained(out)
    assert isinstance(processor, transformers.ProcessorMixin)


def test_inconsistent_settings_are_exported_unchanged(tmp_path: Path) -> None:
    """For example a temperature without sampling, as in Vicuna's folder; `save_pretrained` refuses it."""
    settings = {
        "temperature": 0.9,
        "top_p": 0.6,
        "eos_token_id": 13,
        "transformers_version": "4.31.0",
    }

    def published(folder: Path) -> None:
        (folder / "generation_config.json").write_text(json.dumps(settings))
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(
            json.dumps(config | {"id2label": {"0": "a", "1": "b", "2": "c"}})
        )

    out = round_trip(MODELS["llava"](), tmp_path, published)
    written = json.loads((out / "generation_config.json").read_text())
    assert {name: value for name, value in written.items() if name != "transformers_version"} == {
        name: value for name, value in settings.items() if name != "transformers_version"
    }
    assert AutoConfig.from_pretrained(out).id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize(
    "name", ["llava", "blip2", "blip2-t5", "instructblip", "llava-next", "idefics", "blip"]
)
def test_exported_model_stops_where_the_imported_one_does(name: str, tmp_path: Path) -> None:
    """Calls `generate` with the exported settings; a token of the text is set as the end token."""
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "plain")
    plain = json.loads(import_hf_and_read(tmp_path / "plain", tmp_path / "plain-artifact"))
    (row, *_) = plain["texts"]["until_end"]["ours"]
    ending = row[3]
    for part in (model.config, getattr(model.config, "text_config", None)):
        if hasattr(part, "eos_token_id"):
            part.eos_token_id = ending
        if hasattr(part, "sep_token_id"):
            part.sep_token_id = ending
    model.generation_config = GenerationConfig(
        eos_token_id=ending,
        pad_token_id=0,
        decoder_start_token_id=model.generation_config.decoder_start_token_id,
    )
    if hasattr(model, "language_model") and hasattr(model.language_model, "generation_config"):
        model.language_model.generation_config = model.generation_config
    out = round_trip(model, tmp_path)
    text = json.loads((out / "parity.json").read_text())["texts"]["until_end"]
    assert (
        text["equal"] and text["ours"][0][: row.index(ending) + 1] == row[: row.index(ending) + 1]
    )
    assert len(text["ours"][0]) == row.index(ending) + 1 or len(text["ours"]) > 1


def import_hf_and_read(folder: Path, out: Path) -> str:
    import_hf(folder, out)
    return (out / "parity.json").read_text()


@pytest.mark.parametrize(
    "name", ["llava", "llava-next", "blip2", "instructblip", "idefics", "blip"]
)
def test_transformers_serve_loads_an_exported_folder(name: str, tmp_path: Path) -> None:
    from transformers.cli.serving.model_manager import ModelManager

    out = round_trip(
        with_ids(MODELS[name]()),
        tmp_path,
        lambda folder: load_tokenizer("bytes").save_pretrained(folder),
    )
    manager = ModelManager(device="cpu", model_timeout=-1)
    try:
        model, processor = manager.load_model_and_processor(f"{out}@main")
        assert type(model).__name__ == type(MODELS[name]()).__name__
        assert manager.get_model_modality(model, processor).name in ("VLM", "MULTIMODAL")
    finally:
        manager.shutdown()


# --- models that were trained here -----------------------------------------------------------------------------------


def trained(
    name: str, folder: Path, change: Callable[[Any], Any] = lambda stage: stage
) -> tuple[Path, Any]:
    """Return an artifact of a tiny stage, recorded with three steps, and the stage."""
    recipe, _, stage_name = name.partition("/")
    system = load(recipe).tiny()
    stage = change(replace(system[stage_name], starts_from=None, init_params=()))
    system = System(name=system.name, paper="", stages=(stage,))
    torch.manual_seed(0)
    model = stirred(stage.model.build(pretrained=False))
    artifacts.save(
        folder / "artifact",
        dict(model.named_parameters()),
        system=system,
        stage=stage.name,
        steps=3,
    )
    return folder / "artifact", stage


@pytest.mark.parametrize(
    "name", ["llava/instruct", "llava:next/instruct", "blip2/generate", "instructblip/instruct"]
)
def test_exported_settings_contain_trained_end_tokens(name: str, tmp_path: Path) -> None:
    path, _ = trained(name, tmp_path)
    export_hf(path, tmp_path / "out")
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    pipeline = Pipeline(artifacts.load(path).model, artifacts.load(path).stage)
    ends = (
        {settings.eos_token_id}
        if isinstance(settings.eos_token_id, int)
        else set(settings.eos_token_id)
    )
    assert pipeline.stop_conditions.ids <= ends
    assert settings.pad_token_id == pipeline.tokenizer.pad_token_id
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.text_config.eos_token_id == settings.eos_token_id
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == config.image_token_index


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("llava/instruct", "v1"),
        ("llava/instruct", "chat"),
        ("llava/align", "plain"),
        ("llava:next/instruct", "v1"),
    ],
)
def test_chat_template_and_processor_give_the_training_ids(
    name: str, template: str, tmp_path: Path
) -> None:
    path, stage = trained(
        name, tmp_path, lambda stage: replace(stage, data=replace(stage.data, template=template))
    )
    export_hf(path, tmp_path / "out")
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "out")
    pipeline = Pipeline(artifacts.load(path).model, stage)
    picture = transformers_picture()
    conversation = [
        Part("user", image=0),
        Part("user", text="\n"),
        Part("user", text="What is it?"),
    ]
    own = pipeline.inputs.batch([conversation], [[png(picture)]], answer=False).ids_BT[0]
    asked = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    ]
    text = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    given = processor(images=picture, text=text, add_special_tokens=False, return_tensors="pt")
    word = AutoConfig.from_pretrained(tmp_path / "out").image_token_index
    expected = [word if token < 0 else token for token in own.tolist()]
    if template != "plain":  # which reads no question
        assert given["input_ids"][0].tolist() == expected
    assert int((given["input_ids"] == word).sum()) == int((own < 0).sum())
    features = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    assert features.generate(**given, max_new_tokens=2, do_sample=False).shape[0] == 1


def transformers_picture() -> Any:
    from PIL import Image

    pixels = torch.randint(
        0, 256, (40, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return Image.fromarray(pixels.numpy())


def png(picture: Any) -> bytes:
    import io

    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def test_trained_idefics_has_both_tokens_and_ends_with_a_chunk(
    tmp_path: Path,
) -> None:
    spec = replace(
        test_idefics.idefics.model_config(test_idefics.theirs("small").config), origin=None
    )
    spec = replace(spec, language=replace(spec.language, vocab=300, tokenizer="bytes"))
    stage = test_idefics.idefics.stage(spec)
    torch.manual_seed(0)
    model = stirred(spec.build())
    system = System(name="s", paper="", stages=(stage,))
    artifacts.save(
        tmp_path / "a", dict(model.named_parameters()), system=system, stage=stage.name, steps=3
    )
    assert export_hf(tmp_path / "a", tmp_path / "out").holds
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    assert tokenizer.convert_tokens_to_ids(["<fake_token_around_image>", "<image>"]) == [300, 301]
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert set(settings.eos_token_id) == {259, 300} and settings.suppress_tokens == [301]


def test_full_vocabulary_gets_a_row_for_images(tmp_path: Path) -> None:
    """Every id has a token, so the image token gets a new row."""

    def full(stage: Any) -> Any:
        return replace(
            stage, model=replace(stage.model, language=replace(stage.model.language, vocab=260))
        )

    path, _ = trained("llava/instruct", tmp_path, full)
    export_hf(path, tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.image_token_index, config.text_config.vocab_size) == (260, 261)
    before, after = artifacts.weights(path), load_file(tmp_path / "out" / FILE)
    for own, name in (
        ("language.model.embed_tokens.weight", "embed_tokens.weight"),
        ("language.lm_head.weight", "lm_head.weight"),
    ):
        (longer,) = (tensor for key, tensor in after.items() if key.endswith(name))
        assert longer.shape[0] == 261 and torch.equal(longer[:260], before[own])
    assert (
        AutoProcessor.from_pretrained(tmp_path / "out").tokenizer.convert_tokens_to_ids("<image>")
        == 260
    )


def test_import_trained_further_has_both_end_tokens(tmp_path: Path) -> None:
    with_ids(MODELS["llava"]()).save_pretrained(tmp_path / "in")
    load_tokenizer("bytes").save_pretrained(tmp_path / "in")
    model_320(tmp_path / "in")
    import_hf(tmp_path / "in", tmp_path / "first")
    loaded = artifacts.load(tmp_path / "first")
    artifacts.save(
        tmp_path / "more",
        dict(loaded.model.named_parameters()),
        system=loaded.system,
        stage=loaded.stage.name,
        steps=2,
    )
    export_hf(tmp_path / "more", tmp_path / "out")
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [13, 23, 259]
    assert AutoConfig.from_pretrained(tmp_path / "out").text_config.eos_token_id == [13, 259]


def model_320(folder: Path) -> None:
    """Save the model with a larger vocabulary, because the byte tokenizer needs 260 ids."""
    config = transformers.LlavaConfig.from_pretrained(folder)
    config.text_config.vocab_size = 320
    settings = GenerationConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model: Any = stirred(transformers.LlavaForConditionalGeneration(config))
    model.generation_config = settings
    model.save_pretrained(folder)


# --- Flan-T5 ---------------------------------------------------------------------------------------------------------


def untied(folder: Path, prefix: str) -> None:
    """Untie the output matrix of a T5, as in all published ones but the first."""
    state = load_file(folder / FILE)
    words = state[f"{prefix}shared.weight"]
    state[f"{prefix}lm_head.weight"] = (
        torch.randn(words.shape, generator=torch.Generator().manual_seed(5)) * 0.2
    )
    save_file(state, folder / FILE, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text())
    config["text_config"] |= {"tie_word_embeddings": False, "scale_decoder_outputs": False}
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize("shape", ["blip2-t5", "instructblip-t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_untied_t5_round_trip_is_bit_equal(shape: str, dtype: torch.dtype, tmp_path: Path) -> None:
    test_blip2.theirs(shape).to(dtype).save_pretrained(tmp_path / "in")
    untied(tmp_path / "in", "language_model.")
    state = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / "in" / FILE).items()}
    save_file(state, tmp_path / "in" / FILE, metadata={"format": "pt"})
    assert import_hf(tmp_path / "in", tmp_path / "artifact").holds
    assert not artifacts.load(tmp_path / "artifact").stage.model.language.tied
    export_hf(tmp_path / "artifact", tmp_path / "out")
    before, after = (load_file(tmp_path / side / FILE) for side in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[n]) and t.dtype == after[n].dtype for n, t in before.items())
    assert not torch.equal(
        after["language_model.lm_head.weight"], after["language_model.shared.weight"]
    )


@pytest.mark.parametrize("name", ["blip2", "blip2-finds", "instructblip", "blip2-t5"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_round_trip_is_bit_equal(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """transformers loads the float16 weights of a Q-Former and of T5's `wo` as float32."""
    round_trip(MODELS[name]().to(dtype), tmp_path)
    before, after = (load_file(tmp_path / side / FILE) for side in ("in", "out"))
    assert all(torch.equal(t, after[n]) and t.dtype == after[n].dtype for n, t in before.items())


# --- fields that change outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_an_export_keeps_the_epsilon_and_the_activation_of_a_loaded_tower(
    kind: Literal["clip", "siglip"], tmp_path: Path
) -> None:
    tower = ViTConfig(
        kind=kind, image_size=16, patch=8, width=32, depth=2, heads=2, ffn=48, layer=-1
    )
    config = tower.config()
    config.layer_norm_eps, config.hidden_act = 1e-3, "relu"
    torch.manual_seed(0)
    stirred(type(tower.build().tower)(config)).save_pretrained(tmp_path / "tower")
    vision = replace(tower, weights=str(tmp_path / "tower"))
    path, _ = trained(
        "llava/instruct",
        tmp_path,
        lambda stage: replace(stage, model=replace(stage.model, vision=vision)),
    )
    export_hf(path, tmp_path / "out")
    after = AutoConfig.from_pretrained(tmp_path / "out").vision_config
    assert (after.layer_norm_eps, after.hidden_act) == (1e-3, "relu")


def test_scaled_rope_is_rejected_for_idefics(
    tmp_path: Path,
) -> None:
    spec = replace(
        test_idefics.idefics.model_config(test_idefics.theirs("small").config), origin=None
    )
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    spec = replace(
        spec,
        language=replace(
            spec.language, vocab=300, tokenizer="bytes", extra={"rope_parameters": rope}
        ),
    )
    stage = test_idefics.idefics.stage(spec)
    system = System(name="s", paper="", stages=(stage,))
    artifacts.save(
        tmp_path / "a", dict(spec.build().named_parameters()), system=system, stage=stage.name
    )
    with pytest.raises(SpecError, match=r"Got language\.rope_parameters"):
        export_hf(tmp_path / "a", tmp_path / "out")


@pytest.mark.parametrize(
    ("arch", "given"),
    [
        ("mistral", {"sliding_window": 9}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        (
            "qwen3",
            {
                "sliding_window": 9,
                "use_sliding_window": True,
                "max_window_layers": 0,
                "head_dim": 8,
            },
        ),
    ],
)
def test_export_keeps_the_config_of_a_loaded_language_model(
    arch: str, given: dict[str, Any], tmp_path: Path
) -> None:
    """The config has `weights` and no window; the compared text is longer than the window."""
    config: Any = AutoConfig.for_model(
        arch, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, vocab_size=320,
        intermediate_size=64, max_position_embeddings=512, pad_token_id=0, eos_token_id=7, bos_token_id=1,
        tie_word_embeddings=False, rms_norm_eps=1e-5, **given,
    )  # fmt: skip
    torch.manual_seed(0)
    language: Any = stirred(transformers.AutoModelForCausalLM.from_config(config))
    language.generation_config = GenerationConfig(eos_token_id=[7, 8], repetition_penalty=1.2)
    language.save_pretrained(tmp_path / "lm")
    extra = {
        name: value for name, value in given.items() if name == "head_dim"
    }  # all that its spec names
    spec = LanguageConfig(
        arch=arch, width=32, depth=2, heads=4, kv_heads=4, ffn=64, vocab=320, context=256, tokenizer="bytes",
        weights=str(tmp_path / "lm"), extra=extra,
    )  # fmt: skip
    path, _ = trained(
        "llava/instruct",
        tmp_path,
        lambda stage: replace(stage, model=replace(stage.model, language=spec)),
    )
    export_hf(path, tmp_path / "out")
    after = AutoConfig.from_pretrained(tmp_path / "out").text_config
    ids = {
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "dtype",
        "_name_or_path",
        "architectures",
    }
    assert {k: v for k, v in config.to_dict().items() if k not in ids} == {
        k: v for k, v in after.to_dict().items() if k not in ids
    }
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.eos_token_id, settings.repetition_penalty) == ([7, 8, 259], 1.2)
    said = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert said["texts"]["until_end"]["equal"]


def test_unsupported_output_head_is_rejected(tmp_path: Path) -> None:
    """Gemma-2 caps its logits, which `LlavaForConditionalGeneration` does not."""
    spec = LanguageConfig(
        arch="gemma2", width=32, depth=2, heads=4, kv_heads=4, ffn=64, vocab=320, context=256, tokenizer="bytes",
        extra={"head_dim": 8, "final_logit_softcapping": 2.0},
    )  # fmt: skip
    path, _ = trained(
        "llava/instruct",
        tmp_path,
        lambda stage: replace(stage, model=replace(stage.model, language=spec)),
    )
    with pytest.raises(
        WeightsError, match=r"the outputs disagree, so nothing was written\. Got logits"
    ):
        export_hf(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "part", "field", "value"),
    [
        ("idefics", "vision_config", "layer_norm_eps", 1e-6),
        ("llava", "vision_config", "layer_norm_eps", 1e-3),
        ("llava-siglip", "vision_config", "layer_norm_eps", 1e-4),
        ("llava-next", "vision_config", "layer_norm_eps", 1e-3),
        ("llava-next", "text_config", "sliding_window", 6),
        ("clip", "vision_config", "layer_norm_eps", 1e-4),
        ("blip", "vision_config", "layer_norm_eps", 1e-4),
        (
            "llava",
            "text_config",
            "rope_parameters",
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        ),
        (
            "llava",
            "text_config",
            "rope_parameters",
            {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        ),
    ],
)
def test_a_field_that_changes_outputs_is_kept(
    name: str, part: str, field: str, value: Any, tmp_path: Path
) -> None:
    config = MODELS[name]().config
    setattr(getattr(config, part), field, value)
    torch.manual_seed(0)
    model: Any = stirred(type(MODELS[name]())(config)).eval()
    model.config.architectures = [type(model).__name__]
    out = round_trip(model, tmp_path)
    assert getattr(getattr(AutoConfig.from_pretrained(out), part), field) == value


@pytest.mark.parametrize(
    ("name", "part", "field", "value"),
    [
        ("clip", "text_config", "layer_norm_eps", 1e-4),
        ("clip", "vision_config", "num_channels", 4),
        ("llava", "vision_config", "num_channels", 4),
        ("blip2", "vision_config", "layer_norm_eps", 1e-4),
        ("blip2", "qformer_config", "layer_norm_eps", 1e-4),
        ("blip2", "qformer_config", "encoder_hidden_size", 48),
        ("idefics", "vision_config", "num_channels", 1),
        ("idefics", "perceiver_config", "use_resampler", True),
    ],
)
def test_unsupported_field_is_rejected_by_name(
    name: str, part: str, field: str, value: Any, tmp_path: Path
) -> None:
    MODELS[name]().save_pretrained(tmp_path / "in")
    config = json.loads((tmp_path / "in" / CONFIG).read_text())
    config[part][field] = value
    (tmp_path / "in" / CONFIG).write_text(json.dumps(config))
    try:
        import_hf(tmp_path / "in", tmp_path / "artifact")
    except WeightsError as error:
        assert field in str(error) or "another shape" in str(error)
        assert "\n" not in str(error)
    else:  # a field that transformers itself sets again, or that nothing reads
        assert flatten_config(AutoConfig.from_pretrained(tmp_path / "in").to_dict())[
            f"{part}.{field}"
        ] != value or (part == "perceiver_config")


def test_qformer_weights_with_another_epsilon_are_rejected(tmp_path: Path) -> None:
    model = MODELS["blip2"]()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    for part, said in (
        ("qformer_config", "layer_norm_eps 0.0001"),
        ("vision_config", "layer_norm_eps 0.0001"),
    ):
        changed = config | {part: config[part] | {"layer_norm_eps": 1e-4}}
        (tmp_path / CONFIG).write_text(json.dumps(changed))
        spec = test_blip2.blip2.model_config(model.config)
        spec = replace(
            spec,
            bridge=replace(spec.bridge, weights=str(tmp_path))
            if part == "qformer_config"
            else spec.bridge,
            vision=replace(spec.vision, weights=str(tmp_path))
            if part == "vision_config"
            else spec.vision,
        )
        with pytest.raises(WeightsError, match=said):
            spec.build()


# --- folders that used to end in a traceback -------------------------------------------------------------------------


def test_blip2_config_without_image_token_is_exported_with_one(
    tmp_path: Path,
) -> None:
    MODELS["blip2"]().save_pretrained(tmp_path / "in")
    config = json.loads((tmp_path / "in" / CONFIG).read_text())
    del config["image_token_index"]
    (tmp_path / "in" / CONFIG).write_text(json.dumps(config))
    assert import_hf(tmp_path / "in", tmp_path / "artifact").holds
    assert export_hf(tmp_path / "artifact", tmp_path / "out").holds
    word = AutoConfig.from_pretrained(tmp_path / "out").image_token_index
    assert isinstance(word, int)


def test_retrieval_model_keeps_its_image_token(tmp_path: Path) -> None:
    model = MODELS["blip2-finds"]()
    model.config.image_token_index = 80
    out = round_trip(model, tmp_path)
    assert AutoConfig.from_pretrained(out).image_token_index == 80


@pytest.mark.parametrize("name", ["blip", "blip-answers", "blip-finds"])
def test_a_blip_of_a_small_vocabulary_needs_no_tokenizer(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    config = model.config
    config.text_config.vocab_size, config.text_config.bos_token_id = 42, 40
    config.text_config.pad_token_id, config.text_config.sep_token_id = 3, 4
    torch.manual_seed(0)
    small: Any = stirred(type(model)(config)).eval()
    out = round_trip(small, tmp_path)
    after = AutoConfig.from_pretrained(out).text_config
    assert (after.pad_token_id, after.sep_token_id, after.bos_token_id) == (3, 4, 40)


def test_blip_without_generation_accepts_any_bos_token(tmp_path: Path) -> None:
    model = MODELS["blip-finds"]()
    model.config.text_config.bos_token_id = 7
    out = round_trip(model, tmp_path)
    assert AutoConfig.from_pretrained(out).text_config.bos_token_id == 7


def test_grids_of_incomplete_tiles_are_rejected(tmp_path: Path) -> None:
    model = MODELS["llava-next"]()
    side = model.config.vision_config.image_size
    model.config.image_grid_pinpoints = [[side, 2 * side], [side + 1, side]]
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(
        WeightsError,
        match=f"do not fit tiles of {side} pixels. Got .{side + 1}, {side}.; expected multiples",
    ):
        import_hf(tmp_path / "in", tmp_path / "artifact")


def test_non_finite_weights_are_rejected(tmp_path: Path) -> None:
    MODELS["clip"]().save_pretrained(tmp_path / "in")
    state: dict[str, Tensor] = load_file(tmp_path / "in" / FILE)
    save_file(
        {n: torch.full_like(t, float("nan")) for n, t in state.items()},
        tmp_path / "in" / FILE,
        {"format": "pt"},
    )
    with pytest.raises(WeightsError, match="Got NaN or infinity in"):
        import_hf(tmp_path / "in", tmp_path / "artifact")


def test_exported_files_have_equal_modes(tmp_path: Path) -> None:
    out = round_trip(MODELS["llava"](), tmp_path)
    assert len({file.stat().st_mode for file in out.iterdir() if file.is_file()}) == 1


def test_unsupported_stage_is_rejected(tmp_path: Path) -> None:
    path, _ = trained("xgen_mm/instruct", tmp_path)
    with pytest.raises(SpecError, match="transformers has no model for this PrefixVLM"):
        export_hf(path, tmp_path / "out")
