"""Q-Former masks and cache, compared with BERT and transformers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    OPTConfig,
)

from bridgework.errors import DataError, SpecError, WeightsError
from bridgework.models import ConcatConfig, QFormerConfig
from bridgework.models.qformer import QFormer, bidirectional, causal, is_text, unimodal
from tests.models.examples import stirred

SPEC = QFormerConfig(text=True).tiny()
QUERIES, WIDTH = SPEC.queries, 48
ATTENTION = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()


def build(spec: QFormerConfig = SPEC, out_width: int | None = 24) -> QFormer:
    torch.manual_seed(0)
    return stirred(spec.build(WIDTH, out_width)).eval()


def patches(seed: int = 1) -> Tensor:
    return torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(seed))


def ids(seed: int = 2) -> Tensor:
    return torch.randint(1, 300, (2, 6), generator=torch.Generator().manual_seed(seed))


def changed(ids_NT: Tensor, at: int) -> Tensor:
    other_NT = ids_NT.clone()
    other_NT[:, at] += 1
    return other_NT


def close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5)


def test_masks_are_those_of_figure_2() -> None:
    seen = torch.tensor([[True, True, False]])  # two tokens and a pad, after two queries
    assert unimodal(seen, 2)[0, 0].int().tolist() == [[1, 1, 0, 0, 0]] * 2 + [[0, 0, 1, 1, 0]] * 3
    assert causal(seen, 2)[0, 0].int().tolist() == [[1, 1, 0, 0, 0]] * 2 + [
        [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0],
    ]  # fmt: skip
    assert bidirectional(seen, 2)[0, 0].int().tolist() == [[1, 1, 1, 1, 0]] * 5


def test_caption_after_cached_queries_matches_one_pass_under_the_causal_mask() -> None:
    model, real = build(), ATTENTION
    states = model.encode_image(patches())
    whole = model.fuse(patches(), ids(), real, causal(real, QUERIES))
    assert close(states[-1], whole[:, :QUERIES])
    assert close(model.decode_text(ids(), real, states)[real], whole[:, QUERIES:][real])


def test_two_passes_of_one_stream_each_are_one_pass_under_the_unimodal_mask() -> None:
    model, real = build(), ATTENTION
    whole = model.fuse(patches(), ids(), real, unimodal(real, QUERIES))
    assert close(model.encode_image(patches())[-1], whole[:, :QUERIES])
    assert close(model.encode_text(ids(), real)[real], whole[:, QUERIES:][real])


def test_gradients_of_the_cached_pass_match_one_pass() -> None:
    model, real = build(), ATTENTION
    cached = model.decode_text(ids(), real, model.encode_image(patches()))[real]
    whole = model.fuse(patches(), ids(), real, causal(real, QUERIES))[:, QUERIES:][real]
    weight = torch.randn_like(whole)
    used = [p for name, p in model.named_parameters() if "projection" not in name]
    ours, theirs = (
        torch.autograd.grad((x * weight).sum(), used, materialize_grads=True)
        for x in (cached, whole)
    )
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("at", range(1, 6))
def test_decoded_token_sees_only_the_image_and_earlier_tokens(at: int) -> None:
    model, real = build(), torch.ones(2, 6, dtype=torch.bool)
    states, first = model.encode_image(patches()), ids()
    before, after = (
        model.decode_text(first, real, states),
        model.decode_text(changed(first, at), real, states),
    )
    assert torch.equal(before[:, :at], after[:, :at]) and not close(before[:, at:], after[:, at:])
    assert not close(
        before[:, 0], model.decode_text(first, real, model.encode_image(patches(9)))[:, 0]
    )


def test_matching_lets_image_and_text_shape_each_other() -> None:
    model, real = build(), ATTENTION
    fused = model.fuse(patches(), ids(), real, bidirectional(real, QUERIES))
    other_text = model.fuse(patches(), changed(ids(), 3), real, bidirectional(real, QUERIES))
    other_image = model.fuse(patches(9), ids(), real, bidirectional(real, QUERIES))
    assert not close(fused[:, :QUERIES], other_text[:, :QUERIES])
    assert not close(fused[:, QUERIES:], other_image[:, QUERIES:])


def test_every_second_layer_reads_the_image_and_none_does_without_its_output() -> None:
    model = build()
    layers = {int(n.split(".")[3]) for n, _ in model.named_parameters() if "crossattention" in n}
    assert layers == {0, 2}
    assert not close(model(patches()), model(patches(9)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "crossattention.output.dense" in name:
                parameter.zero_()
    assert torch.equal(model(patches()), model(patches(9)))


def test_permuted_queries_give_permuted_outputs() -> None:
    model, order = build(), torch.tensor([2, 0, 3, 1])
    before = model(patches())
    with torch.no_grad():
        model.queries.copy_(model.queries[:, order])
    torch.testing.assert_close(model(patches()), before[:, order])


def test_without_its_text_stream_the_prefix_is_the_same_bit_for_bit() -> None:
    model = build()
    bare = replace(SPEC, text=False).build(WIDTH, 24).eval()
    bare.load_state_dict({n: t for n, t in model.state_dict().items() if not is_text(n)})
    assert torch.equal(bare(patches()), model(patches()))
    assert not [n for n, _ in bare.named_parameters() if is_text(n)]
    with pytest.raises(SpecError, match=r"bridge\.text=true"):
        bare.encode_text(ids(), ATTENTION)


def test_another_instruction_gives_another_prefix_and_its_padding_none() -> None:
    model, real = build(), ATTENTION
    prefix = model(patches(), ids(), real)
    assert prefix.shape == (2, QUERIES, 24)  # the text's rows are dropped
    assert not close(prefix, model(patches(), changed(ids(), 1), real))
    assert close(prefix, model(patches(), ids().masked_fill(~real, 7), real))
    for side in ((0, 3), (3, 0)):
        wider, heard = (torch.nn.functional.pad(x, side) for x in (ids(), real))
        assert close(prefix, model(patches(), wider, heard))


def test_an_instruction_that_is_not_heard_leaves_blip2s_prefix() -> None:
    model = build()
    assert close(model(patches(), ids(), torch.zeros(2, 6, dtype=torch.bool)), model(patches()))
    assert close(
        model(patches(), ids()), model(patches(), ids(), torch.ones(2, 6, dtype=torch.bool))
    )


def test_an_instruction_trains_the_feed_forward_of_the_text() -> None:
    model = build()
    model(patches(), ids(), ATTENTION).sum().backward()
    heard = {
        n: p.grad is not None and bool(p.grad.any())
        for n, p in model.named_parameters()
        if is_text(n)
    }
    assert {n for n, learns in heard.items() if not learns} == {
        n
        for n in heard
        if f"layer.{SPEC.depth - 1}." in n  # nothing reads the text after the last layer
    }


def test_a_text_longer_than_the_positions_is_refused() -> None:
    with pytest.raises(DataError, match="a text of 6 tokens"):
        build(replace(SPEC, positions=5))(patches(), ids(), ATTENTION)


def test_bert_is_the_text_stream_where_training_begins(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=SPEC.vocab - 1,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
    )
    bert: Any = stirred(BertForMaskedLM(config)).eval()
    with torch.no_grad():
        bert.bert.embeddings.token_type_embeddings.weight.zero_()  # the Q-Former has none
    bert.save_pretrained(tmp_path)
    model = replace(SPEC, bert=str(tmp_path)).build(WIDTH, None).eval()
    theirs = bert.bert(input_ids=ids(), attention_mask=ATTENTION.long()).last_hidden_state
    assert close(model.encode_text(ids(), ATTENTION)[ATTENTION], theirs[ATTENTION])
    for (
        name,
        parameter,
    ) in model.named_parameters():  # the feed-forward of the queries begins as that of the text
        if "_query." in name:
            assert torch.equal(parameter, model.get_parameter(name.replace("_query.", ".")))
    with pytest.raises(
        WeightsError, match=r"do not fit the bridge .* e\.g\. qformer\.layernorm\.weight"
    ):
        replace(SPEC, width=64, bert=str(tmp_path)).build(WIDTH, None)


@pytest.mark.parametrize("text", [False, True])
def test_queries_of_a_complete_blip2_load_without_the_rest_of_it(
    text: bool, tmp_path: Path
) -> None:
    spec = replace(SPEC, text=False)
    config = Blip2Config(
        vision_config={"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 16, "patch_size": 8},
        qformer_config=spec.config(WIDTH).to_dict(),
        text_config=OPTConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, ffn_dim=32, num_attention_heads=2,
                              word_embed_proj_dim=32).to_dict(),
        num_query_tokens=QUERIES,
    )  # fmt: skip
    theirs: Any = stirred(Blip2ForConditionalGeneration(config)).eval()
    theirs.save_pretrained(
        tmp_path, max_shard_size="50KB"
    )  # in many files, of which most are never read
    ours = replace(spec, text=text, weights=str(tmp_path)).build(WIDTH, 24).eval()
    expected = theirs.qformer(
        query_embeds=theirs.query_tokens.expand(2, -1, -1),
        encoder_hidden_states=theirs.vision_model.post_layernorm(patches()),
    ).last_hidden_state
    torch.testing.assert_close(ours.encode_image(patches())[-1], expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(WeightsError, match="of another size or kind"):
        replace(spec, queries=5, weights=str(tmp_path)).build(WIDTH, 24)


def test_four_neighboring_patches_side_by_side_become_one_token() -> None:
    torch.manual_seed(0)
    bridge = stirred(ConcatConfig().build(6, 10)).eval()
    patches_NPF = torch.randn(2, 16, 6)
    tokens_NPD, normal_NPF = bridge(patches_NPF), bridge.ln_vision(patches_NPF)
    assert ConcatConfig().tokens(256) == 64 and tokens_NPD.shape == (2, 4, 10)
    for k in range(4):
        four = normal_NPF[:, 4 * k : 4 * k + 4].flatten(1)
        torch.testing.assert_close(tokens_NPD[:, k], bridge.projection(four))
    with pytest.raises(SpecError, match="257 patches do not fall into groups of 4"):
        ConcatConfig().tokens(257)


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(SpecError, match=r"width 768 must be a multiple of bridge\.heads 7"):
        QFormerConfig(heads=7)
    with pytest.raises(SpecError, match=r"bridge.queries must be at least 1"):
        QFormerConfig(queries=0)
    with pytest.raises(SpecError, match=r"bridge.group must be at least 1"):
        ConcatConfig(group=0)
