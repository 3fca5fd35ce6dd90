"""Decides, step by step, which tokens of which sequences are computed.

Decodes first, then prompts in chunks up to the token budget, then whose turn it is in the line (``fair_line.py``).
Knows counts, blocks and keys. Knows no tensor, no text and no clock.
"""

from bisect import insort
from collections.abc import Container, Iterator
from itertools import islice
from typing import Any

from sightline_server.engine.blocks import BlockPool, chain_hashes
from sightline_server.engine.fair_line import FairLine
from sightline_server.engine.types import (
    EngineConfig,
    ImageSpan,
    Request,
    Sequence,
    SequenceStatus,
    Slice,
    StepPlan,
)
from sightline_server.engine.vision_cache import VisionCache

LEAST_BEFORE_IMAGE = 64
"""Tokens before an image whose pixels aren't there yet that are worth computing without it. Fewer wait, and are read
in one step with it."""
LOOKAHEAD = 8
"""Waiting sequences whose pixels are asked for before their turn, so that decoding overlaps with computing."""


def _turn(sequence: Sequence) -> tuple[int, int]:
    return sequence.request.priority, sequence.order


class Scheduler:
    """Owns the waiting line, the running list and the block books."""

    def __init__(
        self, config: EngineConfig, blocks: BlockPool, vision: VisionCache[Any], *, max_images_per_step: int
    ) -> None:
        self._config = config
        self._blocks = blocks
        self._vision = vision
        self._max_images = max_images_per_step
        self._arrivals = 0
        self._free_rows = list(range(config.max_running))
        self.waiting = FairLine()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0
        self.num_encoder_queries = 0
        self.num_encoder_hits = 0

    def add(self, request: Request) -> Sequence:
        """Put a request at the end of its tenant's line. The caller has checked that it fits the cache."""
        self._arrivals += 1
        token_ids = list(request.prompt.token_ids)
        limit = min(len(token_ids) + request.sampling.max_tokens, self._config.max_model_len)
        sequence = Sequence(request, token_ids, limit, order=self._arrivals)
        if self._config.prefix_caching:
            chain_hashes(request, sequence.token_ids, self._config.block_size, sequence.block_hashes)
        self.waiting.join(sequence)
        return sequence

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands. Its blocks' content stays findable."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.leave(sequence)
        if sequence.status is not SequenceStatus.FINISHED:
            self.waiting.end(sequence)
        self._release(sequence)
        sequence.status = SequenceStatus.FINISHED

    def plan(self, pixels: Container[bytes], only: Container[str] | None = None) -> StepPlan:
        """The next step's decision. ``pixels`` holds the keys of the images that could be encoded now; with ``only``,
        no request beside these is taken out of the waiting line.

        Sequences are moved between the lines and given blocks here; token counts change in ``commit``. Steps run in the
        order they were planned in, so a plan may build on what steps before it have yet to compute.
        """
        planner = _StepPlanner(self._config.max_step_tokens, self._max_images, self._vision, pixels)
        preempted: list[Sequence] = []
        for sequence in list(self.running):
            if (
                sequence.status is SequenceStatus.RUNNING
                and sequence.num_uncomputed == 1
                and not sequence.is_drawn_out
                and planner.budget > 0
                and self._room_for_next_token(sequence, preempted)
            ):
                planner.take(sequence)
        if planner.slices:
            planner.budget = min(planner.budget, self._config.mixed_step_tokens)
        for sequence in self.running:
            if sequence.num_uncomputed > 1 and planner.budget > 0:
                planner.take(sequence)
        if not preempted:
            self._admit(planner, only)
        self._look_ahead(planner)
        return StepPlan(
            slices=tuple(sorted(planner.slices, key=lambda piece: piece.length > 1)),
            encode=tuple(planner.encode),
            wanted=tuple(planner.wanted),
            preempted=tuple(preempted),
        )

    def commit(self, plan: StepPlan) -> None:
        """Record that the plan was launched: full blocks become findable, spent images are unpinned."""
        for piece in plan.slices:
            sequence, end = piece.sequence, piece.start + piece.length
            sequence.num_cached_tokens = end
            sequence.num_pending += piece.samples
            self.waiting.charge(sequence, piece.length)
            self._publish(sequence)
            if sequence.pinned:
                # An image that stands twice may be done in one place and cut off in the other.
                cut_off = {sequence.image_key(span) for span in _touched(sequence, end, 0)}
                for key in sequence.pinned - cut_off:
                    self._unpin(sequence, key)

    def record(self, sequence: Sequence, token_id: int) -> None:
        """Append a token that a launched step has drawn for ``sequence``."""
        sequence.num_pending -= 1
        sequence.token_ids.append(token_id)
        self._publish(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """After a failure: have a sequence computed again from the tokens that are known of it, wherever it stands.

        What was launched for it before is not its own any more; tokens that weren't known yet are drawn again, to the
        same ones.
        """
        if sequence.status is SequenceStatus.RUNNING:
            self._to_waiting(sequence)
        else:
            self._release(sequence)
            sequence.num_cached_tokens = 0
        sequence.num_pending = 0
        sequence.num_restarts += 1

    def distrust(self, sequence: Sequence, start: int = 0) -> None:
        """Let nobody find the blocks of a sequence that hold tokens from ``start`` on."""
        self._blocks.forget(sequence.block_hashes[start // self._config.block_size :])

    def check(self) -> None:
        """Assert that no block or pin is held by anything but a running sequence."""
        self._blocks.check([sequence.blocks for sequence in self.running])
        for sequence in self.waiting:
            assert not sequence.blocks, f"waiting request {sequence.id} holds blocks {sequence.blocks}"
            assert not sequence.pinned, f"waiting request {sequence.id} holds {len(sequence.pinned)} pins"
        rows = sorted([sequence.row for sequence in self.running] + self._free_rows)
        assert rows == list(range(self._config.max_running)), f"rows held and free: {rows}"
        pins = {key for sequence in self.running for key in sequence.pinned}
        assert self._vision.num_pinned == len(pins), f"{self._vision.num_pinned} pins, {len(pins)} in use"

    def _room_for_next_token(self, sequence: Sequence, preempted: list[Sequence]) -> bool:
        """Give a decode the block its next token needs, preempting from the end of the line when none is left."""
        needed = self._blocks_for(sequence.length) - len(sequence.blocks)
        while needed > self._blocks.num_free:
            victim = max(self.running, key=_turn)
            self._preempt(victim)
            preempted.append(victim)
            if victim is sequence:
                return False
        sequence.blocks += self._blocks.allocate(needed)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._to_waiting(sequence)
        self.num_preemptions += 1

    def _to_waiting(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_cached_tokens = 0
        self.waiting.rejoin(sequence)

    def _admit(self, planner: "_StepPlanner", only: Container[str] | None) -> None:
        computing = {key for sequence in self.running for key in self._keys_under_way(sequence)}
        for sequence in self.waiting:
            if planner.budget <= 0 or len(self.running) >= self._config.max_running:
                return
            if only is not None and sequence.id not in only:
                continue
            hits = self._find_prefix(sequence)
            next_key = sequence.block_hashes[len(hits) : self._num_findable(sequence)][:1]
            if next_key and next_key[0] in computing:
                # Another sequence is computing this very block: next step it will be a hit.
                continue
            start = len(hits) * self._config.block_size
            if planner.reach(sequence, start) == 0:
                continue
            needed = self._blocks_for(len(sequence.token_ids)) - len(hits)
            reserve = len(self.running) // self._config.block_size + 1 if self.running else 0
            if needed + reserve > self._blocks.num_free - self._blocks.num_idle_among(hits):
                return
            assert sequence.num_pending == 0, f"request {sequence.id} is admitted with a token still unknown"
            # Held before more is taken, so that whatever fails here, it is given back.
            self._blocks.share(hits)
            sequence.blocks = hits
            sequence.blocks = hits + self._blocks.allocate(needed)
            sequence.num_cached_tokens = start
            sequence.num_published = len(hits)
            sequence.row = self._free_rows.pop()
            sequence.status = SequenceStatus.RUNNING
            self.waiting.leave(sequence)
            insort(self.running, sequence, key=_turn)
            self._count_hits(sequence, start)
            planner.take(sequence)
            computing.update(self._keys_under_way(sequence))

    def _count_hits(self, sequence: Sequence, hit_tokens: int) -> None:
        if sequence.num_hit_tokens >= 0:
            return
        sequence.num_hit_tokens = hit_tokens
        self.num_prefix_queries += sequence.num_prompt_tokens
        self.num_prefix_hits += hit_tokens
        for span in sequence.request.prompt.images:
            if span.start + span.length > hit_tokens:
                self.num_encoder_queries += 1
                self.num_encoder_hits += sequence.image_key(span) in self._vision

    def _look_ahead(self, planner: "_StepPlanner") -> None:
        for sequence in islice(self.waiting, LOOKAHEAD):
            if sequence.request.prompt.images:
                planner.want_missing(sequence, len(self._find_prefix(sequence)) * self._config.block_size)

    def _num_findable(self, sequence: Sequence) -> int:
        """Leading blocks that may be taken from the cache: the last token is always computed, to sample from."""
        return min(len(sequence.block_hashes), (len(sequence.token_ids) - 1) // self._config.block_size)

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        return self._blocks.find(sequence.block_hashes[: self._num_findable(sequence)])

    def _keys_under_way(self, sequence: Sequence) -> Iterator[bytes]:
        if sequence.num_uncomputed > 1:
            yield from sequence.block_hashes[sequence.num_cached_tokens // self._config.block_size :]

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._config.block_size)

    def _publish(self, sequence: Sequence) -> None:
        """Make findable what is full, launched and known. A sequence that was preempted meanwhile has no blocks."""
        size = self._config.block_size
        complete = min(sequence.num_cached_tokens, len(sequence.token_ids)) // size
        if not self._config.prefix_caching or complete <= sequence.num_published:
            return
        chain_hashes(sequence.request, sequence.token_ids[: complete * size], size, sequence.block_hashes)
        for index in range(sequence.num_published, complete):
            self._blocks.publish(sequence.blocks[index], sequence.block_hashes[index])
        sequence.num_published = complete

    def _release(self, sequence: Sequence) -> None:
        self._blocks.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_published = 0
        if sequence.row >= 0:
            self._free_rows.append(sequence.row)
            sequence.row = -1
        for key in list(sequence.pinned):
            self._unpin(sequence, key)

    def _unpin(self, sequence: Sequence, key: bytes) -> None:
        if key in sequence.pinned:
            sequence.pinned.remove(key)
            self._vision.unpin(key)


class _StepPlanner:
    """One step's plan while it grows: what budget is left and what was taken."""

    def __init__(self, budget: int, max_images: int, vision: VisionCache[Any], pixels: Container[bytes]) -> None:
        self.budget = budget
        self.slices: list[Slice] = []
        self.encode: dict[bytes, None] = {}
        self.wanted: list[tuple[Sequence, ImageSpan]] = []
        self._max_images = max_images
        self._vision = vision
        self._pixels = pixels

    def take(self, sequence: Sequence) -> None:
        """Plan as much of the sequence as the budget and its images allow; pin the images it touches."""
        start = sequence.num_cached_tokens
        length = self.reach(sequence, start)
        if length == 0:
            return
        for span in _touched(sequence, start, length):
            key = sequence.image_key(span)
            if key not in self._vision:
                self.encode[key] = None
            if key not in sequence.pinned:
                sequence.pinned.add(key)
                self._vision.pin(key)
        self.slices.append(Slice(sequence, start, length, samples=start + length == sequence.length))
        self.budget -= length

    def reach(self, sequence: Sequence, start: int) -> int:
        """How many tokens from ``start`` to compute now; an image that can't be encoded yet cuts it short."""
        length = min(self.budget, sequence.length - start)
        num_new = 0
        for span in _touched(sequence, start, length):
            key = sequence.image_key(span)
            if key in self._vision or key in self.encode:
                continue
            if key not in self._pixels:
                self.want_missing(sequence, start)
                before = max(0, span.start - start)
                return before if num_new or before >= LEAST_BEFORE_IMAGE else 0
            num_new += 1
            if len(self.encode) + num_new > self._max_images:
                return max(0, span.start - start)
        return length

    def want_missing(self, sequence: Sequence, start: int) -> None:
        """Ask for the pixels of every image at or after ``start`` that is neither encoded nor at hand."""
        for span in sequence.request.prompt.images:
            key = sequence.image_key(span)
            if span.start + span.length > start and key not in self._vision and key not in self._pixels:
                self.wanted.append((sequence, span))


def _touched(sequence: Sequence, start: int, length: int) -> Iterator[ImageSpan]:
    for span in sequence.request.prompt.images:
        if span.start < start + length and start < span.start + span.length:
            yield span
