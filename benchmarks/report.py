"""Writes what the README and `docs/performance.md` say of speed, and the chart, from the newest result files.

Knows result files, markers and pages; runs nothing. Standard library only: the docs gate calls it on a bare checkout.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import chart, tables
from benchmarks.figures import FORMAT
from benchmarks.gpu.targets import ROWS, Row

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks/results")
README, PAGE, CHART = Path("README.md"), Path("docs/performance.md"), Path("docs/performance.svg")
BEGIN, END = "<!-- performance: written by scripts/bench --report -->", "<!-- end of performance -->"
NOT_MEASURED = "not measured"


class ReportError(ValueError):
    """A page that can't take the report; the sentence says what to mend."""


def newest_cpu(root: Path) -> tuple[str, dict[str, Any]] | None:
    """Name and content of the newest full result, or of the newest quick one when there is no full one."""
    found = []
    for path in (root / RESULTS).glob("cpu-*.json"):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("format") == FORMAT:
            found.append((document["size"] == "full", document["machine"]["date"], path.name, document))
    if not found:
        return None
    _, _, name, document = max(found, key=lambda each: each[:3])
    return name, document


def newest_gpu(root: Path) -> tuple[str, dict[str, Any]] | None:
    """Folder and verdicts of the newest GPU check, by the date its folder is named for."""
    found = []
    for path in (root / RESULTS).glob("gpu-*/verdicts.json"):
        if dated := re.search(r"\d{4}-\d{2}-\d{2}$", path.parent.name):
            found.append((dated[0], path.parent.name, path))
    if not found:
        return None
    _, name, path = max(found)
    return name, json.loads(path.read_text(encoding="utf-8"))


def gpu_table(told: tuple[str, Mapping[str, Any]] | None, rows: Iterable[Row], up: str) -> list[str]:
    """A line a row; without a result each says so. ``up`` leads from the page to the root."""
    cells = []
    for row in rows:
        verdict = told[1]["rows"].get(row.id, {}) if told else {}
        value, note = verdict.get("value"), verdict.get("note", "")
        measured = NOT_MEASURED if value is None else _with_unit(value, row.unit) + _missed(row, value)
        cells.append((row.what, _target(row), f"{measured}; {note}" if note else measured))
    heading = f"on a GPU ([{told[0]}]({up}{RESULTS / told[0]}))" if told else "on a GPU"
    return tables.Table("", (heading, "target", "measured"), tuple(cells)).markdown()


def _target(row: Row) -> str:
    if row.target is None:
        return "-"
    if row.target == 0 and row.better == "less":
        return "none"
    return f"{'at least' if row.better == 'more' else 'at most'} {_with_unit(row.target, row.unit)}"


def _missed(row: Row, value: float) -> str:
    if row.target is None:
        return ""
    reached = value >= row.target if row.better == "more" else value <= row.target
    return "" if reached else " (missed)"


def _with_unit(value: float, unit: str) -> str:
    if unit == "share":
        return f"{100 * value:.3g}%"
    return f"{value:,.4g}x{unit[1:]}" if unit.partition(" ")[0] == "x" else f"{value:,.4g} {unit}"


READING = (
    "In brackets: how many times better Sightline's first row is than that row, as median [least, most] of the rounds; "
    "= where it differs from itself by as much."
)
NOTHING = (
    "Nothing has been measured on a CPU with this bench yet: run `scripts/bench --suite cpu --full`. Older figures "
    "stand in the log."
)


def readme_block(cpu: tuple[str, Mapping[str, Any]] | None, gpu: tuple[str, Mapping[str, Any]] | None) -> list[str]:
    """The overview: output tokens a second of every system, and the GPU's rows that have a target."""
    if cpu is None:
        lines = [NOTHING, ""]
    else:
        name, document = cpu
        lines = [tables.workload_line(document) + " " + READING, ""]
        for model in document["models"]:
            lines += [*tables.overview(model).markdown(), ""]
        lines += [f"![Output tokens a second over time to first token]({CHART})", ""]
        lines += [f"{tables.machine_line(document)} All of it: [{name}]({RESULTS / name}).", ""]
    return [*lines, *gpu_table(gpu, (row for row in ROWS if row.target is not None), "")]


def page_block(cpu: tuple[str, Mapping[str, Any]] | None, gpu: tuple[str, Mapping[str, Any]] | None) -> list[str]:
    """Every measure of every system, what was tried, what the gate said, and the GPU's rows."""
    if cpu is None:
        lines = [NOTHING, ""]
    else:
        name, document = cpu
        lines = [f"From [{name}](../{RESULTS / name}). " + tables.workload_line(document), ""]
        lines += [tables.machine_line(document), ""]
        lines += [f"![Output tokens a second over time to first token]({CHART.name})", ""]
        for model in document["models"]:
            lines += [f"### {model['model']}", ""]
            for table in tables.details(model):
                lines += [*table.markdown(), ""]
            if model["loads"]:
                lines += [tables.noise_line(model), ""]
            lines += ["What was tried, and what the gate said of it:", ""]
            lines += [*(f"- {line}" for line in tables.gate_lines(model)), ""]
    return [*lines, "### GPU", "", *gpu_table(gpu, ROWS, "../")]


def with_block(text: str, block: list[str], name: str) -> str:
    """``text`` with ``block`` between the markers. Raises ReportError when it hasn't exactly one pair of them."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ReportError(f"{name} needs one line '{BEGIN}' and after it one line '{END}'.")
    before, rest = text.split(BEGIN)
    return before + "\n".join([BEGIN, "", *block, "", END]) + rest.split(END)[1]


def pages(root: Path) -> dict[Path, str]:
    """What each written file should hold, by its path from ``root``. Raises ReportError for a page without markers."""
    cpu, gpu = newest_cpu(root), newest_gpu(root)
    blocks = {README: readme_block(cpu, gpu), PAGE: page_block(cpu, gpu)}
    wanted = {
        path: with_block((root / path).read_text(encoding="utf-8"), block, str(path)) for path, block in blocks.items()
    }
    if cpu is not None:
        wanted[CHART] = chart.draw(cpu[1])
    return wanted


def stale(root: Path) -> list[Path]:
    """The files that differ from what the results say."""
    return [
        path
        for path, text in pages(root).items()
        if not (root / path).is_file() or (root / path).read_text(encoding="utf-8") != text
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench --report", description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="of the checkout (default: this one)")
    root = parser.parse_args(arguments).root
    try:
        behind, wanted = stale(root), pages(root)
    except ReportError as error:
        print(error, file=sys.stderr)
        return 1
    for path in behind:
        (root / path).write_text(wanted[path], encoding="utf-8")
    print(f"written: {', '.join(map(str, behind))}" if behind else "README, page and chart are up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
