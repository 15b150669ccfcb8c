"""What holds for every recipe that ships, in every variant, at full size and tiny."""

import json

import pytest

from bridgework.config import from_dict, to_dict
from bridgework.system import System, load, recipes, variants

SHIPPED = [name for name in recipes() if not name.startswith("_")]


def every_system(recipe: str) -> list[System]:
    """All variants of one recipe, and their tiny twins."""
    full = [load(f"{recipe}:{variant}") for variant in variants(recipe)]
    return [*full, *(system.tiny() for system in full)]


@pytest.mark.parametrize("recipe", SHIPPED)
def test_a_recipe_has_a_default_variant(recipe: str) -> None:
    assert load(recipe).name == recipe


@pytest.mark.parametrize("recipe", SHIPPED)
def test_a_recipe_comes_back_from_json_as_it_went(recipe: str) -> None:
    for system in every_system(recipe):
        back = from_dict(json.loads(json.dumps(to_dict(system))))
        assert back == system
        assert back.fingerprint() == system.fingerprint()


@pytest.mark.parametrize("recipe", SHIPPED)
def test_a_fingerprint_names_one_variant(recipe: str) -> None:
    """Two variants that differ in sizes alone have one tiny twin."""
    full = [load(f"{recipe}:{variant}").fingerprint() for variant in variants(recipe)]
    tiny = [system.fingerprint() for system in every_system(recipe)[len(full) :]]
    assert len(set(full)) == len(full) and not set(full) & set(tiny)
