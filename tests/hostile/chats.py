"""Well-behaved clients beside the hostile ones: a canary whose answer must never change, and chats that are timed."""

import base64
import io
import json
import time
from typing import Any

import httpx
import numpy as np
from PIL import Image


def noise_url(seed: int, size: int = 96) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def chat_body(model: str, text: str, *urls: str, **fields: Any) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": text})
    return {"model": model, "messages": [{"role": "user", "content": content}]} | fields


async def canary(http: httpx.AsyncClient, model: str) -> str:
    """One fixed request's choices, as text to compare. Raises AssertionError when it isn't answered with 200."""
    body = chat_body(
        model, "What does the canary see?", noise_url(7), seed=11, max_tokens=24, logprobs=True, top_logprobs=3
    )
    answer = await http.post("/v1/chat/completions", json=body | {"ignore_eos": True})
    assert answer.status_code == 200, f"the canary got {answer.status_code}: {answer.text[:300]}"
    return json.dumps(answer.json()["choices"])


async def first_token_s(http: httpx.AsyncClient, model: str, seed: int, max_tokens: int = 16) -> float:
    """Seconds from sending a streamed chat with a picture of its own to its first text; the rest is read too."""
    body = chat_body(model, "What is this?", noise_url(seed), seed=seed, max_tokens=max_tokens, stream=True)
    began, first = time.perf_counter(), None
    async with http.stream("POST", "/v1/chat/completions", json=body | {"ignore_eos": True}) as answer:
        assert answer.status_code == 200, f"a chat got {answer.status_code}: {(await answer.aread())[:300]!r}"
        last = ""
        async for line in answer.aiter_lines():
            if first is None and '"content":"' in line and '"content":""' not in line:
                first = time.perf_counter() - began
            last = line or last
    assert last == "data: [DONE]", f"a chat's stream ended with {last[:200]!r}"
    assert first is not None, "a chat's stream held no text"
    return first
