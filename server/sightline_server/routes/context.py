"""What every route works with, gathered once by ``create_app``."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fastapi import Request

from sightline_server.auth.keyring import Keyring
from sightline_server.auth.principal import Principal
from sightline_server.auth.quotas import Quotas
from sightline_server.chat.decode_pool import DecodePool
from sightline_server.chat.model import ServedModel
from sightline_server.engine.client import EngineClient
from sightline_server.errors import Unavailable
from sightline_server.logs import RequestRecord
from sightline_server.metrics import Metrics
from sightline_server.routes.admission import Admission
from sightline_server.settings import Settings

DRAINING_RETRY_S = 5.0


@dataclass(frozen=True)
class Context:
    engine: EngineClient
    model: ServedModel
    images: DecodePool
    settings: Settings
    metrics: Metrics
    admission: Admission
    keyring: Keyring
    quotas: Quotas
    prompt_threads: ThreadPoolExecutor
    """Where long prompts are rendered and tokenized."""

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together; the engine may have room for less than the checkpoint allows."""
        info = self.engine.info
        return min(self.model.max_model_len, info.max_model_len) if info else self.model.max_model_len

    @property
    def system_fingerprint(self) -> str:
        """Changes with whatever may change the answer to a seeded request."""
        info = self.engine.info
        parts = (self.model.name, str(self.model.created), info.dtype if info else "", info.device if info else "")
        return "fp_" + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:10]


def context_of(request: Request) -> Context:
    context = request.app.state.context
    assert isinstance(context, Context), f"app.state.context is {context!r}"
    return context


def record_of(request: Request) -> RequestRecord:
    record = request.state.record
    assert isinstance(record, RequestRecord), f"state.record is {record!r}"
    return record


def principal_of(request: Request) -> Principal:
    principal = request.state.principal
    assert isinstance(principal, Principal), f"state.principal is {principal!r}"
    return principal


async def refuse_when_draining(request: Request) -> None:
    """For every route of the API: raises Unavailable while the server is finishing its last requests."""
    if request.app.state.draining:
        raise Unavailable(
            "The server is shutting down and takes no new requests. Try again shortly.",
            code="server_is_draining",
            retry_after_s=DRAINING_RETRY_S,
        )
