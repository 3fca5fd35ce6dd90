"""Stand-ins for everything behind the API: an engine that says what it is told to, a tokenizer whose tokens are bytes,
a decode pool that decodes nothing. Deterministic, and without torch.

Bytes as tokens split every character that isn't ASCII over several tokens, which is what tests of text want.
"""

import asyncio
import base64
import codecs
import hashlib
import struct
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from fastapi import FastAPI

from sightline_models.config import (
    DecoderConfig,
    GenerationDefaults,
    Normalization,
    ProjectorConfig,
    RopeConfig,
    VisionConfig,
    VlmConfig,
)
from sightline_models.image_header import ImageError, read_header
from sightline_models.images import PreprocessConfig
from sightline_models.tokenizer import ChatTokenizer, EncodedChat, ImagePart, Message, TokenizerError
from sightline_server.app import create_app
from sightline_server.chat.decode_pool import DecodePool, ImageHandle
from sightline_server.chat.model import ServedModel
from sightline_server.engine.client import EngineClient, PixelSource
from sightline_server.engine.types import (
    EngineInfo,
    EngineStats,
    FinishEvent,
    FinishReason,
    Request,
    TokenEvent,
    TopLogprob,
    Usage,
)
from sightline_server.errors import Unavailable
from sightline_server.settings import Settings

BOS, EOS, IMAGE, VOCAB_SIZE = 256, 257, 258, 260
IMAGE_TOKENS = 4
CONTEXT_LENGTH = 512
FAKE_HEADER_BYTES = 23
MODEL_NAME = "acme/fake-vlm"
ALIAS = "fake"


class FakeDetokenizer:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(bytes([token_id])) if token_id < 256 else ""

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class FakeTokenizer:
    """``ROLE:text`` a message, a token a byte. A system message anywhere but in front is an error, as in strict
    templates."""

    vocab_size = VOCAB_SIZE

    def encode_chat(self, messages: Sequence[Message], image_lengths: Sequence[int]) -> EncodedChat:
        ids, starts, lengths = [BOS], [], iter(image_lengths)
        for index, message in enumerate(messages):
            if message.role == "system" and index:
                raise TokenizerError("The chat template refused: system messages must stand first.")
            ids += f"{message.role.upper()}:".encode()
            for part in message.parts:
                if isinstance(part, ImagePart):
                    starts.append(len(ids))
                    ids += [IMAGE] * next(lengths)
                else:
                    ids += part.text.encode()
        return EncodedChat(tuple(ids), tuple(starts))

    def encode_text(self, text: str) -> list[int]:
        return list(text.encode())

    def token_text(self, token_id: int) -> str:
        return bytes([token_id]).decode("utf-8", "replace") if token_id < 256 else f"<{token_id}>"

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else f"<{token_id}>".encode()

    def is_special(self, token_id: int) -> bool:
        return token_id >= 256

    def detokenizer(self) -> FakeDetokenizer:
        return FakeDetokenizer()


def fake_model(**changes: Any) -> ServedModel:
    config = VlmConfig(
        vision=VisionConfig(8, 16, 2, 2, 8, 4, 1e-5, "quick_gelu"),
        projector=ProjectorConfig(8, 8, "gelu", True),
        decoder=DecoderConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=8,
            intermediate_size=16,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            head_dim=4,
            rope=RopeConfig(10000.0),
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            attention_bias=False,
            mlp_bias=False,
            max_position_embeddings=CONTEXT_LENGTH,
            hidden_act="silu",
        ),
        image_token_id=IMAGE,
        feature_layers=(-2,),
        select_strategy="default",
        dtype="float32",
        eos_token_ids=(EOS,),
        architecture="LlavaForConditionalGeneration",
        is_llava15=True,
    )
    normalization = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 1 / 255)
    fields: dict[str, Any] = {
        "names": (MODEL_NAME, ALIAS),
        "folder": Path("nowhere"),
        "config": config,
        "tokenizer": cast(ChatTokenizer, FakeTokenizer()),
        "preprocess": PreprocessConfig(None, None, (8, 8), 3, None, normalization, IMAGE_TOKENS),
        "generation": GenerationDefaults(0.7, 0.9, 0, 1.0, (EOS,)),
        "created": 1_700_000_000,
        "max_model_len": CONTEXT_LENGTH,
    }
    return ServedModel(**(fields | changes))


@dataclass
class FakePool:
    """Decodes nothing: what ``fake_image`` put behind the header is the picture. ``bad...`` can't be decoded."""

    decoded_total: int = 0
    salts: list[bytes] = field(default_factory=list)

    async def read(self, data: bytes, *, salt: bytes = b"") -> ImageHandle:
        await asyncio.sleep(0)
        self.salts.append(salt)
        header, data = read_header(data), data[FAKE_HEADER_BYTES:]
        if data.startswith(b"bad"):
            raise ImageError("invalid_image", "The image can't be decoded.")
        self.decoded_total += 1
        return ImageHandle(hashlib.sha256(data).digest(), IMAGE_TOKENS, header.pixels, data)

    async def pixels(self, handle: ImageHandle) -> np.ndarray[Any, Any]:
        return np.full((8, 8, 3), handle.data[0], np.uint8)


