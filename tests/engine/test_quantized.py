"""An engine around a quantized model: what it says of itself, and that batch mates change no byte."""

from pathlib import Path

import pytest
import torch
from engines import CLIP, Album, make_engine, make_prompt, make_request, picture, run

from sightline_kernels.int8_linear import on_cpu
from sightline_models.config import read_config
from sightline_models.parameter_count import weight_bytes
from sightline_models.presets import write_preset
from sightline_models.quantization_config import Quantization
from sightline_models.tiny import write_checkpoint
from sightline_models.weights import random_vlm
from sightline_server.engine import load
from sightline_server.settings import Settings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["int8", "int8 by digits", "nf4"])
def test_deterministic_answers_know_no_batch_mates(
    kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "int8 by digits":
        # Matrices as small as these are otherwise multiplied in other ways.
        monkeypatch.setattr(on_cpu, "_MOST_UNPACKED", 0)
    scheme: Quantization = "nf4" if kind == "nf4" else "int8"
    write_preset("tiny", tmp_path)
    model = random_vlm(read_config(tmp_path), CLIP, dtype=dtype, device=torch.device("cpu"), seed=1, quantize=scheme)
    album = Album()
    requests = [
        make_request(f"r{seed}", make_prompt(model, album, parts, seed=seed), max_tokens=6, logprobs=True)
        for seed, parts in enumerate([[9], [3, picture(32, 1), 7], [40, picture(32, 2), 5]])
    ]
    together = run(make_engine(model, deterministic=True), requests, album)
    plain = run(make_engine(model), requests, album)
    for request in requests:
        alone = run(make_engine(model, deterministic=True), [request], album)[request.id]
        assert alone.token_ids == together[request.id].token_ids
        assert alone.logprobs == together[request.id].logprobs
        if dtype == torch.float32:
            assert plain[request.id].logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_the_engine_says_how_its_weights_are_kept(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    weighed = {}
    for scheme in ("none", "int8", "nf4"):
        settings = Settings(device="cpu", threads=1, cpu_cache_gb=0.01, quantize=scheme)
        _, info = load.load_engine(tmp_path, settings, lambda stage, share: None)
        assert (info.quantization, info.dtype) == (scheme, "float32")
        weighed[scheme] = info.weight_bytes
    config = read_config(tmp_path)
    for scheme, held in weighed.items():
        assert held == weight_bytes(config, "float32" if scheme == "none" else scheme, "float32", on_cpu=True)
