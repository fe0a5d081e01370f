"""bench/plot_loss.py: metrics.jsonl to an SVG picture."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def plot(*arguments):
    return subprocess.run([sys.executable, ROOT / "bench/plot_loss.py", *arguments], capture_output=True, text=True)


def test_a_resumed_run(tmp_path):
    run = tmp_path / "L6 & <more>"
    run.mkdir()
    records = [{"run": "first", "step": 0}, {"step": 0, "tokens": 0, "val_loss": 11.0}]
    records += [{"step": step, "tokens": 100 * step, "loss": 11.0 - step / 10} for step in range(1, 61)]
    records += [{"run": "again", "step": 50}]
    records += [{"step": step, "tokens": 100 * step, "loss": 11.0 - step / 10} for step in range(51, 101)]
    records += [{"step": 100, "tokens": 10000, "val_loss": 1.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    done = plot(run / "metrics.jsonl", "--out", tmp_path / "loss.svg")
    assert done.returncode == 0, done.stderr
    picture = ElementTree.parse(tmp_path / "loss.svg").getroot()
    thin, thick = picture.findall(f"{SVG}polyline")
    points = [tuple(map(float, point.split(","))) for point in thin.get("points").split()]
    assert len(points) == 100 and points == sorted(points)
    assert points[0][1] < points[-1][1]  # downwards on the screen: the loss falls
    assert len(picture.findall(f"{SVG}circle")) == 2
    labels = [text.text for text in picture.iter(f"{SVG}text")]
    assert "10,000" in labels and "11" in labels and any("L6 & <more>" in label for label in labels)


def test_a_run_without_steps(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"run": "x", "step": 0}\n')
    done = plot(tmp_path / "metrics.jsonl", "--out", tmp_path / "loss.svg")
    assert done.returncode == 1 and done.stderr.startswith("error: ")


def test_a_file_that_is_not_there(tmp_path):
    done = plot(tmp_path / "metrics.jsonl", "--out", tmp_path / "loss.svg")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
