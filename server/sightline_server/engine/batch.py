"""Turns a StepPlan into the tensors of one forward pass.

Knows slices, slots and rows. Knows nothing of weights, sampling or why the plan is what it is.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sightline_kernels.layout import PagedLayout
from sightline_server.engine.transfer import to_device
from sightline_server.engine.types import Slice

ROWS_PER_PASS = 16
"""Rows of every pass in deterministic mode: matrix products of one shape give one result a row."""


@dataclass(frozen=True)
class ImageRows:
    """Rows of the packed tokens that take their hidden state from an encoded image."""

    key: bytes
    row: int
    offset: int
    """First token of the image that these rows stand for."""
    length: int


@dataclass(frozen=True)
class StepBatch:
    """Device input of one pass: T packed tokens of the slices, decodes first."""

    token_ids_T: Tensor
    positions_T: Tensor
    layout: PagedLayout
    images: tuple[ImageRows, ...]
    sample_rows: tuple[int, ...]
    """Rows whose hidden state a token is sampled from, in the order of the slices that sample."""
    unknown: tuple[Tensor, Tensor] | None = None
    """Rows whose token only the device knows, and where it keeps them (``Sequence.row``)."""


def build_batch(
    slices: Seq[Slice], *, block_size: int, scratch_block: int, device: torch.device, row_invariant: bool = False
) -> StepBatch:
    """The tensors of ``slices``, which stand decodes first.

    With ``row_invariant`` the batch is padded to ``ROWS_PER_PASS`` rows by one-token sequences in ``scratch_block``,
    whose content nobody reads.
    """
    num_rows = sum(piece.length for piece in slices)
    num_padding = ROWS_PER_PASS - num_rows if row_invariant else 0
    assert num_padding >= 0, f"{num_rows} rows in a pass of {ROWS_PER_PASS}"
    # Padding rows are decodes too and stand first, where decodes belong.
    total, num_sequences = num_rows + num_padding, len(slices) + num_padding
    token_ids = np.zeros(total, np.int64)
    positions = np.zeros(total, np.int64)
    slots = np.full(total, scratch_block * block_size, np.int64)
    width = max([1, *(len(piece.sequence.blocks) for piece in slices)])
    table = np.zeros((num_sequences, width), np.int32)
    table[:num_padding] = scratch_block
    query_lens, context_lens = [1] * num_padding, [1] * num_padding
    images: list[ImageRows] = []
    sample_rows: list[int] = []
    unknown: list[tuple[int, int]] = []
    row = num_padding
    for index, piece in enumerate(slices, start=num_padding):
        sequence, start, length = piece.sequence, piece.start, piece.length
        end = start + length
        blocks = sequence.blocks
        table[index, : len(blocks)] = blocks
        if length == 1:
            if start < len(sequence.token_ids):
                token_ids[row] = sequence.token_ids[start]
            else:
                unknown.append((row, sequence.row))
            positions[row] = start
            slots[row] = blocks[start // block_size] * block_size + start % block_size
        else:
            token_ids[row : row + length] = sequence.token_ids[start:end]
            where = np.arange(start, end)
            positions[row : row + length] = where
            slots[row : row + length] = table[index, where // block_size].astype(np.int64) * block_size + (
                where % block_size
            )
        for span in sequence.request.prompt.images:
            first, last = max(start, span.start), min(end, span.start + span.length)
            if first < last:
                images.append(
                    ImageRows(sequence.image_key(span), row + first - start, first - span.start, last - first)
                )
        query_lens.append(length)
        context_lens.append(end)
        row += length
        if piece.samples:
            sample_rows.append(row - 1)
    cu_seqlens = np.zeros(num_sequences + 1, np.int32)
    np.cumsum(query_lens, out=cu_seqlens[1:])
    num_decodes = next((i for i, length in enumerate(query_lens) if length > 1), num_sequences)
    layout = PagedLayout(
        block_table_BN=_to(table, device),
        cu_seqlens_B1=_to(cu_seqlens, device),
        context_len_B=_to(np.array(context_lens, np.int32), device),
        slots_T=_to(slots, device),
        query_lens=tuple(query_lens),
        context_lens=tuple(context_lens),
        num_decodes=num_decodes,
        block_size=block_size,
        row_invariant=row_invariant,
    )
    known_later = None
    if unknown:
        rows, places = np.array(unknown, np.int64).T
        known_later = _to(np.ascontiguousarray(rows), device), _to(np.ascontiguousarray(places), device)
    return StepBatch(
        _to(token_ids, device), _to(positions, device), layout, tuple(images), tuple(sample_rows), known_later
    )


def passes_of_equal_shape(slices: Seq[Slice]) -> list[list[Slice]]:
    """The same work as groups of at most ``ROWS_PER_PASS`` rows each, a sequence's rows in order."""
    groups: list[list[Slice]] = [[]]
    room = ROWS_PER_PASS
    for piece in slices:
        start, left = piece.start, piece.length
        while left:
            if room == 0:
                groups.append([])
                room = ROWS_PER_PASS
            taken = min(room, left)
            groups[-1].append(Slice(piece.sequence, start, taken, samples=piece.samples and taken == left))
            start, left, room = start + taken, left - taken, room - taken
    for group in groups:
        group.sort(key=lambda piece: piece.length > 1)
    return groups


def _to(values: "np.ndarray[tuple[int, ...], np.dtype[np.int32 | np.int64]]", device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(values), device)
