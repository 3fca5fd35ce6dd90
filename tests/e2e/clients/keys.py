"""A server with a key: the right one opens it, a wrong one or none is an AuthenticationError."""

import openai
from common import MODEL, client

hello = [{"role": "user", "content": "Hello"}]
assert client().chat.completions.create(model=MODEL, messages=hello, max_tokens=2).choices

for key in ("wrong", "first-ke"):
    for call in (lambda api: api.models.list(), lambda api: api.chat.completions.create(model=MODEL, messages=hello)):
        try:
            call(client(api_key=key))
        except openai.AuthenticationError as error:
            assert (error.status_code, error.code) == (401, "invalid_api_key"), error.body
        else:
            raise AssertionError(f"key {key!r} was accepted")
print("ok")
