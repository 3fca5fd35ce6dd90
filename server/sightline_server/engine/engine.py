"""The engine: requests in, events out, one step at a time.

With overlap a step is planned and launched before the tokens of the one before it are known, so that the device never
waits for the host. What is learned late costs no more than a token computed in vain for a request that has ended.

A step that fails ends no more than the request it fails for: what was under way is dropped, all is computed again from
the tokens that are known, and the suspects run apart until the culprit is left (``containment.py``).
Synchronous and single-threaded. Knows no process, socket, clock or text; tests drive it directly.
"""

import logging
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import islice

from sightline_models.images import Pixels
from sightline_server.engine import admission
from sightline_server.engine.blocks import BlockPool
from sightline_server.engine.containment import NOT_FINITE, Failure, Probation, is_beyond_containing
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


@dataclass
class _Flight:
    """A step from its planning until its results are accounted for."""

    plan: StepPlan
    sampling: list[tuple[Sequence, int]]
    """The sequences that get a token, and how often each had been restarted."""
    launched: Launched | None = None


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
        self._in_flight: list[_Flight] = []
        self._is_planning = False
        self._probation: Probation | None = None
        self._doubted: set[str] = set()
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

        Returns what happened since the last call, in order. Raises what ends no request but the engine: broken books,
        a lost device, a fault that no request is to blame for.
        """
        failure = None
        try:
            self._compute()
        except Exception as error:
            if is_beyond_containing(error) or not (self._live or self._in_flight):
                raise
            failure = Failure.of(error)
            log.warning("a step failed; what was under way is computed again", exc_info=error)
        # Only now that the error is gone: it holds what the step had allocated.
        if failure is not None:
            self._contain(failure)
        events, self._outbox = self._outbox, []
        return events

    def stats(self) -> EngineStats:
        scheduler, num_new = self._scheduler, self._scheduler.waiting.num_new
        return EngineStats(
            running=len(self._live) - num_new,
            waiting=num_new,
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
        new = sum(sequence.num_hit_tokens < 0 for sequence in self._scheduler.waiting)
        assert self._scheduler.waiting.num_new == new, f"{self._scheduler.waiting.num_new} counted as new, not {new}"
        assert self._doubted <= set(self._live), "a doubt outlived its request"
        assert lines == set(self._live), f"in the lines: {lines}; alive: {set(self._live)}"
        needed = {s.image_key(span) for s in self._live.values() for span in s.request.prompt.images}
        assert set(self._pixels) <= needed, f"{len(set(self._pixels) - needed)} pixel arrays belong to no live request"
        assert set(self._asked.values()) <= lines, "a question for pixels outlived its request"

    def _check_nothing_held(self) -> None:
        """The part of ``check_integrity`` that costs nothing: without requests, nothing is in use."""
        held = (self._blocks.num_used, len(self._pixels), len(self._asked), len(self._scheduler.running))
        assert held == (0, 0, 0, 0), f"no request lives, yet blocks, pixels, questions and slots in use are {held}"

    def _refusal(self, request: Request) -> tuple[str, str] | None:
        if request.id in self._live:
            return "server_error", f"Request id {request.id} is in use."
        refusal = admission.refusal(
            request, max_model_len=self._config.max_model_len, vocab_size=self._runner.vocab_size
        )
        if refusal is not None:
            return refusal
        if self._scheduler.waiting.num_new >= self._config.max_queue:
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

    def _compute(self) -> None:
        if self._in_flight and any(sequence.draws_by_history for sequence in self._scheduler.running):
            # Such a request's next draw needs tokens that may still be under way.
            self._settle()
        self._is_planning = True
        plan = self._scheduler.plan(self._pixels, self._probation.ids if self._probation else None)
        self._is_planning = False
        self._ask_for(plan)
        if plan.slices:
            self._launch(plan)
        self._idle = not plan.slices and not plan.preempted and not self._in_flight
        # Of a step that fails on trial nothing else is under way, so that it is known which one failed.
        late = 1 if plan.slices and self._config.overlap and self._probation is None else 0
        while len(self._in_flight) > late:
            self._settle()
        if self._probation is not None and self._probation.is_through:
            self._try_next(self._probation)

    def _launch(self, plan: StepPlan) -> None:
        self._steps += 1
        sampling = [(piece.sequence, piece.sequence.num_restarts) for piece in plan.slices if piece.samples]
        flight = _Flight(plan, sampling)
        self._in_flight.append(flight)
        flight.launched = self._runner.launch(plan, self._pixels)
        self._scheduler.commit(plan)

    def _settle(self) -> None:
        """Wait for the step that was launched first and account for it."""
        flight = self._in_flight[0]
        assert flight.launched is not None, "a step that was not launched is waited for"
        results = flight.launched.wait()
        self._note_images(flight.plan, results.spoiled)
        for (sequence, num_restarts), token in zip(flight.sampling, results.tokens, strict=True):
            # It may have ended since, aborted or by the token of a step before, or have been put back.
            if sequence.status is SequenceStatus.FINISHED or sequence.num_restarts != num_restarts:
                continue
            if token.is_sound:
                self._append(sequence, token)
            else:
                self._doubt(sequence)
        del self._in_flight[0]

    def _note_images(self, plan: StepPlan, spoiled: Seq[bytes]) -> None:
        if not plan.encode:
            return
        self._images_encoded += len(plan.encode)
        for key in plan.encode:
            # The encoder cache has it now. Should it be evicted before a request needs it again, we ask again.
            if key not in spoiled:
                self._pixels.pop(key, None)
        if spoiled:
            self._runner.forget_images(spoiled)
            for sequence in list(self._scheduler.running):
                if any(sequence.image_key(span) in spoiled for span in sequence.request.prompt.images):
                    self._doubt(sequence)

    def _doubt(self, sequence: Sequence) -> None:
        """Numbers that aren't finite: once they may come out of a cache, twice they are the request's own."""
        self._scheduler.distrust(sequence)
        if sequence.id in self._doubted:
            self._end_for_failing(sequence, NOT_FINITE)
            return
        self._doubted.add(sequence.id)
        self._scheduler.put_back(sequence)
        self._idle = False
        log.warning("numbers of request %s aren't finite; it is computed again", sequence.id)

    def _contain(self, failure: Failure) -> None:
        """After a step that failed: bring its suspects to trial, or on trial make out whose fault it is."""
        suspects = self._put_all_back()
        self._runner.free_memory()
        if self._probation is None:
            self._probation = Probation(suspects)
            return
        culprit = self._probation.narrow()
        if culprit is not None:
            # Where even a plan of nothing fails, this raises.
            self._scheduler.plan(self._pixels, frozenset())
            self._end_for_failing(culprit, failure)
        if not self._probation.ids:
            self._probation = None

    def _put_all_back(self) -> list[Sequence]:
        """Drop what is under way: all is computed again from the tokens that are known. Return who took part."""
        suspects = {piece.sequence.id: piece.sequence for flight in self._in_flight for piece in flight.plan.slices}
        if self._is_planning:
            # Some of those that wait were to be in it.
            next_ones = islice(self._scheduler.waiting, self._config.max_running)
            possible = (*self._scheduler.running, *next_ones)
            suspects |= {sequence.id: sequence for sequence in possible}
            self._is_planning = False
        for flight in self._in_flight:
            self._runner.forget_images(flight.plan.encode)
            for piece in flight.plan.slices:
                self._scheduler.distrust(piece.sequence, piece.start)
        self._in_flight.clear()
        for sequence in self._live.values():
            self._scheduler.put_back(sequence)
        self._idle = False
        self.check_integrity()
        return [sequence for sequence in suspects.values() if sequence.status is not SequenceStatus.FINISHED]

    def _try_next(self, probation: Probation) -> None:
        """The group on trial is through: the next one's turn, or all go on together."""
        probation.next_group()
        if probation.ids:
            for sequence in list(self._scheduler.running):
                self._scheduler.put_back(sequence)
        else:
            self._probation = None
        self._idle = False

    def _end_for_failing(self, sequence: Sequence, failure: Failure) -> None:
        """Raises where a step for nobody fails as well: then no request is to blame."""
        self._runner.probe()
        log.error("request %s ends, for which alone a step failed: %s", sequence.id, failure.reason)
        self._finish(sequence, FinishReason.ERROR, failure.code, failure.message)

    def _append(self, sequence: Sequence, token: Sampled) -> None:
        if sequence.num_generated == 0:
            self._prompt_tokens += sequence.num_prompt_tokens
            self._image_tokens += sequence.request.prompt.num_image_tokens
        self._scheduler.record(sequence, token.token_id)
        self._doubted.discard(sequence.id)
        self._generated_tokens += 1
        if token.token_id in sequence.request.sampling.stop_token_ids:
            self._finish(sequence, FinishReason.STOP)
            return
        self._outbox.append(TokenEvent(sequence.id, token.token_id, token.logprob, token.top_logprobs))
        if len(sequence.token_ids) >= sequence.limit:
            self._finish(sequence, FinishReason.LENGTH)

    def _finish(
        self, sequence: Sequence, reason: FinishReason, code: str | None = None, message: str | None = None
    ) -> None:
        self._scheduler.finish(sequence)
        del self._live[sequence.id]
        self._doubted.discard(sequence.id)
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
