"""CLIP against transformers: names, features, logits, round trips."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import normalize

from bridgework.errors import SpecError, WeightsError
from bridgework.hf import clip
from bridgework.models import CLIPTextConfig, DualEncoderConfig, ModifiedResNetConfig
from bridgework.models.dual_encoder import DualEncoder
from bridgework.training.step import TrainingModule

SHAPES: dict[str, dict[str, Any]] = {
    "small": {"vision": {}, "text": {}, "projection_dim": 24},
    "gelu": {
        "vision": {"hidden_act": "gelu", "image_size": 48},
        "text": {"hidden_act": "gelu"},
        "projection_dim": 32,
    },
    "uneven": {
        "vision": {"hidden_size": 48, "num_hidden_layers": 3, "patch_size": 16},
        "text": {
            "hidden_size": 64,
            "num_attention_heads": 8,
            "intermediate_size": 40,
            "eos_token_id": 2,
        },
        "projection_dim": 16,
    },
}
TOWER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 56,
}
END = 99


def theirs(shape: str) -> Any:
    given = SHAPES[shape]
    vision = TOWER | {"image_size": 32, "patch_size": 8} | given["vision"]
    text = TOWER | {
        "vocab_size": 100,
        "max_position_embeddings": 12,
        "eos_token_id": END,
        "bos_token_id": 98,
    }
    config = transformers.CLIPConfig(
        vision_config=vision,
        text_config=text | given["text"],
        projection_dim=given["projection_dim"],
    )
    torch.manual_seed(0)
    model: Any = transformers.CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def ours(model: Any) -> DualEncoder:
    spec = clip.model_config(model.config)
    state, names = model.state_dict(), clip.tensor_names(spec)
    built = spec.build()
    shapes = {name: tensor.shape for name, tensor in built.state_dict().items()}
    built.load_state_dict({own: state[name].reshape(shapes[own]) for own, name in names.items()})
    return built.eval()


def examples(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return uint8 images, ids padded with the end token, attention."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 98, (3, 8), generator=generator)
    ids[0, 7], ids[1, 4:], ids[2, 6:] = END, END, END
    attention = torch.ones(3, 8, dtype=torch.bool)
    attention[1, 5:], attention[2, 7:] = False, False
    return (
        torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=generator),
        ids,
        attention,
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_names_are_a_bijection_on_all_keys(shape: str) -> None:
    model = theirs(shape)
    names = clip.tensor_names(clip.model_config(model.config))
    assert set(names.values()) == model.state_dict().keys()
    assert len(set(names.values())) == len(names)
    assert names.keys() == ours(model).state_dict().keys()


@pytest.mark.parametrize("shape", SHAPES)
def test_features_logits_and_loss_agree(shape: str) -> None:
    model = theirs(shape)
    built, spec = ours(model), clip.model_config(model.config)
    images, ids, attention = examples(spec.pixels.size)
    look = spec.pixels
    normal = (images / 255 - torch.tensor(look.mean).view(3, 1, 1)) / torch.tensor(look.std).view(
        3, 1, 1
    )
    with torch.no_grad():
        expected = model(
            input_ids=ids, attention_mask=attention.long(), pixel_values=normal, return_loss=True
        )
        outputs = built(ids, attention, pixels=images)
        image, text = normalize(outputs.image_BD, dim=-1), normalize(outputs.text_BD, dim=-1)
        loss = clip.stage(spec).losses[0](outputs).mean()
    torch.testing.assert_close(image, expected.image_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text, expected.text_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        outputs.logit_scale[0] * image @ text.T, expected.logits_per_image, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_config_round_trip_is_equal(shape: str, tmp_path: Path) -> None:
    spec = clip.model_config(theirs(shape).config)
    again = clip.model_config(clip.hf_config(spec))
    assert again == spec
    model: Any = transformers.CLIPModel(clip.hf_config(spec))
    names, shapes = (
        clip.tensor_names(spec),
        {name: tensor.shape for name, tensor in model.state_dict().items()},
    )
    model.load_state_dict(
        {
            names[n]: tensor.reshape(shapes[names[n]])
            for n, tensor in spec.build().state_dict().items()
        }
    )
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert loaded.architectures == list(clip.ARCHITECTURES)
    assert clip.model_config(loaded).tokenizer == str(tmp_path)


def test_stage_has_the_config_and_computes_its_loss() -> None:
    stage = clip.stage(clip.model_config(theirs("small").config))
    assert (stage.data.template, stage.evals, stage.budget.steps) == ("caption", (), 1)
    assert TrainingModule(stage.model.build(), stage.losses).requested == {"pooled"}


def test_models_that_transformers_lacks_are_rejected() -> None:
    resnet = DualEncoderConfig(
        vision=ModifiedResNetConfig(), text=CLIPTextConfig(), embed=1024, project_image=False
    )
    with pytest.raises(SpecError, match="Got ModifiedResNetConfig"):
        clip.hf_config(resnet)
    config = theirs("small").config
    config.text_config.layer_norm_eps = 1e-6
    with pytest.raises(WeightsError, match=r"layer_norm_eps is not supported\. Got 1e-06"):
        clip.model_config(config)
