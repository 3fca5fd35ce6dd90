"""Which quantization a checkpoint's ``config.json`` states, and whether the one that is asked for goes with it.

Knows the names of schemes and the fields that transformers writes for bitsandbytes. Knows no tensors: which of them
are quantized is read from the weight files (``quantize.py``). Imports no torch.
"""

from typing import Literal

from sightline_models.checkpoint_fields import CheckpointError, Fields

Quantization = Literal["none", "int8", "nf4"]


def read_quantization(top: Fields) -> Quantization:
    """The scheme of the weights on disk. Raises CheckpointError, naming it, for one that this release can't load."""
    if not top.get("quantization_config", None):
        return "none"
    fields = top.section("quantization_config")
    eight, four = fields.flag("load_in_8bit", False), fields.flag("load_in_4bit", False)
    # Early checkpoints of bitsandbytes name no method.
    method = fields.get("quant_method", None) or ("bitsandbytes" if eight or four else None)
    if method != "bitsandbytes":
        raise CheckpointError(
            f"{fields.where('quant_method')} is {method!r}: weights quantized that way can't be loaded, only those of "
            "bitsandbytes in int8 or nf4 can; take the unquantized checkpoint, and --quantize if memory is short"
        )
    if eight == four:
        raise CheckpointError(
            f"{fields.where('load_in_8bit')} and load_in_4bit are both {str(eight).lower()}, so the weights' format "
            "is unknown; fetch config.json again"
        )
    if eight:
        return "int8"
    kind = fields.get("bnb_4bit_quant_type", "fp4")
    if kind != "nf4":
        raise CheckpointError(
            f"{fields.where('bnb_4bit_quant_type')} is {kind!r}: of the 4-bit formats only nf4 can be loaded; take "
            "the unquantized checkpoint with --quantize nf4"
        )
    return "nf4"


def read_compressed_scales(top: Fields) -> bool:
    """Whether the scales of 4-bit weights on disk are quantized once more ("double quantization")."""
    if not top.get("quantization_config", None):
        return False
    return top.section("quantization_config").flag("bnb_4bit_use_double_quant", False)


def choose_quantization(stored: Quantization, asked: Quantization, *, vision: bool = False) -> Quantization:
    """The scheme served when weights ``stored`` so are to be served as ``asked``; none asks for what is stored.

    ``vision`` says whether the tower is to be quantized too, which a file that is quantized has settled.
    """
    if asked not in ("none", stored) and stored != "none":
        raise CheckpointError(
            f"--quantize {asked}: this checkpoint is already quantized, as {stored} (config.json: "
            "quantization_config); leave --quantize out, or take the unquantized checkpoint"
        )
    if vision and stored != "none":
        raise CheckpointError(
            f"--quantize-vision: this checkpoint is already quantized, as {stored}, its tower as the files have it; "
            "leave --quantize-vision out, or take the unquantized checkpoint"
        )
    return stored if asked == "none" else asked
