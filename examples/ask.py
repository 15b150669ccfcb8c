"""Ask a served model about an image, with OpenAI's client.

python -m examples.ask                                        a picture of examples/data, on port 8000
python -m examples.ask "Is it red?" photo.png --url http://127.0.0.1:8000/v1 --model llava

The key is that of $BRIDGEWORK_KEY; an app with dev=true needs none.
"""

import base64
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import openai
import typer

from bridgework.data.dataset import open_dataset
from bridgework.data.images import header

DATA = Path(__file__).parent / "data/heldout_style"


def main(
    question: Annotated[str, typer.Argument()] = "What is in the picture?",
    image: Annotated[Path | None, typer.Argument()] = None,
    url: str = "http://127.0.0.1:8000/v1",
    model: str | None = None,
    tokens: int = 32,
) -> None:
    """Print the answer, and its id, which `bridgework trace` follows to the data.

    An empty question sends the image alone, e.g. to a stage that was trained on captions.
    """
    content = (
        open_dataset(str(DATA)).read_group(0, 0)[0].images[0]
        if image is None
        else (image.read_bytes())
    )
    client = openai.OpenAI(base_url=url, api_key=os.environ.get("BRIDGEWORK_KEY", "none"))
    try:
        name = model or client.models.list().data[0].id
        kind = (header(content).format or "png").lower()
        encoded = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        parts: Any = [{"type": "image_url", "image_url": {"url": encoded}}]
        if question:
            parts.append({"type": "text", "text": question})
        answer = client.chat.completions.create(
            model=name, max_tokens=tokens, messages=[{"role": "user", "content": parts}]
        )
    except openai.OpenAIError as error:
        sys.exit(f"error  {url}: {error}")
    print(f"{name}: {answer.choices[0].message.content}\n{answer.id}")


if __name__ == "__main__":
    typer.run(main)
