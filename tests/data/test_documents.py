"""Reading documents: the native parser of JSON lines against Python's json, packed files, standard input."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkvlm import native
from rwkvlm.cli import main as cli
from rwkvlm.data import documents as module
from rwkvlm.data.binidx import BinIdx
from rwkvlm.data.documents import BadInput, Block, parse, read_blocks
from rwkvlm.data.tokenizer import load_tokenizer

needs_native = pytest.mark.skipif(not native.available("tokenizer")[0], reason="no C++ compiler")
SHIM = Path(__file__).resolve().parents[2] / "make_data.py"


def natively(data):
    """[(line, text)] where the native parser takes the block, else None."""
    found = module._parse_natively(data, "text", data.count(b"\n") + 1)
    return None if found is None else [(int(n), found[0][k].decode()) for k, n in enumerate(found[1])]


def by_json(data):
    """[(line, text)] by Python's json; None where a line has no text."""
    made = []
    for n, line in enumerate(data.split(b"\n")):
        if line.strip():
            try:
                text = json.loads(line.decode("utf-8"))["text"]
                made.append((n, text.encode("utf-8").decode("utf-8")))
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                return None
    return made


TAKEN = [
    b'{"text": "a"}',
    b'{"text":"","x":[1,-0.5e+3,null,true,false,{"y":[[]],"z":{}}]}\r\n\n \t\r\n  {"a" : "\\u0000\xe4\xb8\xad" , "text" : "b" } ',
    json.dumps({"text": '"\\/\b\f\n\r\t\0\x7f\u0080é中\ud7ff\ue000\uffff\U0001f600\U0010ffff'}).encode(),
    json.dumps({"text": '"\\/\b\f\n\r\t\x7f\u0080é中\ud7ff\ue000\uffff\U0001f600\U0010ffff' * 9}, ensure_ascii=False).encode(),
    b'{"text": "\\/\\uD83d\\uDE00 \\u00e9"}',
    b'{"x": "\\ud83d", "text": "a"}'.replace(b"\\ud83d", b"x"),
    b'{"text": "\\u007f\\u0080\\u07ff\\u0800\\uffff\\ud800\\udc00\\udbff\\udfff"}',
    b'{"t": 1, "text": "a", "texts": "b", "tex": 2}\n' * 50,
]
NOT_TAKEN_BUT_FINE = [
    b'{"te\\u0078t": "a"}',
    b'{"text": "b", "te\\u0078t": "a"}',
    b'{"text": "a", "x": NaN}',
    b'{"text": 1, "text": "a"}',
    b'{"text": "a", "x": ' + b"[" * 40 + b"]" * 40 + b"}",
    b'{"x": "\\ud83d", "text": "a"}',
]
BAD = [
    b"", b"{", b'"text"', b'{"text"}', b'{"text": "a"', b'{"text": "a",}', b'{"text": "a"}}', b'{"text": "a"} x', b"{'text': 'a'}",
    b'{"text": "a\nb"}', b'{"text": "\x1f"}', b'{"text": "\\x"}', b'{"text": "\\u12g4"}', b'{"text": "\\ud83d"}',
    b'{"text": "\\ude00\\ud83d"}', b'{"text": "\\ud83d\\u0041"}', b'{"text": "\\ud83d\\ue000"}', b'{"text": "\xf5\x80\x80\x80"}',
    b'{"text": "\xff"}', b'{"text": "\xc0\x80"}', b'{"text": "\xe0\x80\x80"}', b'{"text": "\xed\xa0\x80"}',
    b'{"text": "\xf0\x80\x80\x80"}', b'{"text": "\xf4\x90\x80\x80"}', b'{"text": "\xe4\xb8"}', b'{"text": "\xf0\x9f\x98',
    b'{"text": "a", "x": 01}', b'{"text": "a", "x": 1.}', b'{"text": "a", "x": .5}', b'{"text": "a", "x": -}', b'{"text": "a", "x": 1e}',
    b'{"text": "a", "x": +1}', b'{"text": "a", "x": tru}', b'{"text": "a", "x": [1,]}', b'{"text": "a", "x": {1: 2}}',
    b'{"text": "a" "x": 1}', b'{"text": ["a"]}', b'{"text": null}', b"[]", b"{}", b'{"text": "a", "x": [1}', b'\x0c{"text": "a"}',
    b'{"x": "\xff", "text": "a"}', b'{"text": "a", "x": ' + b"1" * 5000 + b"}",
]  # fmt: skip


