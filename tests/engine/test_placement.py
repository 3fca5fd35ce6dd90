"""How many engines settings ask for, and what each of them is told."""

import msgspec
import pytest
import worker_engines

from sightline_server import settings as settings_table
from sightline_server.engine.placement import count_engines, settings_of
from sightline_server.settings import Settings, SettingsError

ON_CPU = worker_engines.INFO
ON_GPU = msgspec.structs.replace(ON_CPU, device="cuda:0 (Card)")


@pytest.mark.parametrize(
    ("flags", "engines"),
    [
        ({}, 1),
        ({"device": "cuda"}, 1),
        ({"device": "cuda:1"}, 1),
        ({"device": "cuda:0,cuda:2"}, 2),
        ({"device": "cuda:0, cuda:1", "engines": "2"}, 2),
        ({"device": "cpu", "engines": "3"}, 3),
        ({"engines": "4"}, 4),
    ],
)
def test_left_open_there_is_an_engine_for_each_gpu_that_is_named(flags: dict[str, str], engines: int) -> None:
    assert count_engines(settings_table.load(flags, {})) == engines


def test_one_engine_is_told_what_the_server_was() -> None:
    settings = Settings(device="cuda:1", cpu_cache_gb=3.0, verify=True)
    assert settings_of(settings, 0, cores=8) == settings


def test_cores_and_cache_of_a_cpu_are_divided_and_weights_are_checked_once() -> None:
    settings = Settings(device="cpu", engines=2, cpu_cache_gb=3.0, verify=True, quantize="int8")
    first, second = (settings_of(settings, engine, cores=5, first=ON_CPU) for engine in range(2))
    assert (first.threads, first.cpu_cache_gb, first.device) == (2, 1.5, "cpu")
    assert (first.verify, second.verify) == (True, False)
    assert settings_table.replace(first, verify=False) == second
    assert count_engines(first) == 1


def test_threads_that_are_given_and_those_of_deterministic_engines_are_left_alone() -> None:
    assert settings_of(Settings(engines=2, threads=3), 0, cores=8).threads == 3
    assert settings_of(Settings(engines=2, deterministic=True), 0, cores=8).threads == 0
    assert settings_of(Settings(engines=9), 0, cores=2).threads == 1


def test_each_engine_gets_a_gpu_of_its_own() -> None:
    named = Settings(device="cuda:3,cuda:1")
    assert [settings_of(named, engine, cores=8).device for engine in range(2)] == ["cuda:3", "cuda:1"]
    counted = Settings(device="cuda", engines=2)
    assert [settings_of(counted, engine, cores=8).device for engine in range(2)] == ["cuda:0", "cuda:1"]


def test_with_auto_the_first_engine_finds_what_there_is() -> None:
    settings = Settings(engines=3)
    assert settings_of(settings, 0, cores=8).device == "auto"
    assert [settings_of(settings, 2, cores=8, first=found).device for found in (ON_GPU, ON_CPU)] == ["cuda:2", "cpu"]


@pytest.mark.parametrize("device", ["cuda:0,cuda", "cpu,cpu", "cuda:0,", "cuda:x", "gpu0", "auto,cuda:1", ""])
def test_what_is_no_device_is_refused_with_an_example(device: str) -> None:
    with pytest.raises(SettingsError, match=r"^--device must be .* cuda:N or a list such as cuda:0,cuda:1, not"):
        settings_table.load({"device": device}, {})


def test_a_gpu_is_named_for_each_engine_and_once() -> None:
    with pytest.raises(SettingsError, match=r"^--device cuda:0,cuda:00 names a GPU twice"):
        settings_table.load({"device": "cuda:0,cuda:00"}, {})
    for device in ("cuda:1", "cuda:0,cuda:1,cuda:2"):
        with pytest.raises(SettingsError, match=r"^--engines 2 and --device .* don't fit: name a GPU for each engine"):
            settings_table.load({"device": device, "engines": "2"}, {})
