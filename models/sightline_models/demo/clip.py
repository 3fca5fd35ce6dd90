"""A tiny CLIP over the demo's scenes: how it is trained, and its files, which are open_clip's.

Knows captions of scenes, open_clip's classes, and the state that lets a killed run go on. Knows no conversations, and
of the demo model only what the tensors of its vision tower are called, since a run may start from them.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision": one tower for
pictures and one for texts, trained so that each picture of a batch is nearest to its own text.
"""

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from sightline_models.demo import captions, scenes
from sightline_models.demo.batches import normalized, to_array
from sightline_models.demo.text import BOS, EOS, PAD, to_json, train_tokenizer
from sightline_models.demo.train import Observer

FOLDER = Path(__file__).with_name("clip")
"""Where the bundled one lies."""

SIDE = 96
CONTEXT = 48
MODEL: dict[str, Any] = {
    "embed_dim": 128,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": SIDE, "patch_size": 8, "width": 192, "head_width": 48, "layers": 4, "pool_type": "avg",
    },
    "text_cfg": {
        "context_length": CONTEXT, "vocab_size": 1408, "width": 128, "heads": 4, "layers": 4,
        "pool_type": "eos", "eos_id": EOS, "pad_id": PAD,
        # open_clip takes the folder's own tokenizer when there is any name here, and its own when there is none.
        "hf_tokenizer_name": "sightline-demo-clip",
    },
}  # fmt: skip
"""What `open_clip.CLIP` is built from."""

_RATE = 1e-3
_STARTED_SHARE = 0.3
"""The rate of what a run starts from, as a share of the others."""
_RISE = 40
"""Steps until the rate is reached."""
_WEIGHT_DECAY = 0.1
_SAVE_SECONDS = 60.0


# ---- training -----------------------------------------------------------------------------------------------------


class ClipSteps(Dataset[tuple[Tensor, list[str]]]):
    """Steps of training: pixels uint8 [rows, 3, side, side] and 2 * rows captions, the full ones before the searches.

    A step's pictures follow from the seed and the step alone.
    """

    def __init__(self, seed: int, rows: int) -> None:
        self.seed, self.rows = seed, rows

    def __getitem__(self, step: int) -> tuple[Tensor, list[str]]:
        dice = [random.Random(f"{self.seed}/clip/{step}/{row}") for row in range(self.rows)]
        drawn = [scenes.draw(rng) for rng in dice]
        pixels = torch.stack([to_array(image, SIDE) for image, _ in drawn])
        forms = (captions.full, captions.search)
        return pixels, [form(rng, scene) for form in forms for rng, (_, scene) in zip(dice, drawn, strict=True)]


@dataclass
class _State:
    """What a run is made of at one moment; all that has to be saved."""

    plan: dict[str, Any]
    """What must not change when a run goes on."""
    step: int
    seconds: float
    """Of training: drawing included, start-up not."""
    model: dict[str, Tensor]
    optimizer: dict[str, Any]


def train_clip(
    minutes: float,
    folder: Path,
    *,
    device: str = "cpu",
    seed: int = 1,
    tower: Path | None = None,
    rows: int = 192,
    workers: int = 1,
    target: Path = FOLDER,
    observer: Observer | None = None,
) -> Path:
    """Train for ``minutes`` in steps of ``rows`` pictures, write the model to ``target`` and return that.

    The state is kept in ``folder``: after a kill the same call goes on from there, with the pictures it would have had.
    Each picture has two captions, one that says everything and one that says a part, and is told from the batch's other
    pictures by both. ``tower`` is the folder of a demo checkpoint to start the vision tower from; without it everything
    starts at random. ``workers`` processes draw beside the training; 0 draws between steps.

    Raises ValueError when ``tower`` holds no such tower, or ``folder`` the state of a run with other arguments.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = clip_tokenizer()
    _write_settings(tokenizer, folder)
    plan = {"minutes": minutes, "seed": seed, "rows": rows, "tower": tower and str(tower)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**MODEL)
    optimizer = _optimizer(model.to(device), started=tower is not None)
    state = _load(folder / "state.pt", plan, device)
    if state:
        model.load_state_dict(state.model)
        optimizer.load_state_dict(state.optimizer)
    else:
        if tower:
            load_tower(model, tower)
        state = _State(plan, 0, 0.0, model.state_dict(), optimizer.state_dict())
    _go(model, optimizer, state, minutes * 60, folder, device, workers, observer)
    export_clip(model, tokenizer, target)
    return target


def _go(
    model: Any,
    optimizer: torch.optim.Optimizer,
    state: _State,
    budget: float,
    folder: Path,
    device: str,
    workers: int,
    observer: Observer | None,
) -> None:
    """Step until ``budget`` seconds are used."""
    tokenize, compare = open_clip.get_tokenizer(f"local-dir:{folder}"), open_clip.ClipLoss()
    steps = ClipSteps(state.plan["seed"], state.plan["rows"])
    order = range(state.step, 1 << 30)
    model.train()
    saved = began = time.monotonic()
    for pixels, texts in DataLoader(steps, batch_size=None, sampler=order, num_workers=workers):
        progress = state.seconds / budget
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * min(1.0, (state.step + 1) / _RISE) * (1 + math.cos(math.pi * progress)) / 2
        # torch's fused attention takes longer than the plain one on CPUs, for heads as narrow as these.
        with torch.autocast(torch.device(device).type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            images = model.encode_image(normalized(pixels.to(device), torch.float32), normalize=True)
            told = model.encode_text(tokenize(texts).to(device), normalize=True)
        # Outside of autocast: bfloat16 would round logits of some tens to quarters.
        scale = model.logit_scale.exp()
        full, search = told.float().chunk(2)
        loss = (compare(images.float(), full, scale) + compare(images.float(), search, scale)) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        now = time.monotonic()
        state.step, state.seconds, began = state.step + 1, state.seconds + now - began, now
        if now - saved >= _SAVE_SECONDS:
            saved = now
            _save(state, model, optimizer, folder)
        if observer:
            observer.step("clip", progress, float(loss.detach()), len(pixels))
    _save(state, model, optimizer, folder)


def _optimizer(model: Any, started: bool) -> torch.optim.Optimizer:
    """AdamW that decays matrices only, and moves slower what was ``started`` from another model's tower."""
    groups = [
        {
            "params": [tensor],
            "base": _RATE * (_STARTED_SHARE if started and name.startswith("visual.") and name not in _OWN else 1.0),
            "weight_decay": _WEIGHT_DECAY if tensor.ndim > 1 and "embedding" not in name else 0.0,
        }
        for name, tensor in model.named_parameters()
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)


