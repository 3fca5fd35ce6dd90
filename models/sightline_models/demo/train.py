"""Trains the demo model from nothing: first the tower to see, then all of it to answer.

Knows optimizers, steps, and the state that lets a killed run go on. Knows no command line (`scripts/train_demo` does).

Stage one trains tower and projector to predict what each patch shows. Stage two starts the decoder's words from what
stage one learnt to tell (the direction of a feature that means "red" becomes the token "red"), and trains everything on
conversations, with stage one's loss beside it so that the tower doesn't forget.

Matrices of the layers are trained with Muon (Jordan et al. 2024, in torch.optim), everything else with AdamW.
"""

import ctypes
import json
import multiprocessing
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import fresh_cache
from torch.multiprocessing.spawn import spawn
from torch.utils.data import DataLoader, Dataset

from sightline_models.demo import network
from sightline_models.demo.batches import ONE, AnsweringSteps, Batch, SeeingSteps, normalized
from sightline_models.demo.export import export
from sightline_models.demo.labels import CHARACTERS, CLASSES, IGNORE, OUTPUTS
from sightline_models.demo.network import DECODER, TOWER, Shape, Weights
from sightline_models.demo.scenes import COLORS, SHAPES
from sightline_models.demo.text import IMAGE, Codec, train_tokenizer
from sightline_models.demo.words import ITEMS

_LABEL_WEIGHTS = {"shape": 3.0, "color": 1.0, "background": 0.6, "character": 4.0, "second_character": 2.0, "item": 1.0}
_WITH_NONE = ("shape", "character", "second_character")
_OTHER_LABELS = 0.3
_BOX_WEIGHTS = {"seeing": 8.0, "answering": 30.0}
"""By stage. In the second, boxes are what is left to learn."""
_NONE_WEIGHT = 0.1
"""Of patches without a thing or character, in the labels that have a class for them: most have neither."""


@dataclass(frozen=True)
class Plan:
    """Everything a run hangs on."""

    minutes: float = 76.0
    """Of training; drawing and optimizer included, start-up not."""
    seeing_share: float = 0.188
    """Stage one's part of the minutes."""
    seed: int = 1
    device: str = "cpu"
    processes: int = 1
    """Each with its own part of every step; gradients are averaged."""
    seeing_rows: int = 20
    """Pictures a step and process in stage one."""
    answering_rows: int = 6
    rates: tuple[tuple[float, float], tuple[float, float]] = ((4e-3, 2e-3), (1.5e-3, 1e-3))
    """By stage: Muon's, which is scaled to AdamW's (`match_rms_adamw`), and AdamW's."""
    tower_rate: float = 0.2
    """The tower's rates in stage two, as a share of the others."""
    frozen: float = 0.25
    """Share of stage two in which the tower stays as it is: what the decoder doesn't know yet would only harm it."""
    weight_decay: float = 0.01
    dense_weight: float = 0.3
    """Stage one's loss in stage two."""
    hold: float = 0.4
    """Share of stage two before the rates begin to fall to zero."""
    compile: bool = True
    workers: int = 0
    """Processes that draw; 0 draws between steps."""
    shape: Shape = field(default_factory=lambda: Shape(vocab_size=1408))


class Observer(Protocol):
    """What a run tells while it goes on."""

    def step(self, stage: str, progress: float, loss: float, pictures: int) -> None: ...

    def scores(self, stage: str, minutes: float, scores: dict[str, float]) -> None: ...


@dataclass
class State:
    """What a run is made of at one moment; all that has to be saved."""

    stage: str
    step: int
    """Of this stage."""
    seconds: float
    """Of this stage."""
    pictures: int
    weights: Weights
    heads: Weights
    optimizers: dict[str, Any]
    history: list[dict[str, Any]]
    """One entry a minute: stage, minutes, pictures, step, and the scores since the last."""


STAGES = ("seeing", "answering")


