"""What the device can do at most: the denominators of every share that is reported.

Knows buffers and matrices. Inputs are random: zeros run faster than real data on some devices.
"""

import statistics

import torch

from benchmarks.gpu.stage import times_ms


def copy_bandwidth(device: str, *, num_bytes: int, repeats: int = 10) -> float:
    """Bytes a second that a device-to-device copy moves, read and written counted both."""
    source = torch.randint(-100, 100, (num_bytes,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times = times_ms(lambda: target.copy_(source), device, warmup=3, repeats=repeats)
    return 2 * num_bytes / (statistics.median(times) / 1000)


def read_bandwidth(device: str, *, num_bytes: int, repeats: int = 10) -> float:
    """Bytes a second that a sum over a large buffer reads: what weights streamed once could at most see."""
    source = torch.randint(-100, 100, (num_bytes // 4,), dtype=torch.int32, device=device).float()
    times = times_ms(source.sum, device, warmup=3, repeats=repeats)
    return source.nbytes / (statistics.median(times) / 1000)


def matmul_rate(device: str, *, size: int, dtype: torch.dtype, repeats: int = 10) -> float:
    """Floating-point operations a second of a square matrix product."""
    left = torch.randn(size, size, device=device, dtype=dtype)
    right = torch.randn(size, size, device=device, dtype=dtype)
    times = times_ms(lambda: left @ right, device, warmup=3, repeats=repeats)
    return 2 * size**3 / (statistics.median(times) / 1000)


def launch_us(device: str, *, launches: int = 2000) -> float:
    """Microseconds a launch of a tiny kernel takes when nothing but launching is done."""
    tiny = torch.ones(1, device=device)

    def burst() -> None:
        for _ in range(launches):
            tiny.add_(1.0)

    return statistics.median(times_ms(burst, device, warmup=1, repeats=3)) * 1000 / launches