def fake_image(data: bytes | str = b"a picture") -> dict[str, Any]:
    """An ``image_url`` part that FakePool reads: a GIF's header with ``data`` in place of pixels.

    It is 8 x 8 pixels, or as many as ``data`` says in front: ``600x1000...``.
    """
    data = data.encode() if isinstance(data, str) else data
    width, _, height = data.partition(b" ")[0].partition(b"x")
    size = (int(width), int(height)) if width.isdigit() and height.isdigit() else (8, 8)
    header = b"GIF89a" + struct.pack("<HHBBB", *size, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, *size, 0)
    assert len(header) == FAKE_HEADER_BYTES
    url = f"data:image/png;base64,{base64.b64encode(header + data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


class FakeEngine(EngineClient):
    """Says ``say`` (or what it returns for a request), a byte a step, then ends as a real engine would."""

    restarts = 0

    def __init__(self, say: str | bytes | Callable[[Request], str] = "Hello there.") -> None:
        self.say = say
        self.requests: list[Request] = []
        self.live: set[str] = set()
        self.aborted: list[str] = []
        self.pixels: list[np.ndarray[Any, Any]] = []
        self.wants_pixels = False
        self.step_s = 0.0
        self.pause_after: int | None = None
        """Say this many tokens, then wait for ``go_on``."""
        self.go_on = asyncio.Event()
        self.fail_after: int | None = None
        """Say this many tokens, then end with ``error``."""
        self.error: tuple[str, str | None] = ("server_error", None)
        self.crash: Exception | None = None
        self.cached_tokens = 3
        self.overshoot = 0
        """Tokens sampled between an abort and its arrival."""
        self._ready = True
        self._stats = EngineStats(blocks_total=8)
        self._info: EngineInfo | None = EngineInfo(
            device="cpu (1 threads)",
            dtype="float32",
            parameters=1,
            weight_bytes=4,
            num_blocks=8,
            block_size=64,
            max_model_len=CONTEXT_LENGTH,
            load_seconds=0.1,
        )

    @property
    def ready(self) -> bool:
        return self._ready

    @property
    def info(self) -> EngineInfo | None:
        return self._info

    @property
    def stats(self) -> EngineStats:
        return self._stats

    def become(
        self, *, ready: bool = True, loaded: bool = True, stats: EngineStats | None = None, max_model_len: int = 0
    ) -> None:
        """Change what the engine reports of itself."""
        import msgspec

        self._ready = ready
        self._stats = stats or self._stats
        if max_model_len and self._info:
            self._info = msgspec.structs.replace(self._info, max_model_len=max_model_len)
        if not loaded:
            self._info = None

    async def start(self) -> None: ...
    async def wait_ready(self, timeout_s: float | None = None) -> None: ...
    async def close(self) -> None: ...

    def abort(self, request_id: str) -> None:
        if request_id in self.live:
            self.aborted.append(request_id)

    async def submit(self, request: Request, pixels: PixelSource) -> AsyncGenerator[TokenEvent | FinishEvent, None]:
        if not self._ready:
            raise Unavailable("The engine is restarting. Try again shortly.", code="engine_restarting")
        if self.crash is not None:
            raise self.crash
        self.requests.append(request)
        self.live.add(request.id)
        sampled = 0
        try:
            if self.wants_pixels:
                self.pixels += [await pixels(span.digest) for span in request.prompt.images]
            for token_id in self._tokens(request):
                await self._step(sampled)
                if self.fail_after == sampled:
                    yield self._finish(request, FinishReason.ERROR, sampled)
                    return
                if request.id in self.aborted:
                    yield self._finish(request, FinishReason.ABORTED, sampled + self.overshoot)
                    return
                sampled += 1
                if token_id in request.sampling.stop_token_ids:
                    yield self._finish(request, FinishReason.STOP, sampled)
                    return
                yield self._token(request, token_id)
                if sampled == request.sampling.max_tokens:
                    yield self._finish(request, FinishReason.LENGTH, sampled)
                    return
        finally:
            self.abort(request.id)
            self.live.discard(request.id)

    async def _step(self, sampled: int) -> None:
        if self.pause_after == sampled:
            await self.go_on.wait()
        await asyncio.sleep(self.step_s)

    def _tokens(self, request: Request) -> Sequence[int]:
        said = self.say(request) if callable(self.say) else self.say
        text = said.encode() if isinstance(said, str) else said
        return [*text, EOS] * (1 + request.sampling.max_tokens // (len(text) + 1))

    def _token(self, request: Request, token_id: int) -> TokenEvent:
        if not request.sampling.logprobs:
            return TokenEvent(request.id, token_id)
        top = tuple(TopLogprob((token_id + k) % VOCAB_SIZE, -0.5 - k) for k in range(request.sampling.top_logprobs))
        return TokenEvent(request.id, token_id, -0.5, top)

    def _finish(self, request: Request, reason: FinishReason, sampled: int) -> FinishEvent:
        self.live.discard(request.id)
        prompt = request.prompt
        usage = Usage(len(prompt.token_ids), sampled, self.cached_tokens, prompt.num_image_tokens)
        code, message = self.error if reason is FinishReason.ERROR else (None, None)
        return FinishEvent(request.id, reason, usage, code, message)


def fake_app(
    engine: FakeEngine | None = None,
    *,
    pool: FakePool | None = None,
    model: ServedModel | None = None,
    **settings: Any,
) -> FastAPI:
    """The true app over fakes. Needs no lifespan."""
    return create_app(
        engine or FakeEngine(), model or fake_model(), cast(DecodePool, pool or FakePool()), Settings(**settings)
    )
