"""Writes what the docs show of the demo model: its figures, six pictures with its answers, mistakes, and a chat.

Knows the docs' marked sections and the terminal client. Everything shown is what the served model says when this runs;
the pictures are the first that their seeds give.
"""

import argparse
import json
import os
import random
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pexpect
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from benchmarks.demo.exam import ask_server
from benchmarks.machine import ROOT
from benchmarks.servers import Server, ServerError, free_port, running, sightline_command
from sightline_models.demo import scenes
from sightline_models.demo.command import draw_curves
from sightline_models.demo.evaluate import EXAMS, Item, items, judge
from sightline_models.demo.questions import PAIR_TASKS, Asker, Conversation
from sightline_models.presets import demo_checkpoint

CARD = ROOT / "docs/demo_model.md"
README = ROOT / "README.md"
PICTURES = ROOT / "docs/demo"

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")


def replace_section(path: Path, name: str, content: str) -> None:
    """Put ``content`` between the marks of section ``name``. Raises ValueError when they aren't there."""
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: written by scripts/show_demo -->", f"<!-- end of {name} -->"
    if begin not in text or end not in text:
        raise ValueError(f"{path} has no section {name!r}")
    before, rest = text.split(begin, 1)
    after = rest.split(end, 1)[1]
    path.write_text(f"{before}{begin}\n\n{content.strip()}\n\n{end}{after}", encoding="utf-8")


# ---- six pictures -------------------------------------------------------------------------------------------------

_SHOWN = (("shapes", "caption"), ("shapes", "rel"), ("shapes", "box"), ("word", "read"), ("receipt", "total"))


def gallery_items() -> list[Item]:
    """Five pictures with a question each, and a pair of pictures."""
    made = []
    asker = Asker(plain=True)
    for index, (kind, task) in enumerate(_SHOWN):
        rng = random.Random(f"readme/{index}")
        conversation: Conversation | None = None
        while conversation is None:
            image, scene = scenes.draw(rng, scenes.FULL, kind)
            conversation = asker.ask(rng, task, scene)
        made.append(Item(conversation, (image,), (scene,)))
    rng = random.Random("readme/pair")
    conversation = None
    while conversation is None:
        (one, first), (two, second) = (scenes.draw(rng, scenes.FULL, "shapes") for _ in range(2))
        conversation = asker.compare(rng, next(task for task in PAIR_TASKS if task == "cmp_which"), first, second)
    return [*made, Item(conversation, (one, two), (first, second))]


def show_gallery(url: str) -> None:
    asked = gallery_items()
    rows = ["| picture | question | answer |", "|---|---|---|"]
    for index, (item, said) in enumerate(zip(asked, ask_server(url, asked), strict=True), 1):
        path = PICTURES / f"{index}.png"
        beside(item.images, 150).save(path, optimize=True)
        question, truth = item.conversation.turns[-1]
        verdict = "" if judge(item, said)[item.task] or "box" in item.task else f" (wrong: {truth})"
        rows.append(f"| ![picture {index}](docs/demo/{index}.png) | {question} | `{said.strip()}`{verdict} |")
    replace_section(README, "pictures", "\n".join(rows))


def beside(images: Sequence[Image.Image], height: int) -> Image.Image:
    """Pictures next to each other, scaled to one height."""
    scaled = [image.resize((round(image.width * height / image.height), height)) for image in images]
    sheet = Image.new("RGB", (sum(image.width for image in scaled) + 8 * (len(scaled) - 1), height), "white")
    left = 0
    for image in scaled:
        sheet.paste(image, (left, 0))
        left += image.width + 8
    return sheet


# ---- mistakes -----------------------------------------------------------------------------------------------------

_OWN_FORM = ("box", "fu_box", "detect")
"""Tasks whose answers are hardly ever right to the last digit; their mistakes show nothing."""


