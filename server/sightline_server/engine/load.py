"""From settings and a checkpoint folder to an engine that is ready: device, precision, weights, cache size.

The only place where "auto" is resolved. Knows nothing of processes or HTTP.
"""

import logging
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sightline_kernels.dispatch import FusedRefusedError, Kernels, choose, explain
from sightline_models.config import VlmConfig, read_config
from sightline_models.decoder import kernel_workload
from sightline_models.images import read_preprocess_config
from sightline_models.kv import KvPool
from sightline_models.parameter_count import count_parameters
from sightline_models.quantization_config import Quantization, choose_quantization
from sightline_models.vlm import Vlm
from sightline_models.weights import load_vlm, random_vlm
from sightline_server.engine.batch import build_batch
from sightline_server.engine.blocks import BlockPool
from sightline_server.engine.engine import Engine
from sightline_server.engine.graphs import CudaRecorder, Recorder, bytes_of_recordings
from sightline_server.engine.runner import Runner
from sightline_server.engine.sampler import choose_tokens
from sightline_server.engine.scheduler import Scheduler
from sightline_server.engine.threads import ThreadChooser
from sightline_server.engine.types import (
    EngineConfig,
    EngineInfo,
    Prompt,
    Request,
    SamplingParams,
    Sequence,
    Slice,
)
from sightline_server.engine.vision_cache import VisionCache
from sightline_server.settings import Settings, SettingsError

log = logging.getLogger(__name__)

Progress = Callable[[str, float], None]
"""Called with what is being done and how far it is, 0 to 1."""


def load_engine(folder: Path, settings: Settings, progress: Progress) -> tuple[Engine, EngineInfo]:
    """Load the checkpoint in ``folder`` (or random weights of its shape) and size the cache.

    Raises CheckpointError for a folder that can't be loaded, SettingsError for settings that don't fit it or the
    machine.
    """
    began = time.monotonic()
    device = choose_device(settings.device)
    use_device(device)
    # Deterministic steps are small, and their arithmetic must not change with what else the machine does.
    threads = settings.threads or (1 if settings.deterministic else len(os.sched_getaffinity(0)))
    if device.type == "cpu":
        torch.set_num_threads(threads)
    config = read_config(folder)
    dtype = choose_dtype(settings.dtype, config, device)
    quantization = choose_quantization(config.quantization, settings.quantize, vision=settings.quantize_vision)
    normalization = read_preprocess_config(folder, config).normalization
    limits = _limits(config, settings, device)
    kernels = choose_kernels(settings, config, device, dtype, quantization)
    try:
        progress("loading weights", 0.0)
        if settings.random:
            model = random_vlm(
                config,
                normalization,
                dtype=dtype,
                device=device,
                seed=settings.random_seed,
                quantize=quantization,
                quantize_vision=settings.quantize_vision,
                kernels=kernels,
            )
        else:
            model = load_vlm(
                folder,
                config,
                normalization,
                dtype=dtype,
                device=device,
                quantize=settings.quantize,
                quantize_vision=settings.quantize_vision,
                kernels=kernels,
                progress=lambda share: progress("loading weights", share),
            )
        progress("sizing the cache", 0.0)
        num_blocks = count_blocks(model, settings, device, dtype, limits)
        engine_config = _fit_to_cache(config, settings, limits, num_blocks)
        engine = assemble(model, engine_config, device=device, dtype=dtype, threads=threads)
    except torch.OutOfMemoryError as error:
        raise SettingsError(
            f"The weights in {_precision(dtype, quantization)} and one full step don't fit {_device_name(device)}. "
            "Run 'sightline doctor' with this folder to see what would; --max-step-tokens lowers what a step needs."
        ) from error
    weights = [*model.parameters(), *model.buffers()]
    info = EngineInfo(
        device=_device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        quantization=quantization,
        parameters=count_parameters(config).total,
        weight_bytes=sum(tensor.nbytes for tensor in weights),
        num_blocks=engine_config.num_blocks,
        block_size=engine_config.block_size,
        max_model_len=engine_config.max_model_len,
        load_seconds=time.monotonic() - began,
    )
    log.info(
        "%s on %s in %s: cache of %d tokens in %d blocks, context %d",
        config.architecture,
        info.device,
        _precision(dtype, quantization),
        info.kv_tokens,
        info.num_blocks,
        info.max_model_len,
    )
    return engine, info


