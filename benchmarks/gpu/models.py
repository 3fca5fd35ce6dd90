"""Models of a named shape for the stages: ours with random weights, and transformers' with the same ones on disk.

Knows checkpoint folders. Knows nothing of what is measured.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from sightline_kernels.dispatch import Kernels, Mode, Workload, choose, explain
from sightline_models import presets
from sightline_models.config import VlmConfig, read_config
from sightline_models.decoder import kernel_workload
from sightline_models.images import read_preprocess_config
from sightline_models.parameter_count import QUANTIZED_BITS, count_parameters
from sightline_models.quantization_config import Quantization
from sightline_models.vlm import Vlm
from sightline_models.weights import load_vlm, random_vlm
from sightline_server.engine.load import choose_device, use_device


def random_model(
    shape: str,
    *,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
    quantize: Quantization = "none",
    mode: Mode = "auto",
) -> Vlm:
    """Ours, made on the device."""
    with tempfile.TemporaryDirectory(prefix="sightline-shape-") as name:
        folder = Path(name)
        presets.write_preset(shape, folder)
        config = read_config(folder)
        normalization = read_preprocess_config(folder, config).normalization
    use_device(choose_device(device))
    return random_vlm(
        config,
        normalization,
        dtype=dtype,
        device=torch.device(device),
        seed=seed,
        quantize=quantize,
        kernels=choose(mode, workload_of(config, dtype, device, quantize)),
    )


def load_ours(folder: Path, *, dtype: torch.dtype, device: str, mode: Mode = "auto") -> Vlm:
    use_device(choose_device(device))
    config = read_config(folder)
    normalization = read_preprocess_config(folder, config).normalization
    kernels = choose(mode, workload_of(config, dtype, device))
    return load_vlm(folder, config, normalization, dtype=dtype, device=torch.device(device), kernels=kernels)


def workload_of(config: VlmConfig, dtype: torch.dtype, device: str, quantize: Quantization = "none") -> Workload:
    return kernel_workload(config.decoder, dtype=dtype, device=torch.device(device), quantization=quantize)


def fused(kernels: Kernels) -> list[str]:
    """The operations that are fused, by the modules that hold them: nobody's word is taken for it."""
    return [name for name, call in vars(kernels).items() if call.__module__.endswith(".fused")]


def not_fused(model: Vlm, dtype: torch.dtype, device: str, quantize: Quantization) -> dict[str, str]:
    """The operations that are not, though ``auto`` takes what it can, each with why."""
    workload = workload_of(model.config, dtype, device, quantize)
    reasons = {choice.operation: choice.reason for choice in explain("auto", workload)}
    taken = fused(choose("auto", workload))
    return {name: reason for name, reason in reasons.items() if name not in taken}


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


def random_transformers_decoder(shape: str, *, device: str) -> Any:
    """transformers' text decoder alone, of the shape's size, in bfloat16: without a picture, its best case."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory(prefix="sightline-shape-") as name:
        presets.write_preset(shape, Path(name))
        config = AutoConfig.from_pretrained(name).get_text_config()
    # Where torch would take cuDNN's attention, every new length costs it 30 ms: ours is kept from that, so is theirs.
    use_device(choose_device(device))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    # Nothing is to end early: answers are as long as they are asked for.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def decoder_bytes_per_step(model: Vlm, dtype: torch.dtype, quantize: Quantization = "none") -> int:
    """Weight bytes that every decode step must read: layers and head, but for the embedding rows it doesn't look up."""
    count, decoder = count_parameters(model.config), model.config.decoder
    head = decoder.vocab_size * decoder.hidden_size
    bits = QUANTIZED_BITS.get(quantize, 8 * dtype.itemsize)
    return int(count.decoder_linears * bits / 8) + (count.decoder_rest + head) * dtype.itemsize


def scratch_folder(num_bytes: int) -> Path | None:
    """A new folder with room for ``num_bytes``, in memory where that has room; nothing when neither has."""
    for root in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        if root.is_dir() and shutil.disk_usage(root).free > num_bytes * 1.2:
            return Path(tempfile.mkdtemp(prefix="sightline-check-", dir=root))
    return None
