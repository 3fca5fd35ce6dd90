"""transformers as the reference: random LLaVA checkpoints saved by it, its logits, and ours over paged steps.

Knows both sides' model code. Knows nothing of the engine: steps are laid out here by hand, with shuffled blocks.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from sightline_kernels.layout import PagedLayout
from sightline_models.config import Normalization, read_config
from sightline_models.kv import KvPool
from sightline_models.quantization_config import Quantization
from sightline_models.vlm import Vlm
from sightline_models.weights import load_vlm

CLIP_NORMALIZATION = Normalization(
    mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711), rescale_factor=1 / 255
)
IMAGE_TOKEN = 4

Names = Literal["saved", "new", "published"]
"""What transformers 5 saves by default; its own module names; llava-1.5-hf's."""


@dataclass(frozen=True)
class Shape:
    vision: dict[str, Any]
    text: dict[str, Any]
    llava: dict[str, Any] = field(default_factory=dict)
    names: Names = "saved"
    shard_size: str = "5GB"


@dataclass(frozen=True)
class Case:
    """One prompt: token ids with placeholders in place, and the pictures they stand for."""

    token_ids: tuple[int, ...]
    pixels_NYXC: Tensor

    def __len__(self) -> int:
        return len(self.token_ids)


def save_random(shape: Shape, folder: Path, seed: int = 0) -> LlavaForConditionalGeneration:
    """Make a random model in transformers, save it as ``shape`` says, return it (float32)."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape.vision),
        text_config=LlamaConfig(**shape.text),
        image_token_index=IMAGE_TOKEN,
        **shape.llava,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(float("norm" in name and name.endswith("weight")), 0.2)
            else:
                # Logits that spread by a few units, attention that is far from uniform.
                parameter.normal_(0.0, 2.0 / math.sqrt(parameter[0].numel()))
    model.save_pretrained(folder, max_shard_size=shape.shard_size, save_original_format=shape.names != "new")
    if shape.names == "published":
        _rename_to_published(folder)
    return model


def _rename_to_published(folder: Path) -> None:
    """The tower of llava-1.5-hf has one more level in its names than transformers 5 saves."""
    files = list(folder.glob("*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as opened:
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        save_file({_published(name): weight for name, weight in weights.items()}, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {_published(name): file for name, file in content["weight_map"].items()}
        index.write_text(json.dumps(content))


def _published(name: str) -> str:
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def make_case(model: LlavaForConditionalGeneration, *, images: int, text: int, seed: int) -> Case:
    """Random text around ``images`` pictures of noise."""
    generator = np.random.default_rng(seed)
    config = model.config
    per_image = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    per_image += config.vision_feature_select_strategy == "full"
    words = generator.integers(IMAGE_TOKEN + 1, config.text_config.vocab_size, (images + 1, text)).tolist()
    token_ids = [1, *words[0]]
    for run in words[1:]:
        token_ids += [IMAGE_TOKEN] * per_image + run
    side = config.vision_config.image_size
    pixels = torch.from_numpy(generator.integers(0, 256, (images, side, side, 3), dtype=np.uint8))
    return Case(tuple(token_ids), pixels)


def reference_logits(model: LlavaForConditionalGeneration, case: Case) -> Tensor:
    """transformers' logits_TV for the whole prompt in one pass."""
    n = CLIP_NORMALIZATION
    pixels = (case.pixels_NYXC.float() * n.rescale_factor - torch.tensor(n.mean)) / torch.tensor(n.std)
    token_ids = torch.tensor([case.token_ids])
    with torch.inference_mode():
        output = model(
            input_ids=token_ids,
            attention_mask=torch.ones_like(token_ids),
            pixel_values=pixels.permute(0, 3, 1, 2).to(model.dtype) if len(pixels) else None,
        )
    return output.logits[0].float()


def load(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    quantize: Quantization = "none",
    quantize_vision: bool = False,
) -> Vlm:
    return load_vlm(
        folder,
        read_config(folder),
        CLIP_NORMALIZATION,
        dtype=dtype,
        device=torch.device(device),
        quantize=quantize,
        quantize_vision=quantize_vision,
    )


