"""Cross-attention wiring against the bare language model, and visibility of images."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bridgework.errors import DataError, SpecError
from bridgework.losses.language_modeling import language_modeling
from bridgework.models import ViTConfig, base
from bridgework.models.cross_attention_vlm import CrossAttentionVLM, CrossAttentionVLMConfig
from bridgework.models.gated_cross_attention import GatesConfig
from bridgework.models.resampler import ResamplerConfig
from bridgework.system import END, IGNORE, IMAGE
from tests.models.examples import LLAMA_7B, padded, pixels

SPEC = CrossAttentionVLMConfig(
    vision=ViTConfig(),
    bridge=ResamplerConfig(project=False, frames=4),
    gates=GatesConfig(),
    language=LLAMA_7B,
)
VOCAB = 320
TRAINS = {"bridge.*": 1.0, "gates.*": 1.0, "extra.*": 1.0}


def build(*, opened: bool = True) -> CrossAttentionVLM:
    torch.manual_seed(0)
    model = SPEC.tiny().build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if opened or "alpha" not in name:
                parameter.add_((0.4 if "alpha" in name else 0.1) * torch.randn_like(parameter))
    return model.eval()


def ids(*row: int) -> Tensor:
    return torch.tensor([row])


def ones(ids_BT: Tensor) -> Tensor:
    return torch.ones_like(ids_BT, dtype=torch.bool)


def logits(
    model: CrossAttentionVLM, ids_BT: Tensor, pixels_N3SS: Tensor | None, **given: Any
) -> Tensor:
    out: Tensor = model(ids_BT, ones(ids_BT), pixels=pixels_N3SS, **given).logits_BTV
    return out


def labels(ids_BT: Tensor) -> Tensor:
    return ids_BT.masked_fill(ids_BT == IMAGE, IGNORE)


DOCUMENT = ids(5, 6, IMAGE, 7, 8, END, IMAGE, 9, 10)


def test_closed_gates_leave_the_language_model_bitwise_as_it_was_and_learn_first() -> None:
    model = build(opened=False)
    base.set_trainable(model, TRAINS)
    out_BTV = logits(model, DOCUMENT, pixels(2))
    bare = model.language(inputs_embeds=model.embed(DOCUMENT), attention_mask=ones(DOCUMENT)).logits
    assert torch.equal(out_BTV[..., :VOCAB], bare)
    language_modeling(out_BTV, model.targets(labels(DOCUMENT))).sum().backward()
    for name, parameter in model.gates.named_parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) == ("alpha" in name), name


def test_a_document_without_images_is_the_bare_language_model_and_leaves_zero_gradients() -> None:
    model, ids_BT = build(opened=False), ids(5, 6, 7, 8)
    base.set_trainable(model, TRAINS)
    out_BTV = logits(model, ids_BT, None)
    assert torch.equal(out_BTV[..., :VOCAB], model.language(ids_BT).logits)
    out_BTV.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.bridge.parameters())


def test_tokens_before_an_image_do_not_depend_on_it() -> None:
    model, pixels_N3SS = build(), pixels(2)
    before = logits(model, DOCUMENT, pixels_N3SS)
    for image, tag in enumerate((2, 6)):
        other = pixels_N3SS.clone()
        other[image] = 255 - other[image]
        changed_T = (logits(model, DOCUMENT, other) != before).any(-1)[0]
        assert not changed_T[:tag].any() and changed_T[tag:].all()


def test_the_order_of_images_matters_to_the_answer() -> None:
    model, pixels_N3SS = build(), pixels(2)
    assert not torch.allclose(
        logits(model, DOCUMENT, pixels_N3SS), logits(model, DOCUMENT, pixels_N3SS.flip(0))
    )


def test_image_and_end_have_rows_of_their_own_and_begin_as_the_mean_word() -> None:
    torch.manual_seed(0)
    model = SPEC.tiny().build()
    embeds_BTD = model.embed(ids(5, END, IMAGE, VOCAB, VOCAB + 1))[0]
    torch.testing.assert_close(embeds_BTD[1], model.language.get_input_embeddings().weight.mean(0))
    assert torch.equal(embeds_BTD[1:3], embeds_BTD[3:])
    out_BTV = logits(model, DOCUMENT, pixels(2))
    assert out_BTV.shape == (1, 9, VOCAB + 2)
    torch.testing.assert_close(
        out_BTV[..., VOCAB + 1], out_BTV[..., :VOCAB].mean(-1), atol=1e-5, rtol=1e-5
    )


def test_label_of_an_end_is_the_column_after_the_vocabulary() -> None:
    model = build()
    outputs = model(DOCUMENT, ones(DOCUMENT), labels(DOCUMENT), pixels(2))
    assert outputs.labels_BT.tolist() == [[5, 6, IGNORE, 7, 8, VOCAB, IGNORE, 9, 10]]
    assert language_modeling(outputs.logits_BTV, outputs.labels_BT).isfinite().all()


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_batch_matches_single_samples(side: str) -> None:
    model, pixels_N3SS = build(), pixels(3)
    rows, images = [DOCUMENT, ids(IMAGE, 5), ids(3, 4)], [pixels_N3SS[:2], pixels_N3SS[2:], None]
    attention_BT = padded([ones(r) for r in rows], side, False)
    batch_BTV = model(padded(rows, side, 0), attention_BT, pixels=pixels_N3SS).logits_BTV
    for row, image, together, real in zip(rows, images, batch_BTV, attention_BT, strict=True):
        torch.testing.assert_close(
            together[real], logits(model, row, image)[0], atol=1e-5, rtol=1e-5
        )


def test_a_video_takes_one_place_and_the_order_of_its_frames_matters() -> None:
    model, frames = build(), pixels(4)
    layouts_N4 = torch.tensor([[1, 2, 32, 32], [0, 0, 32, 32]])  # three frames, then an image
    out_BTV = logits(model, DOCUMENT, frames, layouts=layouts_N4)
    other_BTV = logits(model, DOCUMENT, frames[[2, 1, 0, 3]], layouts=layouts_N4)
    assert torch.equal(out_BTV[:, :2], other_BTV[:, :2]) and not torch.allclose(
        out_BTV[:, 2:], other_BTV[:, 2:]
    )
    alone_BTV = logits(model, ids(5, 6, IMAGE, 7, 8, END), frames[:3], layouts=layouts_N4[:1])
    torch.testing.assert_close(out_BTV[:, :6], alone_BTV, atol=1e-5, rtol=1e-5)


def test_cached_features_stand_in_for_pixels() -> None:
    model, pixels_N3SS = build(), pixels(2)
    from_features = model(DOCUMENT, ones(DOCUMENT), features=model.vision(pixels_N3SS)).logits_BTV
    assert torch.equal(from_features, logits(model, DOCUMENT, pixels_N3SS))


@pytest.mark.parametrize("images", [0, 2])
def test_every_batch_runs_the_same_modules_in_the_same_order(images: int) -> None:
    """Keeps the collectives of ZeRO-3 in step when one rank's batch has no image."""
    model, called = build(), list[str]()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    traces = []
    for count in (1, images):
        called.clear()
        logits(model, ids(5, *[IMAGE] * count, 6), pixels(count) if count else None)
        traces.append(list(called))
    assert (
        traces[0] == traces[1]
        and "gates.0.key" in traces[0]
        and "vision.tower.embeddings" in traces[0]
    )


