"""The command that trains the tiny CLIP (`scripts/train_clip`) and tells how well it finds pictures.

Knows the terminal. Knows no training (`clip.py` does).
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from sightline_models.demo.clip import FOLDER, train_clip
from sightline_models.demo.clip_evaluate import evaluate_clip
from sightline_models.demo.command import Show
from sightline_models.presets import demo_checkpoint


def main(arguments: list[str] | None = None) -> int:
    """Run the command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="scripts/train_clip",
        description="Train the tiny CLIP that finds the demo's scenes by what they show, from the demo model's tower. "
        "Started again with the same folder it goes on where it was, whatever ended it.",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of training (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of weights and pictures (%(default)s)")
    parser.add_argument("--tower", type=Path, default=demo_checkpoint(), help="checkpoint to start from (%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("clip-training"), help="of the run's state (%(default)s)")
    parser.add_argument("--target", type=Path, default=FOLDER, help="where the model goes (%(default)s)")
    args = parser.parse_args(arguments)
    if args.minutes <= 0:
        parser.error("--minutes must be more than 0")
    console = Console()
    show = Show(console)
    try:
        with show.progress:
            train_clip(
                args.minutes,
                args.folder,
                device=args.device,
                seed=args.seed,
                tower=args.tower,
                target=args.target,
                observer=show,
            )
    except ValueError as error:
        console.print(str(error), markup=False)
        return 1
    figures = {name: asdict(figure) for name, figure in evaluate_clip(args.target).items()}
    (args.folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    for name, figure in figures.items():
        console.print(f"{name:<32} {figure['share']:.3f}  (by chance {figure['chance']:.3f}, n {figure['count']})")
    console.print(f"The model: {args.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
