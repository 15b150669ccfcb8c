"""Answers of a required form: valid JSON of the schema, whatever the weights prefer."""

import json
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from bridgework.data.samples import Part
from bridgework.errors import SpecError
from bridgework.inference.engine import Engine
from bridgework.inference.grammars import Grammars, json_grammar
from tests.inference import tiny

ASKED = [Part("user", image=0), Part("user", text="\nWhat is it?")]
SCHEMA = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "dark blue"]},
        "round": {"type": "boolean"},
        "sizes": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["color", "round", "sizes"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("name", ["llava/instruct", "blip2:flan_t5/generate", "flamingo/train"])
def test_every_answer_fulfils_its_schema(name: str) -> None:
    pipe = tiny.pipe_of(name)
    parts = ASKED if pipe.stage.data.template != "plain" else pipe.inputs.about()
    free = pipe.generate(parts, [tiny.picture()], max_new_tokens=8)
    engine = Engine(pipe)
    try:
        for seed in range(4):
            how: Any = {"temperature": float(seed > 0), "seed": seed, "json_schema": SCHEMA}
            answer = engine.generate(parts, [tiny.picture()], max_new_tokens=200, **how)
            value = json.loads(answer.text)
            assert answer.finish_reason == "stop"
            assert value.keys() == {"color", "round", "sizes"}
            assert value["color"] in ("red", "dark blue") and isinstance(value["round"], bool)
            assert 1 <= len(value["sizes"]) <= 3 and set(value["sizes"]) <= {1, 2}
        assert engine.generate(parts, [tiny.picture()], max_new_tokens=8) == free
    finally:
        engine.close()


def test_mask_allows_the_tokens_of_valid_texts_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    end = tokenizer.eos_token_id
    grammars, size = Grammars(tokenizer), len(tokenizer) + 7  # a model may have more columns
    text = '{"color":"dark blue","round":true,"sizes":[2,1]}'
    constraint = grammars.constraint(SCHEMA, frozenset({end}))
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        allowed_V = constraint.mask(torch.zeros(size)) == 0
        assert (
            allowed_V[token] and not allowed_V[end] and not bool(allowed_V[len(tokenizer) :].any())
        )
        constraint.accept(token)
    assert (constraint.mask(torch.zeros(size)) == 0).nonzero().flatten().tolist() == [end]
    wrong = grammars.constraint(SCHEMA, frozenset({end}))
    (first,) = tokenizer("[", add_special_tokens=False).input_ids
    assert wrong.mask(torch.zeros(size))[first] == -torch.inf


@pytest.mark.parametrize(
    "schema",
    [{"type": "cat"}, {"$ref": "https://example.org/x"}, {"type": "string", "pattern": "("}],
)
def test_schema_that_no_mask_expresses_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="json_schema: it cannot be used as a constraint") as caught:
        json_grammar(schema)
    assert "\n" not in str(caught.value)
