"""What the client scripts share: a strict client, pictures and questions.

Runs in an environment that holds only one version of the `openai` package and Pillow. Where the server is and which
key it wants stand in OPENAI_BASE_URL and OPENAI_API_KEY, where the package itself looks.
"""

import base64
import io
from typing import Any

from openai import AsyncOpenAI, OpenAI
from PIL import Image, ImageDraw

MODEL = "sightline-demo"
DESCRIBE = "Describe the picture."
SCENE_TEXT = "2 objects on a white background: red circle, blue square"
IMAGE_TOKENS = 144

_STRICT: dict[str, Any] = {"_strict_response_validation": True, "max_retries": 0, "timeout": 60}


def client(**options: Any) -> OpenAI:
    return OpenAI(**{**_STRICT, **options})


def async_client() -> AsyncOpenAI:
    return AsyncOpenAI(**_STRICT)


def picture(circle: str = "red", square: str | None = "blue", size: int = 384) -> str:
    """A data URL of a circle on the left and, unless None, a square on the right."""
    image = Image.new("RGB", (384, 384), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((60, 140, 150, 230), fill=circle)
    if square is not None:
        draw.rectangle((230, 150, 310, 230), fill=square)
    file = io.BytesIO()
    image.resize((size, size)).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def ask(text: str, *urls: str) -> list[dict[str, Any]]:
    """The messages of one question about the pictures at ``urls``."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
