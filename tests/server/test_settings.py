"""Sizes among the settings: what may be written, and the sentence for what may not."""

import pytest

from sightline_server import settings as settings_table
from sightline_server.settings import Settings, SettingsError

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GiB", 20 * GIB),
        ("20GB", 20 * 10**9),
        ("20 gib", 20 * GIB),
        ("16000MB", 16 * 10**9),
        ("1.5GiB", 3 * GIB // 2),
        ("0.1TB", 10**11),
        ("67108864", 2**26),
        ("67108864B", 2**26),
        ("", 0),
        ("0", 0),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert settings_table.load({"gpu_memory": text}, {}).gpu_memory == size
    assert settings_table.load({}, {"SIGHTLINE_GPU_MEMORY": text}).gpu_memory == size


@pytest.mark.parametrize("text", ["twenty", "20Gb/s", "20G", "-5GiB", "20GiBi", "1e3GiB", "GiB", "20,5GiB", "nan"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^--gpu-memory must be a size such as 20GiB, 16000MB or .*, not"):
        settings_table.load({"gpu_memory": text}, {})
    with pytest.raises(SettingsError, match=r"^SIGHTLINE_GPU_MEMORY must be a size"):
        settings_table.load({}, {"SIGHTLINE_GPU_MEMORY": text})


def test_a_size_without_its_unit_and_one_beyond_reason_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"^--gpu-memory must be at least 64MiB, not '20'; 20GiB is a size\.$"):
        settings_table.load({"gpu_memory": "20"}, {})
    with pytest.raises(SettingsError, match=r"^--gpu-memory is more than any machine has"):
        settings_table.load({"gpu_memory": "99999999TiB"}, {})


def test_what_excludes_a_size_is_named() -> None:
    with pytest.raises(SettingsError, match=r"--gpu-memory and --gpu-memory-utilization exclude each other"):
        settings_table.load({"gpu_memory": "20GiB", "gpu_memory_utilization": "0.8"}, {})
    with pytest.raises(SettingsError, match=r"--gpu-memory is for a GPU: with --device cpu, --cpu-cache-gb"):
        settings_table.load({"gpu_memory": "20GiB", "device": "cpu"}, {})
    default = str(Settings.gpu_memory_utilization)
    assert settings_table.load({"gpu_memory": "20GiB", "gpu_memory_utilization": default}, {}).gpu_memory == 20 * GIB
