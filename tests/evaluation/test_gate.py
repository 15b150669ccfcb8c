"""The gate: 1,000 simulated promotions, its rules, and gate files."""

from pathlib import Path

import numpy as np
import pytest

from bridgework.errors import DataError, SpecError
from bridgework.evaluation import VQA, HeldOutLoss, Ranking
from bridgework.evaluation.gate import Gate, check, default_gate, read_gate
from bridgework.evaluation.statistics import EvaluatedRows, RowValues

RANKING, HELDOUT = Ranking(dataset="pairs"), HeldOutLoss(dataset="pairs")
GATE = Gate(improve=("vqa.accuracy",), resamples=999)
IMAGES, EACH = 150, 4  # questions per image


def answers(draw: np.random.Generator, right: float, redone: float) -> tuple[RowValues, RowValues]:
    """Return the right answers of a model, and of another that answers some questions again.

    Images differ in difficulty, so questions about one image are dependent.
    """
    chance_G = draw.beta(4 * 0.7, 4 * 0.3, IMAGES)
    chance_R = np.repeat(chance_G, EACH)
    old_R = draw.random(IMAGES * EACH) < chance_R
    again_R = draw.random(IMAGES * EACH) < redone
    new_R = np.where(again_R, draw.random(IMAGES * EACH) < chance_R + right, old_R)
    keys = tuple(map(str, range(IMAGES * EACH)))
    rows = EvaluatedRows(keys, tuple(f"image {i // EACH}" for i in range(IMAGES * EACH)))
    return rows.values(new_R), rows.values(old_R)


def outcomes(right: float, redone: float, margin: float | None, times: int) -> list[str]:
    draw = np.random.default_rng(17)
    found = []
    for _ in range(times):
        new, old = answers(draw, right, redone)
        found.append(check(GATE, "vqa.accuracy", "higher", new, old, margin).outcome)
    return found


def test_of_1000_promotions_of_an_equal_model_at_most_5_percent_pass_as_better() -> None:
    found = outcomes(right=0.0, redone=0.3, margin=None, times=1_000)
    assert 0 < found.count("passed") <= 50


def test_a_model_that_is_3_points_worse_never_passes() -> None:
    """0.3 of the questions are answered again, 10 points worse: 3 points in all."""
    found = outcomes(right=-0.1, redone=0.3, margin=None, times=1_000)
    assert found.count("passed") == 0
    guarded = outcomes(right=-0.1, redone=0.3, margin=0.005, times=300)
    assert guarded.count("passed") == 0


def test_a_better_model_passes_and_an_equal_one_passes_its_guard() -> None:
    assert outcomes(right=0.25, redone=0.4, margin=None, times=40).count("passed") == 40
    assert outcomes(right=0.0, redone=0.03, margin=0.03, times=40).count("passed") == 40


def paired(new: "list[float]", old: "list[float]") -> tuple[RowValues, RowValues]:
    keys = tuple(map(str, range(len(new))))
    rows = EvaluatedRows(keys, keys)
    return rows.values(new), rows.values(old)


def test_lower_is_better_for_a_loss() -> None:
    noise = np.random.default_rng(0).normal(0.0, 0.1, 60)
    new, old = paired(list(1.8 + noise), list(2.0 + noise[::-1]))
    assert check(GATE, "heldout.loss", "lower", new, old).outcome == "passed"
    assert check(GATE, "heldout.loss", "lower", old, new).outcome == "failed"
    assert check(GATE, "heldout.loss", "lower", old, new, 0.3).outcome == "passed"
    assert check(GATE, "heldout.loss", "lower", old, new, 0.1).outcome == "failed"


def test_an_undecided_difference_names_the_rows_that_it_needs() -> None:
    draw = np.random.default_rng(1)
    old = draw.normal(0.0, 1.0, 100)
    noise = draw.normal(0.0, 1.0, 100)
    new = old + 0.1 + noise - noise.mean()
    found = check(GATE, "x.y", "higher", *paired(list(new), list(old)))
    assert found.outcome == "undecided" and found.more_rows is not None
    assert found.reason == f"it needs {found.more_rows:,} more rows"
    times = (100 + found.more_rows) // 100 + 1
    more = check(GATE, "x.y", "higher", *paired(list(new) * times, list(old) * times))
    assert more.outcome == "passed"


def test_few_images_decide_nothing_whatever_the_difference() -> None:
    found = check(GATE, "x.y", "higher", *paired([1.0] * 10, [0.0] * 10))
    assert (found.outcome, found.more_rows) == ("undecided", 10)
    assert check(GATE, "x.y", "higher", *paired([1.0] * 20, [0.0] * 20)).outcome == "passed"


