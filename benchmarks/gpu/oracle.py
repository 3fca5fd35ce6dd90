"""Stage oracle: how far our bfloat16 logits are from float32's, beside how far transformers' own bfloat16 ones are.

The oracle is transformers in float32 on the same weights. Ours runs all prompts packed in one prefill, then decodes
the last tokens one by one through the paged cache; teacher-forced, so one slip doesn't change what follows.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.models import load_ours, random_transformers_model, scratch_folder
from benchmarks.gpu.paged import PagedSequences
from benchmarks.gpu.stage import Stage, run
from sightline_kernels.dispatch import Mode
from sightline_models import presets
from sightline_models.config import VlmConfig, read_config
from sightline_models.images import read_preprocess_config
from sightline_models.parameter_count import count_parameters
from sightline_models.vlm import Vlm

DECODED = 8
"""Tokens of each prompt that go through decode steps."""
MOST_OVER_REFERENCE = 1.25
"""Our bfloat16 error may be this many times transformers'."""
MOST_FLOAT32_ERROR = 1e-3
"""Relative; float32 sums in another order over 32 layers stay far below."""


@dataclass(frozen=True)
class Probe:
    """One prompt: token ids with an image's placeholders at ``image_start``, or none."""

    token_ids_T: Tensor
    pixels_YXC: Tensor | None
    image_start: int


def make_probes(config: VlmConfig, text_lens: tuple[int, ...], device: str, seed: int = 0) -> list[Probe]:
    """A prompt for each length: every one but the last with a picture of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    size, start = config.vision.image_size, 4
    probes = []
    for index, text_len in enumerate(text_lens):
        text_T = torch.randint(0, config.decoder.vocab_size, (text_len,), generator=generator)
        text_T[text_T == config.image_token_id] = 0
        if index == len(text_lens) - 1:
            probes.append(Probe(text_T.to(device), None, 0))
            continue
        image_T = torch.full((config.num_image_tokens,), config.image_token_id)
        pixels = torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8)
        ids_T = torch.cat([text_T[:start], image_T, text_T[start:]])
        probes.append(Probe(ids_T.to(device), pixels.to(device), start))
    return probes


def text_rows(probe: Probe, config: VlmConfig) -> Tensor:
    """Positions whose logits are compared: all but the picture's."""
    return (probe.token_ids_T != config.image_token_id).nonzero()[:, 0]


@torch.inference_mode()
def their_logits(model: Any, probes: list[Probe], ours: VlmConfig, mean: Tensor, std: Tensor) -> list[Tensor]:
    """Float32 logits at each probe's text rows."""
    rows = []
    for probe in probes:
        inputs = {"input_ids": probe.token_ids_T[None], "attention_mask": torch.ones_like(probe.token_ids_T)[None]}
        if probe.pixels_YXC is not None:
            normalized = (probe.pixels_YXC.float() / 255 - mean) / std
            inputs["pixel_values"] = normalized.permute(2, 0, 1)[None]
        rows.append(model(**inputs).logits[0, text_rows(probe, ours)].float())
    return rows


@torch.inference_mode()
def our_logits(model: Vlm, probes: list[Probe], dtype: torch.dtype, device: str) -> list[Tensor]:
    """The same from ours: one packed prefill of everything but the last tokens, then decode steps for those."""
    config = model.config
    lengths = [len(probe.token_ids_T) for probe in probes]
    cache = PagedSequences(config.decoder, num_sequences=len(probes), max_len=max(lengths), dtype=dtype, device=device)
    hidden = [_hidden(model, probe) for probe in probes]
    prefilled = tuple(length - DECODED for length in lengths)
    layout, positions_T = cache.layout(prefilled, prefilled)
    packed_TD = torch.cat([rows[:length] for rows, length in zip(hidden, prefilled, strict=True)])
    steps = [list(model(packed_TD, positions_T, cache.kv, layout).split(prefilled))]
    for step in range(DECODED):
        contexts = tuple(length + step + 1 for length in prefilled)
        layout, positions_T = cache.layout((1,) * len(probes), contexts)
        packed_TD = torch.stack([rows[at] for rows, at in zip(hidden, positions_T.tolist(), strict=True)])
        steps.append(list(model(packed_TD, positions_T, cache.kv, layout).split(1)))
    whole = [torch.cat([step[index] for step in steps]) for index in range(len(probes))]
    return [model.logits(rows[text_rows(probe, config)]) for rows, probe in zip(whole, probes, strict=True)]


def _hidden(model: Vlm, probe: Probe) -> Tensor:
    rows_TD = model.embed(probe.token_ids_T)
    if probe.pixels_YXC is not None:
        image_ID = model.encode_images(probe.pixels_YXC[None])[0]
        rows_TD = rows_TD.clone()
        rows_TD[probe.image_start : probe.image_start + len(image_ID)] = image_ID
    return rows_TD


