"""The bundled model behind the true server: the answers it is known for, and the tokens that transformers gives."""

import asyncio
import base64
import io
import json
import random
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from sightline_models.demo.evaluate import EXAMS, Item, items
from sightline_models.presets import demo_checkpoint

GOLDEN = Path(__file__).parent / "golden"
QUESTIONS = 200
MAX_TOKENS = 160


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def turns(item: Item) -> list[tuple[str, str]]:
    return [
        turn for question, answer in item.conversation.turns for turn in (("user", question), ("assistant", answer))
    ]


def messages(images: list[Image.Image], spoken: list[tuple[str, str]], *, urls: bool) -> list[dict[str, Any]]:
    """The conversation as the API takes it, or as transformers' processor does."""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(image)}} if urls else {"type": "image"} for image in images
    ]
    made = []
    for role, text in spoken:
        made.append({"role": role, "content": [*parts, {"type": "text", "text": text}]})
        parts = []
    return made


def held_out(count: int) -> list[Item]:
    """Questions of every kind, about pictures that training can't have seen."""
    made = items(EXAMS["full"], 6, "parity")
    random.Random("parity").shuffle(made)
    assert len({item.task for item in made[:count]}) > 30
    return made[:count]


def test_the_server_gives_the_tokens_that_transformers_gives(demo_server: Any) -> None:
    asked = held_out(QUESTIONS)
    ours = asyncio.run(ask_all(demo_server.url, asked))
    theirs = ask_transformers(asked)
    differing = [
        (item.conversation.turns[-1][0], our, their)
        for item, our, their in zip(asked, ours, theirs, strict=True)
        if our != their
    ]
    assert len(ours) == QUESTIONS
    assert not differing


async def ask_all(url: str, asked: list[Item]) -> list[list[int]]:
    """The bytes of each greedy token, as lists."""
    gate = asyncio.Semaphore(16)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def one(item: Item) -> list[int]:
            body = {
                "model": "sightline-demo",
                "messages": messages(list(item.images), turns(item)[:-1], urls=True),
                "temperature": 0,
                "max_tokens": MAX_TOKENS,
                "logprobs": True,
            }
            async with gate:
                reply = await client.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            choice = reply.json()["choices"][0]
            assert choice["finish_reason"] == "stop"
            return [token["bytes"] for token in choice["logprobs"]["content"]]

        return list(await asyncio.gather(*(one(item) for item in asked)))


def ask_transformers(asked: list[Item]) -> list[list[list[int]]]:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    # The server's pixels are those of the PIL backend; the other rounds some of them differently.
    processor = AutoProcessor.from_pretrained(demo_checkpoint(), backend="pil")
    model = LlavaForConditionalGeneration.from_pretrained(demo_checkpoint(), dtype=torch.float32).eval()
    told = []
    for item in asked:
        spoken = messages([], turns(item)[:-1], urls=False)
        spoken[0]["content"] = [{"type": "image"} for _ in item.images] + spoken[0]["content"]
        text = processor.apply_chat_template(spoken, add_generation_prompt=True)
        inputs = processor(images=list(item.images) or None, text=text, return_tensors="pt")
        start = inputs["input_ids"].shape[1]
        output = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)[0, start:].tolist()
        assert output[-1] == model.generation_config.eos_token_id
        told.append([list(processor.tokenizer.decode([token]).encode()) for token in output[:-1]])
    return told


TRANSCRIPTS: list[dict[str, Any]] = json.loads((GOLDEN / "transcripts.json").read_text("utf-8"))


@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda transcript: transcript["name"])
def test_golden_transcripts(demo_server: Any, transcript: dict[str, Any]) -> None:
    images = [Image.open(GOLDEN / name) for name in transcript["pictures"]]
    spoken: list[tuple[str, str]] = []
    for question, golden in transcript["turns"]:
        spoken.append(("user", question))
        body = {"model": "sightline-demo", "messages": messages(images, spoken, urls=True), "temperature": 0}
        reply = httpx.post(f"{demo_server.url}/v1/chat/completions", json=body, timeout=60)
        assert reply.status_code == 200, reply.text
        answer = reply.json()["choices"][0]["message"]["content"]
        assert answer == golden, question
        spoken.append(("assistant", answer))
