"""Candidate answers: choose, rank and generate read one input, and scores are held against plain forwards."""

from dataclasses import replace

import pytest
import torch

from bridgework.config import added, config_class, from_dict, override, to_dict
from bridgework.data.samples import Part, pair
from bridgework.errors import DataError
from bridgework.inference.pipeline import Pipeline
from bridgework.inference.preprocess import ConversationImages, RawImage
from bridgework.system import IGNORE, IMAGE, Layout, Scoring, load
from tests.inference.tiny import picture, pipe_of, pipeline

CANDIDATES = ["yes", "a red square", "no idea at all, it is too dark"]
PLAIN, LESS_PRIOR = Scoring(prior=False), Scoring(prior=True)
SYSTEMS = (
    "xgen_mm/instruct",
    "llava:next/instruct",
    "llava/instruct",
    "flamingo/train",
    "minigpt4/polish",
    "blip2/generate",
    "blip2:flan_t5/generate",
    "instructblip/instruct",
    "instructblip:vicuna_7b/instruct",
)
TILED = SYSTEMS[:2]


def alone(
    pipe: Pipeline, conversation: list[Part], images: ConversationImages, candidate: str
) -> float:
    """Nats of the last answer, from one plain forward of one row without a cache or padding."""
    batch = pipe.inputs.batch(
        [[*conversation, Part("assistant", text=candidate)]], [images], answer=True
    )
    prompt = pipe.inputs.batch([conversation], [images], answer=False).ids_BT.shape[1]
    with torch.no_grad():
        outputs = pipe.model(**batch.inputs())
    labels, total = outputs.labels_BT[0], 0.0
    for at in range(prompt, len(labels)):
        if labels[at] != IGNORE:
            total += float(outputs.logits_BTV[0, at - 1].double().log_softmax(-1)[labels[at]])
    return total


def asked(*images: int) -> list[Part]:
    return [*(Part("user", image=i) for i in images), Part("user", text="What is it?")]


@pytest.mark.parametrize("name", SYSTEMS)
def test_choice_score_matches_plain_forward_of_the_complete_input(name: str) -> None:
    pipe = pipe_of(name)
    conversation, image = asked(0), picture()
    expected = {c: alone(pipe, conversation, [image], c) for c in CANDIDATES}
    ranked = pipe.rank_answers(conversation, [image], CANDIDATES, scoring=PLAIN)
    assert dict(ranked) == pytest.approx(expected, abs=1e-3)
    assert [r.candidate for r in ranked] == sorted(CANDIDATES, key=lambda c: -expected[c])
    backwards = dict(pipe.rank_answers(conversation, [image], CANDIDATES[::-1], scoring=PLAIN))
    single = {
        c: pipe.rank_answers(conversation, [image], [c], scoring=PLAIN)[0].score for c in CANDIDATES
    }
    assert backwards == pytest.approx(expected, abs=1e-3) and single == pytest.approx(
        expected, abs=1e-3
    )


@pytest.mark.parametrize("name", TILED)
def test_choose_and_rank_read_the_tiles_that_generate_reads(name: str) -> None:
    pipe = pipe_of(name)
    conversation, image = pipe.inputs.about("What?"), picture()
    read = pipe.inputs.batch([conversation], [[image]], answer=False).ids_BT.eq(IMAGE).sum()
    assert read > pipe.stage.model.image_tokens
    (base_square,) = pipe.inputs.encode_images([image])
    base_alone = pipe.inputs.encode_images([image])[0].features[:1]
    whole, base = (
        dict(pipe.rank_answers(conversation, shown, CANDIDATES, scoring=PLAIN))
        for shown in ([image], base_alone)
    )
    assert whole != pytest.approx(base, abs=1e-3)
    assert whole == pytest.approx(
        dict(pipe.rank_answers(conversation, [base_square], CANDIDATES, scoring=PLAIN)), abs=1e-4
    )
    for how in (PLAIN, LESS_PRIOR):
        chosen, ranked = (
            dict(answers)
            for answers in (
                pipe.rank_answers(conversation, [image], CANDIDATES, scoring=how),
                pipe.rank(image, CANDIDATES, "What?", scoring=how),
            )
        )
        assert chosen == pytest.approx(ranked, abs=1e-4)


@pytest.mark.parametrize("name", [*TILED, "llava/instruct"])
def test_the_prior_is_that_of_blank_squares_in_the_places_of_the_images_own(name: str) -> None:
    pipe = pipe_of(name)
    conversation, image = asked(0), picture()
    (seen,) = pipe.inputs.encode_images([image])
    nothing = pipe.inputs.features([pipe.inputs.mean_square()] * len(seen.features))
    blank = replace(seen, features=nothing)
    scores = dict(pipe.rank_answers(conversation, [image], CANDIDATES, scoring=LESS_PRIOR))
    expected = {
        c: alone(pipe, conversation, [image], c) - alone(pipe, conversation, [blank], c)
        for c in CANDIDATES
    }
    assert scores == pytest.approx(expected, abs=1e-3)


