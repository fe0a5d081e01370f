"""report.html: what it holds, that it keeps up with a run, and how it looks to a real browser."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rwkvlm.cli import main
from rwkvlm.train.logs.report import BUCKETS, Curves, Follower

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here: apt-get install chromium (.ci/run does where it may)")


def embedded(page: Path) -> dict:
    return json.loads(re.search(r"^const D = (.*);$", page.read_text(), re.MULTILINE)[1])


def step(number: int, loss: float = 3.0, **more) -> dict:
    return {"step": number, "tokens": 100 * number, "loss": loss, "lr": 1e-3, "grad_norm": 1.0, "grad_norms": {"emb": 0.6, "head": 0.8},
            "tokens_per_s": 50.0, "tflops": 0.1, "mfu": None, "seconds": 2.0 * number, "memory_mb": 10.0} | more  # fmt: skip


def begin(number: int = 0) -> dict:
    return {"run": "2026-11-21-10-00-00", "step": number, "settings": {"my_exit_tokens": 10**6, "real_bsz": 4, "ctx_len": 25}}


def curves(*records: dict) -> dict:
    made = Curves()
    for record in records:
        made.add(record)
    return made.data("training", 2.0)


class Dom(HTMLParser):
    """What a browser has made of the page: attributes of the body, charts with the lengths of their curves, texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.body, self.charts, self.at, self.texts = {}, {}, "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag == "body":
            self.body = found
        if "data-chart" in found:
            self.at = found["data-chart"]
            self.charts[self.at] = []
        if tag == "path" and self.at:
            self.charts[self.at].append(len(re.findall("[ML]", found["d"])))

    def handle_data(self, data):
        self.texts.append(data)


def look(page: Path, folder: Path) -> Dom:
    """The page in headless chromium, without a network, after its script has run."""
    profile = folder / "profile"
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={profile}",
        "--dump-dom",
        page.as_uri(),
    ]
    return Dom(subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout)


CHARTS = {"loss": 3, "lr": 1, "grad_norm": 1, "grad_norms": 5, "tokens_per_s": 1, "memory_mb": 1}


def test_the_page_of_a_run(whole):
    data = embedded(whole / "report.html")
    assert data["state"] == "finished" and data["series"]["step"] == list(range(1, 31)) and data["series"]["tokens"][-1] == 3840
    assert (
        data["validation"]["step"] == [0, 10, 20, 30]
        and set(data["parts"]) == {"emb", "ln", "att", "ffn", "head"}
        and data["settings"]["n_layer"] == 2
    )
    text = (whole / "report.html").read_text()
    assert not re.search(r"(src|href)\s*=|@import|url\(\s*[\"']?http", text) and "fetch(" not in text  # nothing comes from elsewhere


@browser
def test_a_browser_draws_every_curve(whole, tmp_path):
    dom = look(whole / "report.html", tmp_path)
    assert "data-error" not in dom.body and dom.body["data-points"] == "30"
    assert {name: len(paths) for name, paths in dom.charts.items()} == CHARTS
    assert dom.charts["loss"] == [30, 30, 4] and all(n == 30 for name in CHARTS if name != "loss" for n in dom.charts[name])
    assert "finished" in dom.texts and "3.84 k" in dom.texts


@pytest.mark.slow
@browser
def test_a_browser_follows_a_run(run, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *run.argv(out, my_exit_tokens=4_000_000, val_every=50)], stderr=subprocess.DEVNULL
    )
    try:
        seen = []
        for _ in range(2):
            until = time.monotonic() + 240
            while time.monotonic() < until and not (
                (out / "report.html").exists() and len(embedded(out / "report.html")["series"]["step"]) > (seen or [5])[-1]
            ):
                time.sleep(0.2)
            dom = look(out / "report.html", tmp_path)
            assert "data-error" not in dom.body and "training" in dom.texts
            seen.append(int(dom.body["data-points"]))
        assert 5 < seen[0] < seen[1] and {name: len(paths) for name, paths in dom.charts.items()} == CHARTS
    finally:
        process.send_signal(signal.SIGTERM)
    assert process.wait(240) == 143
    dom = look(out / "report.html", tmp_path)
    assert "stopped" in dom.texts and int(dom.body["data-points"]) >= seen[1]


