"""Loss curves of runs as one SVG picture: `python bench/plot_loss.py out/L6-D256-x070/metrics.jsonl ... --out loss.svg`.

Standard library only. Thin: loss of every step; thick: its mean over the last 2 % of the run; dots: validation loss.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 400, 50, 40, 20, 36
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")
Points = list[tuple[float, float]]


def read(path: Path) -> tuple[Points, Points]:
    """(tokens, loss) and (tokens, validation loss). A step that was done again after a resume counts once, the last time."""
    steps: dict[int, tuple[float, float]] = {}
    held_out: dict[int, tuple[float, float]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        for key, points in (("loss", steps), ("val_loss", held_out)):
            if record.get(key) is not None:
                points[record["step"]] = (record["tokens"], record[key])
    return [steps[step] for step in sorted(steps)], [held_out[step] for step in sorted(held_out)]


def smooth(points: Points) -> Points:
    """Each loss as the mean of a window that ends there."""
    window = max(1, len(points) // 50)
    values = [value for _, value in points]
    return [(tokens, sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window)) for i, (tokens, _) in enumerate(points)]


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between the two ends, at most ten."""
    step = 10.0**-6
    while (high - low) / step > 10:
        step *= 2.5 if f"{step:e}".startswith("2") else 2
    first = -(-low // step)
    return [step * (first + i) for i in range(int(high / step - first + 1e-9) + 1)]


class Frame:
    """The axes of a picture around some points, and what is drawn within them.

    marks: what is written where on the axis below, from its first to its last; below: what it shows; right: the margin there.
    """

    def __init__(self, points: Points, marks: dict[float, str], below: str, right: int = RIGHT) -> None:
        low, high = min(value for _, value in points), max(value for _, value in points)
        self.low, self.high = (low, high) if high > low else (low - 0.5, high + 0.5)
        self.least, self.most, self.right = min(marks), max(at for at, _ in points), right
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        ]
        for value in ticks(self.low, self.high):
            y = self.y(value)
            self.parts.append(
                f'<path d="M{LEFT} {y:.1f}H{WIDTH - right}" stroke="#ddd"/>'
                f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
            )
        for at, mark in marks.items():
            self.parts.append(f'<text x="{self.x(at):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{mark}</text>')
        self.parts.append(f'<text x="{(LEFT + WIDTH - right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(below)}</text>')

    def x(self, at: float) -> float:
        return LEFT + (at - self.least) / (self.most - self.least or 1) * (WIDTH - LEFT - self.right)

    def y(self, value: float) -> float:
        return TOP + (self.high - value) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def line(self, points: Points, colour: str, width: float, opacity: float = 1) -> None:
        path = " ".join(f"{self.x(at):.1f},{self.y(value):.1f}" for at, value in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" opacity="{opacity}"/>')

    def dot(self, at: float, value: float, colour: str) -> None:
        self.parts.append(f'<circle cx="{self.x(at):.1f}" cy="{self.y(value):.1f}" r="4" fill="{colour}" stroke="white"/>')

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def picture(runs: list[tuple[str, Points, Points]]) -> str:
    everything = [point for _, steps, held_out in runs for point in steps + held_out]
    frame = Frame(everything, {value: f"{value:,.0f}" for value in ticks(0, max(tokens for tokens, _ in everything) or 1)}, "tokens")
    for i, (name, steps, held_out) in enumerate(runs):
        colour = COLOURS[i % len(COLOURS)]
        frame.line(steps, colour, 0.7, 0.35)
        frame.line(smooth(steps), colour, 2)
        for tokens, loss in held_out:
            frame.dot(tokens, loss, colour)
        frame.parts.append(
            f'<text x="{WIDTH - RIGHT - 8}" y="{TOP + 16 * (i + 1)}" text-anchor="end" fill="{colour}">'
            f"{html.escape(name)}: line training, dots validation</text>"
        )
    return frame.svg()


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the losses of metrics.jsonl files.")
    parser.add_argument("metrics", nargs="+", type=Path, help="metrics.jsonl files")
    parser.add_argument("--out", type=Path, default=Path("loss.svg"))
    args = parser.parse_args()
    for path in args.metrics:
        if not path.is_file():
            sys.exit(f"error: {path} is not there; name metrics.jsonl files, and the picture with --out")
    runs = [(path.parent.name, *read(path)) for path in args.metrics]
    if not all(steps for _, steps, _ in runs):
        sys.exit("error: a file has no losses yet")
    args.out.write_text(picture(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
