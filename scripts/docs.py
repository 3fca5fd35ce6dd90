"""Writes the generated documents from the tables in the code; with --check, only says which are stale.

Knows how the page of settings looks; what is said of speed, `benchmarks/report.py` writes. Knows nothing of what a
setting does.
"""

import argparse
import sys
from itertools import groupby
from pathlib import Path

from sightline_server.settings import Row, rows

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path("docs/settings.md")

# The benchmarks are no part of the installation.
sys.path.insert(0, str(ROOT))
from benchmarks import report  # noqa: E402

HEAD = """# Settings

<!-- Written by scripts/docs.py from server/sightline_server/settings.py. Edit that table, then run the script. -->

Each setting is a flag of `sightline serve` and an environment variable. A flag wins over the variable, the variable
over the default. An unknown `SIGHTLINE_` variable, or a value out of its range, stops the start with a sentence that
names it. The model folder is an argument instead of a flag: `sightline serve /models/llava-1.5-7b-hf`.
"""


def _flag(row: Row) -> str:
    if row.name == "model":
        return "`MODEL_DIR`"
    if row.kind is bool:
        return f"`{row.flag}`, `--no-{row.flag.removeprefix('--')}`"
    return f"`{row.flag}`"


def _default(row: Row) -> str:
    if row.many:
        return ", ".join(f"`{value}`" for value in row.default) or "none"
    if row.kind is bool:
        return "on" if row.default else "off"
    if row.is_size:
        return "none"
    return f"`{row.default}`" if row.default != "" else "none"


def _values(row: Row) -> str:
    if row.choices:
        return ", ".join(f"`{choice}`" for choice in row.choices)
    if row.kind is bool:
        return "`true`, `false`"
    if row.kind is str:
        return "text; several: the flag again, or commas" if row.many else "text"
    if row.is_size:
        return "size: `20GiB`, `16000MB`, bytes"
    noun = "whole number" if row.kind is int else "number"
    if row.minimum is not None and row.maximum is not None:
        return f"{noun}, {row.minimum:g} to {row.maximum:g}"
    return f"{noun}, at least {row.minimum:g}" if row.minimum is not None else noun


def settings_page() -> str:
    parts = [HEAD]
    for section, members in groupby(rows(), key=lambda row: row.section):
        parts.append(
            f"\n## {section}\n\n| flag | variable | values | default | what it does |\n|---|---|---|---|---|\n"
        )
        for row in members:
            help_text = row.help.replace("|", "\\|")
            parts.append(f"| {_flag(row)} | `{row.env}` | {_values(row)} | {_default(row)} | {help_text} |\n")
    return "".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the generated documents.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail when a page is stale")
    check = parser.parse_args().check
    try:
        wanted = {PAGE: settings_page(), **report.pages(ROOT)}
    except report.ReportError as error:
        print(error, file=sys.stderr)
        return 1
    stale = [path for path, text in wanted.items() if _content(path) != text]
    for path in stale:
        if check:
            print(f"{path} is stale: run .venv/bin/python scripts/docs.py", file=sys.stderr)
        else:
            (ROOT / path).write_text(wanted[path], encoding="utf-8")
            print(f"{path} written")
    if not stale:
        print(f"up to date: {', '.join(map(str, wanted))}")
    return 1 if stale and check else 0


def _content(path: Path) -> str | None:
    return (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).is_file() else None


if __name__ == "__main__":
    sys.exit(main())
