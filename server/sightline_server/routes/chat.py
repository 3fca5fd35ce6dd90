"""``POST /v1/chat/completions``: from a body to an answer, in one piece or as a stream.

The order of work is the order of this file. Knows the stages and hands each one's noun to the next; what a stage does
is in its own room.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import ExitStack, aclosing
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from sightline_server import sse
from sightline_server.auth.principal import Scope
from sightline_server.chat import reply
from sightline_server.chat.deltas import ChoiceText
from sightline_server.chat.generation import Generation
from sightline_server.chat.pictures import read_pictures
from sightline_server.chat.prompt import build_prompt, image_places
from sightline_server.chat.reply import ReplyHeader
from sightline_server.chat.sampling import for_choice, resolve_sampling
from sightline_server.engine import types as engine_types
from sightline_server.errors import ApiError, InvalidKey, InvalidRequest
from sightline_server.logs import RequestRecord, frames
from sightline_server.metrics import Timeline
from sightline_server.protocol.chat import ChatRequest, parse_chat_request
from sightline_server.protocol.completion import ChatChunk, ChatCompletion
from sightline_server.protocol.errors import ErrorBody
from sightline_server.protocol.strict_json import parse_object
from sightline_server.routes.access import Needs
from sightline_server.routes.admission import Ticket
from sightline_server.routes.charges import Charges
from sightline_server.routes.context import Context, context_of, principal_of, record_of, refuse_when_draining
from sightline_server.routes.failures import server_fault
from sightline_server.routes.queue_deadline import QueueDeadline

log = logging.getLogger(__name__)
T = TypeVar("T")

PARSED_AT_ONCE = 2**15
"""Bytes of JSON that take no more than some milliseconds."""

router = APIRouter(
    prefix="/v1",
    tags=["chat"],
    dependencies=[Depends(Needs(Scope.CHAT)), Depends(refuse_when_draining)],
    responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
)


# The body is read by hand, with stricter rules than FastAPI's own; the OpenAPI document is told about it here.
@router.post(
    "/chat/completions",
    summary="Chat, with pictures",
    response_model=ChatCompletion,
    responses={
        200: {
            "description": "One ChatCompletion; with `stream: true`, server-sent events that each hold a ChatChunk.",
            "content": {"text/event-stream": {"schema": {"$ref": "#/components/schemas/ChatChunk"}}},
        }
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}},
        }
    },
)
async def create_chat_completion(request: Request) -> Response:
    context, record = context_of(request), record_of(request)
    record.endpoint = "chat"
    until_answered: ExitStack = request.state.until_answered
    charges = Charges(request)
    ticket = until_answered.enter_context(context.admission.enter(principal_of(request)))
    charges.request()
    chat = await _read_chat(request)
    context.model.check_name(chat.model)
    _check_choices(chat, context)
    # Only now: a body that is slow to arrive holds no place.
    ticket.take(chat.num_choices)
    header = _header(chat, context)
    record.fields["completion"] = header.id
    generation = await _until_gone(request.receive, _prepare(request, chat, header.id, charges, ticket))
    generation.start()
    ticket.submitted()
    until_answered.callback(QueueDeadline(generation, context.engine, context.settings.queue_timeout_s).cancel)
    revoked = InvalidKey("This key was revoked. Send one that is in force.")
    until_answered.enter_context(context.keyring.watch(principal_of(request), partial(generation.fail, revoked)))
    answer = _stream if chat.stream else _whole
    try:
        return await answer(request, chat, header, generation)
    except BaseException:
        generation.close()
        raise


async def _read_chat(request: Request) -> ChatRequest:
    """The body's request. A type that a browser sends across origins without asking is no JSON here."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise InvalidRequest(
            f"Send the body as 'Content-Type: application/json', not {kind[:60]!r}.", code="unsupported_media_type"
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise InvalidRequest("Send the body as it is, without Content-Encoding.", code="unsupported_media_type")
    body = await request.body()
    if len(body) <= PARSED_AT_ONCE:
        return _parse(body)
    # Others' tokens go out meanwhile.
    return await asyncio.get_running_loop().run_in_executor(context_of(request).prompt_threads, _parse, body)


def _parse(body: bytes) -> ChatRequest:
    return parse_chat_request(parse_object(body))


