"""Stage environment: what the machine is, and its ceilings measured in this run."""

import contextlib
import importlib.metadata

import torch

from benchmarks.gpu.ceilings import copy_bandwidth, launch_us, matmul_rate, read_bandwidth
from benchmarks.gpu.stage import Stage, run
from benchmarks.machine import describe_machine, nvidia_smi

PEERS = ("bitsandbytes", "torchao", "openai", "typer")


def installed(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of those that are there."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def measure(stage: Stage) -> None:
    stage.save(machine=describe_machine(), peers=installed(PEERS), nvidia_smi_before=nvidia_smi())
    if stage.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        stage.save(
            gpu={
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "cuda": torch.version.cuda,
            }
        )
        stage.say(f"{properties.name}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    num_bytes, size = (2**32, 8192) if stage.on_gpu and not stage.quick else (2**26, 1024)
    stage.save(copy_bytes_per_s=copy_bandwidth(stage.device, num_bytes=num_bytes))
    stage.save(read_bytes_per_s=read_bandwidth(stage.device, num_bytes=num_bytes))
    stage.say(f"copy {stage.results['copy_bytes_per_s'] / 1e12:.3f} TB/s")
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        stage.save(**{f"matmul_{name}_flops": matmul_rate(stage.device, size=size, dtype=dtype)})
        stage.say(f"{name} matrix product {stage.results[f'matmul_{name}_flops'] / 1e12:.2f} TFLOP/s")
    stage.save(launch_us=round(launch_us(stage.device), 3), nvidia_smi_after=nvidia_smi())


if __name__ == "__main__":
    run("environment", measure)
