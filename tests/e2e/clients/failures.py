"""Every failure arrives as the exception class, code and field name that a program would look at."""

import base64
from typing import Any

import openai
from common import DESCRIBE, MODEL, ask, client, picture

api = client()
scene = ask(DESCRIBE, picture())


def refused(kind: type[openai.APIStatusError], status: int, code: str | None, param: str | None, **request: Any) -> str:
    given = {"model": MODEL, "messages": scene, **request}
    for stream in (False, True):
        try:
            api.chat.completions.create(stream=stream, **given)
        except openai.APIStatusError as error:
            assert type(error) is kind, error
            assert (error.status_code, error.param) == (status, param), (error.status_code, error.param, error.body)
            assert code is None or error.code == code, error.body
            assert error.request_id
            assert set(error.body) == {"message", "type", "param", "code"}, error.body
            message = error.body["message"]
        else:
            raise AssertionError(f"accepted: {request}")
    return message


def bad(code: str | None, param: str | None, **request: Any) -> str:
    return refused(openai.BadRequestError, 400, code, param, **request)


def part(url: str) -> list[dict[str, Any]]:
    return ask(DESCRIBE, url)


refused(openai.NotFoundError, 404, "model_not_found", "model", model="no-such-model")
bad("unsupported_parameter", "no_such_field", extra_body={"no_such_field": 1})
bad("unsupported_parameter", "tools", tools=[{"type": "function", "function": {"name": "look"}}])
bad("unsupported_parameter", "response_format", response_format={"type": "json_object"})
bad("unsupported_parameter", "chat_template", extra_body={"chat_template": "{{ messages }}"})
bad(None, "temperature", temperature=3.0)
bad(None, "n", n=0)
bad(None, "top_logprobs", top_logprobs=2)
bad(None, "messages", messages=[])
print("ok fields")

noise = base64.b64encode(b"no picture at all").decode()
truncated = picture()[:-400]
for url in (
    f"data:image/png;base64,{noise}",
    truncated[: len(truncated) // 4 * 4],
    "data:image/png;base64,",
    "data:,x",
):
    said = bad(None, "messages[0].content[0].image_url", messages=part(url))
    assert "0x" not in said, said
for url in ("https://example.com/cat.png", "http://127.0.0.1/cat.png", "file:///etc/passwd", "cat.png"):
    bad(None, "messages[0].content[0].image_url", messages=part(url))
print("ok pictures")

said = bad("context_length_exceeded", "messages", messages=[{"role": "user", "content": "word " * 6000}])
assert "maximum context length" in said, said
print("ok lengths")

try:
    api.models.retrieve("no/such model")
except openai.NotFoundError as error:
    assert error.code == "model_not_found"
else:
    raise AssertionError("a model that isn't there was found")
try:
    api.embeddings.create(model=MODEL, input="text")
except openai.NotFoundError as error:
    assert error.body["message"]
else:
    raise AssertionError("there are no embeddings yet")
print("ok paths")
