"""Throughput over latency as an SVG: a panel a model, a line a system, a point a concurrency.

Knows figures and SVG, and draws with nothing but the standard library. The picture brings its own background, in light
and dark, since a page that shows it as an image can't lend it one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from benchmarks.figures import BASE, Spread, by_round, concurrencies, loads_of, number, spread
from benchmarks.tables import label_of

ACROSS, ALONG = "ttft_p50_ms", "tokens_per_s"
PANEL_W, ALONE_W, PANEL_H = 400, 640, 300
LEFT, RIGHT, GAP = 72, 28, 84
HEAD, LEGEND_ROW, FOOT = 64, 20, 62

LIGHT = {"paper": "#ffffff", "ink": "#1d2733", "soft": "#5b6875", "grid": "#e9edf1", "edge": "#d5dbe1"}
DARK = {"paper": "#12181f", "ink": "#e5ebf1", "soft": "#9aa7b4", "grid": "#232c36", "edge": "#313c48"}
COLOURS = {
    "ours": ("#1663c7", "#6cabff"),
    "ours-int8": ("#0b8a74", "#45d3b6"),
    "ours-defaults": ("#5b4bc4", "#aaa0ff"),
    "ours-deterministic": ("#1663c7", "#6cabff"),
    "transformers": ("#c2550f", "#ffa062"),
    "transformers-defaults": ("#93815f", "#bfae8a"),
}
"""Of the systems that are always the same, in light and in dark."""
OTHERS = (("#7b3fd1", "#c3a0ff"), ("#c01f66", "#ff86b4"), ("#4d6b1f", "#a8cf6b"))
HOLLOW, DASHED = "ours-deterministic", "transformers-defaults"
LABELS = {"ours": (9, 13, "start"), "ours-int8": (-8, -6, "end"), "ours-deterministic": (0, -10, "middle")}
"""Where a point's number stands: off the lines, which rise for ours and run level for a peer that batches nothing."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', Arial, sans-serif"


@dataclass(frozen=True)
class Point:
    concurrency: int
    across: Spread
    along: Spread


@dataclass(frozen=True)
class Line:
    key: str
    label: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Scale:
    """Logarithmic, from figures to pixels."""

    least: float
    most: float
    first: float
    last: float

    def __call__(self, value: float) -> float:
        share = math.log(value / self.least) / math.log(self.most / self.least)
        return self.first + share * (self.last - self.first)


def lines_of(model: Mapping[str, Any]) -> list[Line]:
    """Every system that has figures."""
    loads = loads_of(model["loads"])
    made = []
    for system in model["systems"]:
        points = []
        for concurrency in concurrencies(loads):
            across, along = (
                list(by_round(loads, system["key"], concurrency, measure).values()) for measure in (ACROSS, ALONG)
            )
            if across and along:
                points.append(Point(concurrency, spread(across), spread(along)))
        if points:
            made.append(Line(system["key"], label_of(system).replace("`", ""), tuple(points)))
    return made


def ticks(least: float, most: float) -> list[float]:
    """1, 2 and 5 times powers of ten; powers of ten alone where these would be too many."""
    powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    fine = [step * 10.0**power for power in powers for step in (1, 2, 5)]
    inside = [tick for tick in fine if least <= tick <= most]
    return inside if len(inside) <= 9 else [tick for tick in inside if round(math.log10(tick), 6).is_integer()]


def _short(tick: float) -> str:
    return f"{tick / 1000:g}k" if tick >= 1000 else f"{tick:g}"


def padded(values: Sequence[float]) -> tuple[float, float]:
    """Room round the least and the most, so that no point lies on an edge."""
    least, most = min(values), max(values)
    room = max((most / least) ** 0.08, 1.15)
    return least / room, most * room


def draw(document: Mapping[str, Any]) -> str:
    """The whole picture of one result file."""
    panels = [(model["model"], lines) for model in document["models"] if (lines := lines_of(model))]
    # The models' settings may differ, and one legend serves all panels.
    keys = {line.key: line.label.split(" (")[0] for _, lines in panels for line in lines}
    places = {key: f"c{index}" for index, key in enumerate(keys)}
    panel_width = ALONE_W if len(panels) < 2 else PANEL_W
    width = LEFT + max(len(panels), 1) * (panel_width + GAP) - GAP + RIGHT
    top = HEAD + -(-len(keys) // 2) * LEGEND_ROW + 32
    height = top + PANEL_H + FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" aria-label="Output tokens a second over time to first token">',
        f"<style>\n{_style(list(keys))}</style>",
        f'<rect class="paper" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="10"/>',
        _text(24, 32, "Throughput over time to first token", "title"),
        _text(24, 51, "Medians of the rounds, bars from least to most; numbers say how many requests ran at once."),
        *_legend(keys, places, width),
    ]
    for index, (name, lines) in enumerate(panels):
        parts += _panel(name, lines, places, LEFT + index * (panel_width + GAP), top, panel_width)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _style(keys: Sequence[str]) -> str:
    """Plain rules for light and the same again for dark, without variables: some programs that show SVG know none."""
    others = iter(OTHERS * len(keys))
    pairs = [COLOURS.get(key) or next(others) for key in keys]
    looks = [
        f"text {{ font: 12px {FONT}; }}",
        "text.title { font-size: 16px; font-weight: 600; } text.panel { font-size: 13px; font-weight: 600; }",
        "text.at { font-size: 11px; font-weight: 600; paint-order: stroke; stroke-width: 3px; }",
        ".line { fill: none; stroke-width: 2; stroke-linejoin: round; } .bar { stroke-width: 1.25; opacity: .55; }",
        ".dot { stroke-width: 1.5; } .hollow { stroke-width: 2; } .axis { fill: none; }",
        *_colours(LIGHT, [light for light, _ in pairs]),
        "@media (prefers-color-scheme: dark) {",
        *(f"  {rule}" for rule in _colours(DARK, [dark for _, dark in pairs])),
        "}",
    ]
    return "\n".join(looks) + "\n"


