"""From settings and a checkpoint folder to an engine that is ready: device, precision, weights.

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
from sightline_models.compiled_decoder import CompiledDecoder, CompileError, compile_decoder, refusal
from sightline_models.config import VlmConfig, read_config
from sightline_models.decoder import kernel_workload
from sightline_models.images import read_preprocess_config
from sightline_models.kv import KvPool
from sightline_models.parameter_count import count_parameters, weight_bytes
from sightline_models.quantization_config import Quantization, choose_quantization
from sightline_models.tokenizer import read_chat_template
from sightline_models.vlm import Vlm
from sightline_models.weights import load_vlm, random_vlm
from sightline_server.engine.blocks import BlockPool
from sightline_server.engine.bounds import images_per_step, mixed_step_tokens, running_requests, step_tokens
from sightline_server.engine.engine import Engine
from sightline_server.engine.gpu_memory import gib
from sightline_server.engine.graphs import CudaRecorder, Recorder
from sightline_server.engine.runner import Runner
from sightline_server.engine.scheduler import Scheduler
from sightline_server.engine.sizing import allocate_cache, count_blocks, fit_to_cache
from sightline_server.engine.threads import ThreadChooser
from sightline_server.engine.types import (
    EngineConfig,
    EngineInfo,
)
from sightline_server.engine.verify import Subject, ask_unquantized, verify
from sightline_server.engine.vision_cache import VisionCache
from sightline_server.scratch import ScratchFolder
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
    limit_memory(settings.gpu_memory, device)
    # Deterministic steps are small, and their arithmetic must not change with what else the machine does.
    threads = settings.threads or (1 if settings.deterministic else len(os.sched_getaffinity(0)))
    if device.type == "cpu":
        torch.set_num_threads(threads)
    config = read_config(folder)
    dtype = choose_dtype(settings.dtype, config, device)
    quantization = choose_quantization(config.quantization, settings.quantize, vision=settings.quantize_vision)
    normalization = read_preprocess_config(folder, config).normalization
    limits = _limits(config, settings, device)

    def make(scheme: Quantization, stage: str) -> Vlm:
        progress(stage, 0.0)
        vision = settings.quantize_vision and scheme != "none"
        kept = choose_quantization(config.quantization, scheme, vision=vision)
        kernels = choose_kernels(settings, config, device, dtype, kept)
        if settings.random:
            return random_vlm(
                config,
                normalization,
                dtype=dtype,
                device=device,
                seed=settings.random_seed,
                quantize=kept,
                quantize_vision=vision,
                kernels=kernels,
            )
        return load_vlm(
            folder,
            config,
            normalization,
            dtype=dtype,
            device=device,
            quantize=scheme,
            quantize_vision=vision,
            kernels=kernels,
            progress=lambda share: progress(stage, share),
        )

    subject = Subject(
        folder=folder,
        config=config,
        chat_template=read_chat_template(settings.chat_template),
        quantization=quantization,
        dtype=dtype,
        device=device,
        limits=limits,
    )
    try:
        original = None
        if settings.verify:
            original = ask_unquantized(subject, lambda: make("none", "loading the unquantized weights"))
        model = make(settings.quantize, "loading weights")
        verification = None
        if settings.verify:
            progress("checking the weights", 0.0)
            verification = verify(subject, model, original)
        progress("sizing the cache", 0.0)
        num_blocks = count_blocks(model, settings, device, dtype, limits)
        engine_config = fit_to_cache(config, settings, limits, num_blocks)
        if settings.compile:
            check_compilable(model, settings, device)
            progress("compiling the decode step", 0.0)
        engine = assemble(model, engine_config, device=device, dtype=dtype, threads=threads, compiles=settings.compile)
    except torch.OutOfMemoryError as error:
        size = gib(_planned_bytes(config, dtype, quantization, settings))
        where = f"--gpu-memory {gib(settings.gpu_memory)}" if settings.gpu_memory else _device_name(device)
        raise SettingsError(
            f"The weights in {_precision(dtype, quantization)} ({size}) and one full step don't fit {where}. "
            "Run 'sightline doctor' with this folder to see what would; --max-step-tokens lowers what a step needs."
        ) from error
    info = EngineInfo(
        device=_device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        quantization=quantization,
        parameters=count_parameters(config).total,
        weight_bytes=model.num_bytes,
        num_blocks=engine_config.num_blocks,
        block_size=engine_config.block_size,
        max_model_len=engine_config.max_model_len,
        load_seconds=time.monotonic() - began,
        verification=verification,
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
    compiles: bool = False,
) -> Engine:
    """An engine around a loaded model, with a cache as ``config`` says; on a CPU, steps use at most ``threads``.

    ``recorder`` makes the recordings that ``config.graphs`` asks for; by default CUDA graphs, and none on a CPU. With
    ``compiles`` the decode step is compiled, which raises SettingsError where it can't be.
    """
    kv = allocate_cache(model, config.num_blocks, config.block_size, device, dtype)
    blocks = BlockPool(config.num_blocks, caching=config.prefix_caching)
    vision: VisionCache[Tensor] = VisionCache(config.encoder_cache_bytes)
    max_images = images_per_step(model.config, config.max_step_tokens)
    scheduler = Scheduler(config, blocks, vision, max_images_per_step=max_images)
    if not config.graphs:
        recorder = None
    elif recorder is None and device.type == "cuda":
        recorder = CudaRecorder()
    runner = Runner(
        model,
        kv,
        vision,
        config,
        device,
        ThreadChooser(threads),
        max_images_per_step=max_images,
        recorder=recorder,
        compiled=_compile(model, kv, config) if compiles else None,
    )
    return Engine(runner, scheduler, blocks, config)


def check_compilable(model: Vlm, settings: Settings, device: torch.device) -> None:
    """Raises SettingsError for a model, or other settings, that ``--compile`` doesn't go with."""
    why = refusal(model.decoder)
    if device.type != "cpu":
        why = f"the engine runs on {device}, which replays CUDA graphs instead"
    elif settings.deterministic:
        why = "a compiled step's arithmetic depends on how many answers run, which --deterministic forbids"
    if why is not None:
        raise SettingsError(f"--compile: this decoder can't be compiled: {why}. Leave out one of the two.")