def assemble(
    model: Vlm,
    config: EngineConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    threads: int = 1,
    recorder: Recorder | None = None,
) -> Engine:
    """An engine around a loaded model, with a cache as ``config`` says; on a CPU, steps use at most ``threads``.

    ``recorder`` makes the recordings that ``config.graphs`` asks for; by default CUDA graphs, and none on a CPU.
    """
    kv = _allocate_cache(model.config, config.num_blocks, config.block_size, device, dtype)
    blocks = BlockPool(config.num_blocks, caching=config.prefix_caching)
    vision: VisionCache[Tensor] = VisionCache(config.encoder_cache_bytes)
    max_images = max_images_per_step(model.config, config.max_step_tokens)
    scheduler = Scheduler(config, blocks, vision, max_images_per_step=max_images)
    if recorder is None and device.type == "cuda":
        recorder = CudaRecorder()
    runner = Runner(
        model,
        kv,
        vision,
        config,
        device,
        ThreadChooser(threads),
        max_images_per_step=max_images,
        recorder=recorder if config.graphs else None,
    )
    return Engine(runner, scheduler, blocks, config)


def max_images_per_step(config: VlmConfig, max_step_tokens: int) -> int:
    """As many images as a step's tokens could hold, and two for a prompt that begins and one that ends in it."""
    return max_step_tokens // config.num_image_tokens + 2


def choose_device(name: str) -> torch.device:
    """The device ``name`` stands for; auto takes the first GPU, else the CPU."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SettingsError(
                f"--device {name}: torch sees no CUDA GPU. Run 'sightline doctor', or use --device cpu."
            )
        device = torch.device("cuda", device.index or 0)
        if device.index >= torch.cuda.device_count():
            raise SettingsError(f"--device {name}: this machine has {torch.cuda.device_count()} GPU(s).")
    return device


def use_device(device: torch.device) -> None:
    """Make a GPU this process's current one, and keep attention there away from cuDNN.

    Torch prefers cuDNN on some GPUs. It sets out anew, for about 30 ms, for every number of keys it hasn't seen, and a
    decode step has one more than the step before.
    """
    if device.type != "cuda":
        return
    if device.index is not None:
        # Pinned memory and kernels of our own go by the current device, not by a tensor's.
        torch.cuda.set_device(device)
    torch.backends.cuda.enable_cudnn_sdp(False)


def choose_dtype(name: str, config: VlmConfig, device: torch.device) -> torch.dtype:
    """The precision ``name`` stands for.

    auto is the checkpoint's own on a GPU. On a CPU it is float32, the fastest there that loses nothing: it holds
    bfloat16 and float16 weights exactly, so that logits stay within rounding of the reference's.
    """
    if name == "auto":
        name = config.dtype if device.type == "cuda" else "float32"
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), f"{name} is no dtype"
    if (
        device.type == "cuda"
        and dtype is torch.bfloat16
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        log.warning("this GPU has no bfloat16 arithmetic: using float16")
        return torch.float16
    return dtype


def choose_kernels(
    settings: Settings, config: VlmConfig, device: torch.device, dtype: torch.dtype, quantization: Quantization
) -> Kernels:
    """What ``--kernels`` stands for here; why, operation by operation, goes to the log."""
    workload = kernel_workload(
        config.decoder, dtype=dtype, device=device, row_invariant=settings.deterministic, quantization=quantization
    )
    try:
        for choice in explain(settings.kernels, workload):
            log.debug("%s: %s (%s)", choice.operation, "fused" if choice.fused else "reference", choice.reason)
        return choose(settings.kernels, workload)
    except FusedRefusedError as error:
        raise SettingsError(f"--kernels fused: {error}. Use --kernels auto.") from error


def _precision(dtype: torch.dtype, quantization: Quantization) -> str:
    name = str(dtype).removeprefix("torch.")
    return name if quantization == "none" else f"{quantization} and {name}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def _limits(config: VlmConfig, settings: Settings, device: torch.device) -> EngineConfig:
    """All bounds but the cache's, which is sized by running within them."""
    longest = config.decoder.max_position_embeddings
    if settings.max_model_len > longest:
        raise SettingsError(
            f"--max-model-len {settings.max_model_len} is more than the {longest} positions this checkpoint knows."
        )
    max_step_tokens = settings.max_step_tokens or (2048 if device.type == "cuda" else 512)
    return EngineConfig(
        num_blocks=1,
        block_size=settings.block_size,
        max_model_len=settings.max_model_len or longest,
        max_step_tokens=max_step_tokens,
        max_mixed_tokens=settings.mixed_step_tokens or (512 if device.type == "cuda" else max_step_tokens),
        # Every running request gets a token a step.
        max_running=min(settings.max_running, max_step_tokens),
        max_queue=settings.max_queue,
        encoder_cache_bytes=int(settings.encoder_cache_mb * 2**20),
        prefix_caching=settings.prefix_caching,
        deterministic=settings.deterministic,
        overlap=settings.overlap and device.type == "cuda",
        # Rows of a recording share its shape, and so their arithmetic: that isn't what --deterministic promises.
        graphs=settings.cuda_graphs and device.type == "cuda" and not settings.deterministic,
    )


