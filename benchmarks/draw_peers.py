"""Draw perplexity against bits a weight, as `peers.py --json RESULT` measured. Usage: draw_peers.py RESULT OUT.svg.

A packed model's name says what it is, `ours 2:4 int8 recovered`; those of one pattern, recovered or not, are joined by
a line. What decodes compiled is the same model, and is drawn where it has no row as it is.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from peers import bits_a_weight

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 470, 52, 24, 42, 48
LETTER = 6.6  # width of one in the labels
STYLE = (
    "<style>text{font:12px sans-serif;fill:#24292f}.grid{stroke:#8c959f;stroke-width:.4}"
    ".line{fill:none;stroke-width:1.6}"
    ".pruned{stroke:#0072b2}.recovered{stroke:#009e73}circle.pruned{fill:#0072b2}circle.recovered{fill:#009e73}"
    ".peer{fill:#8c959f}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.pruned{stroke:#56b4e9}.recovered{stroke:#2bd4a0}"
    "circle.pruned{fill:#56b4e9}circle.recovered{fill:#2bd4a0}}</style>"
)


@dataclass(frozen=True)
class Point:
    """A row: its place in the picture, what is written beside it, and the line it is on; None for other programs."""

    x: float
    y: float
    label: str
    line: tuple[str, bool] | None


@dataclass
class Axes:
    """From bits a weight and perplexity to the picture; the perplexity is logarithmic."""

    bits: tuple[float, float]
    perplexity: tuple[float, float]

    def across(self, bits: float) -> float:
        """From the left."""
        low, high = self.bits
        return LEFT + (WIDTH - LEFT - RIGHT) * (bits - low) / (high - low)

    def down(self, perplexity: float) -> float:
        """From the top."""
        low, high = map(math.log, self.perplexity)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (math.log(perplexity) - low) / (high - low)


def models(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows by name, each model once."""
    rows = {row["name"]: row for row in found["rows"]}
    compiled = {name.removesuffix(", compiled"): row for name, row in rows.items() if name.endswith(", compiled")}
    return compiled | {name: row for name, row in rows.items() if not name.endswith(", compiled")}


def points(found: dict[str, Any], axes: Axes) -> list[Point]:
    """Of all models."""
    result = []
    for name, row in models(found).items():
        x, y = axes.across(bits_a_weight(row, found)), axes.down(math.exp(row["loss"]))
        line, label = None, name.removeprefix("llama.cpp ")
        if name.startswith("ours "):
            pattern, *rest = name.split()[1:]
            line = pattern, "recovered" in rest
            label = " ".join(part for part in (pattern, *rest) if part != "recovered")
        result.append(Point(x, y, label, line))
    return result


def labelled(found: list[Point]) -> list[str]:
    """The labels, each where it covers no point and no label, as far as there is such a place."""
    spots = [(point.x, point.y) for point in found]
    for line in lines(found):  # which labels had better not cross
        for (x, y), (to_x, to_y) in pairwise(line):
            steps = max(1, int(math.hypot(to_x - x, to_y - y) / 8))
            spots += [(x + (to_x - x) * i / steps, y + (to_y - y) * i / steps) for i in range(steps)]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in spots]
    parts = []
    for point in found:
        wide = LETTER * len(point.label)
        places = []
        for distance in (0, 8, 16, 24):
            places += [(point.x - wide / 2, point.y - 9 - distance), (point.x - wide / 2, point.y + 17 + distance)]
            places += [(point.x + 8, point.y + 4 + distance), (point.x - wide - 8, point.y + 4 - distance)]
        inside = [place for place in places if LEFT <= place[0] <= WIDTH - wide - 2]
        boxes = [(x, y - 10, x + wide, y + 3) for x, y in inside]
        best = min(range(len(boxes)), key=lambda i: (sum(covered(boxes[i], box) for box in taken), i))
        taken.append(boxes[best])
        x, y = inside[best]
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}">{escape(point.label)}</text>')
    return parts


def lines(found: list[Point]) -> list[list[tuple[float, float]]]:
    """The corners of each line, from left to right."""
    names = dict.fromkeys(point.line for point in found if point.line)
    return [sorted((point.x, point.y) for point in found if point.line == name) for name in names]


def covered(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """The area that two boxes share."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return max(wide, 0) * max(high, 0)


def draw(found: dict[str, Any]) -> str:
    """The picture as SVG, legible on light and dark pages."""
    bits = [bits_a_weight(row, found) for row in found["rows"]]
    perplexities = [math.exp(row["loss"]) for row in found["rows"]]
    first, last = math.floor(min(bits)) - 1, math.ceil(max(bits)) + 1
    axes = Axes((first, last), (min(perplexities) * 0.93, max(perplexities) * 1.06))
    title = escape(f"{found['model']}: perplexity on {found['text']} against bits a weight of the file")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">',
        STYLE,
        f'<text x="{LEFT}" y="20" font-weight="bold">{title}</text>',
    ]
    for tick in range(first + 1, last, 2):
        x = axes.across(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick}</text>')
    for tick in (1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 40, 50, 60, 80, 100, 150, 200, 300, 500, 1000):
        if axes.perplexity[0] <= tick <= axes.perplexity[1]:
            y = axes.down(tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>')
    placed = points(found, axes)
    names = dict.fromkeys(point.line for point in placed if point.line)
    for name, line in zip(names, lines(placed), strict=True):
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
        parts.append(f'<polyline class="line {kind(name)}" points="{joined}"/>')
    parts += [f'<circle class="{kind(p.line)}" cx="{p.x:.1f}" cy="{p.y:.1f}" r="4"/>' for p in placed]
    parts += labelled(placed)
    for style, text, x in (("pruned", "pruned", 400), ("recovered", "pruned, recovered", 480), ("peer", "others", 620)):
        parts.append(f'<circle class="{style}" cx="{x}" cy="{TOP - 6}" r="4"/>')
        parts.append(f'<text x="{x + 9}" y="{TOP - 2}">{text}</text>')
    x, text = (LEFT + WIDTH - RIGHT) / 2, "bits a weight; perplexity: logarithmic"
    parts.append(f'<text x="{x}" y="{HEIGHT - 10}" text-anchor="middle">{text}</text>')
    return "\n".join([*parts, "</svg>", ""])


def kind(line: tuple[str, bool] | None) -> str:
    """The class of style of what is on a line."""
    return "peer" if line is None else "recovered" if line[1] else "pruned"


def main() -> None:
    found = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(draw(found), encoding="utf-8")


if __name__ == "__main__":
    main()
