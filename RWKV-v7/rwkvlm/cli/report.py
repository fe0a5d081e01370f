"""`python -m rwkvlm report OUT`: makes OUT/report.html, the curves of a run, from OUT/metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

from ..config import UserError
from .flags import Parser


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m rwkvlm report", description="Make report.html, a page with the curves of a run, in its folder.")
    parser.add_argument("proj_dir", type=Path, help="folder of the run (--proj_dir of train.py)")
    folder = parser.parse_args(argv).proj_dir
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder} holds no metrics.jsonl; give the --proj_dir of a run")
    from ..train.logs.report import NAME, Follower

    Follower(folder).write(running=False)
    print(folder / NAME)
    return 0
