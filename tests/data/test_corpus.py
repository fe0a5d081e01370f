"""The demo corpus: the same bytes each time, within its size, ready for make_data.py."""

import hashlib
import json
import os
import re
import sysconfig
from pathlib import Path

import pytest

from rwkvlm.cli import main
from rwkvlm.config import UserError
from rwkvlm.data import corpus as module
from rwkvlm.data.binidx import BinIdx
from rwkvlm.data.corpus import write_demo_corpus


def test_the_same_bytes_and_no_tests(tmp_path):
    made = write_demo_corpus(tmp_path / "sub" / "a.jsonl", 2_000_000)
    assert made == write_demo_corpus(tmp_path / "b.jsonl", 2_000_000)
    data = (tmp_path / "sub" / "a.jsonl").read_bytes()
    assert data == (tmp_path / "b.jsonl").read_bytes() and hashlib.sha256(data).hexdigest() == made.sha256
    texts = [json.loads(line)["text"] for line in data.splitlines()]
    assert len(texts) == len(set(texts)) == made.documents > 50
    assert 1_500_000 < sum(len(t.encode()) for t in texts) == made.text_bytes <= 2_000_000
    standard = Path(sysconfig.get_paths()["stdlib"])
    assert texts[0] == (standard / "LICENSE.txt").read_text() or texts[0] == (standard / "__future__.py").read_text()


def test_what_is_left_out(tmp_path, monkeypatch):
    for name, data in {
        "b.py": b"b = 1\n",
        "a.md": b"# a\n",
        "copy.py": b"b = 1\n",
        "tests/test_a.py": b"t = 1\n",
        "deep/site-packages/c.py": b"c = 1\n",
        "deep/d.py": b"d = 1\n",
        "latin.py": b"\xe9\n",
        "blank.py": b"\n",
        "vocabulary.bin": b"x",
    }.items():
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_bytes(data)
    monkeypatch.setattr(module.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    monkeypatch.setattr(module, "PACKAGES", ("no_such_package",))
    write_demo_corpus(tmp_path / "a.jsonl")
    assert [json.loads(line)["text"] for line in open(tmp_path / "a.jsonl")] == ["# a\n", "b = 1\n", "d = 1\n"]
    with pytest.raises(UserError, match="no text for the demo corpus below 3 bytes"):
        write_demo_corpus(tmp_path / "b.jsonl", 3)
    with pytest.raises(UserError, match="cannot write"):
        write_demo_corpus(tmp_path / "a.jsonl" / "c.jsonl")
    with pytest.raises(UserError, match="cannot write .*; free some space"):
        write_demo_corpus(tmp_path / "lib")  # a folder: what has been written beside it goes
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "lib"]


def test_from_corpus_to_tokens(tmp_path, capsys):
    file = str(tmp_path / "demo.jsonl")
    assert main(["demo_corpus", "--out", file, "--max_bytes", "300000"]) == 0
    assert re.search(r"[1-3]\d{5} bytes of text in \d+ documents, sha256 [0-9a-f]{64}\n", capsys.readouterr().out)
    assert main(["make_data", file, "1", "256", "--out", str(tmp_path / "demo"), "--val_split", "0.05"]) == 0
    assert "--magic_prime" in capsys.readouterr().out
    assert BinIdx(tmp_path / "demo.val").n_tokens >= 0.05 * BinIdx(tmp_path / "demo").n_tokens