def test_only_resampler_gates_and_the_two_rows_move() -> None:
    model = build()
    learning = base.set_trainable(model.train(), TRAINS)
    assert {name.split(".")[0] for name in learning} == {"bridge", "gates", "extra"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    outputs = model(DOCUMENT, ones(DOCUMENT), labels(DOCUMENT), pixels(2))
    language_modeling(outputs.logits_BTV, outputs.labels_BT).sum().backward()
    optimizer.step()
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still == set(before) - set(learning)


def test_generation_with_cached_images_is_greedy_decoding_from_scratch() -> None:
    model, pixels_N3SS = build(), pixels(3)
    rows, images = [DOCUMENT, ids(1, 2, IMAGE, 6)], [pixels_N3SS[:2], pixels_N3SS[2:]]
    attention_BT = padded([ones(r) for r in rows], "left", False)
    new_BT = model.generate(
        padded(rows, "left", 0), attention_BT, pixels_N3SS, max_new_tokens=5, do_sample=False
    )
    for row, image, new in zip(rows, images, new_BT, strict=True):
        for token in new:
            last_V = logits(model, row, image)[0, -1].index_fill(
                0, torch.tensor(VOCAB + 1), float("-inf")
            )
            assert token == last_V.argmax()
            row = torch.cat([row, token.view(1, 1)], dim=1)


def test_a_batch_of_beams_is_each_prompts_own_beams() -> None:
    model, pixels_N3SS = build(), pixels(2)
    rows, how = (
        [ids(5, IMAGE, 6), ids(IMAGE, 7, 8)],
        {"num_beams": 3, "max_new_tokens": 4, "do_sample": False},
    )
    together = model.generate(torch.cat(rows), ones(torch.cat(rows)), pixels_N3SS, **how)
    for row, image, new in zip(rows, pixels_N3SS, together, strict=True):
        assert torch.equal(model.generate(row, ones(row), image.unsqueeze(0), **how)[0], new)


def test_an_end_is_written_and_ends_the_text_and_an_image_never_is() -> None:
    model, last = build(), list[Tensor]()
    model.extra.head.register_forward_pre_hook(lambda _, given: last.append(given[0][0, -1]))
    logits(model, DOCUMENT, pixels(2))
    how: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": False,
        "eos_token_id": list(model.endings),
    }
    model.extra.head.weight.data = torch.stack(
        [1e2 * last[0], 1e3 * last[0]]
    )  # both likelier than any word
    (new,) = model.generate(DOCUMENT, ones(DOCUMENT), pixels(2), **how)
    assert new.tolist() == [VOCAB]