def test_video_can_be_ranked_like_generated() -> None:
    pipe = pipe_of("flamingo/train")
    video: tuple[bytes, ...] = tuple(picture(seed, (64, 64)) for seed in range(3))
    still = picture(9, (64, 64))
    for shown, conversation in (([video], asked(0)), ([video, still], asked(0, 1))):
        pictures: list[RawImage] = list(shown)
        expected = {c: alone(pipe, conversation, pictures, c) for c in CANDIDATES}
        assert dict(
            pipe.rank_answers(conversation, pictures, CANDIDATES, scoring=PLAIN)
        ) == pytest.approx(expected, abs=1e-3)
        assert len(pipe.rank_answers(conversation, pictures, CANDIDATES)) == 3
        assert pipe.generate(conversation, pictures, max_new_tokens=2).completion_tokens >= 1
    frames = dict(pipe.rank_answers(asked(0), [video], CANDIDATES, scoring=PLAIN))
    assert frames != pytest.approx(
        dict(pipe.rank_answers(asked(0), [video[:1]], CANDIDATES, scoring=PLAIN)), abs=1e-4
    )
    assert len(pipe.rank(video, CANDIDATES)) == 3


def test_squares_and_tiled_pictures_share_a_conversation() -> None:
    pipe = pipe_of("xgen_mm/instruct")
    square = pipe.inputs.mean_square()
    mixed: list[RawImage] = [square, picture()]
    expected = {c: alone(pipe, asked(0, 1), mixed, c) for c in CANDIDATES}
    assert dict(pipe.rank_answers(asked(0, 1), mixed, CANDIDATES, scoring=PLAIN)) == pytest.approx(
        expected, abs=1e-3
    )
    layouts = [seen.layout for seen in pipe.inputs.encode_images(mixed)]
    assert isinstance(layouts[0], Layout) and layouts[0].columns == 0 and layouts[1] is not None


def test_only_the_last_answer_of_a_conversation_counts() -> None:
    pipe = pipe_of("llava/instruct")
    earlier = [*asked(0), Part("assistant", text="A thing."), Part("user", text="Which one?")]
    scores = pipe.score_answers(earlier, [picture()], CANDIDATES)
    for candidate, score in zip(CANDIDATES, scores, strict=True):
        assert score.loglik == pytest.approx(alone(pipe, earlier, [picture()], candidate), abs=1e-3)
    counts = [
        len(pipe.tokenizer(f" {c}", add_special_tokens=False).input_ids) + 1 for c in CANDIDATES
    ]
    assert [score.tokens for score in scores] == counts  # bytes, and what ends the answer


def test_an_answer_that_the_conversation_ends_with_is_left_out_as_in_writing() -> None:
    pipe = pipe_of("llava/instruct")
    answered = [*asked(0), Part("assistant", text="Perhaps a cat.")]
    assert pipe.rank_answers(answered, [picture()], CANDIDATES) == pipe.rank_answers(
        asked(0), [picture()], CANDIDATES
    )


def test_a_mean_over_tokens_is_the_sum_over_their_number() -> None:
    pipe = pipe_of("llava/instruct")
    scores = pipe.score_answers(asked(0), [picture()], CANDIDATES)
    means = dict(
        pipe.rank_answers(
            asked(0), [picture()], CANDIDATES, scoring=Scoring(prior=False, per_token=True)
        )
    )
    assert means == pytest.approx(
        {c: s.loglik / s.tokens for c, s in zip(CANDIDATES, scores, strict=True)}, abs=1e-4
    )
    sums = dict(pipe.rank_answers(asked(0), [picture()], CANDIDATES))
    both = dict(
        pipe.rank_answers(asked(0), [picture()], CANDIDATES, scoring=Scoring(per_token=True))
    )
    assert both == pytest.approx(
        {c: sums[c] / s.tokens for c, s in zip(CANDIDATES, scores, strict=True)}, abs=1e-4
    )


SCORINGS = {
    "instructblip/instruct": PLAIN,  # 2305.06500, 2.5: vocabulary ranking
    "instructblip:vicuna_7b/instruct": PLAIN,
    "blip:vqa/vqa": PLAIN,  # 2201.12086, 5.3: rank the answers
    "flamingo/train": PLAIN,  # 2204.14198, appendix A.2
    "minigpt4/polish": PLAIN,  # its release's candidates are ranked by their loss
    "llava:quickstart/instruct": Scoring(prior_weight=0.7),  # docs/log.md: chosen by validation
    "llava/instruct": LESS_PRIOR,
}


