"""Stage load: the true server with random weights, loaded over HTTP with a fresh picture a request."""

from typing import Any

from benchmarks.gpu.stage import Stage, run
from benchmarks.servers import Server, ServerError, bench, free_port, running, sightline_command

CONCURRENCIES = (1, 64, 8, 32)
"""The ends first: the stage may be cut short."""
OUTPUT_LEN = 128
START_TIMEOUT_S = 120


def measure(stage: Stage) -> None:
    try:
        _serve_and_load(stage, "auto")
    except ServerError as error:
        # A fused kernel or a recorded step may have taken the engine down with it.
        stage.save(auto_failed=str(error)[-2000:])
        stage.say(f"with --kernels auto: {error}")
        _serve_and_load(stage, "reference", "--no-cuda-graphs", "--no-overlap")


def _serve_and_load(stage: Stage, kernels: str, *flags: str) -> None:
    port = free_port()
    command = sightline_command(port, "--random", stage.shape, "--device", stage.device, "--kernels", kernels, *flags)
    with running("sightline", command, port=port, ready_path="/ready", timeout_s=START_TIMEOUT_S) as server:
        stage.save(shape=stage.shape, kernels=kernels, output_len=OUTPUT_LEN, ready_s=round(server.ready_s, 2), runs=[])
        stage.say(f"{stage.shape} with --kernels {kernels} ready in {server.ready_s:.1f} s")
        _load(stage, server)


def _load(stage: Stage, server: Server) -> None:
    runs: list[dict[str, Any]] = []
    for concurrency in CONCURRENCIES if stage.on_gpu else (1, 4):
        summary = bench(
            server,
            num_prompts=4 if concurrency == 1 else 2 * concurrency,
            max_concurrency=concurrency,
            # Kernels are built, and graphs made, for as many rows as will come.
            warmup=concurrency,
            input_len=64,
            output_len=OUTPUT_LEN if stage.on_gpu else 8,
            images="own",
        )
        runs.append({"concurrency": concurrency, **summary})
        stage.save(runs=runs)
        stage.say(
            f"{concurrency} streams: {summary['throughput']['output_tokens_per_s']:,.0f} output tokens/s, first "
            f"token {summary['ttft_ms']['p50']:,.0f} ms, between chunks p99 {summary['itl_ms']['p99']:,.1f} ms"
        )


if __name__ == "__main__":
    run("load", measure)
