"""Machines as tests plan them, and the doctor's report on one."""

import functools

from sightline_server import settings as settings_table
from sightline_server.cli import doctor
from sightline_server.cli.machine import DriverGpu, Machine, TorchGpu, TorchView

GIB = 2**30

DRIVER_GPU = DriverGpu(name="NVIDIA A10", total_bytes=24 * GIB, driver="550.54", capability="8.6")


def machine(**changes):
    facts = {
        "cpu": "Some CPU",
        "architecture": "x86_64",
        "cores": 8,
        "allowed_cores": 8,
        "cpu_quota": None,
        "features": ("AVX2",),
        "memory_total": 64 * GIB,
        "memory_free": 48 * GIB,
        "memory_limited": False,
        "driver_gpus": (),
        "nvidia_devices": 0,
        "open_files": 4096,
        "in_container": False,
    }
    return Machine(**facts | changes)


def torch_gpu(**changes):
    facts = {
        "index": 0,
        "name": "NVIDIA A10",
        "total_bytes": 24 * GIB,
        "free_bytes": 23 * GIB,
        "capability": "8.6",
        "bfloat16": True,
        "error": None,
    }
    return TorchGpu(**facts | changes)


SHAPES = functools.cache(doctor.read_shape)

NO_GPU = TorchView(error=None, cuda_build="13.2", reason="Found no NVIDIA driver")
WITH_GPU = TorchView(error=None, cuda_build="13.2", gpus=(torch_gpu(),))
GPU_MACHINE = {"driver_gpus": (DRIVER_GPU,), "nvidia_devices": 1}


def examined(monkeypatch, found, torch, *, model="", device="auto", environ=None):
    """The doctor's report on a planned machine."""

    class Probe:
        def result(self):
            return torch

    monkeypatch.setattr(doctor, "read_machine", lambda: found)
    monkeypatch.setattr(doctor, "TorchProbe", Probe)
    monkeypatch.setattr(doctor, "is_port_taken", lambda host, port: False)
    monkeypatch.setattr(doctor, "read_shape", SHAPES)
    return doctor.examine(settings_table.load({"model": str(model), "device": device}, environ or {}))
