"""Written answers: what is written, where it ends, and what happens when nobody reads on."""

import gc
import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from bridgework.data.samples import Part
from bridgework.data.synthetic import shapes
from bridgework.data.tokenization import load_tokenizer
from bridgework.errors import DataError, SpecError
from bridgework.inference.generation import StopConditions, TextReader, Usage, sampling_processors
from bridgework.inference.pipeline import Pipeline
from tests.inference import tiny

IMAGE = next(shapes(1)).images[0]
ASKED = [Part("user", image=0), Part("user", text="What is shown?")]


def pipeline(template: str = "chat", context: int = 512) -> Pipeline:
    """Writes letters and blanks; its answers do not end by themselves."""
    pipe = tiny.pipeline(template, prompts=(), context=context)
    letters = set(pipe.tokenizer("abcdefghijklmnopqrstuvwxyz ").input_ids)
    bias_V = torch.tensor([0.0 if token in letters else -1e4 for token in range(320)])
    pipe.model.language.lm_head.register_forward_hook(lambda module, args, output: output + bias_V)
    return pipe


def greedy_by_hand(pipe: Pipeline, steps: int) -> str:
    """A second way to the answer: the whole prefix again for every token, no cache, no `generate`."""
    batch = pipe.inputs.batch([ASKED], [[IMAGE]], answer=False)
    ids_1T, new = batch.ids_BT, []
    for _ in range(steps):
        attention_1T = torch.ones_like(ids_1T).bool()
        with torch.no_grad():
            logits_V = pipe.model(
                ids=ids_1T, attention=attention_1T, features=batch.features_NPD
            ).logits_BTV[0, -1]
        new.append(int(logits_V.argmax()))
        ids_1T = torch.cat([ids_1T, torch.tensor([new[-1:]])], dim=1)
    return str(pipe.tokenizer.decode(new))


def writers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "generate"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert writers() == []


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["plain", "v1", "chat"])
def test_greedy_takes_the_most_likely_token(template: str) -> None:
    pipe = pipeline(template)
    answer = pipe.generate(ASKED, [IMAGE], max_new_tokens=12)
    assert answer.text == greedy_by_hand(pipe, 12).lstrip()
    assert (answer.completion_tokens, answer.finish_reason) == (12, "length")
    assert (
        answer.prompt_tokens == pipe.inputs.batch([ASKED], [[IMAGE]], answer=False).ids_BT.shape[1]
    )


def test_the_image_matters() -> None:
    pipe = pipeline()
    other = list(shapes(2))[1].images[0]
    answers = {pipe.generate(ASKED, [image], max_new_tokens=30).text for image in (IMAGE, other)}
    assert len(answers) == 2


def test_features_can_replace_the_image() -> None:
    pipe = pipeline()
    expected = pipe.generate(ASKED, [IMAGE], max_new_tokens=8)
    assert pipe.generate(ASKED, pipe.inputs.features([IMAGE]), max_new_tokens=8) == expected


def test_text_alone_is_a_conversation_too() -> None:
    assert len(pipeline().generate([Part("user", text="Hello")], max_new_tokens=5).text) == 5


def test_a_stream_is_the_same_answer_in_pieces() -> None:
    pipe = pipeline()
    pieces = list(pipe.stream(ASKED, [IMAGE], max_new_tokens=20))
    assert len(pieces) > 10
    assert "".join(pieces) == pipe.generate(ASKED, [IMAGE], max_new_tokens=20).text