@pytest.mark.parametrize(("name", "scoring"), SCORINGS.items())
def test_a_recipe_says_how_its_candidates_are_scored(name: str, scoring: Scoring) -> None:
    system, _, stage = name.partition("/")
    assert load(system)[stage].scoring == scoring
    assert load(system).tiny()[stage].scoring == scoring


def test_instructblip_ranks_by_the_plain_log_likelihood() -> None:
    pipe = pipe_of("instructblip/instruct")
    expected = {c: alone(pipe, pipe.inputs.about("What?"), [picture()], c) for c in CANDIDATES}
    assert dict(pipe.rank(picture(), CANDIDATES, "What?")) == pytest.approx(expected, abs=1e-3)
    assert dict(
        pipe.rank_answers(pipe.inputs.about("What?"), [picture()], CANDIDATES)
    ) == pytest.approx(expected, abs=1e-3)


def test_candidate_that_does_not_fit_is_rejected_not_truncated() -> None:
    pipe = pipeline(context=256)
    short = Pipeline(pipe.model, replace(pipe.stage, data=replace(pipe.stage.data, max_tokens=64)))
    conversation = [Part("user", image=0), Part("user", text="x" * 60)]
    image = picture(0, (32, 32))
    assert short.score_answers(conversation, [image], ["a"]) == pipe.score_answers(
        conversation, [image], ["a"]
    )
    with pytest.raises(DataError, match=r"Got \d+ tokens; the language model reads at most 256"):
        pipe.rank_answers(conversation, [image], ["a", "b" * 300])


def test_a_conversation_longer_than_the_rows_of_training_is_scored_to_its_end() -> None:
    """Up to the context, by `scores` as by `choose`: a candidate that is cut would seem likelier than it is."""
    pipe = pipe_of("blip/captioner")
    long = "a red square on a blue field, and a small dog"
    assert (
        len(pipe.tokenizer(long).input_ids) > pipe.stage.data.max_tokens < pipe.stage.model.context
    )
    (score,) = pipe.scores([[*pipe.inputs.about(), Part("assistant", text=long)]], [[picture()]])
    ((_, chosen),) = pipe.rank_answers(pipe.inputs.about(), [picture()], [long], scoring=PLAIN)
    assert score.loglik == pytest.approx(chosen, abs=1e-3)
    (cut,) = pipe.scores([[*pipe.inputs.about(), Part("assistant", text=long[:30])]], [[picture()]])
    assert cut.tokens < score.tokens


def test_images_seen_once_may_be_shown_again() -> None:
    pipe = pipe_of("llava:next/instruct")
    runs: list[int] = []
    pipe.model.vision.register_forward_hook(lambda module, args, output: runs.append(len(args[0])))
    seen = pipe.inputs.encode_images([picture(), picture(1, (40, 40))])
    count = sum(runs)
    pipe.score_answers(asked(0, 1), seen, CANDIDATES)
    pipe.generate(asked(0), seen[:1], max_new_tokens=2)
    assert sum(runs) == count == sum(len(one.features) for one in seen)


def test_prompts_are_counted_with_their_tiles_and_without_the_tower() -> None:
    for name in (*TILED, "llava/instruct", "flamingo/train"):
        pipe = pipe_of(name)
        expected = pipe.generate(asked(0), [picture()], max_new_tokens=1).prompt_tokens
        runs: list[int] = []
        pipe.model.vision.register_forward_hook(
            lambda module, args, output, runs=runs: runs.append(1)
        )
        assert pipe.inputs.prompt_tokens(asked(0), [picture()]) == expected and not runs


def test_the_scoring_of_a_stage_is_a_dotted_path_and_its_default_changes_no_fingerprint() -> None:
    system = load("llava")
    changed = override(system, {"stages.instruct.scoring.per_token": "true"})
    assert changed["instruct"].scoring == Scoring(prior=True, per_token=True)
    assert changed.fingerprint() != system.fingerprint()
    assert "scoring" not in to_dict(system["instruct"]) and from_dict(to_dict(changed)) == changed


@config_class
class _Grown:
    old: int = 1
    new: int = added(default=2)


def test_a_field_that_a_spec_gained_is_written_only_where_it_is_set() -> None:
    assert set(to_dict(_Grown())) == {"_", "old"} and set(to_dict(_Grown(new=3))) == {
        "_",
        "old",
        "new",
    }
    for grown in (_Grown(), _Grown(old=4, new=3)):
        assert from_dict(to_dict(grown)) == grown


def test_about_is_a_pair_without_its_caption() -> None:
    pipe = pipeline()
    assert pipe.inputs.about() == pipe.inputs.ask(pair("k", b"", "said"))[:-1]
    assert pipe.inputs.about("Why?") == pipe.inputs.ask(pair("k", b"", "said"), ("Why?",))[:-1]