def train(plan: Plan, folder: Path, observer: Observer | None = None) -> Path:
    """Train by ``plan`` and return the folder of the checkpoint. What ``folder`` holds of the same run is gone on with.

    Raises ValueError when ``folder`` holds the state of a run by another plan.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_plan(plan, folder)
    if plan.processes == 1:
        _run(0, plan, folder, observer)
        return folder / "checkpoint"
    meeting = folder.resolve() / f"meeting-{os.getpid()}"
    meeting.unlink(missing_ok=True)  # of a killed run, where process numbers come again
    threads = torch.get_num_threads()
    helpers = spawn(_help, (plan, folder, meeting), plan.processes - 1, join=False)  # type: ignore[no-untyped-call]
    try:
        _run_together(0, plan, folder, meeting, observer)
        while not helpers.join():
            pass
    finally:
        torch.set_num_threads(threads)
        for process in helpers.processes:
            process.kill()
        meeting.unlink(missing_ok=True)
    return folder / "checkpoint"


def _check_plan(plan: Plan, folder: Path) -> None:
    path, wanted = folder / "plan.json", json.dumps(asdict(plan), indent=1)
    if not path.exists():
        path.write_text(wanted)
    elif path.read_text() != wanted:
        raise ValueError(f"{folder} holds a run with other settings. Give the settings in {path}, or another folder.")


def _help(index: int, plan: Plan, folder: Path, meeting: Path) -> None:
    _die_with_parent()
    _run_together(index + 1, plan, folder, meeting, None)


def _run_together(rank: int, plan: Plan, folder: Path, meeting: Path, observer: Observer | None) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // plan.processes))
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=plan.processes)
    try:
        _run(rank, plan, folder, observer)
        dist.barrier()  # a rank that left early would break the others' last exchange
    finally:
        dist.destroy_process_group()


def _die_with_parent() -> None:
    """Ask Linux to end this process with the one that started it: a killed parent can't do it itself."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():  # it ended before it was asked
        os._exit(1)


def _run(rank: int, plan: Plan, folder: Path, observer: Observer | None) -> None:
    tokenizer = train_tokenizer(plan.shape.vocab_size)
    codec = Codec(tokenizer)
    state = _load(folder / "state.pt", plan.device) or _fresh(plan)
    if plan.processes > 1:
        dist.barrier()  # all have read the state before one may write another
    trainer = _Trainer(rank, plan, folder, codec, state, observer)
    # A compiler's cache of this process's own: one that a killed run left half written would stop all runs after it.
    with fresh_cache():
        if state.stage == "seeing":
            trainer.go("seeing")
            start_words(state.weights, state.heads, codec)
            state.stage, state.step, state.seconds, state.optimizers = "answering", 0, 0.0, {}
            trainer.save()
        trainer.go("answering")
    if rank == 0:
        trainer.save()
        export(state.weights, plan.shape, tokenizer, folder / "checkpoint")


def _fresh(plan: Plan) -> State:
    generator = torch.Generator().manual_seed(plan.seed)
    weights = network.initial_weights(plan.shape, generator)
    heads = {
        "weight": torch.randn(OUTPUTS, plan.shape.width, generator=generator) * plan.shape.width**-0.5,
        "bias": torch.zeros(OUTPUTS),
    }
    weights, heads = ({k: v.to(plan.device) for k, v in tensors.items()} for tensors in (weights, heads))
    return State("seeing", 0, 0.0, 0, weights, heads, {}, [])


def _load(path: Path, device: str) -> State | None:
    if not path.exists():
        return None
    return State(**torch.load(path, map_location=device, weights_only=True))


