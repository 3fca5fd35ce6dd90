"""Gives the demo model its exams through a server that it starts.

Knows the HTTP API and result files. Knows no scenes: `sightline_models.demo.evaluate` makes and judges the questions.
"""

import argparse
import asyncio
import base64
import datetime
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.machine import ROOT, describe_machine, load_average
from benchmarks.servers import ServerError, free_port, running, sightline_command
from sightline_models.demo.evaluate import EXAMS, Item, Score, grade, items
from sightline_models.presets import demo_checkpoint

ASK_AT_ONCE = 24
MAX_TOKENS = 160


def messages(item: Item) -> list[dict[str, Any]]:
    """An item as the API's messages. Earlier turns carry their true answers."""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(image)}} for image in item.images
    ]
    made: list[dict[str, Any]] = []
    for question, answer in item.conversation.turns:
        made.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        made.append({"role": "assistant", "content": answer})
        parts = []
    return made[:-1]


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def ask_server(url: str, asked: Sequence[Item], progress: Progress | None = None) -> list[str]:
    """Greedy answers of the server at ``url`` (with ``/v1``). Raises ServerError at the first that fails."""
    return asyncio.run(_ask_all(url, asked, progress))


async def _ask_all(url: str, asked: Sequence[Item], progress: Progress | None) -> list[str]:
    gate = asyncio.Semaphore(ASK_AT_ONCE)
    bar = progress.add_task("questions", total=len(asked)) if progress else None
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:
        model = (await client.get("/models")).json()["data"][0]["id"]

        async def one(item: Item) -> str:
            async with gate:
                body = {"model": model, "messages": messages(item), "max_tokens": MAX_TOKENS, "temperature": 0}
                reply = await client.post("/chat/completions", json=body)
            if reply.status_code != 200:
                raise ServerError(f"The server answered {reply.status_code}: {reply.text[:300]}")
            if progress and bar is not None:
                progress.advance(bar)
            return str(reply.json()["choices"][0]["message"]["content"])

        return list(await asyncio.gather(*(one(item) for item in asked)))


def examine(url: str, asked: list[Item], grey: bool, progress: Progress) -> dict[str, Any]:
    """Scores of all items, and those of square and of other pictures by themselves."""
    said = ask_server(url, asked, progress)
    blind = [item.grey() for item in asked] if grey else []
    guessed = grade(blind, ask_server(url, blind, progress)) if grey else None
    entry: dict[str, Any] = {"scores": score_json(grade(asked, said), guessed)}
    for name, square in (("square", True), ("not_square", False)):
        chosen = [(item, text) for item, text in zip(asked, said, strict=True) if item.images and item.square == square]
        entry[name] = score_json(grade([item for item, _ in chosen], [text for _, text in chosen]))
    return entry


def score_json(scores: dict[str, Score], grey: dict[str, Score] | None = None) -> dict[str, Any]:
    return {
        name: {"score": round(score.mean, 4), "n": score.count}
        | ({"grey": round(grey[name].mean, 4)} if grey is not None else {})
        for name, score in scores.items()
    }


def table(results: dict[str, Any]) -> Table:
    """Tasks down, exams across; the grey figure in parentheses."""
    exams = results["exams"]
    out = Table(title="accuracy (with grey pictures)")
    out.add_column("task")
    for name in exams:
        out.add_column(name, justify="right")
    for task in sorted({task for exam in exams.values() for task in exam["scores"]}):
        cells = []
        for exam in exams.values():
            score = exam["scores"].get(task)
            grey = f" ({score['grey']:.2f})" if score and "grey" in score else ""
            cells.append(f"{score['score']:.2f}{grey}" if score else "")
        out.add_row(task, *cells)
    return out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/eval_demo", description="Give the demo model its exams through the true server."
    )
    parser.add_argument("checkpoint", nargs="?", type=Path, default=demo_checkpoint(), help="(%(default)s)")
    parser.add_argument("--exams", default=",".join(EXAMS), help="of %(default)s")
    parser.add_argument("--tasks", default="", help="only these, by their names in the table")
    parser.add_argument("--count", type=int, default=100, help="questions a task and exam (%(default)s)")
    parser.add_argument("--seed", default="a", help="of the held-out scenes (%(default)s)")
    parser.add_argument("--grey", action=argparse.BooleanOptionalAction, default=True, help="ask without looking, too")
    parser.add_argument("--dtype", default="bfloat16", help="to compute in (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: a dated file in benchmarks/results")
    args = parser.parse_args(arguments)
    unknown = set(args.exams.split(",")) - set(EXAMS)
    if unknown:
        parser.error(f"there is no exam {', '.join(sorted(unknown))}; there are {', '.join(EXAMS)}")
    console = Console()
    results: dict[str, Any] = {
        "checkpoint": str(args.checkpoint), "seed": args.seed, "dtype": args.dtype, "machine": describe_machine(),
        "exams": {},
    }  # fmt: skip
    began = time.monotonic()
    port = free_port()
    flags = [str(args.checkpoint), "--dtype", args.dtype]
    try:
        with running("sightline", sightline_command(port, *flags), port=port, ready_path="/ready") as server:
            for name in args.exams.split(","):
                asked = items(EXAMS[name], args.count, args.seed)
                if args.tasks:
                    asked = [item for item in asked if item.task in args.tasks.split(",")]
                with Progress(console=console, transient=True) as progress:
                    results["exams"][name] = examine(server.url, asked, args.grey, progress)
                console.print(f"{name}: {len(asked)} questions")
    except ServerError as error:
        console.print(str(error), markup=False)
        return 1
    results["seconds"] = round(time.monotonic() - began, 1)
    results["load_after"] = load_average()
    path = args.json or ROOT / "benchmarks/results" / f"demo-{datetime.date.today():%Y-%m-%d}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    console.print(table(results))
    console.print(f"Written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
