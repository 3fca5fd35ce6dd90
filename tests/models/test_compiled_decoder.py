"""The compiled decode step against the decoder it was made of: logits, draws, what it writes, what it must not read."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from oracle import CLIP_NORMALIZATION
from torch import Tensor

from sightline_kernels.layout import PagedLayout
from sightline_kernels.sample import compilable
from sightline_models import compiled_decoder
from sightline_models.compiled_decoder import CompiledDecoder, compile_decoder, refusal
from sightline_models.config import read_config
from sightline_models.kv import KvPool
from sightline_models.presets import PRESETS, write_files
from sightline_models.quantize import Int8Linear
from sightline_models.vlm import Vlm
from sightline_models.weights import random_vlm

BLOCK, BLOCKS, MOST_ROWS, MOST_LEN = 16, 300, 12, 400
# Compiling takes as long as the machine lets it.
pytestmark = pytest.mark.timeout(600)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler here")
needs_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this CPU has no VNNI")


@dataclass
class Pair:
    model: Vlm
    kv: KvPool
    compiled: CompiledDecoder


@pytest.fixture(scope="module", params=["none", pytest.param("int8", marks=needs_vnni)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vlm:
    """The smallest shape, with shared heads and every bias there may be."""
    folder = tmp_path_factory.mktemp("biased")
    write_files(dataclasses.replace(PRESETS["tiny"], attention_bias=True, mlp_bias=True), folder)
    cpu, config = torch.device("cpu"), read_config(folder)
    model = random_vlm(config, CLIP_NORMALIZATION, dtype=torch.float32, device=cpu, seed=1, quantize=request.param)
    assert isinstance(model.decoder.layers[0].attention.qkv, Int8Linear) == (request.param == "int8")
    return model


@pytest.fixture(scope="module")
def pair(model: Vlm, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder: Path = tmp_path_factory.mktemp("compiled")
    kv = KvPool.allocate(
        model.decoder.config,
        num_blocks=BLOCKS,
        block_size=BLOCK,
        dtype=torch.float32,
        device=torch.device("cpu"),
        heads_apart=model.decoder.heads_apart,
    )
    assert kv.k_LNPGD.stride(3) > kv.k_LNPGD.stride(2)
    compiled = compile_decoder(model.decoder, kv, folder, most_rows=MOST_ROWS, most_len=MOST_LEN)
    return Pair(model, kv, compiled)


def decode_layout(contexts: list[int], *, row_invariant: bool = False) -> tuple[Tensor, PagedLayout]:
    """Positions of one new token a row, and where its rows lie, in shuffled blocks."""
    rows, width = len(contexts), max(-(-context // BLOCK) for context in contexts)
    order = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(rows))
    table_BN = order[: rows * width].view(rows, width).int()
    positions_B = torch.tensor(contexts) - 1
    slots_B = table_BN[torch.arange(rows), positions_B // BLOCK].long() * BLOCK + positions_B % BLOCK
    layout = PagedLayout(
        block_table_BN=table_BN,
        cu_seqlens_B1=torch.arange(rows + 1, dtype=torch.int32),
        context_len_B=positions_B.int() + 1,
        slots_T=slots_B,
        query_lens=(1,) * rows,
        context_lens=tuple(contexts),
        num_decodes=rows,
        block_size=BLOCK,
        row_invariant=row_invariant,
    )
    return positions_B, layout


@needs_compiler
@pytest.mark.parametrize(
    "contexts",
    [[1], [2], [BLOCK], [BLOCK + 1], [300], [1, 1], [5, 5], [16, 17], [1, 40, 300], [33] * 11, [MOST_LEN] * MOST_ROWS],
    ids=str,
)
def test_logits_and_cache_are_the_decoders_own(pair: Pair, contexts: list[int]) -> None:
    positions_B, layout = decode_layout(contexts)
    assert pair.compiled.takes(layout)
    draw = torch.Generator().manual_seed(len(contexts))
    token_ids_B = torch.randint(5, 500, (len(contexts),), generator=draw)
    # What lies past a row's context may be anything.
    start = [torch.full_like(cache, torch.nan) for cache in (pair.kv.k_LNPGD, pair.kv.v_LNPGD)]
    for row, context in enumerate(contexts):
        for position in range(context - 1):
            block = int(layout.block_table_BN[row, position // BLOCK])
            for cache in start:
                cache[:, block, position % BLOCK] = torch.randn(cache[:, 0, 0].shape, generator=draw)

    temperature_B = torch.tensor([0.0, 1.0, 0.3] * len(contexts))[: len(contexts)]
    noise_BX = -torch.empty(len(contexts), pair.compiled.num_places).exponential_(generator=draw).log()

    def run(compiled: bool) -> tuple[Tensor, Tensor, Tensor]:
        pair.kv.k_LNPGD.copy_(start[0])
        pair.kv.v_LNPGD.copy_(start[1])
        with torch.inference_mode():
            if compiled:
                drawn_B, largest_B, logits_BV = pair.compiled.step(
                    token_ids_B, positions_B, layout, temperature_B, noise_BX
                )
                # The draw inside of the program, from its own logits: the same as outside.
                expected_B, peak_B = compilable.draw(logits_BV, temperature_B, noise_BX)
                assert drawn_B.tolist() == expected_B.tolist()
                torch.testing.assert_close(largest_B, peak_B)
            else:
                hidden_BD = pair.model(pair.model.embed(token_ids_B), positions_B, pair.kv, layout)
                logits_BV = pair.model.logits(hidden_BD)
        return logits_BV, pair.kv.k_LNPGD.clone(), pair.kv.v_LNPGD.clone()

    for ours, theirs in zip(run(compiled=True), run(compiled=False), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5, equal_nan=True)


@needs_compiler
def test_it_takes_decodes_alone_and_no_more_than_it_was_made_for(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    _, layout = decode_layout([40] * MOST_ROWS)
    assert pair.compiled.takes(layout)
    assert not pair.compiled.takes(decode_layout([40] * (MOST_ROWS + 1))[1])
    assert not pair.compiled.takes(decode_layout([40], row_invariant=True)[1])
    prompt = dataclasses.replace(layout, query_lens=(*layout.query_lens[:-1], 2), num_decodes=MOST_ROWS - 1)
    assert not pair.compiled.takes(prompt)
    monkeypatch.setattr(compiled_decoder, "_MOST_KEYS", 3 * BLOCK * MOST_ROWS - 1)
    assert not pair.compiled.takes(layout)


def test_what_is_quantized_or_too_large_is_refused(model: Vlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(model.decoder) is None
    write_files(PRESETS["tiny"], tmp_path)
    config, cpu = read_config(tmp_path), torch.device("cpu")
    quantized = random_vlm(config, CLIP_NORMALIZATION, dtype=torch.float32, device=cpu, seed=1, quantize="nf4")
    assert "its weights are in NF4" in str(refusal(quantized.decoder))
    older = random_vlm(config, CLIP_NORMALIZATION, dtype=torch.float32, device=cpu, seed=1, quantize="int8")
    older.decoder.layers[0].attention.o.scales = None
    assert "no VNNI" in str(refusal(older.decoder))
    monkeypatch.setattr(compiled_decoder, "MOST_PARAMETERS", 1000)
    assert "too large to gain" in str(refusal(model.decoder))
