"""Multiple choice against plain loops: which candidate is chosen, at which rank, and what a written answer names."""

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from sklearn.metrics import roc_auc_score

from bridgework.config import flat, from_dict, override, to_dict
from bridgework.data.dataset import write
from bridgework.data.samples import Part, Sample
from bridgework.data.synthetic import choices, shapes, yes_no
from bridgework.errors import DataError, SpecError
from bridgework.evaluation import MultipleChoice, Writing, WrittenChoice, YesNo
from bridgework.evaluation.base import draw
from bridgework.evaluation.multiple_choice import parse_choice, rank_of, right_of
from bridgework.inference.pipeline import Pipeline, Ranked
from bridgework.system import Scoring
from tests.inference.tiny import pipeline

PROMPT = "Q: {} Options: {options} A:"
PLAIN = Scoring(prior=False)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return pipeline()


def kept(tmp_path: Path, rows: list[Sample]) -> str:
    write(rows, str(tmp_path / "kept"), source="test", license="CC0-1.0", made_by="test")
    return str(tmp_path / "kept")


def test_the_right_candidate_is_ranked_among_its_own_questions_candidates(
    pipe: Pipeline, home: Path, tmp_path: Path
) -> None:
    rows = list(choices(12))
    rows[3] = replace(
        rows[3], candidates=(*rows[3].candidates, "nothing at all", "a cat")
    )  # six here, four elsewhere
    path = kept(tmp_path, rows)
    for scoring in (PLAIN, Scoring(prior=False, per_token=True), None):
        metrics = (
            MultipleChoice(dataset=path, prompts=(PROMPT,), scoring=scoring).run(pipe, home).metrics
        )
        ranks = []
        for sample in rows:
            lettered = " ".join(
                f"({'abcdef'[i]}) {text}" for i, text in enumerate(sample.candidates)
            )
            question = f"Q: Which of these is in the picture? Options: {lettered} A:"
            asked = [Part("user", image=0), Part("user", text=question)]
            scores = {}
            for text in sample.candidates:
                [score] = pipe.scores([[*asked, Part("assistant", text=text)]], [sample.images])
                [blank] = pipe.scores(
                    [[*asked, Part("assistant", text=text)]], [[pipe.inputs.mean_square()]]
                )
                plain = score.loglik / (score.tokens if scoring and scoring.per_token else 1)
                scores[text] = score.loglik - blank.loglik if scoring is None else plain
            right = sample.parts[-1].text
            order = sorted(scores, key=lambda text: -scores[text])
            ranks.append(1 + order.index(str(right)))
        assert metrics["multiple_choice.accuracy"] == pytest.approx(
            fmean(rank == 1 for rank in ranks)
        )
        assert metrics["multiple_choice.mrr"] == pytest.approx(fmean(1 / rank for rank in ranks))
        assert metrics["multiple_choice.chance"] == pytest.approx((11 / 4 + 1 / 6) / 12)
        thirds = fmean(
            [(1 + 1 / 2 + 1 / 3 + 1 / 4) / 4] * 11 + [sum(1 / k for k in range(1, 7)) / 6]
        )
        assert metrics["multiple_choice.chance_mrr"] == pytest.approx(thirds)


def test_a_tie_counts_against_the_right_one_and_a_repeated_candidate_is_one() -> None:
    ranked = [Ranked("a", 2.0), Ranked("b", 1.0), Ranked("c", 1.0), Ranked("d", 0.0)]
    assert [rank_of(ranked, name) for name in "abcd"] == [1, 3, 3, 4]


def test_repeated_candidates_of_a_dialog_are_ranked_once(
    pipe: Pipeline, home: Path, tmp_path: Path
) -> None:
    (sample,) = choices(1)
    twice = replace(sample, candidates=(*sample.candidates, *sample.candidates))
    once, again = (
        MultipleChoice(dataset=kept(tmp_path / name, [row])).run(pipe, home).metrics
        for name, row in (("once", sample), ("twice", twice))
    )
    assert once == again


