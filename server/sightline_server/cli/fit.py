"""What fits in a device's memory: weights at a precision, what a step needs beside them, and how much cache is left.

Pure arithmetic over shapes and sizes, which the engine does by measuring; figures for a GPU are therefore estimates.
"""

from dataclasses import dataclass

from sightline_models.config import VlmConfig
from sightline_models.parameter_count import QUANTIZED_BITS, count_parameters, kv_bytes_per_token, weight_bytes
from sightline_server.settings import Settings

PROCESSES_BYTES = 900 * 2**20
"""Resident memory of the API, two decode workers and an engine with torch loaded, before any weights."""

_STEP_SLACK = 1.5
"""Over the tensors counted below: allocator rounding, workspaces of matrix products."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Where weights and cache would live. Bytes."""

    is_gpu: bool
    total: int
    free: int


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One model at one precision on this machine."""

    model: str
    precision: str
    """Of the decoder's linear layers: a floating-point type, or a scheme of quantization."""
    rest: str
    """Of all other weights, of what is computed and of the cache."""
    weight_bytes: int
    kv_bytes_per_token: int
    needed_bytes: int
    """Free memory it takes: on a CPU with the whole cache, on a GPU with a cache for one longest request."""
    cache_tokens: int
    """Tokens that all requests together can keep; 0 when it doesn't fit."""
    max_context: int
    """Longest prompt and answer of one request; 0 when it doesn't fit."""
    fits: bool


def plan(
    model: str, config: VlmConfig, precision: str, memory: Memory, settings: Settings, *, rest: str = "bfloat16"
) -> Fit:
    """How ``model`` would lie in ``memory`` under ``settings``; ``rest`` counts where ``precision`` is quantized."""
    rest = rest if precision in QUANTIZED_BITS else precision
    weights = weight_bytes(
        count_parameters(config),
        precision,
        rest,
        vision=settings.quantize_vision,
        compressed_scales=config.compressed_scales,
    )
    a_token = kv_bytes_per_token(config.decoder, rest)
    step = _step_bytes(config, precision, rest, memory, settings)
    longest = settings.max_model_len or config.decoder.max_position_embeddings
    if memory.is_gpu:
        beside = weights + step + int(settings.encoder_cache_mb * 2**20)
        others = memory.total - memory.free
        cache = int(memory.total * settings.gpu_memory_utilization) - others - beside
        needed = beside + longest * a_token
        fits = True
    else:
        cache = int(settings.cpu_cache_gb * 2**30)
        needed = weights + step + cache + PROCESSES_BYTES
        fits = needed <= memory.free
    # One block is the engine's own, for rows that pad a step.
    blocks = cache // (settings.block_size * a_token) - 1
    tokens = blocks * settings.block_size
    fits = fits and tokens >= max(config.num_image_tokens + settings.block_size, settings.max_model_len)
    tokens = tokens if fits else 0
    return Fit(
        model=model,
        precision=precision,
        rest=rest,
        weight_bytes=weights,
        kv_bytes_per_token=a_token,
        needed_bytes=needed,
        cache_tokens=tokens,
        max_context=min(longest, tokens),
        fits=fits,
    )


def precisions(memory: Memory, *, gpu_bfloat16: bool) -> tuple[str, ...]:
    """Precisions worth a line for a device, the best first."""
    half = "bfloat16" if gpu_bfloat16 or not memory.is_gpu else "float16"
    return ("float32", half, *QUANTIZED_BITS)


def _step_bytes(config: VlmConfig, precision: str, rest: str, memory: Memory, settings: Settings) -> int:
    """The largest step's tensors: the feed-forward of every token, logits and their sort, one batch of pictures.

    A quantized matrix is made whole before it is multiplied.
    """
    item = 4 if rest == "float32" else 2
    decoder, tower = config.decoder, config.vision
    tokens = settings.max_step_tokens or (2048 if memory.is_gpu else 512)
    hidden = tokens * (3 * decoder.intermediate_size + 8 * decoder.hidden_size) * item
    # float32 values, sorted values, and 64-bit places.
    logits = min(settings.max_running, tokens) * decoder.vocab_size * 16
    images = tokens // config.num_image_tokens + 2
    pictures = images * (tower.num_patches + 1) * (tower.intermediate_size + 6 * tower.hidden_size) * item
    whole = 2 * decoder.intermediate_size * decoder.hidden_size * item if precision in QUANTIZED_BITS else 0
    return int(_STEP_SLACK * (max(hidden, pictures) + logits)) + whole
