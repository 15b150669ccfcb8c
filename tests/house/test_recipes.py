"""Shipped recipes: default variant, JSON round trip and fingerprints, at full size and tiny."""

import json

import pytest

from bridgework.config import from_dict, to_dict
from bridgework.system import System, load, recipes, variants


def every_system(recipe: str) -> list[System]:
    """Return all variants of one recipe, and their tiny versions."""
    full = [load(f"{recipe}:{variant}") for variant in variants(recipe)]
    return [*full, *(system.tiny() for system in full)]


@pytest.mark.parametrize("recipe", recipes())
def test_recipe_has_a_default_variant(recipe: str) -> None:
    assert load(recipe).name == recipe


@pytest.mark.parametrize("recipe", recipes())
def test_recipe_survives_a_json_round_trip(recipe: str) -> None:
    for system in every_system(recipe):
        back = from_dict(json.loads(json.dumps(to_dict(system))))
        assert back == system
        assert back.fingerprint() == system.fingerprint()


@pytest.mark.parametrize("recipe", recipes())
def test_variants_have_distinct_fingerprints(recipe: str) -> None:
    """Tiny fingerprints may repeat, because variants may differ only in size."""
    full = [load(f"{recipe}:{variant}").fingerprint() for variant in variants(recipe)]
    tiny = [system.fingerprint() for system in every_system(recipe)[len(full) :]]
    assert len(set(full)) == len(full) and not set(full) & set(tiny)