class _Trainer:
    """The loop both stages share."""

    def __init__(
        self, rank: int, plan: Plan, folder: Path, codec: Codec, state: State, observer: Observer | None
    ) -> None:
        self.rank, self.plan, self.folder, self.codec, self.state, self.observer = (
            rank, plan, folder, codec, state, observer,
        )  # fmt: skip
        self.dtype = torch.bfloat16
        self.tower_learns = True
        self._before = 0.0
        """When this step began, on the monotonic clock."""
        self.tower_layer, self.decoder_layer = network.tower_layer, network.decoder_layer
        if plan.compile:
            self.tower_layer = torch.compile(self.tower_layer, dynamic=False)
            self.decoder_layer = torch.compile(self.decoder_layer, dynamic=False)

    def go(self, stage: str) -> None:
        plan, state = self.plan, self.state
        share = plan.seeing_share if stage == "seeing" else 1 - plan.seeing_share
        budget = plan.minutes * 60 * share
        trained = self._trained(stage)
        optimizers = self._optimizers(stage, trained)
        for name, saved in state.optimizers.items():
            optimizers[name].load_state_dict(saved)
        tally = _Tally()
        saved_at = noted_at = time.monotonic()
        for batch in self._batches(stage):
            progress = state.seconds / budget
            if progress >= 1:
                break
            for optimizer in optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = group["base"] * _rate(stage, progress, state.step, plan.hold)
            self.tower_learns = stage == "seeing" or progress >= plan.frozen
            loss, pictures = self._step(stage, batch, tally)
            gradients = [tensor.grad for tensor in trained.values() if tensor.grad is not None]
            now = time.monotonic()
            # What follows, the optimizers and the next drawing, is the next step's.
            took, self._before = now - self._before, now
            took = self._share(gradients, took)
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
            state.step += 1
            state.pictures += pictures * plan.processes
            state.seconds += took
            if self.rank:
                continue
            if self.observer:
                self.observer.step(stage, progress, loss, pictures * plan.processes)
            if now - noted_at > 60:
                noted_at = now
                self._note(stage, tally)
            if now - saved_at > 120:
                saved_at = now
                state.optimizers = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
                self.save()
        self._note(stage, tally)
        state.optimizers = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
        for tensor in trained.values():
            tensor.requires_grad_(False)
            tensor.grad = None

    def _batches(self, stage: str) -> Iterator[Any]:
        plan, shape = self.plan, self.plan.shape
        side, grid = shape.image_size, shape.image_size // shape.patch_size
        seed = f"{plan.seed}/{stage}/{self.rank}"
        steps: Dataset[Any]
        if stage == "seeing":
            steps = SeeingSteps(seed, plan.seeing_rows, side, grid)
        else:
            steps = AnsweringSteps(seed, plan.answering_rows, side, grid, self.codec)
        order = range(self.state.step, 1 << 30)
        self._before = time.monotonic()
        yield from DataLoader(steps, batch_size=None, sampler=order, num_workers=plan.workers)

    def _trained(self, stage: str) -> Weights:
        names = [
            name for name in self.state.weights if stage == "answering" or not name.startswith((DECODER, "lm_head"))
        ]
        trained = {name: self.state.weights[name] for name in names if "post_layernorm" not in name}
        trained |= {f"heads.{name}": tensor for name, tensor in self.state.heads.items()}
        for tensor in trained.values():
            tensor.requires_grad_(True)
        return trained

    def _optimizers(self, stage: str, trained: Weights) -> dict[str, torch.optim.Optimizer]:
        plan = self.plan
        muon, adam = plan.rates[STAGES.index(stage)]
        groups: dict[tuple[str, bool], list[Tensor]] = defaultdict(list)
        for name, tensor in trained.items():
            matrix = tensor.ndim == 2 and (".layers." in name or "linear_" in name)
            slow = stage == "answering" and name.startswith((TOWER, "heads"))
            groups["muon" if matrix else "adam", slow].append(tensor)

        def options(kind: str, rate: float) -> list[dict[str, Any]]:
            return [
                {"params": tensors, "base": rate * (plan.tower_rate if slow else 1.0)}
                for (which, slow), tensors in groups.items()
                if which == kind
            ]

        return {
            "muon": torch.optim.Muon(
                options("muon", muon), weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            "adam": torch.optim.AdamW(options("adam", adam), betas=(0.9, 0.98), weight_decay=0.0, foreach=True),
        }

    def _step(self, stage: str, batch: Any, tally: "_Tally") -> tuple[float, int]:
        """Gradients of one step; its loss, and the pictures in it."""
        cast = {name: tensor.to(self.dtype) for name, tensor in self.state.weights.items()}
        heads = {name: tensor.to(self.dtype) for name, tensor in self.state.heads.items()}
        if stage == "seeing":
            pixels, classes, boxes = (tensor.to(self.plan.device) for tensor in batch)
            seen = network.tower(cast, self.plan.shape, normalized(pixels, self.dtype), self.tower_layer)
            features = network.project(cast, seen)
            loss = dense_loss(features, heads, classes, boxes, _BOX_WEIGHTS[stage], tally)
            torch.autograd.backward(loss)
            return float(loss.detach()), len(pixels)
        total = sum(part.weight for part in batch)
        losses = [self._answer(part, cast, heads, total, tally) for part in batch]
        loss = torch.stack(losses).sum()
        torch.autograd.backward(loss)
        return float(loss.detach()), sum(part.pixels.shape[0] * part.pixels.shape[1] for part in batch)

    def _answer(self, batch: Batch, cast: Weights, heads: Weights, total: float, tally: "_Tally") -> Tensor:
        plan, shape = self.plan, self.plan.shape
        rows, pictures = batch.pixels.shape[:2]
        prefix = network.embed(cast, torch.tensor(batch.prefix, device=plan.device)).expand(rows, -1, -1)
        dense = prefix.new_zeros(())
        if pictures:
            pixels = normalized(batch.pixels.flatten(0, 1).to(plan.device), self.dtype)
            with torch.set_grad_enabled(self.tower_learns):
                seen = network.tower(cast, shape, pixels, self.tower_layer)
            features = network.project(cast, seen)
            if batch.classes.numel():
                classes, boxes = batch.classes.to(plan.device), batch.boxes.to(plan.device)
                dense = dense_loss(features, heads, classes, boxes, _BOX_WEIGHTS["answering"], tally)
            is_image = torch.tensor([token == IMAGE for token in batch.prefix], device=plan.device)
            prefix = prefix.masked_scatter(is_image[None, :, None], features.reshape(rows, -1, shape.width))
        embedded = [network.embed(cast, group.tokens.to(plan.device)) for group in batch.groups]
        loss = dense.float() * plan.dense_weight
        # Compiling takes half a minute for each layout and prefix: it pays for the commonest only.
        layer = self.decoder_layer if batch.layout == ONE else None
        for group, hidden in zip(batch.groups, network.decode(cast, shape, prefix, embedded, layer), strict=True):
            asked = group.targets != -100
            logits = F.linear(hidden[asked.to(plan.device)], cast["lm_head.weight"]).float()
            targets = group.targets[asked].to(plan.device)
            each = F.cross_entropy(logits, targets, reduction="none")
            loss = loss + (each * group.weights[asked].to(plan.device)).sum() / total
            tally.answers(group, asked, (logits.argmax(-1) == targets).cpu())
        return loss

    def _share(self, gradients: list[Tensor], took: float) -> float:
        """Average gradients, and the step's time, over the processes."""
        if self.plan.processes == 1:
            return took
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), gradients[0].new_tensor([took])])
        dist.all_reduce(flat)
        flat /= self.plan.processes
        at = 0
        for gradient in gradients:
            gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
            at += gradient.numel()
        return float(flat[-1])

    def _note(self, stage: str, tally: "_Tally") -> None:
        scores = tally.take()
        if self.rank or not scores:
            return
        state = self.state
        minutes = state.seconds / 60
        entry = {"stage": stage, "minutes": minutes, "step": state.step, "pictures": state.pictures, "scores": scores}
        state.history.append(entry)
        lines = (json.dumps(entry) + "\n" for entry in state.history)
        (self.folder / "history.jsonl").write_text("".join(lines))
        if self.observer:
            self.observer.scores(stage, minutes, scores)

    def save(self) -> None:
        """Write the state so that a kill at any moment leaves the old one or the new one."""
        if self.rank:
            return
        new = self.folder / "state.new"
        fields = {name: getattr(self.state, name) for name in State.__dataclass_fields__}
        torch.save(fields, new)
        new.replace(self.folder / "state.pt")


