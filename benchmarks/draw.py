"""Draw the perplexities that `one_shot.py --json RESULT` measured, as bars. Usage: draw.py RESULT OUT.svg."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

WIDTH, LEFT, RIGHT, TOP, STEP, BAR = 640, 96, 74, 44, 34, 20
TEXT = {
    "dense": "dense",
    "fast": "fast (ours)",
    "paper": "paper",
    "ria": "RIA",
    "wanda": "Wanda",
    "magnitude": "magnitude",
}


def draw(rows: list[dict], pattern: str) -> str:
    """The picture as SVG, legible on light and dark pages."""
    rows = sorted(rows, key=lambda row: row["perplexity"])
    low, high = 10.0, 10 ** math.ceil(math.log10(max(row["perplexity"] for row in rows)))
    span = WIDTH - LEFT - RIGHT

    def across(value: float) -> float:
        return LEFT + span * math.log(value / low) / math.log(high / low)

    bottom = TOP + STEP * len(rows)
    title = f"SmolLM2-135M pruned to {pattern}: perplexity on WikiText-2 (less is better)"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 52}" role="img" aria-label="{title}">',
        "<style>text{font:13px sans-serif;fill:#24292f}.grid{stroke:#8c959f;stroke-width:.5}.bar{fill:#8c959f}"
        ".ours{fill:#0072b2}.dense{fill:#57606a}"
        "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.bar{fill:#6e7681}.ours{fill:#56b4e9}"
        ".dense{fill:#9ea7b3}}</style>",
        f'<text x="{LEFT}" y="20" font-weight="bold">{title}</text>',
    ]
    tick = low
    while tick <= high:
        x = across(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick:,.0f}</text>')
        tick *= 10
    for number, row in enumerate(rows):
        y, value = TOP + STEP * number, row["perplexity"]
        kind = {"fast": "ours", "dense": "dense"}.get(row["method"], "bar")
        parts.append(f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end">{TEXT[row["method"]]}</text>')
        parts.append(f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{across(value) - LEFT:.1f}" height="{BAR}"/>')
        parts.append(f'<text x="{across(value) + 6:.1f}" y="{y + 15}">{value:,.1f}</text>')
    middle = LEFT + span / 2
    parts.append(f'<text x="{middle}" y="{bottom + 40}" text-anchor="middle">perplexity, logarithmic</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    result = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(draw(result["rows"], result["pattern"]), encoding="utf-8")


if __name__ == "__main__":
    main()