class PagedRun:
    """Prompts computed by our model step by step, their keys scattered over shuffled blocks of one pool."""

    def __init__(self, vlm: Vlm, cases: list[Case], *, block_size: int = 4, seed: int = 0) -> None:
        self.vlm, self.cases, self.block_size = vlm, cases, block_size
        needed = [-(-len(case) // block_size) for case in cases]
        shuffled = np.random.default_rng(seed).permutation(sum(needed)) + 1
        self.blocks = np.split(shuffled.astype(np.int64), np.cumsum(needed)[:-1])
        weight = vlm.decoder.embed_tokens.weight
        self.device = weight.device
        self.kv = KvPool.allocate(
            vlm.config.decoder,
            num_blocks=sum(needed) + 1,
            block_size=block_size,
            dtype=weight.dtype,
            device=self.device,
        )
        self.hidden = [self._embed(case) for case in cases]
        self.done = [0] * len(cases)
        self.logits: list[list[Tensor]] = [[] for _ in cases]

    def _embed(self, case: Case) -> Tensor:
        with torch.inference_mode():
            token_ids_T = torch.tensor(case.token_ids, device=self.device)
            hidden_TD = self.vlm.embed(token_ids_T)
            if len(case.pixels_NYXC):
                image_rows = self.vlm.encode_images(case.pixels_NYXC.to(self.device)).flatten(0, 1)
                hidden_TD[token_ids_T == self.vlm.config.image_token_id] = image_rows
            return hidden_TD

    def step(self, lengths: dict[int, int], *, row_invariant: bool = False) -> None:
        """Compute the next ``lengths[i]`` tokens of case ``i``, all in one packed step."""
        order = sorted(lengths, key=lambda case: lengths[case] > 1)
        query_lens = tuple(lengths[case] for case in order)
        context_lens = tuple(self.done[case] + lengths[case] for case in order)
        width = max(len(self.blocks[case]) for case in order)
        table = np.zeros((len(order), width), np.int32)
        positions, slots, hidden = [], [], []
        for row, case in enumerate(order):
            table[row, : len(self.blocks[case])] = self.blocks[case]
            where = np.arange(self.done[case], self.done[case] + lengths[case])
            positions.append(where)
            slots.append(self.blocks[case][where // self.block_size] * self.block_size + where % self.block_size)
            hidden.append(self.hidden[case][self.done[case] : self.done[case] + lengths[case]])
        layout = PagedLayout(
            block_table_BN=torch.from_numpy(table).to(self.device),
            cu_seqlens_B1=torch.tensor([0, *query_lens]).cumsum(0).int().to(self.device),
            context_len_B=torch.tensor(context_lens, dtype=torch.int32).to(self.device),
            slots_T=torch.from_numpy(np.concatenate(slots)).to(self.device),
            query_lens=query_lens,
            context_lens=context_lens,
            num_decodes=sum(length == 1 for length in query_lens),
            block_size=self.block_size,
            row_invariant=row_invariant,
        )
        with torch.inference_mode():
            positions_T = torch.from_numpy(np.concatenate(positions)).to(self.device)
            normed_TD = self.vlm(torch.cat(hidden), positions_T, self.kv, layout)
            for case, logits_TV in zip(order, self.vlm.logits(normed_TD).split(query_lens), strict=True):
                self.logits[case].append(logits_TV.cpu())
        for case in order:
            self.done[case] += lengths[case]

    def finish(self, chunk: int) -> None:
        """Run everything that is left, at most ``chunk`` tokens of each case a step."""
        while left := {i: len(case) - self.done[i] for i, case in enumerate(self.cases) if self.done[i] < len(case)}:
            self.step({i: min(chunk, count) for i, count in left.items()})

    def result(self, case: int) -> Tensor:
        """logits_TV of everything computed so far."""
        return torch.cat(self.logits[case])