def _rate(stage: str, progress: float, step: int, hold: float) -> float:
    """The learning rates' factor: a short rise, level, then a fall; in stage one to a third."""
    rise = min(1.0, (step + 1) / 60)
    if stage == "seeing":
        return rise * min(1.0, 1 - (progress - 0.5) / 0.5 * 0.7)
    return rise * min(1.0, max(0.0, (1 - progress) / (1 - hold)))


def dense_loss(
    features: Tensor, heads: Weights, classes: Tensor, boxes: Tensor, box_weight: float, tally: "_Tally"
) -> Tensor:
    """How badly features [B, patches, width] tell ``classes`` [B, labels, patches] and ``boxes`` [B, patches, 4]."""
    outputs = F.linear(features, heads["weight"], heads["bias"])
    *logits, box = torch.split(outputs, [*CLASSES.values(), 4], dim=-1)
    loss = features.new_zeros((), dtype=torch.float32)
    for index, (name, logit) in enumerate(zip(CLASSES, logits, strict=True)):
        target = classes[:, index]
        told = target != IGNORE
        if not told.any():
            continue
        logit, target = logit[told].float(), target[told]
        right = logit.detach().argmax(-1) == target
        balance = None
        if name in _WITH_NONE:  # class 0
            right = right[target > 0]
            balance = torch.ones(logit.shape[-1], device=logit.device)
            balance[0] = _NONE_WEIGHT
        loss = loss + F.cross_entropy(logit, target, balance) * _LABEL_WEIGHTS.get(name, _OTHER_LABELS)
        tally.add(f"patch/{name}", float(right.sum()), right.numel())
    there = ~boxes[..., 0].isnan()
    if there.any():
        away = (box[there].float() - boxes[there]).abs().mean()
        loss = loss + box_weight * away
        tally.add("patch/box_error", float(away.detach()), 1)
    return loss


