"""Fields of an imported transformers model that no forward reads, stored for its export."""

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from bridgework.config import config_class


@config_class
class Origin:
    """Special ids and other config fields, and the generation config, of an imported model.

    Keys of `config` are dotted paths, e.g. `text_config.eos_token_id`. The tokenizer and template
    of a stage decide the prompt and the end of an answer; `bridgework export` writes these fields.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