OPTIONS = ("Paris", "a dog", "Berlin", "no")


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("Berlin", 2),
        ("berlin.", 2),
        ("B", 1),
        ("b.", 1),
        ("(C)", 2),
        ("(c) Berlin", 2),
        ("B. a dog", 1),
        ("B: a dog", 1),
        ("The capital is far away. The answer is C.", 2),
        ("The answer is (D)", 3),
        ("the answer is: A", 0),
        ("The answer is B. No, the answer is C.", 2),
        ("The answer is E.", None),
        ("The answer is an apple", None),
        ("A dog", 1),
        ("A zebra runs", None),
        ("Because of that", None),
        ("", None),
        ("No", 3),
    ],
)
def test_an_answer_names_a_candidate_by_text_or_letter(answer: str, named: int | None) -> None:
    assert parse_choice(answer, OPTIONS) == named


def test_an_answer_of_one_letter_is_that_candidate_where_it_is_a_text_itself() -> None:
    assert parse_choice("B", ("C", "B", "A")) == 1 and parse_choice("a", ("C", "B", "A")) == 2


def test_right_candidate_is_the_answer_or_the_end_of_the_solution() -> None:
    (sample,) = choices(1)
    right = sample.candidates.index(str(sample.parts[-1].text))
    assert right_of(sample) == right
    solved = f"Look at the shapes. The answer is {'ABCD'[right]}."
    assert (
        right_of(replace(sample, parts=(*sample.parts[:2], Part("assistant", text=solved))))
        == right
    )
    assert right_of(replace(sample, candidates=())) is None
    assert (
        right_of(replace(sample, parts=(*sample.parts[:2], Part("assistant", text="none of them"))))
        is None
    )


def test_a_written_answer_is_right_where_it_names_the_right_candidate(
    pipe: Pipeline, home: Path, tmp_path: Path
) -> None:
    rows = list(choices(6))
    spec = WrittenChoice(dataset=kept(tmp_path, rows), prompts=(PROMPT,))
    written = {}
    for sample in rows:
        lettered = " ".join(f"({'abcd'[i]}) {text}" for i, text in enumerate(sample.candidates))
        question = f"Q: Which of these is in the picture? Options: {lettered} A:"
        asked = [Part("user", image=0), Part("user", text=question)]
        written[sample.key] = pipe.generate(
            asked, sample.images, min_new_tokens=1, max_new_tokens=16
        ).text
    told = [parse_choice(written[s.key], s.candidates) for s in rows]
    assert spec.run(pipe, home).metrics == {
        "written_choice.accuracy": pytest.approx(
            fmean(t == right_of(s) for t, s in zip(told, rows, strict=True))
        ),
        "written_choice.unanswered": pytest.approx(fmean(t is None for t in told)),
        "written_choice.chance": 0.25,
    }


def test_a_model_that_writes_the_letter_is_right(home: Path, tmp_path: Path) -> None:
    pipe, (sample,) = pipeline(), choices(1)
    bias_V = torch.full((320,), -1e4)  # of all tokens but the letter of the right candidate
    bias_V[pipe.tokenizer("ABCD"[right_of(sample) or 0], add_special_tokens=False).input_ids] = 0.0
    pipe.model.language.lm_head.register_forward_hook(lambda module, args, output: output + bias_V)
    spec = WrittenChoice(dataset=kept(tmp_path, [sample]), writing=Writing(beams=1, most=1))
    metrics = spec.run(pipe, home).metrics
    assert metrics["written_choice.accuracy"] == 1.0 and metrics["written_choice.unanswered"] == 0.0


def test_questions_without_a_picture_are_asked_too(
    pipe: Pipeline, home: Path, tmp_path: Path
) -> None:
    said = (Part("user", text="Which is a color?"), Part("assistant", text="red"))
    rows = [Sample("text", (), said, candidates=("red", "dog")), *choices(2)]
    assert (
        MultipleChoice(dataset=kept(tmp_path, rows))
        .run(pipe, home)
        .metrics["multiple_choice.accuracy"]
        >= 0
    )


