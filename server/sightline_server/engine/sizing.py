"""How large the cache may be: what weights, the largest step and recordings leave of the memory set aside.

Knows models and bounds, and runs the largest step there is. Knows nothing of where a checkpoint comes from.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sightline_models.config import VlmConfig
from sightline_models.kv import KvPool
from sightline_models.vlm import Vlm
from sightline_server.engine.batch import build_batch
from sightline_server.engine.bounds import images_per_step
from sightline_server.engine.gpu_memory import Needs, bytes_of_recordings, room_for_cache, why_too_little
from sightline_server.engine.sampler import choose_tokens
from sightline_server.engine.types import EngineConfig, Prompt, Request, SamplingParams, Sequence, Slice
from sightline_server.settings import Settings, SettingsError


def count_blocks(model: Vlm, settings: Settings, device: torch.device, dtype: torch.dtype, limits: EngineConfig) -> int:
    """Blocks the cache may have, its scratch block not counted."""
    a_block = KvPool.bytes_per_block(model.config.decoder, block_size=limits.block_size, dtype=dtype)
    if device.type == "cpu":
        return int(settings.cpu_cache_gb * 2**30) // a_block - 1
    step = _measure_largest_step(model, limits, device, dtype)
    recordings = 0
    if limits.graphs:
        recordings = bytes_of_recordings(
            model.config,
            max_running=limits.max_running,
            max_images=images_per_step(model.config, limits.max_step_tokens),
            decodes=model.decoder.kernels.can_be_recorded,
        )
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    if settings.gpu_memory:
        least = max(model.config.num_image_tokens + limits.block_size, settings.max_model_len)
        needs = Needs(
            weights=torch.cuda.memory_reserved(device),
            # What torch held, not only what was used: holding on to less, it would free and ask anew in each step.
            step=max(step.allocated, step.reserved) + recordings,
            encoder_cache=limits.encoder_cache_bytes,
            smallest_cache=(-(-least // limits.block_size) + 1) * a_block,
        )
        if refusal := why_too_little(settings.gpu_memory, free, needs):
            raise SettingsError(refusal)
        return room_for_cache(settings.gpu_memory, free, needs) // a_block - 1
    # What others hold, and what torch holds outside tensors, counts against our share too.
    left = int(total * settings.gpu_memory_utilization) - (total - free)
    return (left - step.allocated - recordings - limits.encoder_cache_bytes) // a_block - 1


@dataclass(frozen=True)
class StepMemory:
    """Bytes that the largest step needs beside weights and cache."""

    allocated: int
    reserved: int
    """With what torch's allocator took for it and kept."""


def _measure_largest_step(model: Vlm, limits: EngineConfig, device: torch.device, dtype: torch.dtype) -> StepMemory:
    length = min(limits.max_step_tokens, limits.max_model_len)
    kv = allocate_cache(model, -(-length // limits.block_size), limits.block_size, device, dtype)
    torch.cuda.empty_cache()
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    run_largest_step(model, kv, limits, device)
    return StepMemory(
        torch.cuda.max_memory_allocated(device) - allocated, torch.cuda.max_memory_reserved(device) - reserved
    )


def run_largest_step(model: Vlm, kv: KvPool, limits: EngineConfig, device: torch.device) -> None:
    """Run what no step needs more memory than. ``kv`` holds any number of blocks and a scratch block.

    - Pictures: the scheduler encodes at most ``images_per_step`` of them, all before the decoder runs and, unless
      deterministic, in one batch. What comes out is pinned in the encoder cache until the decoder is done, so it lives
      on here as well; whatever else that cache holds is within the bytes set aside for it.
    - Tokens: a full budget. Once all of it prompts that end where a context may end, since a slice looks back at all of
      its context; once as many decodes as may run, each at its context's end, and prompts in the rest.
    - Answers: a row for every request that may run, with all that can be asked of sampling. Bias copies the logits, a
      filter sorts them, and log-probabilities are as many again.
    """
    num_blocks, longest = kv.k_LNPGD.shape[1] - 1, limits.max_model_len
    size, num_images = model.config.vision.image_size, images_per_step(model.config, limits.max_step_tokens)
    sampling = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.5, logit_bias={0: 0.0}, logprobs=True)
    request = Request(id="largest", prompt=Prompt((0,) * longest), sampling=sampling)
    # Longer than ``kv``: it reads the same blocks again and again.
    blocks = [index % num_blocks for index in range(-(-longest // limits.block_size))]
    sequence = Sequence(request, list(request.prompt.token_ids), blocks=blocks)

    def run(slices: list[Slice]) -> Tensor:
        batch = build_batch(slices, block_size=limits.block_size, scratch_block=num_blocks, device=device)
        normed_TD: Tensor = model(model.embed(batch.token_ids_T), batch.positions_T, kv, batch.layout)
        return normed_TD

    def prompts(budget: int) -> list[Slice]:
        lengths = [longest] * (budget // longest) + [budget % longest]
        return [Slice(sequence, longest - length, length) for length in lengths if length]

    with torch.inference_mode():
        at_once = 1 if limits.deterministic else num_images
        encoded_NLD = model.encode_images(torch.zeros(at_once, size, size, 3, dtype=torch.uint8, device=device))
        kept = [encoded_NLD[index % at_once].clone() for index in range(num_images)]
        del encoded_NLD
        run(prompts(limits.max_step_tokens))
        decodes = [Slice(sequence, longest - 1, 1)] * (limits.max_running - 1)
        hidden_TD = run([*decodes, *prompts(limits.max_step_tokens - len(decodes))])
        logits_SV = model.logits(hidden_TD[: limits.max_running].clone())
        choose_tokens(logits_SV, [sequence] * len(logits_SV), model.decoder.kernels.sample)
        del kept


def fit_to_cache(config: VlmConfig, settings: Settings, limits: EngineConfig, num_blocks: int) -> EngineConfig:
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


def allocate_cache(model: Vlm, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype) -> KvPool:
    # One block more than the books know: scratch for padding rows.
    count, config = num_blocks + 1, model.config.decoder
    try:
        return KvPool.allocate(
            config,
            num_blocks=count,
            block_size=block_size,
            dtype=dtype,
            device=device,
            heads_apart=model.decoder.heads_apart,
        )
    except (RuntimeError, OSError) as error:
        if device.type != "cpu":
            raise
        size = count * KvPool.bytes_per_block(config, block_size=block_size, dtype=dtype) / 2**30
        raise SettingsError(
            f"This machine can't give {size:.1f} GiB to the key/value cache. Lower --cpu-cache-gb."
        ) from error
