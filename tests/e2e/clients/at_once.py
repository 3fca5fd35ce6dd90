"""Many questions at once through the async client: each gets the answer to its own picture."""

import asyncio

from common import DESCRIBE, MODEL, ask, async_client, picture

COLORS = ("red", "green", "blue")


async def whole(api, color: str) -> str:
    answer = await api.chat.completions.create(
        model=MODEL, messages=ask("What color is the circle?", picture(color, None)), temperature=0
    )
    return answer.choices[0].message.content.strip()


async def streamed(api, color: str) -> str:
    stream = await api.chat.completions.create(
        model=MODEL, messages=ask("What color is the circle?", picture(color, None)), temperature=0, stream=True
    )
    return "".join([choice.delta.content or "" async for chunk in stream for choice in chunk.choices]).strip()


async def cancelled(api) -> None:
    asking = api.chat.completions.create(
        model=MODEL, messages=ask(DESCRIBE, picture()), max_tokens=1000, extra_body={"ignore_eos": True}
    )
    try:
        await asyncio.wait_for(asking, timeout=0.3)
    except TimeoutError:
        return
    raise AssertionError("a thousand tokens came within 0.3 seconds")


async def main() -> None:
    async with async_client() as api:
        wanted = [color for color in COLORS for _ in range(4)]
        asked = [whole(api, color) if index % 2 else streamed(api, color) for index, color in enumerate(wanted)]
        answers = await asyncio.gather(*asked, cancelled(api))
        assert answers[:-1] == wanted, answers
        models = [model.id async for model in api.models.list()]
        assert MODEL in models


asyncio.run(main())
print("ok")
