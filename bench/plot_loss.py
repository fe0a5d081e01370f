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
    step = 10.0 ** -6
    while (high - low) / step > 10:
        step *= 2.5 if f"{step:e}".startswith("2") else 2
    first = -(-low // step)
    return [step * (first + i) for i in range(int(high / step - first + 1e-9) + 1)]


def picture(runs: list[tuple[str, Points, Points]]) -> str:
    everything = [point for _, steps, held_out in runs for point in steps + held_out]
    most = max(tokens for tokens, _ in everything) or 1
    low, high = min(value for _, value in everything), max(value for _, value in everything)

    def x(tokens: float) -> float:
        return LEFT + tokens / most * (WIDTH - LEFT - RIGHT)

    def y(loss: float) -> float:
        return TOP + (high - loss) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM)

    def line(points: Points, colour: str, width: float, opacity: float) -> str:
        path = " ".join(f"{x(tokens):.1f},{y(loss):.1f}" for tokens, loss in points)
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" opacity="{opacity}"/>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for value in ticks(low, high):
        parts.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/><text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in ticks(0, most):
        parts.append(f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:,.0f}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">tokens</text>')
    for i, (name, steps, held_out) in enumerate(runs):
        colour = COLOURS[i % len(COLOURS)]
        parts += [line(steps, colour, 0.7, 0.35), line(smooth(steps), colour, 2, 1)]
        parts += [f'<circle cx="{x(tokens):.1f}" cy="{y(loss):.1f}" r="4" fill="{colour}" stroke="white"/>' for tokens, loss in held_out]
        parts.append(f'<text x="{WIDTH - RIGHT - 8}" y="{TOP + 16 * (i + 1)}" text-anchor="end" fill="{colour}">{html.escape(name)}: line training, dots validation</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


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
