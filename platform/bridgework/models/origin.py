"""Fields of a model's folder in transformers' format that no forward reads, kept for the way back."""

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from bridgework.config import config_class


@config_class
class Origin:
    """Special ids and other fields of the config, and the settings of generation, of an imported model.

    Keys of `config` are dotted paths such as `text_config.eos_token_id`. The tokenizer and the template of a stage
    decide what is fed and what ends an answer; these fields go out again with `bridgework export`.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