def test_seed_gives_the_same_answer_next_to_other_requests() -> None:
    pipe = pipeline()

    def answer(seed: int | None) -> str:
        return pipe.generate(
            ASKED, [IMAGE], max_new_tokens=20, temperature=1.0, top_p=0.95, seed=seed
        ).text

    expected = answer(1)
    threads = [threading.Thread(target=answer, args=(None,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert answer(1) == expected
    for thread in threads:
        thread.join()
    assert len({expected, answer(2), answer(None), answer(None)}) == 4


def test_drawing_leaves_the_process_generator_alone() -> None:
    pipe = pipeline()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    pipe.generate(ASKED, [IMAGE], max_new_tokens=3, temperature=1.0, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_small_nucleus_and_a_low_temperature_are_greedy() -> None:
    pipe = pipeline()
    greedy = pipe.generate(ASKED, [IMAGE], max_new_tokens=12)
    assert (
        pipe.generate(ASKED, [IMAGE], max_new_tokens=12, temperature=1.0, top_p=1e-6, seed=0)
        == greedy
    )
    assert pipe.generate(ASKED, [IMAGE], max_new_tokens=12, temperature=1e-4, seed=0) == greedy


def test_draws_follow_the_distribution() -> None:
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0, -5.0])
    for top_p, kept in (
        (1.0, 5),
        (0.9, 2),
    ):  # at temperature 0.5 the first has 0.86, the second 0.12
        expected_V = (logits_V[:kept] / 0.5).softmax(-1)
        draw = sampling_processors(
            temperature=0.5, top_p=top_p, seeds=[0], device=torch.device("cpu")
        )
        before_BT, logits_BV = (
            torch.LongTensor(20_000, 1),
            cast(torch.FloatTensor, logits_V.expand(20_000, 5)),
        )
        drawn_B = draw(before_BT, logits_BV).argmax(-1)
        shares_V = torch.bincount(drawn_B, minlength=5) / 20_000
        torch.testing.assert_close(shares_V[:kept], expected_V, atol=0.01, rtol=0)
        assert float(shares_V[kept:].sum()) == 0.0


# --- where it ends ---------------------------------------------------------------------------------------------------


def test_eos_ends_an_answer_and_is_not_in_it() -> None:
    pipe = pipeline()
    free = pipe.generate(ASKED, [IMAGE], max_new_tokens=6)
    ends_after(pipe, 3)
    answer = pipe.generate(ASKED, [IMAGE], max_new_tokens=6)
    assert free.text.startswith(answer.text)
    assert (answer.completion_tokens, answer.finish_reason) == (4, "stop")


def ends_after(pipe: Pipeline, tokens: int) -> None:
    """From now on the model's answers end after so many tokens."""
    calls = [0]

    def end(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] > tokens:
            output[..., pipe.tokenizer.eos_token_id] = 1e6
        return output

    pipe.model.language.lm_head.register_forward_hook(end)


def test_a_stop_string_ends_an_answer_before_itself() -> None:
    pipe = pipeline()
    free = pipe.generate(ASKED, [IMAGE], max_new_tokens=20).text
    stop = free[5:8]
    answer = pipe.generate(ASKED, [IMAGE], max_new_tokens=20, stop=[stop, "#"])
    assert answer.text == free[: free.index(stop)]
    assert answer.finish_reason == "stop"
    assert answer.completion_tokens < 20


def test_an_answer_never_leaves_the_context() -> None:
    pipe = pipeline(context=64)
    answer = pipe.generate(ASKED, [IMAGE], max_new_tokens=1_000)
    assert answer.prompt_tokens + answer.completion_tokens == 64
    with pytest.raises(DataError, match="at most 63 fit"):
        pipe.generate([*ASKED, Part("user", text="x" * 64)], [IMAGE])


def test_the_plain_template_ends_a_caption_with_its_line() -> None:
    pipe = pipeline("plain")
    newline = pipe.tokenizer("\n").input_ids[0]

    def end(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output[..., newline] = 1e6
        return output

    pipe.model.language.lm_head.register_forward_hook(end)
    answer = pipe.generate(ASKED, [IMAGE], max_new_tokens=9)
    assert (answer.text, answer.completion_tokens, answer.finish_reason) == ("", 1, "stop")


# --- nobody reads on -------------------------------------------------------------------------------------------------


def test_a_closed_stream_ends_its_work() -> None:
    stream = pipeline().stream(ASKED, [IMAGE], max_new_tokens=400)
    assert len(list(islice(stream, 3))) == 3
    assert len(writers()) == 1
    stream.close()
    assert writers() == []
    assert stream.usage.finish_reason is None
    assert list(stream) == []


def test_a_dropped_stream_ends_its_work_without_the_garbage_collector() -> None:
    pipe = pipeline()
    gc.disable()
    try:
        for _ in pipe.stream(ASKED, [IMAGE], max_new_tokens=400):
            break
        assert writers() == []
    finally:
        gc.enable()


def test_unread_stream_does_not_generate() -> None:
    stream = pipeline().stream(ASKED, [IMAGE], max_new_tokens=400)
    assert writers() == []
    stream.close()


def test_an_error_of_the_model_reaches_the_reader() -> None:
    pipe = pipeline()

    def fail(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        raise RuntimeError("no memory left")

    pipe.model.language.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no memory left"):
        pipe.generate(ASKED, [IMAGE])


# --- from tokens to text ---------------------------------------------------------------------------------------------


def read(text: str, stop: Sequence[str] = ()) -> tuple[list[str], Usage]:
    tokenizer, usage = load_tokenizer("bytes"), Usage(0)
    tokens = iter(tokenizer(text, add_special_tokens=False).input_ids)
    return list(
        TextReader(tokenizer, StopConditions(frozenset(), tuple(stop)), usage).read(tokens)
    ), usage


def test_no_piece_holds_half_a_character() -> None:
    pieces, usage = read("où 🦊 naïve")
    assert "".join(pieces) == "où 🦊 naïve"
    assert all("\ufffd" not in piece for piece in pieces)
    assert usage.completion_tokens == len("où 🦊 naïve".encode())


def test_possible_stop_string_is_held_back() -> None:
    pieces, usage = read("one ST two STOP three", ["STOP"])
    assert "".join(pieces) == "one ST two "
    assert not any(piece.endswith(("S", "ST", "STO")) and piece != "ST " for piece in pieces)
    assert usage.finish_reason == "stop"


def test_the_beginning_of_a_stop_string_at_the_end_is_text() -> None:
    assert "".join(read("one ST", ["STOP"])[0]) == "one ST"


def test_the_first_of_several_stop_strings_counts() -> None:
    assert "".join(read("a, b. c", [".", ","])[0]) == "a"


def test_blanks_before_the_answer_are_left_out_and_others_kept() -> None:
    assert "".join(read(" \n two  words ")[0]) == "two  words "
    assert "".join(read("   ")[0]) == ""


def test_beam_search_matches_transformers() -> None:
    pipe = pipeline()
    asked = [Part("user", text="What is it?")]
    searched = pipe.generate(asked, max_new_tokens=8, beams=4)
    inputs, _ = pipe._prompt_inputs([asked], [()])
    ids = pipe.model.generate(
        **inputs, num_beams=4, do_sample=False, max_new_tokens=8,
        eos_token_id=sorted(pipe.stop_conditions.ids), pad_token_id=pipe.tokenizer.pad_token_id,
    )[0]  # fmt: skip
    assert searched.text == pipe.tokenizer.decode(ids, skip_special_tokens=True).lstrip()
    with pytest.raises(SpecError, match="beam search does not sample"):
        pipe.generate(asked, beams=2, temperature=1.0)