def show_mistakes(url: str, count: int = 12) -> None:
    """A sheet of the first wrong answers, one a task."""
    asked = [item for item in items(EXAMS["full"], 25, "mistakes") if item.images and item.task not in _OWN_FORM]
    random.Random("mistakes").shuffle(asked)
    wrong: dict[str, tuple[Item, str]] = {}
    for item, said in zip(asked, ask_server(url, asked), strict=True):
        if not judge(item, said)[item.task]:
            wrong.setdefault(item.task, (item, said))
    chosen = list(wrong.values())[:count]
    width, height, columns = 270, 230, 4
    sheet = Image.new("RGB", (width * columns, height * -(-len(chosen) // columns)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for index, (item, said) in enumerate(chosen):
        left, top = index % columns * width + 6, index // columns * height + 6
        picture = beside(item.images, 150)
        picture.thumbnail((width - 12, 150))
        sheet.paste(picture, (left, top))
        question, truth = item.conversation.turns[-1]
        lines = (question, f"says: {said.strip()}", f"true: {truth}")
        for line, text in enumerate(lines):
            draw.text((left, top + 154 + 18 * line), _cut(text, 42), "black" if line != 1 else "#b00000", font)
    sheet.save(PICTURES / "mistakes.png", optimize=True)


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 1] + "…"


# ---- a chat -------------------------------------------------------------------------------------------------------

_CHAT = (
    "hello",
    "/image shapes.png",
    "What shape is blue?",
    "Where is it?",
    "Is the blue square left of the red circle?",
    "/clear",
    "shapes.png Give the bounding box of the green star.",
    "/clear",
    "receipt.png How much is the cake?",
    "And the tea?",
    "What is the total?",
    "/quit",
)


def chat_pictures(folder: Path) -> None:
    """Two pictures as a newcomer would make them with Pillow."""
    picture = Image.new("RGB", (480, 360), "white")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((40, 60, 160, 180), fill="red")
    draw.rectangle((300, 50, 410, 160), fill="blue")
    star = [(240, 200), (257, 250), (310, 250), (268, 281), (284, 332), (240, 301), (196, 332), (212, 281), (170, 250),
            (223, 250)]  # fmt: skip
    draw.polygon(star, fill="green")
    picture.save(folder / "shapes.png")
    picture = Image.new("RGB", (320, 320), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(56)
    for row, (item, price) in enumerate((("TEA", "4"), ("CAKE", "12"), ("TOTAL", "16"))):
        draw.text((16, 25 + 100 * row), item, "black", font)
        draw.text((304, 25 + 100 * row), price, "black", font, anchor="ra")
    picture.save(folder / "receipt.png")


def record_chat(server: Server) -> str:
    """What a terminal shows of `sightline chat` while ``_CHAT`` is typed into it."""
    with tempfile.TemporaryDirectory() as folder:
        chat_pictures(Path(folder))
        command = [sys.executable, "-m", "sightline_server.cli.main", "chat", "--url", server.url]
        environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "110", "PYTHONUNBUFFERED": "1"}
        child = pexpect.spawn(
            command[0], command[1:], cwd=folder, env=environment, encoding="utf-8", timeout=60, dimensions=(60, 110)
        )
        prompt = re.compile(r"(?:^|\n)(?:\[\d pictures?\] )?> $")
        shown = []
        for line in _CHAT:
            child.expect(prompt)
            shown.append(child.before + child.after)
            child.sendline(line)
        child.expect(pexpect.EOF)
        shown.append(child.before)
    text = re.sub(r"\S waiting for the first word\n", "", _ANSI.sub("", "".join(shown)))
    return re.sub(r"http://127\.0\.0\.1:\d+", "http://127.0.0.1:8000", text).strip()


# ---- golden transcripts -------------------------------------------------------------------------------------------

_TALKS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("greeting", (), ("Hello",)),
    ("help", (), ("What can you do?",)),
    ("no picture", (), ("What color is the circle?",)),
    ("caption", ("shapes.png",), ("Describe the picture.",)),
    ("count", ("shapes.png",), ("How many objects are there?",)),
    ("relation", ("shapes.png",), ("Is the red circle left of the blue square?",)),
    ("follow-up", ("shapes.png",), ("What color is the star?", "Where is it?")),
    ("turns", ("shapes.png",), ("Describe the picture.", "How many objects are there?", "Is there a yellow ring?")),
    ("box", ("shapes.png",), ("Give the bounding box of the blue square.",)),
    ("boxes", ("shapes.png",), ("Detect all objects as JSON.",)),
    ("absent", ("shapes.png",), ("Is there a yellow ring?",)),
    ("missing", ("shapes.png",), ("What color is the diamond?",)),
    ("receipt", ("receipt.png",), ("Read the receipt.",)),
    ("total", ("receipt.png",), ("What is the total?",)),
    ("item", ("receipt.png",), ("How much is the cake?", "And the tea?")),
    ("no item", ("receipt.png",), ("How much is the soup?",)),
    ("numbers", ("numbers.png",), ("Read the numbers.", "Add the numbers.")),
    ("word", ("word.png",), ("What does it say?",)),
    ("ink", ("word.png",), ("What color is the text?",)),
    ("pair", ("shapes.png", "more.png"), ("Which picture has more objects?",)),
)


def write_golden(url: str) -> None:
    """Pictures and transcripts that a test holds the shipped model to."""
    folder = ROOT / "tests/e2e/golden"
    folder.mkdir(exist_ok=True)
    chat_pictures(folder)
    for name, lines, ink, paper in (("numbers", ("47", "12"), "black", "white"), ("word", ("FISH",), "red", "yellow")):
        picture = Image.new("RGB", (320, 240), paper)
        for row, line in enumerate(lines):
            ImageDraw.Draw(picture).text((60, 10 + 115 * row), line, ink, ImageFont.load_default(90))
        picture.save(folder / f"{name}.png")
    picture = Image.new("RGB", (320, 240), "white")
    ImageDraw.Draw(picture).ellipse((90, 50, 230, 190), fill="purple")
    picture.save(folder / "more.png")
    transcripts = []
    for name, pictures, questions in _TALKS:
        images = tuple(Image.open(folder / picture).convert("RGB") for picture in pictures)
        turns: list[tuple[str, str]] = []
        for question in questions:
            item = Item(Conversation(name, (*turns, (question, ""))), images, ())
            turns.append((question, ask_server(url, [item])[0]))
        transcripts.append({"name": name, "pictures": pictures, "turns": turns})
    (folder / "transcripts.json").write_text(json.dumps(transcripts, indent=1) + "\n", encoding="utf-8")


# ---- figures ------------------------------------------------------------------------------------------------------


def figures(results: dict[str, Any], interim: dict[str, Any]) -> str:
    """The card's table: a task a row; grey figures in parentheses; the interim model on its own exam."""
    exams = results["exams"]
    names = [name for name in ("plain", "full", "wordings", "strangers", "fonts", "words") if name in exams]
    head = ["task", "interim, plain", *names]
    rows = [f"| {' | '.join(head)} |", f"|---|{'---|' * (len(head) - 1)}"]
    for task in sorted({task for exam in exams.values() for task in exam["scores"]}):
        cells = [_cell(interim["exams"]["plain"]["scores"].get(task))]
        cells += [_cell(exams[name]["scores"].get(task)) for name in names]
        rows.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return ""
    grey = f" ({score['grey']:.2f})" if "grey" in score else ""
    return f"{score['score']:.2f}{grey}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/show_demo", description="Write what README and docs/demo_model.md show of the demo model."
    )
    parser.add_argument("--results", type=Path, required=True, help="JSON of scripts/eval_demo")
    parser.add_argument("--interim", type=Path, required=True, help="the same, of the interim checkpoint's plain exam")
    parser.add_argument("--run", type=Path, help="folder of the training run, for its curves")
    args = parser.parse_args(arguments)
    console = Console()
    results, interim = (json.loads(path.read_text()) for path in (args.results, args.interim))
    replace_section(CARD, "figures", figures(results, interim))
    PICTURES.mkdir(exist_ok=True)
    if args.run:
        history = [json.loads(line) for line in (args.run / "history.jsonl").read_text().splitlines()]
        draw_curves(history, PICTURES / "curves.png")
    port = free_port()
    command = sightline_command(port, str(demo_checkpoint()), "--served-model-name", "sightline-demo")
    try:
        with running("sightline", command, port=port, ready_path="/ready") as server:
            show_gallery(server.url)
            show_mistakes(server.url)
            write_golden(server.url)
            replace_section(CARD, "chat", f"```text\n$ sightline chat\n{record_chat(server)}\n```")
    except ServerError as error:
        console.print(str(error), markup=False)
        return 1
    console.print(f"Written: {CARD}, {README}, {PICTURES}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
