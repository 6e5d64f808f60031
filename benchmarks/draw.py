"""Draw the perplexities that `quality.py --json RESULT` measured, as bars. Usage: draw.py RESULT OUT.svg [PATTERN].

Only draw 0 is shown, and methods with values of their own are left out.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

WIDTH, LEFT, RIGHT, TOP, STEP, BAR = 640, 96, 74, 44, 34, 20
TEXT = {
    "dense": "dense",
    "best": "best (ours)",
    "fast": "fast (ours)",
    "alps": "ALPS",
    "sparsegpt": "SparseGPT",
    "paper": "paper",
    "ria": "RIA",
    "wanda": "Wanda",
    "magnitude": "magnitude",
}


def draw(values: dict[str, float], pattern: str) -> str:
    """The picture as SVG, legible on light and dark pages. values: method -> perplexity."""
    rows = sorted(values.items(), key=lambda row: row[1])
    low, high = 10.0, 10 ** math.ceil(math.log10(max(values.values())))
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
    for number, (method, value) in enumerate(rows):
        y = TOP + STEP * number
        kind = {"best": "ours", "fast": "ours", "dense": "dense"}.get(method, "bar")
        parts.append(f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end">{TEXT[method]}</text>')
        parts.append(f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{across(value) - LEFT:.1f}" height="{BAR}"/>')
        parts.append(f'<text x="{across(value) + 6:.1f}" y="{y + 15}">{value:,.1f}</text>')
    middle = LEFT + span / 2
    parts.append(f'<text x="{middle}" y="{bottom + 40}" text-anchor="middle">perplexity, logarithmic</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    rows = json.loads(Path(sys.argv[1]).read_text())["rows"]
    pattern = sys.argv[3] if len(sys.argv) > 3 else "2:4"
    shown = [row for row in rows if row["pattern"] in ("", pattern) and row["draw"] == 0]  # dense has no pattern
    values = {row["method"]: row["perplexity"] for row in shown if row["method"] in TEXT}
    Path(sys.argv[2]).write_text(draw(values, pattern), encoding="utf-8")


if __name__ == "__main__":
    main()