def errors(rows: list[Tensor], oracle: list[Tensor]) -> dict[str, float]:
    """How ``rows`` differ from ``oracle``: relative L2, largest difference, equal greedy choices, mean KL in nats."""
    ours_RV, true_RV = torch.cat(rows).double(), torch.cat(oracle).double()
    divergence = F.kl_div(ours_RV.log_softmax(-1), true_RV.log_softmax(-1), log_target=True, reduction="none")
    return {
        "relative_l2": float((ours_RV - true_RV).norm() / true_RV.norm()),
        "max_abs": float((ours_RV - true_RV).abs().max()),
        "same_greedy": float((ours_RV.argmax(-1) == true_RV.argmax(-1)).double().mean()),
        "mean_kl": float(divergence.sum(-1).mean()),
        "rows": len(ours_RV),
    }


def compare(shape: str, device: str, folder: Path) -> dict[str, Any]:
    """All errors of one shape; ``folder`` is where its weights are written for ours to load."""
    presets.write_preset(shape, folder)
    config = read_config(folder)
    normalization = read_preprocess_config(folder, config).normalization
    mean, std = (torch.tensor(values, device=device) for values in (normalization.mean, normalization.std))
    probes = make_probes(config, (48, 64, 24, 40), device)
    theirs = random_transformers_model(folder, device=device)
    theirs_bfloat16 = their_logits(theirs, probes, config, mean, std)
    theirs.save_pretrained(folder)
    oracle = their_logits(theirs.float(), probes, config, mean, std)
    del theirs
    told: dict[str, Any] = {"shape": shape, "transformers_bfloat16": errors(theirs_bfloat16, oracle)}
    runs: list[tuple[str, torch.dtype, Mode]] = [("ours_bfloat16", torch.bfloat16, "auto")]
    if device != "cpu":
        # A CPU has no other kernels.
        runs.append(("ours_bfloat16_reference", torch.bfloat16, "reference"))
    for name, dtype, mode in [*runs, ("ours_float32", torch.float32, "auto")]:
        if device != "cpu":
            torch.cuda.empty_cache()
        model = load_ours(folder, dtype=dtype, device=device, mode=mode)
        told[name] = errors(our_logits(model, probes, dtype, device), oracle)
        del model
    told["over_reference"] = told["ours_bfloat16"]["relative_l2"] / told["transformers_bfloat16"]["relative_l2"]
    told["passed"] = (
        told["over_reference"] <= MOST_OVER_REFERENCE and told["ours_float32"]["relative_l2"] <= MOST_FLOAT32_ERROR
    )
    return told


def bytes_needed(shape: str) -> tuple[int, int]:
    """Disk bytes of the checkpoint and device bytes of the float32 oracle with room for activations."""
    with tempfile.TemporaryDirectory(prefix="sightline-shape-") as folder:
        presets.write_preset(shape, Path(folder))
        count = count_parameters(read_config(Path(folder))).total
    # The last tower layer and its norm are in the checkpoint though ours never builds them.
    count = int(count * 1.05)
    return 2 * count, 4 * count + 2 * 2**30


def measure(stage: Stage) -> None:
    # A float32 product in tf32 would be no oracle.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    shapes = ["tiny"] if not stage.on_gpu else ["llava-110m"] if stage.quick else ["llava-110m", "llava-1.5-7b"]
    compared: list[dict[str, Any]] = []
    for shape in shapes:
        on_disk, on_device = bytes_needed(shape)
        if stage.on_gpu and torch.cuda.mem_get_info()[0] < on_device:
            stage.save(skipped=f"{shape}: the float32 oracle needs {on_device / 2**30:.0f} GiB of GPU memory")
            continue
        folder = scratch_folder(on_disk)
        if folder is None:
            stage.save(skipped=f"{shape}: no folder has {on_disk / 2**30:.0f} GiB free for its weights")
            continue
        try:
            told = compare(shape, stage.device, folder)
        finally:
            shutil.rmtree(folder)
        compared.append(told)
        stage.save(shapes=compared)
        stage.say(
            f"{shape}: bfloat16 error {told['ours_bfloat16']['relative_l2']:.2e}, transformers' "
            f"{told['transformers_bfloat16']['relative_l2']:.2e} ({told['over_reference']:.2f}x); ours in float32 "
            f"{told['ours_float32']['relative_l2']:.1e}"
        )
    wrong = [told["shape"] for told in compared if not told["passed"]]
    if wrong:
        raise SystemExit(f"The error is larger than allowed on {', '.join(wrong)}: no speed of these means anything.")


if __name__ == "__main__":
    run("oracle", measure)
