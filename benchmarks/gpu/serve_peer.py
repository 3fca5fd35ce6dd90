"""Stage serve: `transformers serve` under the load of stage load, as far as its packages are there.

It answers pictures one after another, so a few requests say what it gives.
"""

import shutil
from pathlib import Path

from benchmarks.gpu.load import OUTPUT_LEN
from benchmarks.gpu.models import random_transformers_model, scratch_folder
from benchmarks.gpu.oracle import bytes_needed
from benchmarks.gpu.stage import Stage, first_line, run
from benchmarks.servers import ServerError, bench
from benchmarks.transformers_serve import link_checkpoint, missing_packages, serving
from sightline_models import presets

CONCURRENCY = 8


def measure(stage: Stage) -> None:
    if missing := missing_packages():
        stage.save(skipped=f"not installed: {', '.join(missing)}")
        stage.say(stage.results["skipped"])
        return
    on_disk, _ = bytes_needed(stage.shape)
    folder = scratch_folder(on_disk)
    if folder is None:
        stage.save(skipped=f"no folder has {on_disk / 2**30:.0f} GiB free for the weights")
        return
    try:
        _serve_and_load(stage, folder)
    except ServerError as error:
        # A peer that doesn't run is a row without a figure, and no failure of ours.
        stage.save(skipped=first_line(error), said=str(error)[-3000:])
        stage.say(f"transformers serve could not be measured: {error}")
    finally:
        shutil.rmtree(folder)


def _serve_and_load(stage: Stage, folder: Path) -> None:
    weights, served = folder / "weights", folder / "served"
    presets.write_preset(stage.shape, weights)
    random_transformers_model(weights, device=stage.device).save_pretrained(weights)
    link_checkpoint(weights, served)
    stage.save(shape=stage.shape)
    with serving(served, "auto", device=stage.device) as server:
        summary = bench(
            server,
            num_prompts=CONCURRENCY if stage.on_gpu else 2,
            max_concurrency=CONCURRENCY,
            warmup=1,
            input_len=64,
            output_len=OUTPUT_LEN if stage.on_gpu else 8,
            images="own",
            ignore_eos=False,
        )
    stage.save(run=summary, concurrency=CONCURRENCY)
    stage.say(f"{CONCURRENCY} at once: {summary['throughput']['output_tokens_per_s']:,.0f} output tokens/s")


if __name__ == "__main__":
    run("serve", measure)
