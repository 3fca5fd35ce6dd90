"""An engine around a quantized model: what it says of itself, and that batch mates change no byte."""

import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes_oracle import SAVED, save_quantized
from engines import CLIP, Album, make_engine, make_prompt, make_request, picture, run

from sightline_models.config import CheckpointError, read_config
from sightline_models.parameter_count import count_parameters
from sightline_models.presets import write_preset
from sightline_models.quantization_config import Quantization
from sightline_models.tiny import write_checkpoint
from sightline_models.weights import random_vlm
from sightline_server.engine import load
from sightline_server.settings import Settings


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_deterministic_answers_know_no_batch_mates(scheme: Quantization, tmp_path: Path) -> None:
    write_preset("tiny", tmp_path)
    model = random_vlm(
        read_config(tmp_path), CLIP, dtype=torch.float32, device=torch.device("cpu"), seed=1, quantize=scheme
    )
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
        assert plain[request.id].logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_the_engine_says_how_its_weights_are_kept(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    weighed = {}
    for scheme in ("none", "int8", "nf4"):
        settings = Settings(device="cpu", threads=1, cpu_cache_gb=0.01, quantize=scheme)
        _, info = load.load_engine(tmp_path, settings, lambda stage, share: None)
        assert (info.quantization, info.dtype) == (scheme, "float32")
        weighed[scheme] = info.weight_bytes
    # Scales and tables weigh something too on matrices this small.
    linears = count_parameters(read_config(tmp_path)).decoder_linears
    assert weighed["none"] - weighed["int8"] == pytest.approx(3 * linears, rel=0.1)
    assert weighed["none"] - weighed["nf4"] == pytest.approx((4 - 4.5 / 8) * linears, rel=0.1)
    settings = Settings(device="cpu", threads=1, cpu_cache_gb=0.01, quantize="int8", quantize_vision=True)
    _, info = load.load_engine(tmp_path, settings, lambda stage, share: None)
    tower = count_parameters(read_config(tmp_path)).vision_linears
    assert weighed["int8"] - info.weight_bytes == pytest.approx(3 * tower, rel=0.1)


@pytest.mark.filterwarnings("ignore")
def test_compressed_scales_weigh_an_eighth_of_a_bit(tmp_path: Path) -> None:
    settings = Settings(device="cpu", cpu_cache_gb=0.01)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "num_kv_heads": 4}
    write_checkpoint(tmp_path / "plain", **sizes)
    weighed = {}
    for kind in ("nf4", "nf4, double"):
        options = SAVED[kind] | {
            "llm_int8_skip_modules": ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
        }
        # bitsandbytes compiles some of what it does.
        with torch.compiler.set_stance("force_eager"):
            save_quantized(tmp_path / "plain", tmp_path / kind, options)
        shutil.copy(tmp_path / "plain/processor_config.json", tmp_path / kind)
        _, info = load.load_engine(tmp_path / kind, settings, lambda stage, share: None)
        assert info.quantization == "nf4"
        weighed[kind] = info.weight_bytes
    config = read_config(tmp_path / "plain")
    blocks, layers = count_parameters(config).decoder_linears // 64, 4 * config.decoder.num_layers
    # A byte, two numbers for each 256 of them and a table of 256 numbers a layer, instead of four bytes.
    saved = 4 * blocks - (blocks + 8 * blocks // 256 + 1024 * layers)
    assert weighed["nf4"] - weighed["nf4, double"] == saved > 0


def test_another_scheme_than_the_checkpoints_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    write_preset("tiny", tmp_path)
    config = (tmp_path / "config.json").read_text()
    stated = '{"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": true}, '
    (tmp_path / "config.json").write_text(config.replace("{", stated, 1))
    with pytest.raises(CheckpointError, match=r"--quantize nf4.*as int8"):
        load.load_engine(tmp_path, Settings(device="cpu", quantize="nf4"), lambda stage, share: None)
    settings = Settings(device="cpu", quantize="int8", quantize_vision=True)
    with pytest.raises(CheckpointError, match=r"--quantize-vision.*as int8"):
        load.load_engine(tmp_path, settings, lambda stage, share: None)
