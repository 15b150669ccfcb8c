"""Parameter counts of every recipe: `python -m tests.house.parameter_counts` writes the file that ships."""

import json

from bridgework.system import load, recipes, variants
from bridgework.training import estimate
from tests.house import source

FILE = source.PACKAGE / "recipes" / estimate.FILE


def counts() -> dict[str, tuple[int, int]]:
    """Return the counts of all stages of all variants, by the key of `estimate`."""
    stages = [
        stage
        for recipe in recipes()
        for variant in variants(recipe)
        for stage in load(f"{recipe}:{variant}").stages
    ]
    return {estimate.key(stage): estimate.compute(stage) for stage in stages}


def text() -> str:
    return json.dumps(counts(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    print(FILE)
