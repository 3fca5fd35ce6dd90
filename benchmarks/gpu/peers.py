"""Stages peer-*: transformers' own text decoder of the same shape, in the ways its documentation calls fast.

It gets its best case: no picture, greedy tokens, prompts of one length, no end token, nothing said back in between.
Variants: eager (``generate``, alone and in batches), compiled (a static cache and its forward pass compiled with CUDA
graphs), int8wo and int4wo (the same with torchao's weights). Knows nothing of our engine.
"""

import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.decode import CONTEXT
from benchmarks.gpu.models import random_transformers_decoder
from benchmarks.gpu.stage import Stage, first_line, run, synchronize

NEW_TOKENS = 32
BATCHES = (64, 32, 16)
"""The largest first: it is most likely the best, and the stage may be cut short."""
ROUNDS = 3
WARMUP_STEPS = 8
CACHE_LEN = 704
"""Just what is needed: a step looks at all of a static cache."""
GROUP_SIZE = 128
"""Of int4wo."""


def generate_ms(model: Any, batch: int, new_tokens: int, device: str, seed: int) -> float:
    """Milliseconds of one call of ``generate``."""
    generator = torch.Generator().manual_seed(seed)
    length = CONTEXT - NEW_TOKENS // 2
    ids_BT = torch.randint(3, model.config.vocab_size, (batch, length), generator=generator).to(device)
    synchronize(device)
    began = time.perf_counter()
    out_BT = model.generate(
        input_ids=ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
    )
    synchronize(device)
    assert out_BT.shape[1] == length + new_tokens, f"{out_BT.shape[1] - length} tokens instead of {new_tokens}"
    return (time.perf_counter() - began) * 1000


def measure_generate(stage: Stage, model: Any) -> None:
    """Decoding alone: a call for many tokens less a call for one. Both are given, so that anything else can be."""
    rows: list[dict[str, Any]] = []
    for batch in (1, *(BATCHES if stage.on_gpu else (2,))):
        try:
            generate_ms(model, batch, 2, stage.device, seed=0)
            pairs = [
                (
                    generate_ms(model, batch, 1, stage.device, seed=1 + turn),
                    generate_ms(model, batch, 1 + NEW_TOKENS, stage.device, seed=1 + turn),
                )
                for turn in range(ROUNDS if batch == 1 else 2)
            ]
        except RuntimeError as error:
            rows.append({"batch": batch, "failed": first_line(error)})
            stage.save(generate=rows)
            continue
        step_ms = statistics.median(whole - first for first, whole in pairs) / NEW_TOKENS
        whole_ms = statistics.median(whole for _, whole in pairs)
        rows.append(
            {
                "batch": batch,
                "prefill_ms": round(statistics.median(first for first, _ in pairs), 3),
                "step_ms": round(step_ms, 4),
                "tokens_per_s": round(batch / step_ms * 1000, 1),
                "tokens_per_s_with_prefill": round(batch * (1 + NEW_TOKENS) / whole_ms * 1000, 1),
            }
        )
        stage.save(generate=rows)
        stage.say(f"generate, batch {batch}: {step_ms:.2f} ms a step, {rows[-1]['tokens_per_s']:,.0f} tokens/s")