def _check_choices(chat: ChatRequest, context: Context) -> None:
    # Each choice takes a place in the queue: more than it has would be turned away however often they came again.
    most = min(context.settings.max_choices, context.settings.max_queue)
    if chat.num_choices > most:
        raise InvalidRequest(f"'n' is {chat.num_choices}; at most {most} choices are allowed.", param="n")


def _header(chat: ChatRequest, context: Context) -> ReplyHeader:
    return ReplyHeader(
        id=f"chatcmpl-{uuid4().hex}",
        created=int(time.time()),
        model=context.model.name,
        system_fingerprint=context.system_fingerprint,
        names_tier=chat.service_tier is not None,
    )


async def _prepare(request: Request, chat: ChatRequest, reply_id: str, charges: Charges, ticket: Ticket) -> Generation:
    """Pictures, prompt and parameters, made into a Generation that isn't started yet."""
    context, record, principal = context_of(request), record_of(request), principal_of(request)
    salt, places = principal.cache_salt, image_places(chat.messages)
    charges.images(len(places))
    pictures = await read_pictures(places, context.images, context.settings, salt=salt, charge=charges.pixels)
    building = partial(build_prompt, chat.messages, pictures.handles, context.model, context.context_length)
    prompt = await asyncio.get_running_loop().run_in_executor(context.prompt_threads, building)
    record.fields |= {"prompt_tokens": len(prompt.token_ids), "images": len(pictures.handles)}
    sampling = resolve_sampling(
        chat, context.model, prompt_tokens=len(prompt.token_ids), context_length=context.context_length
    )
    requests = [
        engine_types.Request(
            id=f"{reply_id}-{choice}",
            prompt=prompt,
            sampling=for_choice(sampling, choice),
            tenant=principal.key_id,
            cache_salt=salt,
            arrived=time.time(),
        )
        for choice in range(chat.num_choices)
    ]
    texts = [
        ChoiceText(
            context.model.tokenizer.detokenizer(),
            stop=chat.stop_strings,
            min_tokens=sampling.min_tokens,
            logprobs=sampling.logprobs,
        )
        for _ in requests
    ]
    timeline = Timeline(context.metrics, record.started)
    generation = Generation(context.engine, requests, texts, pictures.pixels, timeline, on_first_token=ticket.leave)
    longest = sampling.max_tokens * chat.num_choices
    charges.tokens(len(prompt.token_ids), longest, lambda: generation.usage().total)
    return generation


async def _whole(request: Request, chat: ChatRequest, header: ReplyHeader, generation: Generation) -> Response:
    tokenizer = context_of(request).model.tokenizer
    collecting = reply.collect(generation, header, tokenizer, logprobs=bool(chat.logprobs))
    completion = await _until_gone(request.receive, collecting)
    _note_usage(record_of(request), generation)
    return Response(completion.model_dump_json(exclude_unset=True), media_type="application/json")


async def _stream(request: Request, chat: ChatRequest, header: ReplyHeader, generation: Generation) -> Response:
    context = context_of(request)
    silence_s = context.settings.sse_keep_alive_s or None
    # A refusal by the engine shall be an HTTP status; but when the queue is long, headers go out before the answer.
    await _until_gone(request.receive, generation.admitted(silence_s))
    chunks = reply.stream(
        generation,
        header,
        context.model.tokenizer,
        include_usage=chat.include_usage,
        keep_alive_s=silence_s,
    )
    return sse.EventStream(_events(chunks, generation, record_of(request)), on_end=generation.close)


async def _events(
    chunks: AsyncGenerator[ChatChunk | None, None], generation: Generation, record: RequestRecord
) -> AsyncGenerator[bytes, None]:
    record.outcome = "cancelled"
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                if generation.finished:
                    # Some clients leave before the usage and the end mark; they have got their answer.
                    record.outcome = "completed"
                yield sse.KEEP_ALIVE if chunk is None else sse.encode(chunk)
        yield sse.DONE
    except ApiError as error:
        record.fail(error)
        yield sse.encode_error(error)
    except Exception as error:
        log.error("Request %s failed in its stream.\n%s", record.request_id, frames(error))
        record.fail(server_fault())
        yield sse.encode_error(server_fault())
    finally:
        _note_usage(record, generation)


def _note_usage(record: RequestRecord, generation: Generation) -> None:
    usage = generation.usage()
    record.fields |= {"completion_tokens": usage.completion_tokens, "cached_tokens": usage.cached_tokens}


async def _until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, unless the client leaves first: then it is cancelled and ClientDisconnect raised."""
    task, watcher = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.wait({task, watcher})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
