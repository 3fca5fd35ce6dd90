"""The command that trains the demo model (`scripts/train_demo`): settings, progress, curves, where the result goes.

Knows the terminal. Knows no training (`train.py` does).
"""

import argparse
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from sightline_models.demo.train import Plan, curves, train

_SHOWN = ("color", "shape", "count", "where", "exist", "rel", "box", "caption", "read_number", "read_word", "sum")
_TITLES = {"seeing": "learning to see", "answering": "learning to answer", "clip": "learning to match"}


class Show:
    """Progress bars of the two stages, and a line of scores a minute above them."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %  {task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._bars: dict[str, TaskID] = {}
        self._pictures = 0

    def step(self, stage: str, progress: float, loss: float, pictures: int) -> None:
        """A step was made."""
        if stage not in self._bars:
            for finished in self._bars.values():
                self.progress.update(finished, completed=1.0)  # its clock stops
            self._bars[stage] = self.progress.add_task(_TITLES[stage], total=1.0, note="")
        self._pictures += pictures
        note = f"{self._pictures:,} pictures, loss {loss:.2f}"
        self.progress.update(self._bars[stage], completed=progress, note=note)

    def scores(self, stage: str, minutes: float, scores: dict[str, float]) -> None:
        """A minute has passed."""
        shown = [name for name in _SHOWN if name in scores] or [name for name in scores if name.startswith("patch/")]
        said = "  ".join(f"{name.removeprefix('patch/')} {scores[name]:.2f}" for name in shown)
        self.progress.console.print(f"[dim]{minutes:5.1f} min  {said}[/]", highlight=False, soft_wrap=True)


def draw_curves(history: list[dict[str, Any]], path: Path) -> None:
    """A PNG of every score over the minutes: patches in stage one, answers in stage two."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(15, 7), width_ratios=(1, 2))
    panels = (("seeing", lambda name: name.startswith("patch/") and "error" not in name),
              ("answering", lambda name: not name.startswith("patch/")))  # fmt: skip
    for axis, (stage, pick) in zip(axes, panels, strict=True):
        lines = curves([entry for entry in history if entry["stage"] == stage], pick)
        for index, (name, points) in enumerate(sorted(lines.items())):
            minutes, scores = zip(*points, strict=True)
            style = ("-", "--", ":", "-.")[index // 10 % 4]
            axis.plot(minutes, scores, style, color=f"C{index % 10}", label=name.removeprefix("patch/"), linewidth=1.3)
        axis.set(title=_TITLES[stage], xlabel="minutes", ylabel="right", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, ncols=2 if stage == "seeing" else 3, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; its exit status."""
    usual = Plan()
    parser = argparse.ArgumentParser(
        prog="scripts/train_demo",
        description="Train the demo model from nothing on pictures drawn as it goes. Started again with the same "
        "folder it goes on where it was, whatever ended it.",
    )
    parser.add_argument("--minutes", type=float, default=usual.minutes, help="of training (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=usual.seed, help="of weights and pictures (%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("demo-training"), help="of the run's state (%(default)s)")
    parser.add_argument("--install", type=Path, metavar="FOLDER", help="copy the finished checkpoint there")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=None, help="with torch.compile (from 10 minutes)"
    )
    parser.add_argument("--processes", type=int, help="that share each step (one a core on a CPU, 1 on a GPU)")
    args = parser.parse_args(arguments)
    if args.minutes <= 0:
        parser.error("--minutes must be more than 0")
    on_gpu = args.device.startswith("cuda")
    cores = len(os.sched_getaffinity(0))
    plan = replace(
        usual,
        minutes=args.minutes,
        device=args.device,
        seed=args.seed,
        processes=args.processes or (1 if on_gpu else min(cores, 8)),
        compile=args.minutes >= 10 if args.compile is None else args.compile,
        workers=max(1, cores - 1) if on_gpu else 0,
        seeing_rows=256 if on_gpu else usual.seeing_rows,
        answering_rows=96 if on_gpu else usual.answering_rows,
    )
    console = Console()
    show = Show(console)
    try:
        with show.progress:
            checkpoint = train(plan, args.folder, show)
    except ValueError as error:
        console.print(str(error), markup=False)
        return 1
    history = [json.loads(line) for line in (args.folder / "history.jsonl").read_text().splitlines()]
    draw_curves(history, args.folder / "curves.png")
    console.print(f"The checkpoint: {checkpoint}\nIts curves: {args.folder / 'curves.png'}")
    if args.install:
        shutil.copytree(checkpoint, args.install, dirs_exist_ok=True)
        console.print(f"Copied to {args.install}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