def decode_steps(model: Any, device: str, forward: Any, ids_1T: Tensor) -> Iterator[Tensor]:
    """Endless greedy decode steps after a prompt, over a static cache; nothing waits for the device."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=CACHE_LEN)
    positions_1T = torch.arange(ids_1T.shape[1], device=device)[None]
    # Not compiled: the cache makes its tensors in its first pass, and a graph needs them to stay where they are.
    out = model(
        input_ids=ids_1T.to(device),
        position_ids=positions_1T,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    token_11 = out.logits[:, -1:].argmax(-1)
    position_11 = positions_1T[:, -1:].clone()
    while True:
        yield token_11
        position_11 += 1
        torch.compiler.cudagraph_mark_step_begin()
        out = forward(input_ids=token_11, position_ids=position_11, past_key_values=cache, use_cache=True)
        token_11 = out.logits[:, -1:].argmax(-1)


def measure_compiled(stage: Stage, model: Any) -> None:
    try:
        time_compiled(stage, model, fullgraph=True)
    except Exception as error:
        # Some versions can't compile the whole of it, and compile it in parts.
        stage.save(whole_graph_failed=first_line(error))
        stage.say(f"in one graph: {first_line(error)}")
        torch._dynamo.reset()
        time_compiled(stage, model, fullgraph=False)


@torch.no_grad()
def time_compiled(stage: Stage, model: Any, *, fullgraph: bool) -> None:
    # A CPU only proves the code: what would take its compiler a minute is left out.
    how: dict[str, Any] = {"mode": "reduce-overhead"} if stage.on_gpu else {"backend": "eager"}
    forward = torch.compile(model.forward, fullgraph=fullgraph, **how)
    length = CONTEXT - WARMUP_STEPS - ROUNDS * NEW_TOKENS // 2
    ids_1T = torch.randint(3, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    steps = decode_steps(model, stage.device, forward, ids_1T)
    # The prompt, then the steps that are compiled and captured.
    for _ in itertools.islice(steps, 1 + WARMUP_STEPS):
        pass
    synchronize(stage.device)
    stage.save(compile_s=round(time.perf_counter() - began, 1))
    spent = []
    tokens = NEW_TOKENS if stage.on_gpu else 2
    for _ in range(ROUNDS):
        synchronize(stage.device)
        began = time.perf_counter()
        for _ in itertools.islice(steps, tokens):
            pass
        synchronize(stage.device)
        spent.append((time.perf_counter() - began) * 1000 / tokens)
    step_ms = statistics.median(spent)
    counters = torch._dynamo.utils.counters["inductor"]
    stage.save(
        step_ms=round(step_ms, 4),
        round_ms=[round(each, 4) for each in spent],
        tokens_per_s=round(1000 / step_ms, 1),
        cudagraph_skips=counters.get("cudagraph_skips", 0),
    )
    stage.say(
        f"compiled forward pass: {step_ms:.2f} ms a step, {1000 / step_ms:,.0f} tokens/s; compiling took "
        f"{stage.results['compile_s']:.0f} s, graphs skipped: {stage.results['cudagraph_skips']}"
    )


def quantize(model: Any, variant: str, device: str) -> str | None:
    """Quantize all linears but the head, as ours are. Returns why it can't be done, or None."""
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        return f"not installed: torchao ({error})"
    if variant == "int4wo":
        # The layout of torch's own int4 product: the others need a package more.
        config = Int4WeightOnlyConfig(group_size=GROUP_SIZE, int4_packing_format="tile_packed_to_4d")
    else:
        config = Int8WeightOnlyConfig()

    def is_ours(module: torch.nn.Module, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and "lm_head" not in name

    quantize_(model, config, filter_fn=is_ours)
    return None


def measure(stage: Stage) -> None:
    variant = stage.variant or "eager"
    if variant not in ("eager", "compiled", "int8wo", "int4wo"):
        raise ValueError(f"There is no variant {variant}: take eager, compiled, int8wo or int4wo.")
    model = random_transformers_decoder(stage.shape, device=stage.device)
    stage.save(shape=stage.shape, context=CONTEXT)
    if variant == "eager":
        measure_generate(stage, model)
        return
    try:
        missing = quantize(model, variant, stage.device) if variant != "compiled" else None
        if missing is not None:
            stage.save(skipped=missing)
            stage.say(missing)
            return
        measure_compiled(stage, model)
    except Exception as error:
        # A peer that doesn't run is a row without a figure, and no failure of ours.
        stage.save(skipped=first_line(error))
        stage.say(f"{variant} could not be measured: {first_line(error)}")


if __name__ == "__main__":
    run("peer", measure)
