"""A CPU's cache: the same to whoever reads or writes it, by heads in memory, on large pages where there are some."""

import re
from pathlib import Path

import pytest
import torch

from sightline_models.config import read_config
from sightline_models.kv import KvPool
from sightline_models.presets import demo_checkpoint

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def allocate(num_blocks: int) -> KvPool:
    decoder, cpu = read_config(demo_checkpoint()).decoder, torch.device("cpu")
    return KvPool.allocate(
        decoder, num_blocks=num_blocks, block_size=16, dtype=torch.bfloat16, device=cpu, heads_apart=True
    )


def test_heads_lie_apart_and_all_is_zero() -> None:
    decoder = read_config(demo_checkpoint()).decoder
    pool = allocate(5)
    for cache in (pool.k_LNPGD, pool.v_LNPGD):
        assert cache.shape == (decoder.num_layers, 5, 16, decoder.num_kv_heads, decoder.head_dim)
        assert cache.transpose(2, 3).is_contiguous()
        assert not cache.any()
    pool.k_LNPGD[1, 2, 3] = 1
    assert pool.k_LNPGD.sum() == decoder.num_kv_heads * decoder.head_dim
    assert not pool.v_LNPGD.any()


def test_it_lives_as_long_as_its_tensors() -> None:
    cache = allocate(5).k_LNPGD
    assert not cache.add_(1).ne(1).any()


def test_memory_that_is_not_there_is_an_error() -> None:
    with pytest.raises((RuntimeError, OSError)):
        allocate(2**40)


@pytest.mark.skipif(
    not LARGE_PAGES.is_file() or "[never]" in LARGE_PAGES.read_text(), reason="this kernel gives no large pages"
)
def test_it_wishes_for_large_pages() -> None:
    pool = allocate(1000)
    mappings = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    for cache in (pool.k_LNPGD, pool.v_LNPGD):
        address = cache.data_ptr()
        own = next(
            mapping
            for mapping in mappings[1:]
            if int(mapping.split("-")[0], 16) <= address < int(mapping.split("-")[1].split()[0], 16)
        )
        flags = re.search(r"VmFlags: (.*)", own)
        assert flags is not None
        # "hg": advised to have them. "sh": shared, which has none.
        assert "hg" in flags[1].split()
        assert "sh" not in flags[1].split()
