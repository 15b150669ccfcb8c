"""Write vqa.json: 200 rows with the accuracies of lmms-eval, whose code follows the official one.

    python -m venv /tmp/lmms && /tmp/lmms/bin/pip install --no-deps lmms-eval==0.7.3
    /tmp/lmms/bin/python tests/evaluation/references/make_vqa.py

The file is kept, because the tests do not need lmms-eval.
"""

import importlib.util
import json
import random
import sysconfig
from pathlib import Path

PACKAGE = Path(sysconfig.get_paths()["purelib"]) / "lmms_eval" / "tasks" / "_task_utils"
WORDS = (
    "red", "Red.", "a red", "the dog", "2", "two", "Two dogs", "dont", "don't", "it's", "1,000", "t-shirt",
    "yes", "Yes!", "no", "none", "an apple", "apple", "$5", "5.0", "half/half", "left; right", "on table",
    "on the table", "ten", "10", "coca-cola", "u.s.", "isnt", "wheres", "what's that?", "(left)",
)  # fmt: skip


def main() -> None:
    spec = importlib.util.spec_from_file_location("vqa_eval", PACKAGE / "vqa_eval_metric.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    process, draw, rows = module.EvalAIAnswerProcessor(), random.Random(0), []
    for _ in range(200):
        some = draw.sample(WORDS, 4)
        references = [draw.choice(some) for _ in range(10)]
        answer = draw.choice(some if draw.random() < 0.8 else WORDS)
        normal, others = process(answer), [process(text) for text in references]
        scores = []
        for left_out in range(10):
            same = sum(text == normal for i, text in enumerate(others) if i != left_out)
            scores.append(min(1.0, same / 3))
        rows.append(
            {
                "answer": answer,
                "references": references,
                "normalized": normal,
                "accuracy": sum(scores) / 10,
            }
        )
    file = Path(__file__).with_name("vqa.json")
    file.write_text(json.dumps(rows, indent=0) + "\n")


if __name__ == "__main__":
    main()
