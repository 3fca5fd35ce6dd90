"""What fits in a device's memory: weights at a precision, what a step needs beside them, and how much cache is left.

Pure arithmetic over shapes and sizes, which the engine does by measuring; figures for a GPU are therefore estimates.
"""

from dataclasses import dataclass

from sightline_models.config import VlmConfig
from sightline_models.parameter_count import QUANTIZED_BITS, kv_bytes_per_token, weight_bytes
from sightline_server.engine.bounds import images_per_step, running_requests, step_tokens
from sightline_server.engine.gpu_memory import Needs, bytes_of_recordings, room_for_cache
from sightline_server.engine.placement import count_engines
from sightline_server.settings import Settings

PROCESSES_BYTES = 900 * 2**20
"""Resident memory of the API, two decode workers and an engine with torch loaded, before any weights."""

ENGINE_BYTES = 500 * 2**20
"""Of that, the engine's: so much more for each further one."""

CONTEXT_BYTES = 2**29
"""What driver and libraries take of a GPU for a process, before any weights. A guess."""

TEXT_TOKENS = 128
"""Of the request that is counted in: a picture, and so many tokens of question and answer together."""

GATHERED_BYTES = 2**29
"""What plain torch copies of the cache for decodes on a GPU, at most: paged_attention/reference.py bounds it."""

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
    """Free memory it takes: on a CPU for all engines with their cache, on a GPU for one with a cache for one longest
    request."""
    kv_bytes: int
    """The whole cache, of all engines, a block of each for rows that pad a step among it; 0 when it doesn't fit."""
    cache_tokens: int
    """Tokens that all requests together can keep; 0 when it doesn't fit."""
    max_context: int
    """Longest prompt and answer of one request; 0 when it doesn't fit."""
    requests: int
    """How many of one picture and ``TEXT_TOKENS`` are computed at once, no prompt being shared."""
    fits: bool


def plan(
    model: str, config: VlmConfig, precision: str, memory: Memory, settings: Settings, *, rest: str = "bfloat16"
) -> Fit:
    """How ``model`` would lie in ``memory`` under ``settings``; ``rest`` counts where ``precision`` is quantized.

    Several engines divide a CPU's memory; of GPUs each has one, taken to be as large as ``memory``.
    """
    engines = count_engines(settings)
    rest = rest if precision in QUANTIZED_BITS else precision
    weights = weight_bytes(config, precision, rest, on_cpu=not memory.is_gpu, vision=settings.quantize_vision)
    a_token = kv_bytes_per_token(config.decoder, rest)
    a_block = settings.block_size * a_token
    step = _step_bytes(config, precision, rest, memory, settings)
    longest = settings.max_model_len or config.decoder.max_position_embeddings
    least = max(config.num_image_tokens + settings.block_size, settings.max_model_len)
    if memory.is_gpu:
        recordings = 0
        if settings.cuda_graphs and not settings.deterministic:
            recordings = bytes_of_recordings(
                config,
                max_running=running_requests(settings, on_gpu=memory.is_gpu),
                max_images=images_per_step(config, step_tokens(settings, on_gpu=memory.is_gpu)),
                decodes=settings.kernels != "reference",
            )
        needs = Needs(
            weights=weights,
            step=step + recordings,
            encoder_cache=int(settings.encoder_cache_mb * 2**20),
            smallest_cache=least * a_token,
        )
        needed = needs.beside_cache + longest * a_token
        if settings.gpu_memory:
            cache = room_for_cache(settings.gpu_memory, memory.free - weights, needs)
        else:
            others = memory.total - memory.free
            cache = int(memory.total * settings.gpu_memory_utilization) - others - needs.beside_cache
        fits = True
    else:
        cache = int(settings.cpu_cache_gb / engines * 2**30)
        needed = engines * (weights + step + cache) + PROCESSES_BYTES + (engines - 1) * ENGINE_BYTES
        fits = needed <= memory.free
    # One block is the engine's own, for rows that pad a step.
    blocks = cache // a_block - 1
    fits = fits and blocks * settings.block_size >= least
    blocks = blocks if fits else 0
    tokens = blocks * settings.block_size
    a_request = -(-(config.num_image_tokens + TEXT_TOKENS) // settings.block_size)
    return Fit(
        model=model,
        precision=precision,
        rest=rest,
        weight_bytes=weights,
        kv_bytes_per_token=a_token,
        needed_bytes=needed,
        kv_bytes=engines * (blocks + 1) * a_block if fits else 0,
        cache_tokens=engines * tokens,
        max_context=min(longest, tokens),
        requests=engines * min(blocks // a_request, running_requests(settings, on_gpu=memory.is_gpu)),
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
    tokens = step_tokens(settings, on_gpu=memory.is_gpu)
    hidden = tokens * (3 * decoder.intermediate_size + 8 * decoder.hidden_size) * item
    # float32 values, sorted values, and 64-bit places.
    logits = running_requests(settings, on_gpu=memory.is_gpu) * decoder.vocab_size * 16
    images = images_per_step(config, tokens)
    pictures = images * (tower.num_patches + 1) * (tower.intermediate_size + 6 * tower.hidden_size) * item
    kept = images * config.num_image_tokens * decoder.hidden_size * item
    whole = 2 * decoder.intermediate_size * decoder.hidden_size * item if precision in QUANTIZED_BITS else 0
    gathered = 0
    if memory.is_gpu and settings.kernels == "reference":
        longest = settings.max_model_len or decoder.max_position_embeddings
        a_layer = kv_bytes_per_token(decoder, rest) // decoder.num_layers
        gathered = min(GATHERED_BYTES, running_requests(settings, on_gpu=memory.is_gpu) * longest * a_layer)
    return int(_STEP_SLACK * (max(hidden + kept, pictures) + logits)) + whole + gathered
