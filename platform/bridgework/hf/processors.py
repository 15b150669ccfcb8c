"""Processors of transformers for models that were trained here: pictures, texts, and the template of a conversation."""

import json
from collections.abc import Mapping
from typing import Any

from bridgework.data.templates import V1_SYSTEM
from bridgework.system import Pixels

BICUBIC = 3  # Pillow's number, as transformers writes it
# Contents of one string each, of lists of parts: an image is a word, and a line break stands between two parts.
FLAT = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set said = namespace(text='', first=true) -%}
  {%- if message['content'] is string -%}
    {%- set said.text = message['content'] -%}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- set word = IMAGE if part['type'] == 'image' else part['text'] -%}
      {%- if not said.first and IMAGE -%}{%- set said.text = said.text + '\\n' -%}{%- endif -%}
      {%- set said.text = said.text + word -%}
      {%- set said.first = false -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set flat.messages = flat.messages + [{'role': message['role'], 'content': said.text}] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
V1 = """\
{{- BOS -}}
{%- if messages[0]['role'] != 'system' -%}{{- SYSTEM -}}{%- endif -%}
{%- set gap = namespace(text=' ') -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}{{- message['content'] -}}
  {%- elif message['role'] == 'user' -%}{{- gap.text + 'USER: ' + message['content'] -}}
  {%- else -%}{{- ' ASSISTANT: ' + message['content'] + EOS -}}
  {%- endif -%}
  {%- set gap.text = '' if message['role'] != 'system' else ' ' -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ' ASSISTANT:' -}}{%- endif -%}
"""
BARE = """\
{{- BOS -}}
{%- for message in messages -%}
  {{- message['content'] -}}
  {%- if message['role'] == 'assistant' -%}{{- EOS -}}{%- endif -%}
{%- endfor -%}
"""


def image_processor(pixels: Pixels) -> Any:
    """Return the image processor of transformers whose pixels are nearest to those of `to_square` and `lay_out`."""
    size, square = pixels.size, {"height": pixels.size, "width": pixels.size}
    numbers: dict[str, Any] = {
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
        "resample": BICUBIC,
        "size": {"shortest_edge": size},
        "crop_size": square,
        "do_center_crop": True,
        "do_convert_rgb": True,
    }
    if pixels.grids:
        grids = [[rows * size, columns * size] for columns, rows in pixels.grids]
        return processor_class("LlavaNextImageProcessor")(**numbers, image_grid_pinpoints=grids)
    if pixels.fit == "pad":
        return processor_class("LlavaImageProcessor")(**numbers, do_pad=True)
    return processor_class("CLIPImageProcessor")(**numbers)


def processor_class(name: str) -> Any:
    """Return a class of transformers; of an image processor the one that needs no torchvision, where there is none."""
    import transformers
    from transformers.utils.import_utils import is_torchvision_available

    plain = name.endswith("ImageProcessor") and not is_torchvision_available()
    return getattr(transformers, f"{name}Pil" if plain else name)


def chat_template(template: str, tokenizer: Any, image: str) -> str | None:
    """Return the Jinja template that writes a conversation as a stage's template does; None where there is none.

    `image` is the word for an image in the text; empty where a processor puts images elsewhere.
    """
    if template != "chat":
        return _named(FLAT + (V1 if template == "v1" else BARE), image, tokenizer)
    if (own := tokenizer.chat_template) is None:
        return None
    asked = str(tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False))
    first = (
        "" if asked.startswith(tokenizer.bos_token or "") else "{{- BOS -}}"
    )  # which every row begins with here
    return _named(FLAT, image, tokenizer) + first + str(own)


def _named(text: str, image: str, tokenizer: Any) -> str:
    words: Mapping[str, str] = {
        "IMAGE": image,
        "BOS": tokenizer.bos_token or "",
        "EOS": tokenizer.eos_token or tokenizer.sep_token or "",
        "SYSTEM": V1_SYSTEM,
    }
    return (
        "".join(f"{{%- set {name} = {json.dumps(word)} -%}}\n" for name, word in words.items())
        + text
    )