def test_continuations_match_complete_rows() -> None:
    model, pixels_N3SS = build(), pixels(2)
    rest_CR = torch.tensor([[3, 4, END], [7, END, 0]])
    behind_CRV = model.continuations(DOCUMENT, rest_CR, model.vision(pixels_N3SS))
    for rest, behind in zip(rest_CR, behind_CRV, strict=True):
        whole_BTV = logits(model, torch.cat([DOCUMENT, rest.unsqueeze(0)], dim=1), pixels_N3SS)
        torch.testing.assert_close(behind, whole_BTV[0, -4:-1], atol=1e-5, rtol=1e-5)


def test_bfloat16_towers_run_and_stay_close() -> None:
    model, pixels_N3SS = build(), pixels(2)
    exact = logits(model, DOCUMENT, pixels_N3SS)
    rounded = logits(model.bfloat16(), DOCUMENT, pixels_N3SS)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.2, rtol=0.2)
    assert model.generate(
        DOCUMENT, ones(DOCUMENT), pixels_N3SS, max_new_tokens=2, do_sample=False
    ).shape == (1, 2)


def test_threads_that_write_at_once_see_their_own_images() -> None:
    """The model holds no state of a call, because a server answers several requests with one."""
    model, seen = build(), pixels(4).unsqueeze(1)
    prompt, how = ids(5, IMAGE, 6), {"max_new_tokens": 8, "do_sample": False}
    for block in model.gates.children():
        block.get_parameter("alpha").data.fill_(4.0)  # so that images decide what is written
        block.get_submodule("out").weight.data.mul_(20.0)
    alone = [model.generate(prompt, ones(prompt), image, **how).tolist() for image in seen]
    with ThreadPoolExecutor(4) as pool:
        together = list(
            pool.map(
                lambda image: model.generate(prompt, ones(prompt), image, **how).tolist(), seen
            )
        )
    assert together == alone and len({str(new) for new in alone}) > 1


@pytest.mark.parametrize("arch", ["mistral", "opt", "phi3"])
def test_other_kinds_of_language_models_take_the_blocks(arch: str) -> None:
    torch.manual_seed(0)
    language = replace(SPEC.language, arch=arch)
    model = replace(SPEC, language=language).tiny().build().eval()
    out_BTV = logits(model, DOCUMENT, pixels(2))
    bare = model.language(inputs_embeds=model.embed(DOCUMENT), attention_mask=ones(DOCUMENT)).logits
    assert torch.equal(out_BTV[..., :VOCAB], bare)
    for block in model.gates.children():
        block.get_parameter("alpha").data.fill_(0.5)
    assert not torch.allclose(logits(model, DOCUMENT, pixels(2)), out_BTV)
    new_BT = model.generate(DOCUMENT, ones(DOCUMENT), pixels(2), max_new_tokens=3, do_sample=False)
    row = DOCUMENT
    for token in new_BT[0]:
        last_V = logits(model, row, pixels(2))[0, -1].index_fill(
            0, torch.tensor(VOCAB + 1), float("-inf")
        )
        assert token == last_V.argmax()
        row = torch.cat([row, token.view(1, 1)], dim=1)