@needs_native
def test_native_parser_by_hand():
    for data in TAKEN:
        assert natively(data) == by_json(data) is not None, data
    for data in NOT_TAKEN_BUT_FINE:
        assert natively(data) is None and by_json(data) is not None, data
        assert [*parse(Block(Path("x.jsonl"), 1, b'{"text": "b"}\n' + data, 0, 2)).texts] == [b"b", b"a"]
    for data in BAD[1:]:
        assert natively(data) is None and (by_json(data) is None or data[:1] == b"\x0c"), data
        assert natively(b'{"text": "b"}\n' + data) is None
    assert natively(b"") == natively(b"\n \n") == []


@needs_native
def test_native_parser_on_damaged_lines():
    """Whatever it takes, Python's json reads the same way."""
    rng = random.Random(7)
    taken = 0
    seeds = [*TAKEN, *NOT_TAKEN_BUT_FINE, *BAD]
    for _ in range(60_000):
        data = bytearray(rng.choice(TAKEN[:6] if rng.random() < 0.6 else seeds))
        for _ in range(rng.choice([0, 1, 1, 2, 5])):
            at = rng.randrange(len(data) + 1)
            piece = rng.choice(
                [
                    b'"',
                    b"\\",
                    b"{",
                    b"}",
                    b"[",
                    b"]",
                    b",",
                    b":",
                    b"\n",
                    b"\r",
                    b" ",
                    b"\0",
                    b"\x80",
                    b"\xed\xa0\x80",
                    b"\xf4",
                    b"u",
                    b"d83d",
                    b"1",
                    b"-",
                    b"text",
                    b'"text": "a"',
                    rng.randbytes(1),
                ]
            )
            data[at : at + rng.choice([0, 0, 1, len(piece)])] = piece
        data = bytes(data)
        if (found := natively(data)) is not None:
            taken += 1
            assert found == by_json(data), data
    assert 5_000 < taken < 50_000


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda v: st.lists(v) | st.dictionaries(st.text(), v),
    max_leaves=8,
)


@needs_native
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.dictionaries(st.text(), VALUES, max_size=4), st.text(), st.booleans(), st.sampled_from([None, 1]))))
def test_everything_that_python_writes_is_read(records):
    lines = [
        json.dumps(extra | {"text": text}, ensure_ascii=ascii_only, indent=None, separators=(",", ":") if pad else None)
        for extra, text, ascii_only, pad in records
    ]
    parsed = parse(Block(Path("x.jsonl"), 1, "\n".join(lines).encode("utf-8", "surrogatepass"), 0, len(lines) + 1))
    assert [*parsed.texts] == [text.encode() for _, text, _, _ in records] and not parsed.bad


