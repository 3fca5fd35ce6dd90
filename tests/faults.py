"""The fault seam: makes the Nth call of a stage of an engine fail, or every call that a victim takes part in.

It wraps the stages of one engine object from outside, so that a server holds nothing that could be set off.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from sightline_server.engine.engine import Engine

POINTS = ("plan", "allocate", "encode", "batch", "forward", "sample", "commit", "wait", "record")
"""In the order of a step; images are encoded and blocks allocated only in some."""


@dataclass
class Fault:
    """What goes wrong, where and when. Without a ``victim`` only the call ``nth``, counted from 0; with one, every call
    from ``nth`` on that it takes part in. Calls that nobody takes part in don't count.

    ``error`` makes what is raised; None, at ``sample`` alone, makes the logits NaN: of the victim, or of the first row.
    """

    point: str
    error: Callable[[], Exception] | None
    nth: int = 0
    victim: str | None = None
    always: bool = False
    """Every call from ``nth`` on, whoever takes part."""
    calls: int = 0
    fired: int = 0

    def hits(self, names: Iterable[str]) -> bool:
        names = set(names)
        if not names and not self.always:
            return False
        call, self.calls = self.calls, self.calls + 1
        if self.always:
            hit = call >= self.nth
        elif self.victim is None:
            hit = call == self.nth
        else:
            hit = call >= self.nth and self.victim in names
        self.fired += hit
        return hit

    def reach(self, point: str, names: Iterable[str]) -> None:
        if point == self.point and self.hits(names) and self.error is not None:
            raise self.error()


def plant(engine: Engine, fault: Fault) -> None:
    """Have ``fault`` happen in ``engine``."""
    runner, scheduler, blocks = engine._runner, engine._scheduler, engine._blocks
    present: dict[str, set[bytes]] = {}
    batched: list[str] = []

    def before(owner: Any, name: str, point: str, names: Callable[..., Iterable[str]]) -> None:
        stage = getattr(owner, name)

        def reached(*arguments: Any, **options: Any) -> Any:
            fault.reach(point, names(*arguments, **options))
            return stage(*arguments, **options)

        setattr(owner, name, reached)

    def planned(pixels: Any, only: Any = None) -> list[str]:
        lines = (*scheduler.running, *scheduler.waiting)
        return [sequence.id for sequence in lines if only is None or sequence.id in only]

    def slices_of(slices: Any) -> list[str]:
        return [piece.sequence.id for piece in slices]

    def batched_of(slices: Any) -> list[str]:
        batched[:] = slices_of(slices)
        return batched

    before(scheduler, "plan", "plan", planned)
    before(blocks, "allocate", "allocate", lambda count: present)
    before(runner, "_encode_group", "encode", lambda group, _: [n for n in present if present[n] & set(group)])
    before(runner, "_batch", "batch", batched_of)
    before(runner, "_forward", "forward", lambda batch: batched)
    before(scheduler, "commit", "commit", lambda plan: slices_of(plan.slices))
    before(scheduler, "record", "record", lambda sequence, token_id: [sequence.id])

    launch, draw = runner.launch, runner._draw

    def launched(plan: Any, pixels: Any) -> Any:
        present.clear()
        for piece in plan.slices:
            spans = piece.sequence.request.prompt.images
            present[piece.sequence.id] = {piece.sequence.image_key(span) for span in spans}
        step = launch(plan, pixels)
        names, wait = list(present), step.wait

        def waited() -> Any:
            fault.reach("wait", names)
            return wait()

        step.wait = waited  # type: ignore[method-assign]
        return step

    def drawn(logits_SV: torch.Tensor, sequences: Any) -> Any:
        names = [sequence.id for sequence in sequences]
        if fault.point == "sample" and fault.hits(names):
            if fault.error is not None:
                raise fault.error()
            logits_SV = logits_SV.clone()
            logits_SV[names.index(fault.victim) if fault.victim in names else 0] = torch.nan
        return draw(logits_SV, sequences)

    runner.launch, runner._draw = launched, drawn  # type: ignore[method-assign]
    graphs = runner._decode_graphs
    if graphs is not None:
        before(graphs, "run", "forward", slices_of)