def _compile(model: Vlm, kv: KvPool, config: EngineConfig) -> CompiledDecoder:
    began = time.monotonic()
    try:
        with ScratchFolder("compiled") as folder:
            compiled = compile_decoder(
                model.decoder, kv, folder, most_rows=config.max_running, most_len=config.max_model_len
            )
    except CompileError as error:
        raise SettingsError(
            f"--compile: the decode step could not be compiled ({error}). It needs a C++ compiler such as g++; without "
            "one, leave --compile out."
        ) from error
    log.info("the decode step was compiled in %.0f s", time.monotonic() - began)
    return compiled


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


def limit_memory(limit: int, device: torch.device) -> None:
    """Hold torch to ``limit`` bytes on ``device``; 0 is no limit. Call before anything is put there."""
    if not limit:
        return
    if device.type != "cuda":
        log.warning("--gpu-memory has no effect without a GPU; --cpu-cache-gb sizes the cache")
        return
    total = torch.cuda.mem_get_info(device)[1]
    if limit > total:
        raise SettingsError(f"--gpu-memory {gib(limit)} is more than the {gib(total)} of {device}: lower it.")
    torch.cuda.set_per_process_memory_fraction(limit / total, device)


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


def _planned_bytes(config: VlmConfig, dtype: torch.dtype, quantization: Quantization, settings: Settings) -> int:
    rest = str(dtype).removeprefix("torch.")
    kept = rest if quantization == "none" else quantization
    return weight_bytes(config, kept, rest, vision=settings.quantize_vision)


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
    on_gpu = device.type == "cuda"
    return EngineConfig(
        num_blocks=1,
        block_size=settings.block_size,
        max_model_len=settings.max_model_len or longest,
        max_step_tokens=step_tokens(settings, on_gpu=on_gpu),
        mixed_step_tokens=mixed_step_tokens(settings, on_gpu=on_gpu),
        max_running=running_requests(settings, on_gpu=on_gpu),
        max_queue=settings.max_queue,
        encoder_cache_bytes=int(settings.encoder_cache_mb * 2**20),
        prefix_caching=settings.prefix_caching,
        deterministic=settings.deterministic,
        overlap=settings.overlap and on_gpu,
        # Rows of a recording share its shape, and so their arithmetic: that isn't what --deterministic promises.
        graphs=settings.cuda_graphs and on_gpu and not settings.deterministic,
    )