def _load(path: Path, plan: dict[str, Any], device: str) -> _State | None:
    if not path.exists():
        return None
    state = _State(**torch.load(path, map_location=device, weights_only=True))
    if state.plan != plan:
        raise ValueError(f"{path} is of a run with other arguments. Give {state.plan}, or another folder.")
    return state


def _save(state: _State, model: Any, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write the state so that a kill at any moment leaves the old one or the new one."""
    state.model, state.optimizer = model.state_dict(), optimizer.state_dict()
    new = folder / "state.new"
    torch.save({name: getattr(state, name) for name in _State.__dataclass_fields__}, new)
    new.replace(folder / "state.pt")


# ---- files --------------------------------------------------------------------------------------------------------

_OWN = {"visual.proj", "visual.ln_post.weight", "visual.ln_post.bias"}
"""What a CLIP has of its own in its vision tower: the demo model's ends before."""
_TOWER = "vision_tower.vision_model"
_LAYER = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""A layer's parts, by open_clip's names, as Hugging Face's CLIP names them."""


def load_tower(model: Any, folder: Path) -> None:
    """Start ``model``'s vision tower from the first layers of the tower in ``folder``, a demo checkpoint's.

    Raises ValueError when the checkpoint there has no tower of this shape, FileNotFoundError when there is none.
    """
    try:
        tower = _open_clip_names(load_file(folder / "model.safetensors"), MODEL["vision_cfg"]["layers"])
        missing = model.load_state_dict(tower, strict=False).missing_keys
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{folder} has no tower for this: {error}. Give the folder of a demo checkpoint.") from error
    assert {name for name in missing if name.startswith("visual.")} == _OWN, missing


def _open_clip_names(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A Hugging Face CLIP vision tower, ``layers`` of its layers, by open_clip's names."""
    named = {
        "visual.class_embedding": weights[f"{_TOWER}.embeddings.class_embedding"],
        "visual.conv1.weight": weights[f"{_TOWER}.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": weights[f"{_TOWER}.embeddings.position_embedding.weight"],
    }
    for part in ("weight", "bias"):
        named[f"visual.ln_pre.{part}"] = weights[f"{_TOWER}.pre_layrnorm.{part}"]
        for index in range(layers):
            ours, theirs = f"visual.transformer.resblocks.{index}", f"{_TOWER}.encoder.layers.{index}"
            qkv = [weights[f"{theirs}.self_attn.{name}_proj.{part}"] for name in "qkv"]
            named[f"{ours}.attn.in_proj_{part}"] = torch.cat(qkv)
            for ours_in, theirs_in in _LAYER.items():
                named[f"{ours}.{ours_in}.{part}"] = weights[f"{theirs}.{theirs_in}.{part}"]
    return named


def clip_tokenizer() -> Tokenizer:
    """The demo model's tokenizer, but texts end with the token whose features stand for them."""
    tokenizer = train_tokenizer(MODEL["text_cfg"]["vocab_size"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B:1 </s>:1", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return tokenizer


def export_clip(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``folder``, which open_clip knows as ``local-dir:<folder>``: bfloat16 weights, settings and tokenizer."""
    _write_settings(tokenizer, folder)
    tensors = {name: value.to("cpu", torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors makes its file readable for the owner only


def _write_settings(tokenizer: Tokenizer, folder: Path) -> None:
    """All files but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "model_cfg": MODEL,
        "preprocess_cfg": {
            "size": SIDE,
            "mode": "RGB",
            "mean": open_clip.OPENAI_DATASET_MEAN,
            "std": open_clip.OPENAI_DATASET_STD,
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }
    names = {
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "padding_side": "right",
        "truncation_side": "right", "model_max_length": CONTEXT, "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    for name, fields in (("open_clip_config", settings), ("tokenizer_config", names)):
        (folder / f"{name}.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(to_json(tokenizer), encoding="utf-8")


Preprocess = Callable[[Image.Image], Tensor]
Tokenize = Callable[[Sequence[str]], Tensor]


def load_clip(folder: Path = FOLDER) -> tuple[Any, Preprocess, Tokenize]:
    """The model in ``folder``, as open_clip's users load it, and what makes its inputs.

    Its inputs are a picture's normalized pixels [3, side, side] and texts' tokens [texts, context].

    Raises FileNotFoundError when ``folder`` has no such model.
    """
    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)
