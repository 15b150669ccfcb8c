"""BLIP-2's first stage: masks, trained parameters, and transformers' retrieval model."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from transformers import BertConfig, BertForMaskedLM

from bridgework.errors import DataError, SpecError
from bridgework.losses import LanguageModeling, QueryContrast
from bridgework.losses.matching import Matching
from bridgework.models import EvaConfig, QFormerConfig, QFormerPretrainerConfig, base
from bridgework.models.qformer_pretrainer import QFormerPretrainer
from bridgework.system import IGNORE, Layout
from tests.models.examples import pixels, stirred

SPEC = QFormerPretrainerConfig(vision=EvaConfig(), bridge=QFormerConfig(text=True))
LOSSES = (QueryContrast(), Matching(negatives="all"), LanguageModeling(label_smoothing=0.1))
ALL = frozenset(loss.requires for loss in LOSSES)
ATTENTION = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
LABELS = torch.tensor([[9]]).expand(3, 6).masked_fill(~ATTENTION, IGNORE)


def build(dropout: float = 0.1) -> QFormerPretrainer:
    torch.manual_seed(0)
    spec = replace(SPEC, bridge=replace(SPEC.bridge, dropout=dropout)).tiny()
    return stirred(spec.build()).eval()


def ids(seed: int = 2) -> Tensor:
    return torch.randint(1, 300, (3, 6), generator=torch.Generator().manual_seed(seed))


def test_no_text_changes_the_queries_and_no_image_the_text() -> None:
    model = build()
    first, other_text, other_image = (
        model(i, ATTENTION, pixels=p, requested=ALL)
        for i, p in ((ids(), pixels(3)), (ids(9), pixels(3)), (ids(), pixels(3, seed=9)))
    )
    assert torch.equal(first.image_BQD, other_text.image_BQD) and not torch.equal(
        first.text_BD, other_text.text_BD
    )
    assert torch.equal(first.text_BD, other_image.text_BD) and not torch.equal(
        first.image_BQD, other_image.image_BQD
    )
    assert not torch.equal(first.logits_BTV, other_image.logits_BTV)


def test_caption_is_decoded_after_its_own_first_token() -> None:
    """[DEC] replaces CLS: the first id changes no logit, and every other id changes later logits."""
    model, changed = build(), ids()
    changed[:, 0] = 7
    before = model(ids(), ATTENTION, pixels=pixels(3)).logits_BTV
    assert torch.equal(before, model(changed, ATTENTION, pixels=pixels(3)).logits_BTV)
    changed[:, 2] += 1
    after = model(changed, ATTENTION, pixels=pixels(3)).logits_BTV
    assert torch.equal(before[:, :2], after[:, :2]) and not torch.equal(before[:, 2], after[:, 2])


def test_the_head_over_the_words_is_the_words_own_matrix() -> None:
    model = build()
    assert model.heads.lm.decoder.weight is model.bridge.embeddings.word_embeddings.weight
    assert model.heads.lm.bias is model.heads.lm.decoder.bias


def test_matching_is_the_mean_over_the_queries_and_its_own_pair_comes_first() -> None:
    model = build()
    outputs = model(ids(), ATTENTION, pixels=pixels(3), requested=ALL)
    features = model.vision(pixels(3))
    own = model.match(ids(), ATTENTION, features)
    assert outputs.match_B3C.shape == (3, 3, 2)
    odds_B3 = outputs.match_B3C.diff(dim=-1)[..., 0]
    torch.testing.assert_close(odds_B3[:, 0], own, atol=1e-5, rtol=1e-5)
    others = {
        (i, k): model.match(ids()[[i]], ATTENTION[[i]], features[[k]]).item()
        for i in range(3)
        for k in range(3)
        if i != k
    }
    for i in range(3):  # a negative is one of the other pairs, never the own one
        negative_image, negative_text = odds_B3[i, 1].item(), odds_B3[i, 2].item()
        assert any(abs(negative_image - score) < 1e-5 for (t, _), score in others.items() if t == i)
        assert any(abs(negative_text - score) < 1e-5 for (_, p), score in others.items() if p == i)


def test_all_losses_train_every_parameter_of_bridge_and_heads_and_nothing_else() -> None:
    model = build()
    learning = base.set_trainable(model.train(), {"bridge.*": 1.0, "heads.*": 1.0})
    assert not model.vision.training
    before = {name: p.detach().clone() for name, p in model.vision.named_parameters()}
    outputs = model(ids(), ATTENTION, LABELS, pixels(3), requested=ALL)
    torch.stack([loss(outputs).sum() for loss in LOSSES]).sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in learning), name
    assert all(torch.equal(p, before[name]) for name, p in model.vision.named_parameters())


def test_stage_one_has_its_published_size_without_a_byte_of_memory() -> None:
    with torch.device("meta"):
        model = SPEC.build(pretrained=False)
    base.set_trainable(model, {"bridge.*": 1.0, "heads.*": 1.0})
    # the paper says 188M for the Q-Former (3.1); LAVIS's modules, counted one by one, are these
    assert base.count(model) == (186_705_470, 985_949_440)


def test_cached_features_stand_in_for_pixels() -> None:
    model = build()
    from_pixels, from_features = (
        model(ids(), ATTENTION, requested=frozenset({"pooled", "logits"}), **given)
        for given in ({"pixels": pixels(3)}, {"features": model.vision(pixels(3))})
    )
    assert torch.equal(from_pixels.image_BQD, from_features.image_BQD)
    assert torch.equal(from_pixels.logits_BTV, from_features.logits_BTV)


def test_bfloat16_runs_and_its_losses_stay_close() -> None:
    model = build(dropout=0.0)
    requested = ALL - {"match_all"}  # its negatives are drawn
    exact, rounded = (
        m(ids(), ATTENTION, LABELS, pixels(3), requested=requested)
        for m in (model, copy.deepcopy(model).bfloat16())
    )
    for loss in (LOSSES[0], LOSSES[2]):
        assert loss(rounded).dtype == torch.float32
        torch.testing.assert_close(loss(rounded), loss(exact), atol=0.3, rtol=0.1)


def test_padding_on_either_side_changes_nothing() -> None:
    model = build()
    right = model(ids(), ATTENTION, pixels=pixels(3), requested=frozenset({"pooled", "logits"}))
    rows = [
        (row[real], len(row) - int(real.sum())) for row, real in zip(ids(), ATTENTION, strict=True)
    ]
    left = torch.stack([torch.nn.functional.pad(row, (pads, 0)) for row, pads in rows])
    outputs = model(
        left, ATTENTION.flip(1), pixels=pixels(3), requested=frozenset({"pooled", "logits"})
    )
    torch.testing.assert_close(outputs.text_BD, right.text_BD, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        outputs.logits_BTV[ATTENTION.flip(1)], right.logits_BTV[ATTENTION], atol=1e-5, rtol=1e-5
    )


def test_embeddings_for_search_are_the_outputs_made_unit_length() -> None:
    model = build()
    outputs = model(ids(), ATTENTION, pixels=pixels(3), requested=ALL)
    features, normal = model.vision(pixels(3)), torch.nn.functional.normalize
    torch.testing.assert_close(model.embed_images(features), normal(outputs.image_BQD, dim=-1))
    torch.testing.assert_close(model.embed_texts(ids(), ATTENTION), normal(outputs.text_BD, dim=-1))


def test_the_head_over_the_words_begins_as_berts(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=319,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
    )
    bert = stirred(BertForMaskedLM(config)).eval()
    with torch.no_grad():
        bert.bert.embeddings.token_type_embeddings.weight.zero_()  # the Q-Former has none
    bert.save_pretrained(tmp_path)
    spec = SPEC.tiny()
    model = replace(spec, bridge=replace(spec.bridge, bert=str(tmp_path))).build().eval()
    ours = model.heads.lm(model.bridge.encode_text(ids(), ATTENTION))[..., :319]
    theirs = bert(input_ids=ids(), attention_mask=ATTENTION.long()).logits
    torch.testing.assert_close(ours[ATTENTION], theirs[ATTENTION], atol=1e-5, rtol=1e-5)


def rank(index: int, folder: str) -> None:
    """One sample a rank: only the other rank has a negative, and its gradient must come back."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2
    )
    model = build(dropout=0.0)
    own = slice(index, index + 1)
    widths = (4, 6)  # texts of another width on every rank
    outputs = model(
        ids()[own, : widths[index]],
        ATTENTION[own, : widths[index]],
        pixels=pixels(3)[own],
        requested=ALL,
    )
    torch.save(outputs.match_B3C.detach(), f"{folder}/{index}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_negatives_come_from_the_other_rank(tmp_path: Path) -> None:
    spawn(rank, (str(tmp_path),), nprocs=2)
    judged = [torch.load(tmp_path / f"{index}.pt") for index in range(2)]
    model = build()
    features = model.vision(pixels(3))
    for own, other in ((0, 1), (1, 0)):
        own_text, other_text = (
            (ids()[[own]], ATTENTION[[own]]),
            (ids()[[other]], ATTENTION[[other]]),
        )
        pairs = ((own_text, own), (own_text, other), (other_text, own))
        expected = torch.cat([model.match(*text, features[[image]]) for text, image in pairs])
        torch.testing.assert_close(
            judged[own][0].diff(dim=-1)[:, 0], expected, atol=1e-5, rtol=1e-5
        )


def test_one_sample_alone_has_no_negative() -> None:
    with pytest.raises(DataError, match="a sample has no negative among 1 candidates"):
        build()(ids()[:1], ATTENTION[:1], pixels=pixels(1), requested=ALL)


def test_inputs_and_configs_that_do_not_fit_are_refused() -> None:
    model = build()
    with pytest.raises(SpecError, match=r"set bridge\.text=true"):
        QFormerPretrainerConfig(vision=EvaConfig(), bridge=QFormerConfig())
    with pytest.raises(DataError, match="Got 3 samples and 2 images"):
        model(ids(), ATTENTION, pixels=pixels(2))
    with pytest.raises(DataError, match="Got neither pixels nor cached features"):
        model(ids(), ATTENTION)
    with pytest.raises(DataError, match=r"Got \(4, 1280\) per image; expected \(17, 32\)"):
        model(ids(), ATTENTION, features=torch.zeros(3, 4, 1280))
    with pytest.raises(SpecError, match="Got \\['answers'\\]"):
        model(ids(), ATTENTION, pixels=pixels(3), requested=frozenset({"answers"}))


def test_its_text_has_no_places_for_images() -> None:
    assert (
        SPEC.image_tokens == 0
        and SPEC.num_image_tokens(Layout(0, 0, 4, 3)) == 0
        and SPEC.instruction is None
    )
    assert (SPEC.tokenizer, SPEC.tiny().tokenizer, SPEC.context) == (
        "google-bert/bert-base-uncased",
        "bytes",
        512,
    )
