"""Initial weights of a MED: BERT for the text modules, a ViT for the tower."""

from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTModel

from bridgework.errors import WeightsError
from bridgework.models import BlipViTConfig
from tests.models.med_examples import TINY, pairs, spec


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=512,
    )  # fmt: skip
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.bert.embeddings.token_type_embeddings.weight.zero_()  # BLIP has none
    model.name_or_path = str(tmp_path_factory.mktemp("bert"))
    model.save_pretrained(model.name_or_path)
    return model


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> ViTModel:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        layer_norm_eps=1e-6,
    )  # fmt: skip
    model = ViTModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.name_or_path = str(tmp_path_factory.mktemp("vit"))
    model.save_pretrained(model.name_or_path)
    return model


def test_a_text_alone_is_read_as_bert_reads_it(bert: BertForMaskedLM) -> None:
    model = replace(spec(), text=replace(TINY.text, weights=bert.name_or_path)).build().eval()
    ids, attention, _, _ = pairs()
    expected = bert.bert(input_ids=ids, attention_mask=attention.long()).last_hidden_state
    torch.testing.assert_close(
        model.encode(ids, attention)[attention], expected[attention], atol=1e-5, rtol=1e-5
    )


def test_words_are_spoken_with_berts_head_and_the_decoder_begins_with_its_attention(
    bert: BertForMaskedLM,
) -> None:
    model = replace(spec(), text=replace(TINY.text, weights=bert.name_or_path)).build().eval()
    states = torch.randn(3, 32)
    torch.testing.assert_close(model.writer.cls(states)[:, :260], bert.cls(states))
    own = model.decoder.state_dict()
    assert all(
        torch.equal(own[name], tensor)
        for name, tensor in bert.bert.state_dict().items()
        if name in own
    )
    assert not model.text.embeddings.word_embeddings.weight[260:].eq(0).all()


@pytest.mark.parametrize("tasks", [("caption",), ("answer",)])
def test_a_decoder_of_its_own_begins_with_bert_too(
    bert: BertForMaskedLM, tasks: tuple[str, ...]
) -> None:
    model = replace(TINY, tasks=tasks, text=replace(TINY.text, weights=bert.name_or_path)).build()
    own = model.decoder.state_dict()
    theirs = bert.bert.state_dict()
    assert all(
        torch.equal(tensor[:260], theirs[n][:260])
        for n, tensor in own.items()
        if "crossattention" not in n
    )


def test_a_bert_of_other_numbers_is_refused(bert: BertForMaskedLM) -> None:
    with pytest.raises(WeightsError, match=r"depth 2 \(config 3"):
        replace(spec(), text=replace(TINY.text, depth=3, weights=bert.name_or_path)).build()


def test_tower_matches_the_vit(vit: ViTModel) -> None:
    tower = replace(TINY.vision, weights=vit.name_or_path).build().eval()
    normal = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        tower.patches(normal), vit(normal).last_hidden_state, atol=1e-5, rtol=1e-5
    )


def test_a_vit_of_another_size_gets_its_positions_interpolated(vit: ViTModel) -> None:
    tower = replace(TINY.vision, image_size=48, weights=vit.name_or_path).build().eval()
    normal = torch.randn(2, 3, 48, 48)
    expected = vit(normal, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(tower.patches(normal), expected, atol=1e-5, rtol=1e-5)


def test_a_vit_of_other_numbers_is_refused(vit: ViTModel) -> None:
    with pytest.raises(WeightsError, match=r"patch 8 \(config 16"):
        BlipViTConfig(
            image_size=32, width=32, depth=2, heads=2, ffn=64, weights=vit.name_or_path
        ).build()


def test_without_weights_a_tower_is_drawn_large_enough_to_learn() -> None:
    """transformers' own draw is all but zero (1e-10), and every image would look the same."""
    tower = TINY.vision.build()
    assert tower.tower.embeddings.patch_embedding.weight.std() > 0.01