class _Tally:
    """Shares of right answers since they were last taken. No picture comes twice, so all are held out when answered."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, float] = defaultdict(float)

    def add(self, name: str, right: float, count: float) -> None:
        self._sums[name] += right
        self._counts[name] += count

    def answers(self, group: Any, asked: Tensor, right: Tensor) -> None:
        """An answer is right when each of its tokens is the likeliest one: then it is what greedy decoding says."""
        wrong = torch.zeros_like(asked)
        wrong[asked] = ~right
        wrong = (wrong & group.last).any(-1)
        for row, tasks in enumerate(group.tasks):
            for slot, task in enumerate(tasks):
                if task:
                    self.add(task, 1.0 - float(wrong[row, slot]), 1)

    def take(self) -> dict[str, float]:
        scores = {name: self._sums[name] / count for name, count in self._counts.items() if count}
        self._sums.clear()
        self._counts.clear()
        return scores


def start_words(weights: Weights, heads: Weights, codec: Codec) -> None:
    """Start the words for colours, shapes, characters and items from the directions in which features tell them."""
    rows = dict(zip(CLASSES, torch.split(heads["weight"], [*CLASSES.values(), 4])[:-1], strict=True))
    named: list[tuple[str, Tensor]] = []
    for index, color in enumerate(COLORS):
        named += [(form, rows["color"][index]) for form in (color, f" {color}")]
    for index, shape in enumerate(SHAPES):
        named += [(form, rows["shape"][index + 1]) for form in (shape, f" {shape}")]
        named += [(form, rows["shape"][index + 1]) for form in (f" {shape}s", f" {shape}es")]
    named += [(character, rows["character"][index + 1]) for index, character in enumerate(CHARACTERS)]
    for index, item in enumerate(ITEMS):
        named += [(form, rows["item"][index + 1]) for form in (item.lower(), f" {item.lower()}")]
    embedding, head = weights[f"{DECODER}.embed_tokens.weight"], weights["lm_head.weight"]
    usual, usual_head = float(embedding.norm(dim=1).mean()), float(head.norm(dim=1).mean())
    with torch.no_grad():
        for form, direction in named:
            ids = codec.ids(form)
            if len(ids) == 1:
                unit = direction / direction.norm()
                embedding[ids[0]] = unit * usual
                head[ids[0]] = unit * usual_head


def curves(history: Iterable[dict[str, Any]], pick: Callable[[str], bool]) -> dict[str, list[tuple[float, float]]]:
    """Curves [(minutes, score)] by name, of a history's entries."""
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for entry in history:
        for name, score in entry["scores"].items():
            if pick(name):
                lines[name].append((entry["minutes"], score))
    return lines
