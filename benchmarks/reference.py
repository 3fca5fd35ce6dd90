"""The reference's side of the gate: what transformers answers in float32, and how far our logits are from its own.

A program of its own, because it loads torch and several models; the bench reads the JSON it writes. Logits are
teacher-forced: both sides score the prompts followed by the reference's greedy answers, ours through prefill and
paged decode steps. Knows nothing of servers or speed.
"""

import argparse
import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from benchmarks.gate import ANSWER_LEN
from benchmarks.gpu.oracle import Probe, errors, our_logits, their_logits
from sightline_kernels.int8_linear import reference as int8
from sightline_models.config import VlmConfig, read_config
from sightline_models.images import prepare, read_preprocess_config
from sightline_models.vlm import Vlm
from sightline_models.weights import load_vlm
from sightline_server import settings as settings_table
from sightline_server.engine.load import choose_dtype, choose_kernels

QUESTIONS = ("Describe the picture.", "How many objects are there?", "What colour is the largest thing?")
SHAPES = (
    (("ellipse", "red", (0.10, 0.15, 0.40, 0.45)), ("rectangle", "blue", (0.55, 0.50, 0.85, 0.80))),
    (("rectangle", "green", (0.15, 0.20, 0.45, 0.50)),),
    (
        ("ellipse", "orange", (0.05, 0.05, 0.35, 0.35)),
        ("rectangle", "black", (0.50, 0.10, 0.90, 0.45)),
        ("ellipse", "purple", (0.30, 0.55, 0.75, 0.95)),
    ),
)
"""Of each picture: what is drawn, in shares of its side."""


def draw_pictures(side: int) -> list[Image.Image]:
    """One a question, of the side that the tower sees, so that nobody has to resize it."""
    pictures = []
    for shapes in SHAPES:
        picture = Image.new("RGB", (side, side), "white")
        draw = ImageDraw.Draw(picture)
        for shape, colour, box in shapes:
            getattr(draw, shape)(tuple(round(share * side) for share in box), fill=colour)
        pictures.append(picture)
    return pictures


def as_png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


@torch.inference_mode()
def greedy(model: Any, processor: Any, picture: Image.Image, question: str) -> tuple[Tensor, list[dict[str, Any]]]:
    """The ids of prompt and greedy answer, and of each step the text so far and how near the second best was."""
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    out = model.generate(
        **inputs, do_sample=False, max_new_tokens=ANSWER_LEN, return_dict_in_generate=True, output_logits=True
    )
    answer = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    steps = []
    for length, logits_1V in enumerate(out.logits, start=1):
        best, second = logits_1V[0].float().topk(2).values.tolist()
        text = processor.tokenizer.decode(answer[:length], skip_special_tokens=True)
        steps.append({"text": text, "margin": best - second})
    return out.sequences[0], steps


def make_probe(sequence_T: Tensor, picture: Image.Image, folder: Path, config: VlmConfig) -> Probe:
    """Prompt and answer with the pixels that our own preprocessing makes of the picture."""
    pixels = prepare(picture, read_preprocess_config(folder, config)).pixels
    start = int((sequence_T == config.image_token_id).nonzero()[0, 0])
    return Probe(sequence_T, torch.from_numpy(pixels.copy()), start)


def load_ours(folder: Path, dtype: str, quantize: str) -> tuple[Vlm, torch.dtype]:
    """Our model as the server would load it on a CPU with these settings."""
    settings = settings_table.load({"dtype": dtype, "quantize": quantize, "device": "cpu"}, environ={})
    config, device = read_config(folder), torch.device("cpu")
    torch_dtype = choose_dtype(settings.dtype, config, device)
    kernels = choose_kernels(settings, config, device, torch_dtype, settings.quantize)
    normalization = read_preprocess_config(folder, config).normalization
    model = load_vlm(
        folder,
        config,
        normalization,
        dtype=torch_dtype,
        device=device,
        quantize=settings.quantize,
        kernels=kernels,
    )
    return model, torch_dtype


def round_to_int8(model: Any) -> None:
    """Round the decoder's linear weights of transformers' model to what int8 can hold; it computes in float32."""
    for module in model.model.language_model.layers.modules():
        if isinstance(module, nn.Linear):
            codes_OI, absmax_O = int8.quantize(module.weight.data.half())
            module.weight.data.copy_(int8.dequantize(codes_OI, absmax_O, torch.float32))


def compare(folder: Path, kinds: list[tuple[str, str]]) -> dict[str, Any]:
    """All of it: the answers, and for each (dtype, quantize) of ours the errors against what it has to equal."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    def theirs(dtype: torch.dtype) -> Any:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()

    config = read_config(folder)
    normalization = read_preprocess_config(folder, config).normalization
    mean, std = torch.tensor(normalization.mean), torch.tensor(normalization.std)
    processor, float32 = AutoProcessor.from_pretrained(folder), theirs(torch.float32)
    answers, probes = [], []
    for picture, question in zip(draw_pictures(config.vision.image_size), QUESTIONS, strict=True):
        sequence_T, steps = greedy(float32, processor, picture, question)
        png = base64.b64encode(as_png(picture)).decode()
        answers.append({"question": question, "png": png, "steps": steps})
        probes.append(make_probe(sequence_T, picture, folder, config))

    def scored(model: Any) -> list[Tensor]:
        return their_logits(model, probes, config, mean, std)

    oracle = scored(float32)
    references = {"none": oracle}
    half = scored(theirs(torch.bfloat16))
    if any(quantize == "int8" for _, quantize in kinds):
        # Last, since it spoils the float32 model.
        round_to_int8(float32)
        references["int8"] = scored(float32)
    told = []
    for dtype, quantize in kinds:
        model, torch_dtype = load_ours(folder, dtype, quantize)
        rows = our_logits(model, probes, torch_dtype, "cpu")
        told.append(
            {
                "dtype": dtype,
                "quantize": quantize,
                "computes_in": str(torch_dtype).removeprefix("torch."),
                "against_reference": errors(rows, references[quantize]),
                "against_float32": errors(rows, oracle),
            }
        )
    return {"answers": answers, "logits": told, "transformers_bfloat16": errors(half, oracle)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kind", action="append", required=True, metavar="DTYPE/QUANTIZE")
    args = parser.parse_args()
    kinds = [(dtype, quantize) for dtype, _, quantize in (kind.partition("/") for kind in args.kind)]
    args.out.write_text(json.dumps(compare(args.model, kinds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
