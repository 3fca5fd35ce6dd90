"""The engine: requests in, events out, one step at a time.

With overlap a step is planned and launched before the tokens of the one before it are known, so that the device never
waits for the host. What is learned late costs no more than a token computed in vain for a request that has ended.
Synchronous and single-threaded. Knows no process, socket, clock or text; tests drive it directly.
"""

import contextlib
import logging

import torch

from sightline_models.images import Pixels
from sightline_server.engine.blocks import BlockPool
from sightline_server.engine.runner import Launched, Runner
from sightline_server.engine.sampler import Sampled
from sightline_server.engine.scheduler import Scheduler
from sightline_server.engine.types import (
    EngineConfig,
    EngineStats,
    Event,
    FinishEvent,
    FinishReason,
    PixelsWanted,
    Request,
    Sequence,
    SequenceStatus,
    StepPlan,
    TokenEvent,
    Usage,
)

log = logging.getLogger(__name__)


class Engine:
    """Continuous batching over a paged cache.

    ``add`` never raises for what a request holds: its refusal is an event of the next ``step``. Every request gets
    exactly one FinishEvent, whatever happens to it.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, blocks: BlockPool, config: EngineConfig) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._blocks = blocks
        self._config = config
        self._live: dict[str, Sequence] = {}
        self._outbox: list[Event] = []
        self._pixels: dict[bytes, Pixels] = {}
        self._asked: dict[bytes, str] = {}
        self._in_flight: tuple[StepPlan, Launched] | None = None
        self._idle = True
        self._prompt_tokens = self._image_tokens = self._generated_tokens = 0
        self._images_encoded = self._steps = 0

    @property
    def has_work(self) -> bool:
        """Whether ``step`` would do anything: false while all there is waits for pixels or for nothing."""
        return bool(self._outbox) or not self._idle

    def add(self, request: Request) -> None:
        """Queue a request."""
        if not self._live:
            self._check_nothing_held()
        refusal = self._refusal(request)
        if refusal:
            code, message = refusal
            self._outbox.append(FinishEvent(request.id, FinishReason.ERROR, Usage(), code, message))
            return
        self._live[request.id] = self._scheduler.add(request)
        self._idle = False

    def abort(self, request_id: str) -> None:
        """End a request now; its slot and blocks are free when this returns. Unknown ids are ignored."""
        sequence = self._live.get(request_id)
        if sequence is not None:
            self._finish(sequence, FinishReason.ABORTED)

    def provide(self, request_id: str, digest: bytes, pixels: Pixels) -> None:
        """The answer to a PixelsWanted; ignored when the request has ended meanwhile."""
        sequence = self._live.get(request_id)
        if sequence is not None:
            key = sequence.request.cache_salt + digest
            self._asked.pop(key, None)
            self._pixels[key] = pixels
            self._idle = False

    def fail_image(self, request_id: str, digest: bytes, code: str, message: str) -> None:
        """The other answer to a PixelsWanted: the image can't be had, so the request ends."""
        sequence = self._live.get(request_id)
        if sequence is not None:
            log.debug("image %s of request %s failed: %s", digest.hex()[:12], request_id, code)
            self._finish(sequence, FinishReason.ERROR, code, message)

    def step(self) -> list[Event]:
        """Plan and launch one step, account for it, or with overlap for the one before.

        Returns what happened since the last call, in order.
        """
        if self._in_flight and any(sequence.draws_by_history for sequence in self._scheduler.running):
            # Such a request's next draw needs tokens that may still be under way.
            self._settle()
        plan = self._scheduler.plan(self._pixels)
        self._ask_for(plan)
        launched = self._launch(plan) if plan.slices else None
        self._idle = not plan.slices and not plan.preempted and self._in_flight is None
        self._settle()
        if launched is not None:
            self._in_flight = plan, launched
        if not self._config.overlap:
            self._settle()
        events, self._outbox = self._outbox, []
        return events

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            blocks_used=self._blocks.num_used,
            blocks_total=self._blocks.num_blocks,
            prompt_tokens_total=self._prompt_tokens,
            image_tokens_total=self._image_tokens,
            generated_tokens_total=self._generated_tokens,
            prefix_queries_total=scheduler.num_prefix_queries,
            prefix_hits_total=scheduler.num_prefix_hits,
            encoder_queries_total=scheduler.num_encoder_queries,
            encoder_hits_total=scheduler.num_encoder_hits,
            images_encoded_total=self._images_encoded,
            preemptions_total=scheduler.num_preemptions,
            steps_total=self._steps,
            graph_steps_total=self._runner.num_replayed,
        )

    def check_integrity(self) -> None:
        """Assert that every block, slot, pin and pixel array belongs to a live request."""
        self._scheduler.check()
        lines = {sequence.id for sequence in (*self._scheduler.waiting, *self._scheduler.running)}
        assert lines == set(self._live), f"in the lines: {lines}; alive: {set(self._live)}"
        needed = {s.image_key(span) for s in self._live.values() for span in s.request.prompt.images}
        assert set(self._pixels) <= needed, f"{len(set(self._pixels) - needed)} pixel arrays belong to no live request"
        assert set(self._asked.values()) <= lines, "a question for pixels outlived its request"

    def _check_nothing_held(self) -> None:
        """The part of ``check_integrity`` that costs nothing: without requests, nothing is in use."""
        held = (self._blocks.num_used, len(self._pixels), len(self._asked), len(self._scheduler.running))
        assert held == (0, 0, 0, 0), f"no request lives, yet blocks, pixels, questions and slots in use are {held}"

    def _refusal(self, request: Request) -> tuple[str, str] | None:
        length, limit = len(request.prompt.token_ids), self._config.max_model_len
        if request.id in self._live:
            return "server_error", f"Request id {request.id} is in use."
        if length == 0:
            return "invalid_value", "The prompt is empty."
        if length >= limit:
            return "context_length_exceeded", (
                f"This model's maximum context length is {limit} tokens. However, the prompt has {length} tokens and "
                "needs room for an answer. Shorten the messages or send fewer images."
            )
        if len(self._scheduler.waiting) >= self._config.max_queue:
            return "server_is_overloaded", (
                f"{self._config.max_queue} requests are waiting already, as many as this server queues. Retry later."
            )
        return None

    def _ask_for(self, plan: StepPlan) -> None:
        """Ask one request for each missing image; should that one end first, the next step asks another."""
        for sequence, span in plan.wanted:
            key = sequence.image_key(span)
            if key not in self._asked:
                self._asked[key] = sequence.id
                self._outbox.append(PixelsWanted(sequence.id, span.digest))

    def _launch(self, plan: StepPlan) -> Launched | None:
        """Start computing; None, and one request less, if the device has no memory for it."""
        self._steps += 1
        launched: Launched | None = None
        with contextlib.suppress(torch.OutOfMemoryError):
            launched = self._runner.launch(plan, self._pixels)
        # Only once the error is gone: it holds what the step had allocated.
        if launched is None:
            self._give_up_on_largest(plan)
            return None
        self._scheduler.commit(plan)
        self._images_encoded += len(plan.encode)
        for key in plan.encode:
            # The encoder cache has it now. Should it be evicted before a request needs it again, we ask again.
            del self._pixels[key]
        return launched

    def _settle(self) -> None:
        """Wait for the step in flight, if there is one, and account for its tokens."""
        if self._in_flight is None:
            return
        (plan, launched), self._in_flight = self._in_flight, None
        sampling = [piece.sequence for piece in plan.slices if piece.samples]
        for sequence, token in zip(sampling, launched.wait(), strict=True):
            # It may have ended since: aborted, or by the token of a step before.
            if sequence.status is not SequenceStatus.FINISHED:
                self._append(sequence, token)

    def _append(self, sequence: Sequence, token: Sampled) -> None:
        if sequence.num_generated == 0:
            self._prompt_tokens += sequence.num_prompt_tokens
            self._image_tokens += sequence.request.prompt.num_image_tokens
        self._scheduler.record(sequence, token.token_id)
        self._generated_tokens += 1
        if token.token_id in sequence.request.sampling.stop_token_ids:
            self._finish(sequence, FinishReason.STOP)
            return
        self._outbox.append(TokenEvent(sequence.id, token.token_id, token.logprob, token.top_logprobs))
        if len(sequence.token_ids) >= sequence.limit:
            self._finish(sequence, FinishReason.LENGTH)

    def _give_up_on_largest(self, plan: StepPlan) -> None:
        """After an out-of-memory error: the largest slice of the step asked for too much; the others try again."""
        largest = max(plan.slices, key=lambda piece: (piece.length, piece.sequence.order)).sequence
        log.error("out of memory in a step of %d tokens; request %s ends", plan.num_tokens, largest.id)
        torch.cuda.empty_cache()
        message = "The device ran out of memory on this request. Send fewer or shorter inputs."
        self._finish(largest, FinishReason.ERROR, "engine_oom", message)

    def _finish(
        self, sequence: Sequence, reason: FinishReason, code: str | None = None, message: str | None = None
    ) -> None:
        self._scheduler.finish(sequence)
        del self._live[sequence.id]
        self._idle = False
        for span in sequence.request.prompt.images:
            key = sequence.image_key(span)
            if self._asked.get(key) == sequence.id:
                del self._asked[key]
            self._forget_unneeded_pixels(key)
        usage = Usage(
            prompt_tokens=sequence.num_prompt_tokens,
            completion_tokens=sequence.num_generated,
            cached_tokens=max(0, sequence.num_hit_tokens),
            image_tokens=sequence.request.prompt.num_image_tokens,
        )
        self._outbox.append(FinishEvent(sequence.id, reason, usage, code, message))

    def _forget_unneeded_pixels(self, key: bytes) -> None:
        if key in self._pixels and not any(
            sequence.image_key(span) == key
            for sequence in self._live.values()
            for span in sequence.request.prompt.images
        ):
            del self._pixels[key]