def count_blocks(model: Vlm, settings: Settings, device: torch.device, dtype: torch.dtype, limits: EngineConfig) -> int:
    """Blocks the cache may have, its scratch block not counted."""
    a_block = KvPool.bytes_per_block(model.config.decoder, block_size=limits.block_size, dtype=dtype)
    if device.type == "cpu":
        return int(settings.cpu_cache_gb * 2**30) // a_block - 1
    needed_by_steps = _measure_largest_step(model, limits, device, dtype)
    if limits.graphs:
        # Recordings keep memory of their own, and hold no more than a step does.
        needed_by_steps += needed_by_steps + bytes_of_recordings(model.config, limits)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    # What others hold, and what torch holds outside tensors, counts against our share too.
    left = int(total * settings.gpu_memory_utilization) - (total - free)
    return (left - needed_by_steps - limits.encoder_cache_bytes) // a_block - 1


def _measure_largest_step(model: Vlm, limits: EngineConfig, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes that the largest step needs beside weights and cache."""
    length = min(limits.max_step_tokens, limits.max_model_len)
    kv = _allocate_cache(model.config, -(-length // limits.block_size), limits.block_size, device, dtype)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run_largest_step(model, kv, limits, device)
    return torch.cuda.max_memory_allocated(device) - before


def run_largest_step(model: Vlm, kv: KvPool, limits: EngineConfig, device: torch.device) -> None:
    """What needs most memory: the largest image batch, a full token budget, every row drawn or decoding at its end.

    ``kv`` holds a full token budget and a scratch block.
    """
    length = min(limits.max_step_tokens, limits.max_model_len)
    num_blocks = -(-length // limits.block_size)
    size = model.config.vision.image_size
    num_images = 1 if limits.deterministic else max_images_per_step(model.config, limits.max_step_tokens)
    # Bias copies the logits, a filter sorts them, and log-probabilities are as many again.
    sampling = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.5, logit_bias={0: 0.0}, logprobs=True)
    request = Request(id="largest", prompt=Prompt((0,) * length), sampling=sampling)
    sequence = Sequence(request, list(request.prompt.token_ids), blocks=list(range(num_blocks)))
    with torch.inference_mode():
        model.encode_images(torch.zeros(num_images, size, size, 3, dtype=torch.uint8, device=device))
        batch = build_batch(
            [Slice(sequence, 0, length)], block_size=limits.block_size, scratch_block=num_blocks, device=device
        )
        hidden_TD = model(model.embed(batch.token_ids_T), batch.positions_T, kv, batch.layout)
        logits_SV = model.logits(hidden_TD[: limits.max_running])
        choose_tokens(logits_SV, [sequence] * len(logits_SV))
        del batch, hidden_TD, logits_SV
        # Longer than ``kv``: it reads the same blocks again and again.
        blocks = [index % num_blocks for index in range(-(-limits.max_model_len // limits.block_size))]
        longest = Sequence(request, [0] * limits.max_model_len, blocks=blocks)
        batch = build_batch(
            [Slice(longest, limits.max_model_len - 1, 1)] * limits.max_running,
            block_size=limits.block_size,
            scratch_block=num_blocks,
            device=device,
        )
        model(model.embed(batch.token_ids_T), batch.positions_T, kv, batch.layout)


def _fit_to_cache(config: VlmConfig, settings: Settings, limits: EngineConfig, num_blocks: int) -> EngineConfig:
    tokens = max(0, num_blocks) * limits.block_size
    least = config.num_image_tokens + limits.block_size
    if tokens < least or tokens < settings.max_model_len:
        wanted = max(least, settings.max_model_len)
        raise SettingsError(
            f"The memory set aside leaves a cache of {tokens} tokens and {wanted} are needed. "
            "Raise --cpu-cache-gb (CPU) or --gpu-memory-utilization (GPU), or lower --max-model-len."
        )
    values = {name: getattr(limits, name) for name in limits.__dataclass_fields__}
    values.update(num_blocks=num_blocks, max_model_len=min(limits.max_model_len, tokens))
    return EngineConfig(**values)


def _allocate_cache(
    config: VlmConfig, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
) -> KvPool:
    # One block more than the books know: scratch for padding rows.
    count = num_blocks + 1
    try:
        return KvPool.allocate(config.decoder, num_blocks=count, block_size=block_size, dtype=dtype, device=device)
    except RuntimeError as error:
        if device.type != "cpu":
            raise
        size = count * KvPool.bytes_per_block(config.decoder, block_size=block_size, dtype=dtype) / 2**30
        raise SettingsError(
            f"This machine can't give {size:.1f} GiB to the key/value cache. Lower --cpu-cache-gb."
        ) from error
