"""Turns what pydantic found wrong into one sentence and a path such as ``messages[0].content[1].image_url``.

Knows pydantic's kinds of errors. Knows no field of any request.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from sightline_server.errors import InvalidRequest
from sightline_server.protocol.strict_json import render_path

M = TypeVar("M", bound=BaseModel)
_MAX_SENTENCE = 400


def validate(model: type[M], data: dict[str, Any]) -> M:
    """``data`` as a ``model``. Raises InvalidRequest about the innermost of the errors found."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
    places = [_place(data, entry["loc"], entry["type"] == "missing") for entry in found]
    # Branches of a union report their failures side by side: the deepest one is what the user meant.
    worst = max(range(len(found)), key=lambda index: (len(places[index]), -index))
    raise _explain(found[worst]["type"], found[worst]["msg"], found[worst].get("ctx", {}), render_path(places[worst]))


def unrecognized(param: str) -> InvalidRequest:
    shown = render_path((param,)) if len(param) > 100 else param
    return InvalidRequest(
        f"Unrecognized request argument supplied: {shown}.", code="unsupported_parameter", param=shown
    )


def _place(data: Any, location: Sequence[str | int], missing: bool) -> tuple[str | int, ...]:
    """``location`` without the names of union branches, which no client ever wrote."""
    kept: list[str | int] = []
    for index, part in enumerate(location):
        here = isinstance(data, dict) and part in data
        if here or (isinstance(data, list) and isinstance(part, int) and part < len(data)):
            data = data[part]
        elif not (missing and index == len(location) - 1):
            continue
        kept.append(part)
    return tuple(kept)


def _explain(kind: str, message: str, context: dict[str, Any], param: str) -> InvalidRequest:
    if kind == "extra_forbidden":
        return unrecognized(param)
    field = str(context.get("discriminator", "type")).strip("'")
    if kind in ("missing", "union_tag_not_found"):
        name = param if kind == "missing" else f"{param}.{field}"
        return InvalidRequest(f"Missing required parameter: {name!r}.", code="missing_required_parameter", param=name)
    if kind == "union_tag_invalid":
        tag = str(context.get("tag", ""))[:60]
        return InvalidRequest(
            f"Invalid {param + '.' + field!r}: {tag!r} is not supported here, use one of "
            f"{context.get('expected_tags', '')}.",
            param=f"{param}.{field}",
        )
    if kind in ("model_type", "dict_type"):
        message = "Input should be an object"
    sentence = (message[:1].lower() + message[1:_MAX_SENTENCE]).replace(" after validation", "")
    return InvalidRequest(f"Invalid {param!r}: {sentence}.", param=param or None)