@pytest.mark.parametrize(("images", "places"), [(2, 1), (1, 2), (0, 1)])
def test_images_and_places_that_differ_in_number_are_refused(images: int, places: int) -> None:
    given = pixels(images) if images else None
    with pytest.raises(DataError, match=f"{places} image places in its ids, and {images} images"):
        logits(build(), ids(5, *[IMAGE] * places), given)


def test_a_language_model_without_a_list_of_layers_is_refused() -> None:
    with pytest.raises(SpecError, match="'gpt2' has no such list"):
        replace(SPEC, language=replace(SPEC.language, arch="gpt2")).tiny().build()


def test_inputs_and_configs_that_do_not_fit_are_refused() -> None:
    model = build()
    with pytest.raises(SpecError, match="Got \\['pooled'\\]"):
        model(DOCUMENT, ones(DOCUMENT), requested=frozenset({"pooled"}))
    with pytest.raises(DataError, match="both pixels and cached features"):
        model(DOCUMENT, ones(DOCUMENT), pixels=pixels(2), features=torch.zeros(2, 16, 32))
    with pytest.raises(DataError, match=r"\(4, 7\) per image"):
        model(DOCUMENT, ones(DOCUMENT), features=torch.zeros(2, 4, 7))
    with pytest.raises(DataError, match="layouts are of 3 squares, and 2 are given"):
        logits(model, ids(IMAGE), pixels(2), layouts=torch.tensor([[2, 1, 9, 9]]))
    with pytest.raises(SpecError, match="expected less than the language model's 32 layers"):
        CrossAttentionVLMConfig(
            vision=ViTConfig(),
            bridge=ResamplerConfig(),
            gates=GatesConfig(first=32),
            language=LLAMA_7B,
        )


# --- the language model's own head and experts -----------------------------------------------------------------------

SCALED: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 8},
    "gemma3_text": {"final_logit_softcapping": 3.0, "head_dim": 8},
    "falcon_h1": {"lm_head_multiplier": 0.3},
}
EXPERTS = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")


def of_family(arch: str, **extra: Any) -> CrossAttentionVLM:
    torch.manual_seed(0)
    tied = arch in ("cohere", "cohere2", "gemma2", "gemma3_text")
    language = replace(SPEC.tiny().language, arch=arch, kv_heads=4, tied=tied, extra=extra)
    model = replace(SPEC.tiny(), language=language).build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((0.4 if "alpha" in name else 0.2) * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("arch", SCALED)
@torch.no_grad()
def test_logits_are_those_of_the_language_models_own_head(arch: str) -> None:
    """Closed gates leave the bare model; END and IMAGE are scaled and capped like every other column."""
    model = of_family(arch, **SCALED[arch])
    for name, parameter in model.gates.named_parameters():
        if "alpha" in name:
            parameter.zero_()
    words = ids(5, 6, 7, 8)
    found, bare = logits(model, words, None), model.language(words, use_cache=False).logits
    assert bare.shape[-1] == VOCAB and found.shape[-1] == VOCAB + 2
    torch.testing.assert_close(found[..., :VOCAB], bare, atol=1e-6, rtol=1e-6)
    model.extra.head.weight[0] = model.language.get_output_embeddings().weight[3]
    torch.testing.assert_close(
        logits(model, words, None)[..., VOCAB], bare[..., 3], atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("arch", [*EXPERTS, *SCALED])
@torch.no_grad()
def test_every_family_generates_the_argmax_of_its_logits(arch: str) -> None:
    model, images = of_family(arch, **SCALED.get(arch, {})), pixels(2)
    new = model.generate(
        DOCUMENT, ones(DOCUMENT), images, max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    row = DOCUMENT
    for _ in range(4):
        last = logits(model, row, images)[0, -1, :-1]
        row = torch.cat([row, last.argmax().view(1, 1)], dim=1)
    assert new.tolist() == row[:, DOCUMENT.shape[1] :].tolist()


def test_a_language_model_of_two_halves_is_refused() -> None:
    language = replace(SPEC.tiny().language, arch="bart", kv_heads=4)
    with pytest.raises(SpecError):
        replace(SPEC.tiny(), language=language).build()
    with pytest.raises(SpecError, match="between the layers of a causal language model, and 't5'"):
        replace(SPEC.tiny(), language=replace(language, arch="t5", tied=True)).build()
