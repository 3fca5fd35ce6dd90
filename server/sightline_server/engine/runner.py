"""Executes a StepPlan: encodes images, runs the decoder over packed tokens, draws.

Holds the model, the cache tensors, the encoder cache and the tokens drawn last. Launches steps and waits for none.
Knows no waiting line and no request's end. Suffixes: R rows of the token pool, others as in ``vlm.py``.
"""

import contextlib
import functools
import logging
import math
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sightline_kernels.dispatch import Sample
from sightline_kernels.sample.noise_ahead import NoiseAhead
from sightline_kernels.sample.reference import sample
from sightline_models.compiled_decoder import CompiledDecoder
from sightline_models.images import Pixels
from sightline_models.kv import KvPool
from sightline_models.vlm import Vlm
from sightline_server.engine.batch import StepBatch, build_batch, passes_of_equal_shape
from sightline_server.engine.graphs import DecodeGraphs, EncoderGraphs, Recorder
from sightline_server.engine.sampler import Drawn, Sampled, choose_tokens, draw_numbers, is_plain
from sightline_server.engine.threads import ThreadChooser
from sightline_server.engine.transfer import Arriving, to_device
from sightline_server.engine.types import (
    EngineConfig,
    Prompt,
    Request,
    SamplingParams,
    Sequence,
    Slice,
    StepPlan,
)
from sightline_server.engine.vision_cache import VisionCache

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Results:
    """What a step gave."""

    tokens: Seq[Sampled]
    """One for each slice that samples, in the plan's order."""
    spoiled: Seq[bytes] = ()
    """Keys of the images whose encoder outputs hold a NaN or an infinity."""


