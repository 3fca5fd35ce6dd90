"""Models of a named shape for the stages: ours with random weights, and transformers' with the same ones on disk.

Knows checkpoint folders. Knows nothing of what is measured.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from sightline_kernels.dispatch import Kernels, choose
from sightline_models import presets
from sightline_models.config import VlmConfig, read_config
from sightline_models.decoder import kernel_workload
from sightline_models.images import read_preprocess_config
from sightline_models.parameter_count import count_parameters
from sightline_models.vlm import Vlm
from sightline_models.weights import load_vlm, random_vlm
from sightline_server.engine.load import choose_device, use_device


def random_model(shape: str, *, dtype: torch.dtype, device: str, seed: int = 0) -> Vlm:
    """Ours, made on the device."""
    with tempfile.TemporaryDirectory(prefix="sightline-shape-") as name:
        folder = Path(name)
        presets.write_preset(shape, folder)
        config = read_config(folder)
        normalization = read_preprocess_config(folder, config).normalization
    use_device(choose_device(device))
    kernels = kernels_of(config, dtype, device)
    return random_vlm(config, normalization, dtype=dtype, device=torch.device(device), seed=seed, kernels=kernels)


def load_ours(folder: Path, *, dtype: torch.dtype, device: str) -> Vlm:
    use_device(choose_device(device))
    config = read_config(folder)
    normalization = read_preprocess_config(folder, config).normalization
    kernels = kernels_of(config, dtype, device)
    return load_vlm(folder, config, normalization, dtype=dtype, device=torch.device(device), kernels=kernels)


def kernels_of(config: VlmConfig, dtype: torch.dtype, device: str) -> Kernels:
    """Those that the server would use: fused wherever they can be."""
    return choose("auto", kernel_workload(config.decoder, dtype=dtype, device=torch.device(device)))


def random_transformers_model(folder: Path, *, device: str, seed: int = 0) -> Any:
    """transformers' model of the shape in ``folder``: bfloat16 weights made on the device, of a size that makes
    logits neither flat nor saturated."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                scale = 1.0 if name.endswith("embed_tokens.weight") else parameter[0].numel() ** -0.5
                parameter.normal_(0.0, scale, generator=generator)
            elif "norm" in name:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.normal_(0.0, 0.1, generator=generator)
    return model.eval()


def decoder_bytes_per_step(model: Vlm, dtype: torch.dtype) -> int:
    """Weight bytes that every decode step must read: layers and head, but for the embedding rows it doesn't look up."""
    count, decoder = count_parameters(model.config), model.config.decoder
    head = decoder.vocab_size * decoder.hidden_size
    return (count.decoder_linears + count.decoder_rest + head) * dtype.itemsize


def scratch_folder(num_bytes: int) -> Path | None:
    """A new folder with room for ``num_bytes``, in memory where that has room; nothing when neither has."""
    for root in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        if root.is_dir() and shutil.disk_usage(root).free > num_bytes * 1.2:
            return Path(tempfile.mkdtemp(prefix="sightline-check-", dir=root))
    return None
