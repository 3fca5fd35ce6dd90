"""Decode steps and image encoding recorded once for each batch size, and replayed.

A replay launches a whole step at once and costs the host the same whatever the step holds. What is recorded works on
tensors that stay where they are: before a replay they are filled with the step's numbers, rows that a batch is short
of with padding that writes where nobody reads. Knows batches and buffers. Knows no plan, no queue and no results.

Suffixes: B rows of a recording, N blocks a sequence, R rows of the token pool, V vocabulary.
"""

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sightline_kernels.layout import PagedLayout
from sightline_models.kv import KvPool
from sightline_models.vlm import Vlm
from sightline_server.engine.gpu_memory import MOST_IMAGES, batch_sizes
from sightline_server.engine.sampler import draw_numbers
from sightline_server.engine.types import EngineConfig, Slice

Work = Callable[[], tuple[Tensor, ...]]


class Recorder(Protocol):
    """Makes a piece of device work repeatable."""

    def record(self, work: Work) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        """What ``work`` returned, and a call that does the same work again, into those very tensors.

        ``work`` must read nothing but tensors that live on, and mustn't wait for the device.
        """


class CudaRecorder:
    """CUDA graphs that share one memory pool: a replay overwrites what the one before left in it."""

    def __init__(self) -> None:
        self._pool: Any = None
        # One for all: libraries keep a workspace for every stream they were used on.
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def record(self, work: Work) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        # Kernels are compiled and libraries set up on the first call, neither of which can be recorded.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            results = work()
        self._pool = self._pool or graph.pool()
        return results, graph.replay


class DecodeGraphs:
    """One recording a batch size of: look the tokens up, run the decoder, draw the next tokens, keep them."""

    def __init__(self, model: Vlm, kv: KvPool, tokens_R: Tensor, config: EngineConfig, recorder: Recorder) -> None:
        """``tokens_R`` has a row for each running sequence and one more, for padding."""
        self._model = model
        self._kv = kv
        self._tokens_R = tokens_R
        self._config = config
        self._sizes = batch_sizes(config.max_running)
        self._recordings: dict[int, tuple[_StepTensors, tuple[Tensor, ...], Callable[[], None]]] = {}
        # Largest first: what the smaller ones need then fits into memory that the pool already has.
        for size in reversed(self._sizes):
            tensors = _StepTensors(size, config, tokens_R.device)
            results, replay = recorder.record(partial(self._step, tensors))
            self._recordings[size] = tensors, results, replay

    def take(self, slices: Seq[Slice]) -> bool:
        """Whether a recording takes these slices: all of them decodes of text, and no more than the largest holds."""
        return len(slices) <= self._sizes[-1] and all(
            piece.length == 1 and piece.samples and not _is_in_picture(piece) for piece in slices
        )

    def run(self, slices: Seq[Slice]) -> tuple[Tensor, Tensor, Tensor]:
        """The drawn tokens, their rows' largest logits and all logits of ``slices``, whose sequences all are
        ``is_plain`` or drawn again.

        All lie in the recordings' memory, and are overwritten by the next run.
        """
        size = next(size for size in self._sizes if size >= len(slices))
        tensors, (drawn_B, largest_B, logits_BV), replay = self._recordings[size]
        tensors.fill(slices)
        replay()
        return drawn_B[: len(slices)], largest_B[: len(slices)], logits_BV[: len(slices)]

    def _step(self, tensors: "_StepTensors") -> tuple[Tensor, ...]:
        token_ids_B = tensors.token_ids_B
        token_ids_B = torch.where(token_ids_B < 0, self._tokens_R[tensors.rows_B], token_ids_B)
        hidden_BD = self._model(self._model.embed(token_ids_B), tensors.positions_B, self._kv, tensors.layout())
        logits_BV = self._model.logits(hidden_BD)
        drawn_B = self._model.decoder.kernels.sample(logits_BV, *tensors.draws)
        self._tokens_R.index_copy_(0, tensors.rows_B, drawn_B)
        return drawn_B, logits_BV.amax(dim=-1), logits_BV


def _is_in_picture(piece: Slice) -> bool:
    """Whether the slice's one token stands for a part of a picture, as a prompt's last may."""
    spans = piece.sequence.request.prompt.images
    return bool(spans) and piece.start < spans[-1].start + spans[-1].length


