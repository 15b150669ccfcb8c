"""Figures against reference implementations, on 200 rows each."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from sklearn.metrics import (
    accuracy_score,
    label_ranking_average_precision_score,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

from bridgework.data.synthetic import shapes
from bridgework.evaluation.captioning import bleu4, cider
from bridgework.evaluation.hallucination import binary_metrics, chair_metrics, parse_yes_no
from bridgework.evaluation.likelihood import first_is_best
from bridgework.evaluation.multiple_choice import rank_of
from bridgework.evaluation.retrieval import within
from bridgework.evaluation.statistics import EvaluatedRows
from bridgework.evaluation.vqa import agreement
from bridgework.inference.pipeline import Ranked

ROWS = 200
KEYS = tuple(map(str, range(ROWS)))
EVALUATED = EvaluatedRows(KEYS, KEYS)
REPLIES = (
    "Yes", "yes, there is.", "No", "no.", "There is no dog. Yes.", "I do not see one", "It isn't",
    "Nothing, yes", "Notably yes", "a dog", "None", "Yes. No, wait.",
)  # fmt: skip


def test_vqa_accuracy_is_that_of_lmms_eval() -> None:
    """The file is written by references/make_vqa.py."""
    rows = json.loads((Path(__file__).parent / "references" / "vqa.json").read_text())
    assert len(rows) == ROWS and 0.2 < np.mean([row["accuracy"] for row in rows]) < 0.9
    for row in rows:
        assert agreement(row["answer"], row["references"]) == pytest.approx(row["accuracy"])


def pope_says_yes(text: str) -> bool:
    """Return the answer as POPE's evaluation reads it: the first sentence, by its words."""
    sentence = text.split(".")[0].replace(",", "")
    return not {"No", "not", "no"} & set(sentence.split(" "))


def test_pope_is_that_of_the_paper_and_of_scikit_learn() -> None:
    draw = random.Random(0)
    plain = [reply for reply in REPLIES if reply != "It isn't"]  # its tokenizer splits "n't" before
    texts = [draw.choice(plain) for _ in range(ROWS)]
    said = [parse_yes_no(text) for text in texts]
    assert said == [pope_says_yes(text) for text in texts]
    truth = [draw.random() < 0.5 for _ in range(ROWS)]
    found = {name: rows.mean for name, rows in binary_metrics(EVALUATED, said, truth).items()}
    precision, recall, f1, _ = precision_recall_fscore_support(truth, said, average="binary")
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx(
        (precision, recall, f1)
    )
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, said))


def test_chair_is_that_of_the_paper_in_loops() -> None:
    """Rohrbach et al. 2018, equations 1 and 2."""
    draw = random.Random(1)
    objects = ["dog", "cat", "bus", "mat", "cup", "tree"]
    said = [set(draw.sample(objects, draw.randrange(4))) for _ in range(ROWS)]
    there = [set(draw.sample(objects, draw.randrange(1, 4))) for _ in range(ROWS)]
    mentioned = hallucinated = sentences = 0
    for names, truth in zip(said, there, strict=True):
        wrong = [name for name in names if name not in truth]
        mentioned += len(names)
        hallucinated += len(wrong)
        sentences += bool(wrong)
    found = {name: rows.mean for name, rows in chair_metrics(EVALUATED, said, there).items()}
    assert found["instances"] == pytest.approx(hallucinated / mentioned)
    assert found["captions"] == pytest.approx(sentences / ROWS)


def test_cider_and_bleu_are_those_of_pycocoevalcap() -> None:
    draw, captions = random.Random(2), [sample.text for sample in shapes(ROWS)]
    references = [[text, *draw.sample(captions, draw.randrange(3))] for text in captions]
    said = []
    for text in captions:
        words = text.split()
        words[draw.randrange(len(words))] = draw.choice(words)
        said.append(" ".join(words[: draw.randrange(4, len(words) + 1)]))
    truth = dict(enumerate(references))
    written = {i: [text] for i, text in enumerate(said)}
    score, each = Cider().compute_score(truth, written)
    assert cider(said, references).tolist() == pytest.approx(list(each))
    assert cider(said, references).mean() == pytest.approx(score)
    scores, _ = Bleu(4).compute_score(truth, written, verbose=0)
    assert bleu4(said, references).mean() == pytest.approx(scores[3], abs=1e-9)


@pytest.mark.parametrize("cut", [1, 5, 10])
def test_recall_with_several_captions_an_image_is_that_of_scikit_learn(cut: int) -> None:
    """A caption has one image; an image has five captions, of which the best counts."""
    images = ROWS // 5
    scores_CR = torch.randn(ROWS, images, generator=torch.Generator().manual_seed(3))
    own_C = torch.arange(ROWS) // 5
    own_CR = own_C.unsqueeze(1) == torch.arange(images)
    scores_CR = scores_CR + 1.5 * own_CR
    expected = top_k_accuracy_score(own_C.numpy(), scores_CR.numpy(), k=cut)
    assert float(within(scores_CR, cut, own_CR).double().mean()) == pytest.approx(expected)
    ranks = [
        min(
            scores_CR[:, row].argsort(descending=True).tolist().index(caption)
            for caption in range(5 * row, 5 * row + 5)
        )
        for row in range(images)
    ]
    found = float(within(scores_CR.T, cut, own_CR.T).double().mean())
    assert found == pytest.approx(np.mean([rank < cut for rank in ranks]))


@pytest.mark.parametrize("cut", [1, 5])
def test_zero_shot_accuracy_is_that_of_scikit_learn(cut: int) -> None:
    generator = torch.Generator().manual_seed(4)
    scores_RC = torch.randn(ROWS, 12, generator=generator)
    right_R = torch.randint(12, (ROWS,), generator=generator)
    right_RC = right_R.unsqueeze(1) == torch.arange(12)
    expected = top_k_accuracy_score(right_R.numpy(), scores_RC.numpy(), k=cut, labels=range(12))
    assert float(within(scores_RC, cut, right_RC).double().mean()) == pytest.approx(expected)


def test_ranking_and_choices_are_those_of_scikit_learn() -> None:
    scores_RC = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(5))
    scores_RC[:, 0] += 1.0  # the right one first, as `Ranking` has it
    right = np.zeros(ROWS, dtype=int)
    expected = top_k_accuracy_score(right, scores_RC.numpy(), k=1, labels=range(6))
    assert float(first_is_best(scores_RC).double().mean()) == pytest.approx(expected)
    names = [str(column) for column in range(6)]
    ranks = [
        rank_of([Ranked(name, s) for name, s in zip(names, row, strict=True)], "0")
        for row in scores_RC.tolist()
    ]
    reciprocal = label_ranking_average_precision_score(np.eye(6)[right], scores_RC.double().numpy())
    assert np.mean([1 / rank for rank in ranks]) == pytest.approx(reciprocal)
    assert np.mean([rank == 1 for rank in ranks]) == pytest.approx(expected)
