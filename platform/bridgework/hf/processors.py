"""Processors of transformers for models that were trained here: images, text and chat templates."""

import json
from collections.abc import Mapping
from typing import Any

from bridgework.data.templates import V1_SYSTEM
from bridgework.system import Pixels

BICUBIC = 3  # Pillow's number, as transformers writes it
# Joins the parts of each message to one string, with a line break between parts; an image is IMAGE.
FLAT = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set result = namespace(text='', first=true) -%}
  {%- if message['content'] is string -%}
    {%- set result.text = message['content'] -%}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- set word = IMAGE if part['type'] == 'image' else part['text'] -%}
      {%- if not result.first and IMAGE -%}
{%- set result.text = result.text + '\\n' -%}
{%- endif -%}
      {%- set result.text = result.text + word -%}
      {%- set result.first = false -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set flat.messages = flat.messages + [{'role': message['role'], 'content': result.text}] -%}
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
    """Return the transformers image processor that is closest to `to_square` and `tile_image`."""
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
    """Return a class of transformers; without torchvision, the Pillow image processor."""
    import transformers
    from transformers.utils.import_utils import is_torchvision_available

    plain = name.endswith("ImageProcessor") and not is_torchvision_available()
    return getattr(transformers, f"{name}Pil" if plain else name)


def chat_template(template: str, tokenizer: Any, image: str) -> str | None:
    """Return the Jinja chat template that is equivalent to a stage's template, or None.

    `image` is the image token in the text; empty if the processor places images itself.
    """
    if template != "chat":
        return _set_variables(FLAT + (V1 if template == "v1" else BARE), image, tokenizer)
    if (own := tokenizer.chat_template) is None:
        return None
    asked = str(tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False))
    # every row begins with BOS here
    first = "" if asked.startswith(tokenizer.bos_token or "") else "{{- BOS -}}"
    return _set_variables(FLAT, image, tokenizer) + first + str(own)


def _set_variables(text: str, image: str, tokenizer: Any) -> str:
    """Return the template after statements that set its variables."""
    variables: Mapping[str, str] = {
        "IMAGE": image,
        "BOS": tokenizer.bos_token or "",
        "EOS": tokenizer.eos_token or tokenizer.sep_token or "",
        "SYSTEM": V1_SYSTEM,
    }
    statements = (
        f"{{%- set {name} = {json.dumps(value)} -%}}\n" for name, value in variables.items()
    )
    return "".join(statements) + text