def test_a_step_done_again_counts_once():
    data = curves(
        begin(), *(step(n) for n in range(1, 9)), {"step": 6, "tokens": 600, "val_loss": 2.5}, begin(5), step(6, 4.0, seconds=2.0)
    )
    assert data["series"]["step"] == [1, 2, 3, 4, 5, 6] and data["series"]["loss"][-1] == 4.0 and data["validation"]["step"] == []
    assert [event["text"] for event in data["events"]] == ["went on at 2026-11-21-10-00-00"]
    assert data["series"]["hours"][-1] == pytest.approx(12 / 3600, rel=1e-5)  # time of both processes


def test_a_run_that_goes_on_with_another_batch_goes_on_at_its_tokens():
    again = begin(5)
    again["settings"]["real_bsz"] = 2
    data = curves(begin(), *(step(n) for n in range(1, 6)), again, {**step(6), "tokens": 550})
    assert [(event["step"], event["tokens"]) for event in data["events"]] == [(5, 500)] and data["series"]["tokens"] == [
        100,
        200,
        300,
        400,
        500,
        550,
    ]


def test_long_runs_are_averaged_and_stay_small():
    data = curves(begin(), *(step(n, n / 1000) for n in range(1, 5001)))
    points = data["series"]["step"]
    assert BUCKETS / 2 <= len(points) <= BUCKETS and points == sorted(points)
    width = points[1] - points[0]
    assert data["series"]["loss"][0] == pytest.approx((1 + width) / 2 / 1000) and points[-1] >= 5000 - width


def test_skipped_and_undone_steps_are_events():
    data = curves(begin(), step(1), step(2, None, skipped=True, grad_norm=None, grad_norms=None), step(3, 9.0, undone_to=0))
    assert [(event["kind"], event["step"], event["tokens"]) for event in data["events"]] == [("skipped", 2, 200), ("undone", 3, 300)]
    assert data["series"]["loss"] == [3.0, None, 9.0] and data["parts"]["emb"] == [0.6, None, 0.6]


def test_half_a_line_waits_and_markup_is_only_text(tmp_path):
    record = begin()
    record["settings"]["data_file"] = "</script><b>"
    lines = json.dumps(record) + "\n" + json.dumps(step(1)) + "\n"
    (tmp_path / "metrics.jsonl").write_text(lines + json.dumps(step(2))[:20])
    follower = Follower(tmp_path)
    follower.write(running=True)
    assert embedded(tmp_path / "report.html")["series"]["step"] == [1]
    assert (tmp_path / "report.html").read_text().count("</script>") == 1
    (tmp_path / "metrics.jsonl").write_text(lines + json.dumps(step(2)) + "\n")
    follower.write(running=False)
    data = embedded(tmp_path / "report.html")
    assert data["series"]["step"] == [1, 2] and data["state"] == "stopped" and data["settings"]["data_file"] == "</script><b>"


def test_the_command_makes_the_page_of_any_run(whole, tmp_path, capsys):
    shutil.copy(whole / "metrics.jsonl", tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert embedded(tmp_path / "report.html")["series"] == embedded(whole / "report.html")["series"]
    assert main(["report", str(tmp_path / "none")]) == 2


def test_tensorboard_has_every_number(run, tmp_path, records):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for stop in (5, 3):
        assert run(tmp_path / "out", tensorboard=1, max_steps=stop, val_every=4) == 0
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    assert {"loss", "lr", "grad_norm", "grad_norms/att", "tokens_per_s", "memory_mb", "tokens", "val_loss"} <= set(events.Tags()["scalars"])
    found = records(tmp_path / "out")
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(n, pytest.approx(found[n]["loss"])) for n in range(1, 9)]
    assert [e.step for e in events.Scalars("val_loss")] == [0, 4, 8]


@pytest.mark.parametrize("method", ["add_scalar", "__init__"])
def test_a_run_outlives_tensorboard(run, tmp_path, records, monkeypatch, capfd, method):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    def full(self, *arguments, **more):
        if method == "__init__" or arguments[-1] >= 3:  # add_scalar: the step
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, method, full)
    assert run(tmp_path / "out", tensorboard=1, max_steps=5) == 0
    assert (
        capfd.readouterr().err.count("TensorBoard fails (No space left on device); this run goes on without it") == 1
        and len(records(tmp_path / "out")) == 5
    )


def test_tensorboard_that_is_not_installed_is_said_at_once(run, tmp_path, monkeypatch, capfd):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else find(name, *rest))
    assert run(tmp_path / "out", tensorboard=1) == 2
    assert (
        f"--tensorboard 1: tensorboard is not installed; run: {sys.executable} -m pip install tensorboard, or leave --tensorboard out"
        in capfd.readouterr().err
    )