class Launched:
    """A step under way, or done."""

    def __init__(self, drawn: Seq[Drawn], encoded: Mapping[bytes, Tensor]) -> None:
        """``drawn``: the draws of the step, in the plan's order. ``encoded``: of each image encoded, the sum of what
        the encoder gave."""
        self._drawn = drawn
        self._images = tuple(encoded)
        sums = [torch.stack(list(encoded.values()))] if encoded else []
        self._arriving = Arriving([*(tensor for part in drawn for tensor in part.tensors), *sums])

    def wait(self) -> Results:
        """Waits for this step, and for no later one."""
        tensors = iter(self._arriving.wait())
        tokens = [token for part in self._drawn for token in part.read([next(tensors) for _ in part.tensors])]
        sums: list[float] = next(tensors).tolist() if self._images else []
        spoiled = [key for key, total in zip(self._images, sums, strict=True) if not math.isfinite(total)]
        return Results(tokens, spoiled)


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
        *,
        max_images_per_step: int,
        recorder: Recorder | None = None,
        compiled: CompiledDecoder | None = None,
    ) -> None:
        """``kv`` holds one block more than ``config.num_blocks``: the last is scratch for padding rows.

        With a ``recorder`` decode steps and image encoding are recorded here and replayed later. ``compiled``, made
        for ``kv``, computes the steps that it takes.
        """
        self._model = model
        self._kv = kv
        self._vision = vision
        self._config = config
        self._device = device
        self._threads = threads
        self._noise = NoiseAhead()
        self._sample = self._sampler()
        # The last row is for padding.
        self._tokens_R = torch.zeros(config.max_running + 1, dtype=torch.int64, device=device)
        self._compiled = compiled
        self._decode_graphs: DecodeGraphs | None = None
        self._encoder_graphs: EncoderGraphs | None = None
        self.num_replayed = 0
        if recorder is not None:
            with torch.inference_mode():
                self._encoder_graphs = EncoderGraphs(model, max_images_per_step, device, recorder)
                if model.decoder.kernels.can_be_recorded:
                    self._decode_graphs = DecodeGraphs(model, kv, self._tokens_R, config, recorder)

    def _sampler(self) -> Sample:
        """The model's, with noise made for several steps where steps follow one another on a CPU."""
        draw = self._model.decoder.kernels.sample
        if draw is not sample or self._device.type != "cpu" or self._config.deterministic:
            return draw
        return functools.partial(sample, noise=self._noise)

    @property
    def vocab_size(self) -> int:
        return self._model.config.decoder.vocab_size

    @torch.inference_mode()
    def launch(self, plan: StepPlan, pixels: Mapping[bytes, Pixels]) -> Launched:
        """Have the plan's tokens computed, after all that was launched before.

        Raises torch.OutOfMemoryError when the device is full, and whatever else a step may fail with; the cache then
        holds nothing new that is published.
        """
        if self._device.type != "cpu" or self._config.deterministic:
            return self._launch(plan, pixels)
        rows = plan.num_tokens + len(plan.encode) * self._model.config.num_image_tokens
        threads = self._threads.choose(rows)
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
        began = time.perf_counter()
        launched = self._launch(plan, pixels)
        self._threads.took(rows, threads, time.perf_counter() - began)
        return launched

    @torch.inference_mode()
    def probe(self) -> None:
        """Compute one token for nobody, and wait for it. Raises what no request is to blame for.

        On a device that is lost, this raises as every step would.
        """
        request = Request(id="probe", prompt=Prompt((0,)), sampling=SamplingParams(max_tokens=1))
        nobody = Sequence(request, [0], blocks=[self._config.num_blocks])
        hidden_TD = self._forward(self._batch((Slice(nobody, 0, 1, samples=True),)))
        largest = float(self._model.logits(hidden_TD).amax())
        if not math.isfinite(largest):
            raise ArithmeticError("The model gives numbers that are not finite whatever it computes.")

    def forget_images(self, keys: Seq[bytes]) -> None:
        """Drop encoder outputs that a failed step left, or that are no numbers."""
        for key in keys:
            self._vision.forget(key)

    def free_memory(self) -> None:
        """Give back what was kept for the next step. Call once an error is gone: it holds what its step allocated."""
        # Of a device that is lost, the next step says so.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()

    def _launch(self, plan: StepPlan, pixels: Mapping[bytes, Pixels]) -> Launched:
        encoded = self._encode(plan.encode, pixels)
        return Launched(self._run(plan), encoded)

    def _run(self, plan: StepPlan) -> list[Drawn]:
        if self._config.deterministic:
            return self._run_row_by_row(plan.slices)
        if self._decode_graphs is not None and self._decode_graphs.take(plan.slices):
            return [self._replay(self._decode_graphs, plan.slices)]
        batch = self._batch(plan.slices)
        sampling = [piece.sequence for piece in plan.slices if piece.samples]
        if self._compiled is not None and self._is_plain_decode(batch) and self._compiled.takes(batch.layout):
            return [self._run_compiled(self._compiled, batch, sampling)]
        hidden_TD = self._forward(batch)
        if not sampling:
            return []
        # Where every row is sampled from, they stand in order.
        if len(batch.sample_rows) < len(hidden_TD):
            rows = to_device(torch.tensor(batch.sample_rows), self._device)
            hidden_TD = hidden_TD[rows]
        return [self._draw(self._model.logits(hidden_TD), sampling)]

    def _run_compiled(self, compiled: CompiledDecoder, batch: StepBatch, sequences: Seq[Sequence]) -> Drawn:
        self._look_up(batch)
        numbers = draw_numbers(sequences)
        places = compiled.num_places
        noise_SX = torch.zeros(len(sequences), places) if numbers.is_greedy else self._noise(*numbers.counters, places)
        try:
            token_ids_S, largest_S, logits_SV = compiled.step(
                batch.token_ids_T, batch.positions_T, batch.layout, numbers.temperature_S, noise_SX
            )
        except Exception:
            # A trial reads prompts again, which the program has no part in: it would never be found out.
            log.error("the compiled decode step failed, and isn't used any more")
            self._compiled = None
            raise
        if numbers.has_filter or not all(is_plain(sequence) for sequence in sequences):
            # Some ask for more than the program knows: all are drawn again.
            return self._draw(logits_SV, sequences)
        return self._keep(Drawn(tuple(sequences), token_ids_S, largest_S))

    def _replay(self, graphs: DecodeGraphs, slices: Seq[Slice]) -> Drawn:
        self.num_replayed += 1
        token_ids_S, largest_S, logits_SV = graphs.run(slices)
        sequences = [piece.sequence for piece in slices]
        if all(is_plain(sequence) for sequence in sequences):
            return Drawn(tuple(sequences), token_ids_S, largest_S)
        # Some ask for more than was recorded: all are drawn again, the others to the same tokens.
        return self._draw(logits_SV, sequences)

    def _run_row_by_row(self, slices: Seq[Slice]) -> list[Drawn]:
        """Passes of one shape. Logits of a full pass, then every row drawn alone: no shape depends on batch mates."""
        drawn: dict[int, Drawn] = {}
        for group in passes_of_equal_shape(slices):
            batch = self._batch(group)
            hidden_TD = self._forward(batch)
            if not batch.sample_rows:
                continue
            logits_TV = self._model.logits(hidden_TD)
            for row, piece in zip(batch.sample_rows, (piece for piece in group if piece.samples), strict=True):
                drawn[id(piece.sequence)] = self._draw(logits_TV[row : row + 1], [piece.sequence])
        return [drawn[id(piece.sequence)] for piece in slices if piece.samples]

    def _draw(self, logits_SV: Tensor, sequences: Seq[Sequence]) -> Drawn:
        return self._keep(choose_tokens(logits_SV, sequences, self._sample))

    def _keep(self, drawn: Drawn) -> Drawn:
        """Where the next step is launched before the host knows these tokens, have it find them."""
        if self._config.overlap:
            rows = to_device(torch.tensor([sequence.row for sequence in drawn.sequences]), self._device)
            self._tokens_R.index_copy_(0, rows, drawn.token_ids_S)
        return drawn

    def _encode(self, keys: Seq[bytes], pixels: Mapping[bytes, Pixels]) -> dict[bytes, Tensor]:
        """Have images encoded; the sum of each one's output, which is finite where all of it is."""
        # One image a pass in deterministic mode, where no shape may depend on batch mates.
        groups = [[key] for key in keys] if self._config.deterministic else [list(keys)] * bool(keys)
        sums: dict[bytes, Tensor] = {}
        while groups:
            group = groups.pop(0)
            try:
                sums |= self._encode_group(group, pixels)
            except torch.OutOfMemoryError:
                if len(group) == 1:
                    raise
                groups = [[key] for key in group]
        return sums

    def _encode_group(self, group: Seq[bytes], pixels: Mapping[bytes, Pixels]) -> dict[bytes, Tensor]:
        stacked_NYXC = to_device(torch.from_numpy(np.stack([pixels[key] for key in group])), self._device)
        if self._encoder_graphs is not None and self._encoder_graphs.take(len(group)):
            encoded_NLD = self._encoder_graphs.run(stacked_NYXC)
        else:
            encoded_NLD = self._model.encode_images(stacked_NYXC)
        for key, encoded_LD in zip(group, encoded_NLD, strict=True):
            # A copy of its own: a view would keep the whole batch alive.
            self._vision.put(key, encoded_LD.clone())
        return dict(zip(group, encoded_NLD.sum(dim=(1, 2), dtype=torch.float32), strict=True))

    def _batch(self, slices: Seq[Slice]) -> StepBatch:
        return build_batch(
            slices,
            block_size=self._config.block_size,
            scratch_block=self._config.num_blocks,
            device=self._device,
            row_invariant=self._config.deterministic,
        )

    @staticmethod
    def _is_plain_decode(batch: StepBatch) -> bool:
        """Whether every row is a text token that another one is drawn after."""
        return not batch.images and len(batch.sample_rows) == len(batch.token_ids_T)

    def _look_up(self, batch: StepBatch) -> None:
        """Fill in the tokens that only the device knows."""
        if batch.unknown is not None:
            rows, places = batch.unknown
            batch.token_ids_T.index_copy_(0, rows, self._tokens_R[places])

    def _forward(self, batch: StepBatch) -> Tensor:
        self._look_up(batch)
        hidden_TD = self._model.embed(batch.token_ids_T)
        for part in batch.images:
            encoded_LD = self._vision.get(part.key)
            hidden_TD[part.row : part.row + part.length] = encoded_LD[part.offset : part.offset + part.length]
        normed_TD: Tensor = self._model(hidden_TD, batch.positions_T, self._kv, batch.layout)
        return normed_TD