def test_blocks_are_whole_lines_and_can_be_taken_up_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 100)
    rng = random.Random(1)
    data = (
        b"\xef\xbb\xbf"
        + b"".join(json.dumps({"text": "x" * rng.randrange(300)}).encode() + rng.choice([b"\n", b"\n\n"]) for _ in range(60))
        + b'{"text": "last"}'
    )
    for name, pack in [("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress)]:
        (tmp_path / name).write_bytes(pack(data))
        blocks = [*read_blocks(tmp_path / name)]
        assert b"".join(b.data for b in blocks) == data and all(b.data.endswith(b"\n") for b in blocks[:-1]) and len(blocks) > 20
        for k, block in enumerate(blocks[:-1]):
            assert data[: block.after].count(b"\n") == block.next_line - 1
            rest = [*read_blocks(tmp_path / name, start=block.after, line=block.next_line)]
            assert b"".join(b.data for b in rest) == data[block.after :] and rest[0].line == block.next_line


def run(*argv):
    return cli(["make_data", *map(str, argv)])


def texts_of(prefix):
    data, world = BinIdx(prefix), load_tokenizer()
    return sorted(world.decode(data.doc(i)[:-1]) for i in range(data.n_docs))


def test_zst(tmp_path, monkeypatch, capsys):
    zstandard = pytest.importorskip("zstandard")
    monkeypatch.chdir(tmp_path)
    texts = [f"{k} 中 {'x' * (k * 7 % 400)}" for k in range(2000)]
    data = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    pack = zstandard.ZstdCompressor(write_checksum=True).compress
    Path("a.jsonl.zst").write_bytes(pack(data[:50_001]) + pack(b"") + pack(data[50_001:]))  # frames need not end with lines
    Path("b.txt.zst").write_bytes(pack(b"whole"))
    assert run("a.jsonl.zst", "b.txt.zst", 1, 4, "--out", "x") == 0 and texts_of("x") == sorted([*texts, "whole"])
    packed = pack(random.Random(0).randbytes(300_000).hex().encode() + b"\n")
    for name, broken in [
        ("cut", packed[:-1000]),
        ("start", packed[:3]),
        ("plain", data),
        ("flip", packed[:9000] + b"\0\0" + packed[9002:]),
    ]:
        Path(f"{name}.jsonl.zst").write_bytes(broken)
        capsys.readouterr()
        assert run(f"{name}.jsonl.zst", 1, 4) == 2
        err = capsys.readouterr().err
        assert f"error: {name}.jsonl.zst, line 1: the .zst file is damaged here" in err and err.count("\n") == 1, err


def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").touch(), Path("a.jsonl.zst").touch()
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    for name, package in [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")]:
        assert run(name, 1, 4) == 2
        assert (
            capsys.readouterr().err == f"error: input {name} needs the package {package}; run: {sys.executable} -m pip install {package}\n"
        )


def test_standard_input_and_report(tmp_path):
    lines = '{"text": "one"}\nbad\n{"text": "two two"}\n'
    command = [sys.executable, str(SHIM), "-", "2", "4", "--out", "x", "--skip_bad", "--report", "facts.json"]
    done = subprocess.run(command, input=lines, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "standard input, line 2: not JSON" in done.stdout, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["facts.json", "x.bin", "x.idx"]
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert texts_of(tmp_path / "x") == ["one", "one", "two two", "two two"]
    assert facts["documents"] == 4 and facts["tokens"] == BinIdx(tmp_path / "x").n_tokens and facts["text_bytes"] == 10
    assert facts["bytes_per_token"] == round(10 / (facts["tokens"] / 2 - 2), 4) and sum(n for _, _, n in facts["lengths"]) == 2
    assert facts["skipped"] == 1 and facts["first_skipped"][0].startswith("standard input, line 2") and len(facts["order_hash"]) == 64
    done = subprocess.run([sys.executable, str(SHIM), "-", "2", "4"], input=lines, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: standard input needs --out PREFIX\n")


def test_the_slow_way_gives_the_same_bytes(tmp_path, monkeypatch):
    """Without a compiler, and for any number of threads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "BLOCK", 5000)
    rng = random.Random(2)
    texts = ["".join(rng.choice("ab c\n\0é中\U0001f600") for _ in range(rng.randrange(60))) for _ in range(900)]
    Path("a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    made = set()
    for k, (workers, library) in enumerate([(1, True), (2, True), (5, True), (2, False)]):
        if not library:
            monkeypatch.setattr(module, "_library", lambda: None)
        assert run("a.jsonl", 2, 4, "--out", f"x{k}", "--workers", workers, "--val_split", "0.1") == 0
        made.add(b"".join(Path(f"x{k}{end}").read_bytes() for end in (".bin", ".idx", ".val.bin", ".val.idx")))
    assert len(made) == 1


@pytest.mark.parametrize("name, pack", [("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress)])
def test_lines_that_are_too_long_are_named_and_passed_over(tmp_path, monkeypatch, capsys, name, pack):
    monkeypatch.setattr(module, "LONGEST", 1000)
    monkeypatch.setattr(module, "BLOCK", 100)
    monkeypatch.chdir(tmp_path)
    rng = random.Random(3)
    fits = b'{"text": "' + b"f" * 986 + b'"}'  # 1000 bytes with its newline
    for final in (b"", b"\n"):
        lines = [
            rng.choice(
                [b'{"text": "a"}'] * 3
                + [b'{"text": "b' + b"b" * rng.randrange(2000) + b'"}', b"", fits, b'{"text": "' + b"t" * 987 + b'"}']
            )
            for _ in range(300)
        ] + [b"x" * 3000]
        data = b"\n".join(lines) + final
        Path(name).write_bytes(pack(data))
        expected = [json.loads(line)["text"] for line in lines[:-1] if line and len(line) < 1000]
        blocks = [*read_blocks(Path(name))]
        bad = [(b.line, b.data) for b in blocks if isinstance(b.data, BadInput)]
        assert [line for line, _ in bad] == [n for n, line in enumerate(lines, 1) if len(line) >= 1000] and len(bad) > 20
        assert bad[-1][
            1
        ].line == 301 and f"the line is {3000 + len(final)} bytes long, more than 0 MiB; put its text into a .txt file" in str(bad[-1][1])
        assert [t.decode() for b in blocks for t in parse(b).texts] == expected and blocks[-1].after == len(data)
        for k, block in enumerate(blocks[:-1]):  # taken up anywhere, the rest is the same
            rest = [*read_blocks(Path(name), start=block.after, line=block.next_line)]
            assert [(b.line, b.data) for b in rest if isinstance(b.data, BadInput)] == [(n, b) for n, b in bad if n >= block.next_line]
            assert [t for b in rest for t in parse(b).texts] == [t for b in blocks[k + 1 :] for t in parse(b).texts]
    capsys.readouterr()
    assert run(name, 1, 4) == 2 and capsys.readouterr().err.startswith(f"error: {name}, line {bad[0][0]}: the line is ")
    assert run(name, 1, 4, "--skip_bad") == 0 and texts_of("a") == sorted(expected)
