"""Executes a StepPlan: encodes images, runs the decoder over packed tokens, samples.

Holds the model, the cache tensors and the encoder cache. Knows no waiting line and no request's end.
"""

import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from sightline_models.images import Pixels
from sightline_models.kv import KvPool
from sightline_models.vlm import Vlm
from sightline_server.engine.batch import StepBatch, build_batch, passes_of_equal_shape
from sightline_server.engine.sampler import Sampled, choose_tokens
from sightline_server.engine.threads import ThreadChooser
from sightline_server.engine.transfer import to_device
from sightline_server.engine.types import EngineConfig, Slice, StepPlan
from sightline_server.engine.vision_cache import VisionCache


class Runner:
    """The device's side of the engine."""

    def __init__(
        self,
        model: Vlm,
        kv: KvPool,
        vision: VisionCache[Tensor],
        config: EngineConfig,
        device: torch.device,
        threads: ThreadChooser,
    ) -> None:
        """``kv`` holds one block more than ``config.num_blocks``: the last is scratch for padding rows."""
        self._model = model
        self._kv = kv
        self._vision = vision
        self._config = config
        self._device = device
        self._threads = threads

    @torch.inference_mode()
    def run(self, plan: StepPlan, pixels: Mapping[bytes, Pixels]) -> list[Sampled]:
        """Compute the plan's tokens; a sampled token for each slice that samples, in the plan's order.

        Raises torch.OutOfMemoryError when the device is full; the cache then holds nothing new that is published.
        """
        if self._device.type != "cpu" or self._config.deterministic:
            return self._run(plan, pixels)
        rows = plan.num_tokens + len(plan.encode) * self._model.config.num_image_tokens
        threads = self._threads.choose(rows)
        torch.set_num_threads(threads)
        began = time.perf_counter()
        sampled = self._run(plan, pixels)
        self._threads.took(rows, threads, time.perf_counter() - began)
        return sampled

    def _run(self, plan: StepPlan, pixels: Mapping[bytes, Pixels]) -> list[Sampled]:
        self._encode(plan.encode, pixels)
        sampling = [piece.sequence for piece in plan.slices if piece.samples]
        if not self._config.deterministic:
            batch = self._batch(plan.slices)
            hidden_TD = self._forward(batch)
            if not sampling:
                return []
            rows = to_device(torch.tensor(batch.sample_rows), self._device)
            return choose_tokens(self._model.logits(hidden_TD[rows]), sampling)
        sampled: dict[int, Sampled] = {}
        for group in passes_of_equal_shape(plan.slices):
            batch = self._batch(group)
            hidden_TD = self._forward(batch)
            if not batch.sample_rows:
                continue
            # Logits of a full pass, then every row sampled alone: no shape depends on batch mates.
            logits_TV = self._model.logits(hidden_TD)
            for row, piece in zip(batch.sample_rows, (piece for piece in group if piece.samples), strict=True):
                sampled[id(piece.sequence)] = choose_tokens(logits_TV[row : row + 1], [piece.sequence])[0]
        return [sampled[id(sequence)] for sequence in sampling]

    def _encode(self, keys: Seq[bytes], pixels: Mapping[bytes, Pixels]) -> None:
        if not keys:
            return
        # One image a pass in deterministic mode, where no shape may depend on batch mates.
        size = 1 if self._config.deterministic else len(keys)
        for first in range(0, len(keys), size):
            group = keys[first : first + size]
            stacked = torch.from_numpy(np.stack([pixels[key] for key in group]))
            encoded_NLD = self._model.encode_images(to_device(stacked, self._device))
            for key, encoded_LD in zip(group, encoded_NLD, strict=True):
                # A copy of its own: a view would keep the whole batch alive.
                self._vision.put(key, encoded_LD.clone())

    def _batch(self, slices: Seq[Slice]) -> StepBatch:
        return build_batch(
            slices,
            block_size=self._config.block_size,
            scratch_block=self._config.num_blocks,
            device=self._device,
            row_invariant=self._config.deterministic,
        )

    def _forward(self, batch: StepBatch) -> Tensor:
        hidden_TD = self._model.embed(batch.token_ids_T)
        for part in batch.images:
            encoded_LD = self._vision.get(part.key)
            hidden_TD[part.row : part.row + part.length] = encoded_LD[part.offset : part.offset + part.length]
        normed_TD: Tensor = self._model(hidden_TD, batch.positions_T, self._kv, batch.layout)
        return normed_TD
