"""Result files of the comparison with figures that a test chooses."""

from typing import Any

from benchmarks.figures import FORMAT

Rates = dict[str, dict[int, list[float]]]
"""Tokens a second of each round, by system and concurrency."""


def load(system: str, concurrency: int, turn: int, rate: float) -> dict[str, Any]:
    figures = {
        "tokens_per_s": rate,
        "tokens_per_cpu_s": rate / 2,
        "ttft_p50_ms": 1000 / rate,
        "ttft_p99_ms": 2000 / rate,
        "tpot_p50_ms": 600 / rate,
        "itl_p50_ms": 500 / rate,
        "itl_p99_ms": 900 / rate,
    }
    return {"system": system, "concurrency": concurrency, "round": turn, "figures": figures}


def model(name: str, rates: Rates, *, failed: tuple[str, ...] = ()) -> dict[str, Any]:
    systems = []
    for key in [*dict.fromkeys(key for key in rates if key != "ours-again"), *failed]:
        tried = {
            "setting": "bfloat16",
            "threads": "1",
            "tokens_per_s": None,
            "gate": "logits",
            "passed": key not in failed,
        }
        chosen = {"setting": None, "threads": None} if key in failed else {"setting": "bfloat16", "threads": "1"}
        systems.append({"key": key, "label": key.capitalize(), **chosen, "tried": [tried]})
    loads = [
        load(key, concurrency, turn, rate)
        for key, by_concurrency in rates.items()
        for concurrency, values in by_concurrency.items()
        for turn, rate in enumerate(values)
    ]
    return {"model": name, "passed": not failed, "systems": systems, "loads": loads}


def document(*models: dict[str, Any], size: str = "full", date: str = "2026-11-21") -> dict[str, Any]:
    machine = {
        "date": f"{date}T10:00:00+00:00",
        "commit": "abc+changes",
        "packages": {"torch": "2.15.0", "numpy": "2.4"},
        "cpu": "A CPU",
        "cores": 2,
        "memory_gib": 8.0,
        "load": [0.5, 0.4, 0.3],
        "matmul_gflops": 100.0,
    }
    return {
        "suite": "cpu",
        "format": FORMAT,
        "size": size,
        "rounds": 2,
        "machine": machine,
        "machine_after": {"load": [1.5, 1.0, 0.5], "matmul_gflops": 90.0},
        "seconds": 1.0,
        "workload": {"input_len": 64, "output_len": 128, "images": "own"},
        "models": list(models),
    }