class _StepTensors:
    """The inputs of one recording: views of one buffer on the device, which one copy from the host fills."""

    def __init__(self, size: int, config: EngineConfig, device: torch.device) -> None:
        self._size = size
        self._config = config
        width = -(-config.max_model_len // config.block_size)
        self._buffer = _Fields(size, width, device)
        pinned = device.type == "cuda"
        # One is written while the other may still be on its way to the device.
        self._hosts = [_Fields(size, width, torch.device("cpu"), pinned=pinned) for _ in range(2)]
        self._starts_B1 = torch.arange(size + 1, dtype=torch.int32, device=device)
        fields = self._buffer
        self.token_ids_B, self.rows_B, self.positions_B, self._slots_B, *integers = fields.longs_8B.unbind()
        top_k_B, seed_B, choice_B, position_B = integers
        temperature_B, top_p_B, min_p_B = fields.floats_3B.unbind()
        self.draws = (temperature_B, top_k_B, top_p_B, min_p_B, seed_B, choice_B, position_B)
        # Recorded over padding alone: what a recording's first call reads has to be in range.
        self.fill(())

    def layout(self) -> PagedLayout:
        """Where the rows lie, as far as a recording may know: the host's copies of lengths are only bounds."""
        longest = self._config.max_model_len
        return PagedLayout(
            block_table_BN=self._buffer.table_BN,
            cu_seqlens_B1=self._starts_B1,
            context_len_B=self._buffer.context_B,
            slots_T=self._slots_B,
            query_lens=(1,) * self._size,
            context_lens=(longest,) * self._size,
            num_decodes=self._size,
            block_size=self._config.block_size,
        )

    def fill(self, slices: Seq[Slice]) -> None:
        """Have the device's tensors hold ``slices``, and padding after them."""
        self._hosts.reverse()
        host, count, block_size = self._hosts[0], len(slices), self._config.block_size
        longs_8B, table_BN = host.longs_8B.numpy(), host.table_BN.numpy()
        scratch = self._config.num_blocks
        longs_8B[:, count:] = 0
        longs_8B[1, count:] = self._config.max_running
        longs_8B[3, count:] = scratch * block_size
        table_BN[count:, 0] = scratch
        host.context_B.numpy()[count:] = 1
        host.floats_3B.numpy()[:, count:] = 0
        if slices:
            longs = []
            for row, (sequence, start) in enumerate((piece.sequence, piece.start) for piece in slices):
                blocks, known = sequence.blocks, sequence.token_ids
                slot = blocks[start // block_size] * block_size + start % block_size
                longs.append((known[start] if start < len(known) else -1, sequence.row, start, slot))
                table_BN[row, : len(blocks)] = blocks
            longs_8B[:4, :count] = np.array(longs, np.int64).T
            host.context_B.numpy()[:count] = longs_8B[2, :count] + 1
            numbers = draw_numbers([piece.sequence for piece in slices])
            longs_8B[4:, :count] = numbers.integers_4S
            host.floats_3B.numpy()[:, :count] = numbers.floats_3S
        self._buffer.data.copy_(host.data, non_blocking=True)


class _Fields:
    """One buffer and its views, each of which begins where a launch may expect it to: at a multiple of 16 bytes."""

    def __init__(self, size: int, width: int, device: torch.device, *, pinned: bool = False) -> None:
        columns = -(-size // 4) * 4
        kinds = (
            (torch.int64, (8, columns)),
            (torch.float32, (3, columns)),
            (torch.int32, (1, columns)),
            (torch.int32, (size, -(-width // 4) * 4)),
        )
        lengths = [dtype.itemsize * math.prod(shape) for dtype, shape in kinds]
        self.data = torch.zeros(sum(lengths), dtype=torch.uint8, device=device, pin_memory=pinned)
        longs, floats, contexts, table = (
            part.view(dtype).view(shape)
            for part, (dtype, shape) in zip(torch.split(self.data, lengths), kinds, strict=True)
        )
        self.longs_8B, self.floats_3B, self.context_B = longs[:, :size], floats[:, :size], contexts[0, :size]
        self.table_BN = table


class EncoderGraphs:
    """One recording for each number of images up to a bound."""

    def __init__(self, model: Vlm, most: int, device: torch.device, recorder: Recorder) -> None:
        side = model.config.vision.image_size
        self._recordings = {}
        for count in range(min(most, MOST_IMAGES), 0, -1):
            pixels_NYXC = torch.zeros(count, side, side, 3, dtype=torch.uint8, device=device)
            (encoded_NLD,), replay = recorder.record(partial(_encode, model, pixels_NYXC))
            self._recordings[count] = pixels_NYXC, encoded_NLD, replay

    def take(self, count: int) -> bool:
        return count in self._recordings

    def run(self, pixels_NYXC: Tensor) -> Tensor:
        """What ``Vlm.encode_images`` gives for pixels on the device; overwritten by the next run."""
        held_NYXC, encoded_NLD, replay = self._recordings[len(pixels_NYXC)]
        held_NYXC.copy_(pixels_NYXC)
        replay()
        return encoded_NLD


def _encode(model: Vlm, pixels_NYXC: Tensor) -> tuple[Tensor, ...]:
    return (model.encode_images(pixels_NYXC),)
