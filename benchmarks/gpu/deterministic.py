"""Stage deterministic: what ``--deterministic`` costs: the same streams with it and without.

Short contexts: row by row, a long prompt would take longer than the measurement. Without it, the engine is the fastest
one; with it, the reference kernels alone will do.
"""

from typing import Any

import torch

from benchmarks.gpu.decode import free_up
from benchmarks.gpu.models import random_model
from benchmarks.gpu.stage import Stage, run
from benchmarks.gpu.streams import rate_of

DTYPE = torch.bfloat16
CONTEXT = 64
STREAMS = (8, 64)


def measure(stage: Stage) -> None:
    all_streams = STREAMS if stage.on_gpu else (2,)
    rounds, tokens, warmup = (3, 6, 4) if stage.on_gpu else (1, 2, 1)
    rates: dict[tuple[int, bool], Any] = {}
    stage.save(shape=stage.shape, context=CONTEXT)
    for deterministic in (False, True):
        mode = "reference" if deterministic else "auto"
        model = random_model(stage.shape, dtype=DTYPE, device=stage.device, mode=mode)
        rows: list[dict[str, Any]] = []
        for streams in all_streams:
            rate = rate_of(
                model,
                device=stage.device,
                dtype=DTYPE,
                streams=streams,
                context=CONTEXT,
                rounds=rounds,
                tokens=tokens,
                warmup=warmup,
                deterministic=deterministic,
            )
            rates[streams, deterministic] = rate
            rows.append({"streams": streams, **rate.to_json()})
            stage.save(**{"deterministic" if deterministic else "plain": rows})
            free_up()
        del model
        free_up()
    prices = {
        str(streams): round(rates[streams, False].tokens_per_s / rates[streams, True].tokens_per_s, 3)
        for streams in all_streams
    }
    stage.save(prices=prices)
    stage.say(", ".join(f"{streams} streams: {price:.1f}x slower" for streams, price in prices.items()))


if __name__ == "__main__":
    run("deterministic", measure)
