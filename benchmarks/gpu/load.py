"""Stage 7: the true server with random weights, loaded over HTTP."""

from typing import Any

from benchmarks.gpu.stage import Stage, run
from benchmarks.servers import bench, free_port, running, sightline_command

CONCURRENCIES = (1, 16, 64)
START_TIMEOUT_S = 120


def measure(stage: Stage) -> None:
    port = free_port()
    command = sightline_command(port, "--random", stage.shape, "--device", stage.device)
    runs: list[dict[str, Any]] = []
    with running("sightline", command, port=port, ready_path="/ready", timeout_s=START_TIMEOUT_S) as server:
        stage.save(shape=stage.shape, ready_s=round(server.ready_s, 2))
        stage.say(f"{stage.shape} ready in {server.ready_s:.1f} s")
        for concurrency in CONCURRENCIES if stage.on_gpu else (1, 4):
            summary = bench(
                server,
                num_prompts=4 if concurrency == 1 else 2 * concurrency,
                max_concurrency=concurrency,
                input_len=64,
                output_len=128 if stage.on_gpu else 8,
                images="own",
            )
            runs.append(summary)
            stage.save(runs=runs)
            stage.say(
                f"{concurrency} streams: {summary['throughput']['output_tokens_per_s']:,.0f} output tokens/s, first "
                f"token {summary['ttft_ms']['p50']:,.0f} ms, between chunks p99 {summary['itl_ms']['p99']:,.1f} ms"
            )


if __name__ == "__main__":
    run("load", measure)
