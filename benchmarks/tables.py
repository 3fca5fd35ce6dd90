"""Results as rows of text: what competed, what it gave, and how many times that ours gives.

Knows result files and words. Knows nothing of pages, servers or pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.figures import AGAIN, BASE, BY_ID, Load, by_round, concurrencies, gain, loads_of, noise, number, spread

Document = Mapping[str, Any]
FAILED = "failed the gate"


@dataclass(frozen=True)
class Table:
    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> list[str]:
        """The first column to the left, figures to the right."""
        rule = "|---|" + "---:|" * (len(self.headings) - 1)
        return [_line(self.headings), rule, *(_line(row) for row in self.rows)]

    def aligned(self) -> list[str]:
        lines = [self.headings, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.headings))]
        told = [
            "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(cells))
            for cells in (tuple(zip(line, widths, strict=True)) for line in lines)
        ]
        return [self.title, *told]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def label_of(system: Mapping[str, Any]) -> str:
    """Its name with what it was started with."""
    if system["setting"] is None or system["key"].startswith("llama-"):
        return str(system["label"])
    return f"{system['label']} ({started_with(system)})"


def started_with(choice: Mapping[str, Any]) -> str:
    threads = choice["threads"]
    told = {"auto": "the checkpoint's precision"}.get(choice["setting"], choice["setting"])
    if threads == "default":
        return told
    # Another choice than a number says what it is.
    noun = "" if not threads.isdecimal() else " thread" if threads == "1" else " threads"
    return f"{told}, {threads}{noun}"


def overview(model: Mapping[str, Any], measure: str = "tokens_per_s") -> Table:
    """A row a system, a column a concurrency: the median, and how many times that ours gives."""
    loads = loads_of(model["loads"])
    found = concurrencies(loads)
    rows = []
    for system in model["systems"]:
        cells = [_overview_cell(loads, system["key"], concurrency, measure) for concurrency in found]
        rows.append((label_of(system), *(cells if _has_speed(loads, system) else [FAILED] * len(found))))
    headings = (f"{model['model']}: {BY_ID[measure].label}", *(f"{count} at once" for count in found))
    return Table(model["model"], headings, tuple(rows))


def _overview_cell(loads: Sequence[Load], key: str, concurrency: int, measure: str) -> str:
    values = by_round(loads, key, concurrency, measure)
    if not values:
        return "-"
    median = number(spread(list(values.values())).median)
    found = None if key == BASE else gain(loads, key, concurrency, measure)
    return median if found is None else f"{median} ({found})"


DETAILS = (
    ("tokens/s", "tokens_per_s", None),
    ("tokens per CPU second", "tokens_per_cpu_s", None),
    ("first token, ms: p50 / p99", "ttft_p50_ms", "ttft_p99_ms"),
    ("each token after it, ms: p50 / gaps' p99", "tpot_p50_ms", "itl_p99_ms"),
)


def details(model: Mapping[str, Any]) -> list[Table]:
    """A table a concurrency, every measure: median [least, most] of the rounds, then how many times better ours is."""
    loads = loads_of(model["loads"])
    tables = []
    for concurrency in concurrencies(loads):
        rows = []
        for system in model["systems"]:
            if not _has_speed(loads, system):
                rows.append((label_of(system), *[FAILED] * (2 * len(DETAILS))))
            elif by_round(loads, system["key"], concurrency, "tokens_per_s"):
                rows.append((label_of(system), *_detail_cells(loads, system["key"], concurrency)))
        headings = [f"{model['model']}, {concurrency} at once"]
        for heading, _, _ in DETAILS:
            headings += [heading, "ours"]
        tables.append(Table(f"{model['model']}, {concurrency} at once", tuple(headings), tuple(rows)))
    return tables


def _detail_cells(loads: Sequence[Load], key: str, concurrency: int) -> list[str]:
    cells = []
    for _, measure, tail in DETAILS:
        values = list(by_round(loads, key, concurrency, measure).values())
        found = None if key == BASE else gain(loads, key, concurrency, measure)
        if not values:
            cells += ["-", "-"]
            continue
        median = spread(values)
        told = f"{number(median.median)} [{number(median.least)}, {number(median.most)}]"
        if tail is not None and (ends := list(by_round(loads, key, concurrency, tail).values())):
            told += f" / {number(spread(ends).median)}"
        cells += [told, "" if found is None else str(found)]
    return cells


def _has_speed(loads: Sequence[Load], system: Mapping[str, Any]) -> bool:
    return any(load.system == system["key"] for load in loads)


def gate_lines(model: Mapping[str, Any]) -> list[str]:
    """A sentence for every way that was tried: its speed when tried, and the gate's verdict."""
    lines = []
    for system in model["systems"]:
        for one in system["tried"]:
            told = f"{system['label']}, {started_with(one)}"
            if one["tokens_per_s"] is not None:
                told += f": {number(one['tokens_per_s'])} tokens/s when tried"
            if "gate" in one:
                told += f"; gate {'passed' if one['passed'] else 'FAILED'}: {one['gate']}"
            lines.append(told)
    return lines


def noise_line(model: Mapping[str, Any]) -> str:
    """What ours differed by from itself, in throughput."""
    loads = loads_of(model["loads"])
    told = [
        f"{(noise(loads, count, 'tokens_per_s') - 1):.1%} at {count}"
        for count in concurrencies(loads)
        if by_round(loads, AGAIN, count, "tokens_per_s")
    ]
    return f"Asked twice a round, ours differed from itself in tokens/s by up to {', '.join(told)}." if told else ""


def workload_line(document: Document) -> str:
    work = document["workload"]
    pictures = {
        "own": "a fresh picture with each request (caches cold)",
        "same": "one picture for all requests (caches warm but for the first)",
        "none": "no pictures",
    }[work["images"]]
    rounds = "1 round" if document["rounds"] == 1 else f"{document['rounds']} rounds"
    return (
        f"{pictures[0].upper()}{pictures[1:]}, {work['input_len']} text tokens in, {work['output_len']} out, sampled "
        f"at temperature 1 to full length; {rounds}, {document['size']} size."
    )


def machine_line(document: Document) -> str:
    machine, after = document["machine"], document["machine_after"]
    packages = ", ".join(f"{name} {machine['packages'][name]}" for name in SHOWN if name in machine["packages"])
    clock = after["matmul_gflops"] / machine["matmul_gflops"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:g} GiB; {packages}; commit "
        f"{machine['commit']}, {machine['date'][:10]}. Load {machine['load'][0]:g} before and {after['load'][0]:g} "
        f"after; a fixed matrix product ran at {clock:.2f} times its speed before."
    )


SHOWN = ("torch", "transformers", "llama-server")


def terminal(document: Document) -> list[str]:
    """All there is to say when a run has ended."""
    lines = ["", workload_line(document), machine_line(document)]
    for model in document["models"]:
        for table in details(model):
            lines += ["", *table.aligned()]
        lines += [noise_line(model)] if model["loads"] else [f"{model['model']}: no speed, since the gate failed."]
    return [
        *lines,
        "Medians of the rounds [least, most]. Ours: how many times better than that row, = where it differs from "
        "itself by as much.",
    ]