def _colours(page: Mapping[str, str], systems: Sequence[str]) -> list[str]:
    return [
        f"text {{ fill: {page['soft']}; }} text.title, text.panel, text.legend {{ fill: {page['ink']}; }}",
        f".paper {{ fill: {page['paper']}; stroke: {page['edge']}; }} .grid {{ stroke: {page['grid']}; }} "
        f".axis {{ stroke: {page['edge']}; }}",
        *(
            f".line.c{index}, .bar.c{index}, .hollow.c{index} {{ stroke: {colour}; }} "
            f".dot.c{index}, text.c{index} {{ fill: {colour}; }}"
            for index, colour in enumerate(systems)
        ),
        f".dot, text.at {{ stroke: {page['paper']}; }} .hollow {{ fill: {page['paper']}; }}",
    ]


def _legend(keys: Mapping[str, str], places: Mapping[str, str], width: int) -> list[str]:
    parts, column = [], (width - 48) // 2
    for index, (key, label) in enumerate(keys.items()):
        x, y = 24 + index % 2 * column, HEAD + 14 + index // 2 * LEGEND_ROW
        if key != HOLLOW:
            parts.append(_stroke(f"M{x} {y - 4}H{x + 24}", key, places[key]))
        parts.append(_dot(x + 12, y - 4, key, places[key]))
        parts.append(_text(x + 32, y, label, "legend"))
    return parts


def _panel(name: str, lines: Sequence[Line], places: Mapping[str, str], x: int, y: int, width: int) -> list[str]:
    points = [point for line in lines for point in line.points]
    across = Scale(*padded([p.across.median for p in points]), x, x + width)
    along = Scale(*padded([v for p in points for v in (p.along.least, p.along.most)]), y + PANEL_H, y)
    parts = [_text(x, y - 8, name, "panel"), _text(x + width, y - 8, "\u2196 better", anchor="end")]
    for tick in ticks(across.least, across.most):
        at = round(across(tick), 1)
        parts.append(f'<path class="grid" d="M{at} {y}V{y + PANEL_H}"/>')
        parts.append(_text(at, y + PANEL_H + 18, _short(tick), anchor="middle"))
    for tick in ticks(along.least, along.most):
        at = round(along(tick), 1)
        parts.append(f'<path class="grid" d="M{x} {at}H{x + width}"/>')
        parts.append(_text(x - 8, at + 4, _short(tick), anchor="end"))
    parts.append(f'<path class="axis" d="M{x} {y}V{y + PANEL_H}H{x + width}"/>')
    parts.append(_text(x + width / 2, y + PANEL_H + 40, "time to first token, median, ms (log)", anchor="middle"))
    middle = y + PANEL_H / 2
    turned = f'transform="rotate(-90 {x - 52} {middle})"'
    parts.append(_text(x - 52, middle, "output tokens/s (log)", anchor="middle", more=turned))
    # Ours last, so that nothing covers it.
    for line in sorted(lines, key=lambda line: line.key == BASE):
        parts += _line(line, places[line.key], across, along)
    return parts


def _line(line: Line, place: str, across: Scale, along: Scale) -> list[str]:
    spots = [(round(across(p.across.median), 1), round(along(p.along.median), 1)) for p in line.points]
    parts = [_stroke("M" + "L".join(f"{x} {y}" for x, y in spots), line.key, place)] if len(spots) > 1 else []
    for (x, y), point in zip(spots, line.points, strict=True):
        ends = [round(along(value), 1) for value in (point.along.least, point.along.most)]
        parts.append(f'<path class="bar {place}" d="M{x} {ends[0]}V{ends[1]}"/>')
        told = (
            f"{line.label}, {point.concurrency} at once: {number(point.along.median)} tokens/s, first token after "
            f"{number(point.across.median)} ms"
        )
        parts.append(_dot(x, y, line.key, place, told))
        right, down, anchor = LABELS.get(line.key, (7, -8, "start"))
        parts.append(_text(x + right, y + down, str(point.concurrency), f"at {place}", anchor=anchor))
    return parts


def _stroke(path: str, key: str, place: str) -> str:
    dashes = ' stroke-dasharray="5 4"' if key == DASHED else ""
    return f'<path class="line {place}"{dashes} d="{path}"/>'


def _dot(x: float, y: float, key: str, place: str, told: str = "") -> str:
    title = f"<title>{escape(told)}</title>" if told else ""
    return f'<circle class="{"hollow" if key == HOLLOW else "dot"} {place}" cx="{x}" cy="{y}" r="4.5">{title}</circle>'


def _text(x: float, y: float, text: str, kind: str = "", *, anchor: str = "", more: str = "") -> str:
    told = [f'x="{x:g}" y="{y:g}"']
    told += [f'class="{kind}"'] if kind else []
    told += [f'text-anchor="{anchor}"'] if anchor else []
    told += [more] if more else []
    return f"<text {' '.join(told)}>{escape(text)}</text>"
