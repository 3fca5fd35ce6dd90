"""The engine's nouns: what comes in, what is decided, what goes out.

Knows token ids, digests and numbers. Knows no tensor, no text, no HTTP. Everything here that crosses the process
boundary is a frozen msgspec struct; ``Sequence`` alone is mutable and never leaves the engine loop.
"""

import enum
import sys
from dataclasses import dataclass, field
from typing import Literal

import msgspec


class ImageSpan(msgspec.Struct, frozen=True):
    """One image's placeholder tokens in a prompt: ``length`` tokens from ``start``."""

    start: int
    length: int
    digest: bytes
    """Identity of the prepared pixels (see ``PreparedImage.digest``)."""


class Prompt(msgspec.Struct, frozen=True):
    token_ids: tuple[int, ...]
    images: tuple[ImageSpan, ...] = ()

    @property
    def num_image_tokens(self) -> int:
        return sum(span.length for span in self.images)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are chosen. Every field has a definite value: defaults were resolved before the engine."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means no limit."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    """Unsigned 64-bit; always given, drawn by the caller when the user gave none."""
    choice: int = 0
    """Index among the ``n`` choices of one HTTP request; part of the random counter."""
    stop_token_ids: tuple[int, ...] = ()
    """End the request without being shown; the checkpoint's eos ids are among them unless ``ignore_eos``."""
    logprobs: bool = False
    top_logprobs: int = 0


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """Accepted work."""

    id: str
    prompt: Prompt
    sampling: SamplingParams
    priority: int = 0
    """0 interactive, 1 batch: a lower class is served first."""
    tenant: str = ""
    """Whose request it is: within a class tenants take turns, and one tenant's requests are served as they came."""
    cache_salt: bytes = b""
    """Tenants with different salts never share cached blocks or encoder outputs."""
    arrived: float = 0.0
    """Unix seconds; for metrics only, never for order."""


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"
    ERROR = "error"


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Sampled tokens, a hidden stop token included."""
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were found in the cache when the request was first scheduled."""
    image_tokens: int = 0

    @property
    def total(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    token_id: int
    logprob: float


class TokenEvent(msgspec.Struct, frozen=True, tag="token"):
    """One sampled, visible token."""

    request_id: str
    token_id: int
    logprob: float | None = None
    """Natural log of the token's probability under the model's unmodified distribution (temperature 1, no
    penalties), present when asked for."""
    top_logprobs: tuple[TopLogprob, ...] = ()


class FinishEvent(msgspec.Struct, frozen=True, tag="finish"):
    """Exactly one for each Request, and the last event it gets."""

    request_id: str
    reason: FinishReason
    usage: Usage
    error_code: str | None = None
    """With reason ERROR: a code from ``errors.py`` such as ``engine_oom`` or ``engine_restarting``."""
    error_message: str | None = None


class PixelsWanted(msgspec.Struct, frozen=True, tag="pixels"):
    """The encoder cache lacks this image: answer with ``provide(request_id, digest, pixels)``."""

    request_id: str
    digest: bytes


Event = TokenEvent | FinishEvent | PixelsWanted


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges are current; ``*_total`` only ever grow while the engine process lives. Those of several add up."""

    running: int = 0
    """Requests that have begun, also while they are put back."""
    waiting: int = 0
    """Requests that have had no turn yet."""
    blocks_used: int = 0
    blocks_total: int = 0
    prompt_tokens_total: int = 0
    image_tokens_total: int = 0
    generated_tokens_total: int = 0
    prefix_queries_total: int = 0
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits_total: int = 0
    encoder_queries_total: int = 0
    """Images looked up in the encoder cache."""
    encoder_hits_total: int = 0
    images_encoded_total: int = 0
    preemptions_total: int = 0
    steps_total: int = 0
    graph_steps_total: int = 0
    """Steps of decodes that were replayed from a graph."""

    def __add__(self, other: "EngineStats") -> "EngineStats":
        return EngineStats(**{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__})

    @property
    def totals(self) -> "EngineStats":
        """What is left when the engine is gone: no gauge."""
        return msgspec.structs.replace(self, running=0, waiting=0, blocks_used=0, blocks_total=0)


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """What one way of keeping the weights costs. Speeds are medians of single requests, in this process alone."""

    weight_bytes: int
    prompt_tokens_per_s: float
    """Pictures' tokens among them, and the time to encode these."""
    decode_tokens_per_s: float


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--verify`` found: how far quantized weights answer from the unquantized ones they were made of."""

    outcome: Literal["compared", "nothing_to_compare", "failed"]
    message: str
    """One sentence for people: the figures below, or why there are none."""
    quantization: str
    """The scheme that was looked at, as in ``EngineInfo``."""
    num_answers: int = 0
    num_positions: int = 0
    """Tokens of the unquantized model's greedy answers; at each of them the two distributions were compared."""
    mean_kl: float | None = None
    """Kullback-Leibler divergence of the quantized distribution from the unquantized, nats a position."""
    worst_kl: float | None = None
    top1_agreement: float | None = None
    """Share of positions at which both find the same token the likeliest."""
    served: Pace | None = None
    unquantized: Pace | None = None


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What was loaded and what it leaves room for; told once, when the engine is ready."""

    device: str
    """Such as ``cuda:0 (NVIDIA H200)`` or ``cpu (2 threads)``."""
    dtype: str
    quantization: str = "none"
    """How the linear layers' weights are kept: none, int8 or nf4. ``dtype`` is that of everything else."""
    parameters: int
    weight_bytes: int
    num_blocks: int
    block_size: int
    max_model_len: int
    load_seconds: float
    verification: Verification | None = None
    """With ``--verify``: what came of it."""

    @property
    def kv_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The bounds an engine runs within; every field resolved, no "auto" left."""

    num_blocks: int
    block_size: int
    max_model_len: int
    max_step_tokens: int
    mixed_step_tokens: int = sys.maxsize
    """Most prompt tokens in a step that continues answers too: those wait for the whole step."""
    max_running: int
    max_queue: int
    encoder_cache_bytes: int
    prefix_caching: bool = True
    deterministic: bool = False
    overlap: bool = False
    """Plan and launch a step before the tokens of the one before are known: its events come one step late."""
    graphs: bool = False
    """Record decode steps and image encoding once, and replay them; only on a GPU."""


class SequenceStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True)
class Sequence:
    """One request while it lives: the only mutable noun, owned by the engine loop."""

    request: Request
    token_ids: list[int]
    """Prompt and sampled tokens, as far as they are known."""
    limit: int = sys.maxsize
    """Tokens, prompt and answer, at which it has to end."""
    order: int = 0
    """Place in the order of arrival; survives preemption."""
    status: SequenceStatus = SequenceStatus.WAITING
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained hashes of the leading full blocks of ``token_ids``, computed or not."""
    num_cached_tokens: int = 0
    """Tokens whose keys and values are in ``blocks``, once all that was launched is done."""
    num_published: int = 0
    """Leading blocks that the books have been told the content of."""
    num_pending: int = 0
    """Tokens that launched steps draw and that aren't known yet."""
    row: int = -1
    """Where the device keeps the token drawn last; -1 while the sequence isn't running."""
    num_hit_tokens: int = -1
    """Prefix-cache hits when first scheduled; -1 before that."""
    pinned: set[bytes] = field(default_factory=set)
    """Keys of images whose encoder outputs this sequence still needs."""
    num_restarts: int = 0
    """How often it was put back after a failure: what was launched for it before that draws nothing for it."""

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt.token_ids)

    @property
    def length(self) -> int:
        """Tokens, those included that are drawn and not known yet."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_generated(self) -> int:
        """Tokens of the answer that are known."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_drawn(self) -> int:
        """Tokens of the answer, known or not: the position of the next one."""
        return self.length - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        return self.length - self.num_cached_tokens

    @property
    def is_drawn_out(self) -> bool:
        """Whether its last token is drawn already: it only waits to be known."""
        return self.length >= self.limit

    @property
    def draws_by_history(self) -> bool:
        """Whether a token can only be drawn when all before it are known."""
        params = self.request.sampling
        return bool(params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty)

    def image_key(self, span: ImageSpan) -> bytes:
        """What the encoder cache knows the image by: tenants with different salts share nothing."""
        return self.request.cache_salt + span.digest


@dataclass(frozen=True, slots=True)
class Slice:
    """The tokens ``[start, start + length)`` of one sequence, computed in this step."""

    sequence: Sequence
    start: int
    length: int
    samples: bool = False
    """Whether this slice reaches the sequence's last token, so that a new one is sampled."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step's decision. Decodes (slices of one token) stand first."""

    slices: tuple[Slice, ...] = ()
    encode: tuple[bytes, ...] = ()
    """Cache keys of the images to encode before the decoder runs."""
    wanted: tuple[tuple[Sequence, ImageSpan], ...] = ()
    """Images that hold a sequence up because their pixels have not been provided."""
    preempted: tuple[Sequence, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(piece.length for piece in self.slices)