def test_rows_without_candidates_are_named(pipe: Pipeline, home: Path) -> None:
    for spec in (
        MultipleChoice(dataset="synthetic:shapes"),
        WrittenChoice(dataset="synthetic:shapes"),
    ):
        with pytest.raises(
            DataError, match="none of the rows of synthetic:shapes has candidates and an answer"
        ):
            spec.run(pipe, home)


# --- yes or no -------------------------------------------------------------------------------------------------------


def test_yes_against_no_is_the_area_under_the_curve_of_the_best_words(
    pipe: Pipeline, home: Path
) -> None:
    spec = YesNo(dataset="synthetic:yes-no", rows=24, scoring=PLAIN, prompts=("{} Answer:",))
    metrics = spec.run(pipe, home).metrics
    margins, truth = [], []
    for item in draw(spec, pipe, home):
        question = str(item.sample.parts[1].text).strip()
        asked = [Part("user", image=0), Part("user", text=f"{question} Answer:")]
        nats = {
            word: pipe.scores([[*asked, Part("assistant", text=word)]], [item.sample.images])[
                0
            ].loglik
            for word in ("yes", "true", "no", "false")
        }
        margins.append(max(nats["yes"], nats["true"]) - max(nats["no"], nats["false"]))
        truth.append(item.sample.parts[-1].text == "yes")
    assert metrics["yes_no.auc"] == pytest.approx(roc_auc_score(truth, margins))
    pairs = [(p > n) + 0.5 * (p == n) for p, t in zip(margins, truth, strict=True) if t
             for n, u in zip(margins, truth, strict=True) if not u]  # fmt: skip
    assert metrics["yes_no.auc"] == pytest.approx(fmean(pairs))
    assert metrics["yes_no.accuracy"] == pytest.approx(
        fmean((m > 0) == t for m, t in zip(margins, truth, strict=True))
    )
    assert metrics["yes_no.most_common"] == pytest.approx(max(fmean(truth), 1 - fmean(truth)))


def test_rows_that_are_all_answered_alike_have_no_curve(
    pipe: Pipeline, home: Path, tmp_path: Path
) -> None:
    path = kept(tmp_path, [sample for i, sample in enumerate(yes_no(6)) if i % 2])
    with pytest.raises(DataError, match="all answered alike"):
        YesNo(dataset=path).run(pipe, home)
    with pytest.raises(
        DataError, match=r"none of the rows .* is answered with one of yes, true, no, false"
    ):
        YesNo(dataset="synthetic:shapes").run(pipe, home)


# --- specs -----------------------------------------------------------------------------------------------------------

SPECS = (MultipleChoice(dataset="x"), WrittenChoice(dataset="x"), YesNo(dataset="x"))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_specs_are_values_and_tiny_ones_run(
    spec: MultipleChoice | WrittenChoice | YesNo, pipe: Pipeline, home: Path
) -> None:
    assert from_dict(to_dict(spec)) == spec and override(spec, flat(spec)) == spec
    assert spec.tiny().run(pipe, home).metrics.keys() == {
        f"{spec.name}.{key}" for key in spec.better
    }


def test_invalid_fields_are_rejected() -> None:
    for spec in (MultipleChoice, WrittenChoice):
        with pytest.raises(SpecError, match="at least 1"):
            spec(dataset="x", rows=0)
    with pytest.raises(SpecError, match="at least 2"):
        YesNo(dataset="x", rows=1)
    with pytest.raises(SpecError, match="no word is in both"):
        YesNo(dataset="x", yes=("yes",), no=("no", "yes"))


def test_synthetic_questions_have_one_right_answer() -> None:
    pictures = {sample.key.removeprefix("shapes-"): set(sample.labels) for sample in shapes(40)}
    for sample in choices(40):
        shown = pictures[sample.key.removeprefix("choices-")]
        assert len(set(sample.candidates)) == 4 and len(set(sample.candidates) & shown) == 1
        assert sample.parts[-1].text in shown
    for sample in yes_no(40):
        shown = pictures[sample.key.removeprefix("yes-no-")]
        assert any(label in str(sample.parts[1].text) for label in shown) == (
            sample.parts[-1].text == "yes"
        )