def test_images_that_are_not_part_of_the_figure_do_not_count() -> None:
    """E.g. 300 requests of which 6 should be refused."""
    keys = tuple(map(str, range(300)))
    rows, harmful = EvaluatedRows(keys, keys), [float(i < 6) for i in range(300)]
    new, old = rows.values([1.0] * 300, harmful), rows.values([0.0] * 300, harmful)
    found = check(GATE, "refusals.refused", "higher", new, old)
    assert (found.outcome, found.n, found.images) == ("undecided", 6, 6)


def test_an_equal_model_passes_a_guard_without_margin() -> None:
    values = [float(i % 3 == 0) for i in range(60)]
    assert check(GATE, "x.y", "higher", *paired(values, values), 0.0).outcome == "passed"
    assert check(GATE, "x.y", "higher", *paired(values, values)).outcome == "failed"


def test_a_figure_that_is_not_a_number_never_passes() -> None:
    nan = [float("nan")] * 30
    assert check(GATE, "x.y", "higher", *paired(nan, [0.5] * 30)).outcome == "failed"
    assert check(GATE, "x.y", "higher", *paired(nan, nan)).outcome == "failed"
    assert check(GATE, "x.y", "lower", *paired([0.5] * 30, nan)).outcome == "passed"


def test_rows_of_other_data_are_not_compared() -> None:
    one, other = EvaluatedRows(("a",), ("a",)), EvaluatedRows(("b",), ("b",))
    with pytest.raises(DataError, match="no row in common"):
        check(GATE, "x.y", "higher", one.values([1.0]), other.values([0.0]))


def test_the_default_gate_improves_the_first_figure_and_guards_the_others() -> None:
    gate = default_gate([RANKING, HELDOUT])
    assert (gate.improve, dict(gate.guard)) == (("ranking.accuracy",), {"heldout.loss": 0.02})
    assert gate.evals([RANKING, HELDOUT]) == [RANKING, HELDOUT]
    with pytest.raises(SpecError, match="has no evaluations, so nothing can be compared"):
        default_gate([])


def test_a_gate_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "gate.toml"
    file.write_text(
        'improve = ["ranking.accuracy"]\nparity = true\n[guard]\n"vqa.accuracy" = 0.01\n'
        '[[evaluation]]\non = "vqa:vqav2-val"\nrows = 200\nwriting = {beams = 1}\n'.replace(
            "writing = {beams = 1}\n", '"writing.beams" = 1\n'
        )
    )
    gate = read_gate(file)
    assert gate.parity and gate.improve == ("ranking.accuracy",)
    first, second = gate.evals([RANKING, HELDOUT])
    assert first == RANKING and isinstance(second, VQA)
    assert (second.rows, second.writing.beams, second.dataset) == (200, 1, "vqav2-val")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "nothing is required"),
        ("improve = 'x'", "improve has another type"),
        ('improv = ["x"]', "unknown key 'improv'; did you mean 'improve'"),
        ("improve = [", "is not TOML"),
        ('[guard]\n"a.b" = -1', "expected a number of at least 0"),
        ('[guard]\n"a.b" = true', "expected a number of at least 0"),
        ('improve = ["a.b"]\n[guard]\n"a.b" = 1', "must improve, so it needs no guard"),
        ('improve = ["a.b"]\n[[evaluation]]\nrows = 2', "an evaluation needs `on`"),
        (
            'improve = ["a.b"]\n[[evaluation]]\non = "vqq:x"',
            "no evaluation 'vqq'; did you mean 'vqa'",
        ),
        ('improve = ["a.b"]\n[[evaluation]]\non = "vqa:x"\nrow = 2', "no field 'row'"),
        ('improve = ["a.b"]\nevaluation = ["vqa:x"]', r"as a table \[\[evaluation\]\]"),
        ('improve = ["a.b"]\nconfidence = 1.5', "confidence is in"),
    ],
)
def test_a_wrong_gate_file_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "gate.toml"
    file.write_text(text)
    with pytest.raises(SpecError, match=said):
        read_gate(file)


def test_a_missing_gate_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="does not exist"):
        read_gate(tmp_path / "none.toml")


def test_unknown_figures_and_baselines_are_refused() -> None:
    with pytest.raises(SpecError, match=r"'ranking\.acuracy'; did you mean 'ranking\.accuracy'"):
        Gate(improve=("ranking.acuracy",)).evals([RANKING])
    with pytest.raises(SpecError, match="is a baseline"):
        Gate(improve=("ranking.chance",)).evals([RANKING])
