"""Stage bitsandbytes: its own layers inside our decoder, beside ours, in the same CUDA graphs.

What differs is the linear layers' kernels alone. Its int8 runs without outlier columns (threshold 0), which is its
faster way and the only one that a graph can hold. Both are timed in turn.
"""

import importlib.metadata
import logging
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.decode import DTYPE, DecodeStep, capture_call, free_up
from benchmarks.gpu.models import random_model
from benchmarks.gpu.stage import Stage, first_line, run, times_ms
from sightline_models.quantization_config import Quantization
from sightline_models.vlm import Vlm
from sightline_models.weights import linears_to_quantize

BATCHES = (1, 8, 32)
TURNS = 3


def replace_linears(model: Vlm, make: Callable[[Tensor], nn.Module]) -> None:
    """Put what ``make`` makes of its weight in place of each of the decoder's linears, one at a time."""
    wanted = linears_to_quantize(model, vision=False)
    places = [
        (parent, name, child)
        for parent in model.decoder.layers.modules()
        for name, child in parent.named_children()
        if child in wanted
    ]
    wanted.clear()
    while places:
        parent, name, child = places.pop()
        assert child.bias is None, f"{name} has a bias"
        weight_OI = child.weight.detach()
        # A CPU has it packed.
        setattr(parent, name, make(weight_OI.to_dense() if weight_OI.is_mkldnn else weight_OI))
        del child


def int8_layer(weight_OI: Tensor) -> nn.Module:
    import bitsandbytes as bnb

    rows, columns = weight_OI.shape
    with torch.device("meta"):
        layer = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=0.0)
    # As its own ``to`` does for weights that come from the CPU.
    codes_OI, scales_O, _ = bnb.functional.int8_vectorwise_quant(weight_OI.half())
    layer.weight = bnb.nn.Int8Params(codes_OI, requires_grad=False, has_fp16_weights=False, CB=codes_OI, SCB=scales_O)
    return layer.eval()


def nf4_layer(weight_OI: Tensor) -> nn.Module:
    import bitsandbytes as bnb

    rows, columns = weight_OI.shape
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=DTYPE, quant_type="nf4")
    packed_Q1, state = bnb.functional.quantize_4bit(weight_OI, blocksize=64, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(
        packed_Q1,
        requires_grad=False,
        quant_state=state,
        blocksize=64,
        compress_statistics=False,
        quant_type="nf4",
        bnb_quantized=True,
    )
    layer.quant_state = state
    return layer.eval()


LAYERS: dict[Quantization, Callable[[Tensor], nn.Module]] = {"int8": int8_layer, "nf4": nf4_layer}


def compare(stage: Stage, quantize: Quantization, batch: int, ours: Vlm, theirs: Vlm) -> dict[str, Any]:
    """Step times of both, in turn, from graphs where both can be captured."""
    steps = [DecodeStep(model, batch, DTYPE, stage.device) for model in (ours, theirs)]
    row: dict[str, Any] = {"quantization": quantize, "batch": batch, "in_graph": stage.on_gpu}
    calls: list[Callable[[], object]] = list(steps)
    if stage.on_gpu:
        try:
            calls = [capture_call(step).replay for step in steps]
        except RuntimeError as error:
            row |= {"in_graph": False, "not_captured": first_line(error)}
            calls = list(steps)
    spent: list[list[float]] = [[], []]
    repeats = 20 if stage.on_gpu else 2
    for turn in range(TURNS):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            spent[which].append(statistics.median(times_ms(calls[which], stage.device, warmup=2, repeats=repeats)))
    ratios = [theirs_ms / ours_ms for ours_ms, theirs_ms in zip(*spent, strict=True)]
    row |= {
        "ours_ms": round(statistics.median(spent[0]), 4),
        "theirs_ms": round(statistics.median(spent[1]), 4),
        "theirs_over_ours": round(statistics.median(ratios), 4),
        "least": round(min(ratios), 4),
        "most": round(max(ratios), 4),
    }
    stage.say(
        f"{quantize}, B={batch}: ours {row['ours_ms']:.2f} ms, bitsandbytes' {row['theirs_ms']:.2f} "
        f"({row['theirs_over_ours']:.2f}x, {row['least']:.2f} to {row['most']:.2f})"
    )
    return row


def measure(stage: Stage) -> None:
    try:
        version = importlib.metadata.version("bitsandbytes")
        import bitsandbytes
    except Exception as error:
        # Its import looks for a library that fits the CUDA version, and may fail where the package is there.
        stage.save(skipped=f"not installed: bitsandbytes ({first_line(error)})")
        stage.say(stage.results["skipped"])
        return
    stage.save(shape=stage.shape, version=version, module=bitsandbytes.__name__)
    # It says for every product that it works in float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="bitsandbytes")
    rows: list[dict[str, Any]] = []
    for quantize in ("nf4", "int8"):
        try:
            free_up()
            ours = random_model(stage.shape, dtype=DTYPE, device=stage.device, quantize=quantize)
            theirs = random_model(stage.shape, dtype=DTYPE, device=stage.device)
            with torch.no_grad():
                replace_linears(theirs, LAYERS[quantize])
            free_up()
            for batch in BATCHES if stage.on_gpu else (1,):
                rows.append(compare(stage, quantize, batch, ours, theirs))
                stage.save(rows=rows)
        except Exception as error:
            rows.append({"quantization": quantize, "failed": first_line(error)})
            stage.save(rows=rows)
            stage.say(f"{quantize} could not be measured: {first_line(error)}")


if __name__ == "__main__":
    run("bitsandbytes", measure)
