"""Drives a Scheduler without a model: a house of its books, and plans in a form that tests can compare."""

from dataclasses import dataclass
from typing import Any

from sightline_server.engine.blocks import BlockPool
from sightline_server.engine.scheduler import Scheduler
from sightline_server.engine.types import EngineConfig, ImageSpan, Prompt, Request, SamplingParams, Sequence, StepPlan
from sightline_server.engine.vision_cache import VisionCache


@dataclass
class Entry:
    nbytes: int = 1


class House:
    """A scheduler with its books, and a stand-in for the runner that puts encoded images into the cache."""

    def __init__(self, *, num_blocks: int = 100, budget: int = 64, max_running: int = 16, **more: Any) -> None:
        self.config = EngineConfig(
            num_blocks=num_blocks,
            block_size=4,
            max_model_len=num_blocks * 4,
            max_step_tokens=budget,
            max_running=max_running,
            max_queue=99,
            encoder_cache_bytes=more.pop("encoder_cache_bytes", 100),
            **more,
        )
        self.blocks = BlockPool(num_blocks, caching=self.config.prefix_caching)
        self.vision: VisionCache[Entry] = VisionCache(self.config.encoder_cache_bytes)
        self.scheduler = Scheduler(self.config, self.blocks, self.vision, max_images_per_step=3)
        self.pixels: set[bytes] = set()

    def add(
        self,
        name: str,
        tokens: int | tuple[int, ...],
        *,
        images: tuple[ImageSpan, ...] = (),
        priority: int = 0,
        tenant: str = "",
        max_tokens: int = 99,
    ) -> Sequence:
        ids = tokens if isinstance(tokens, tuple) else tuple(hash(name) % 1000 + i for i in range(tokens))
        return self.scheduler.add(
            Request(
                id=name,
                prompt=Prompt(ids, images),
                sampling=SamplingParams(max_tokens=max_tokens),
                priority=priority,
                tenant=tenant,
            )
        )

    def step(self) -> StepPlan:
        plan = self.scheduler.plan(self.pixels)
        for key in plan.encode:
            assert key in self.pixels
            self.vision.put(key, Entry())
        self.scheduler.commit(plan)
        for piece in plan.slices:
            if piece.samples:
                self.scheduler.record(piece.sequence, 1)
        self.scheduler.check()
        return plan


def shape(plan: StepPlan) -> list[tuple[str, int, int]]:
    return [(piece.sequence.id, piece.start, piece.length) for piece in plan.slices]
