"""make_data.py from the outside: what it writes, what it refuses, and that a refusal leaves nothing behind."""

import gzip
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rwkvlm.cli import main as cli
from rwkvlm.cli import make_data as command
from rwkvlm.data import pack as pack_module
from rwkvlm.data.binidx import BinIdx
from rwkvlm.data.pack import Stage
from rwkvlm.data.tokenizer import WorldTokenizer, load_tokenizer

SHIM = Path(__file__).resolve().parents[2] / "make_data.py"


def main(argv):
    return cli(["make_data", *argv])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def jsonl(path, texts, key="text"):
    Path(path).write_text("".join(json.dumps({key: t, "other": 1}) + "\n" for t in texts), encoding="utf-8")


def words(n, seed=0):
    rng = random.Random(seed)
    return [
        " ".join(rng.choice(["sun", "moon", "naïve", "中文", "\U0001f600", "x = 1\n"]) for _ in range(rng.randrange(30))) for _ in range(n)
    ]


def texts_of(prefix):
    data, world = BinIdx(prefix), load_tokenizer()
    assert all(data.doc(i)[-1] == 0 for i in range(data.n_docs))
    return [world.decode(data.doc(i)[:-1]) for i in range(data.n_docs)]


def test_as_many_threads_as_there_is_time_for(here, monkeypatch):
    """Of a container's CPUs, not of its machine's; or what --workers says."""
    jsonl("a.jsonl", words(3))
    asked, pool = [], pack_module.ThreadPoolExecutor
    monkeypatch.setattr(pack_module, "cpus", lambda: 3)
    monkeypatch.setattr(pack_module, "ThreadPoolExecutor", lambda workers: asked.append(workers) or pool(workers))
    for name, more in (("x", []), ("y", ["--workers", "2"])):
        assert main(["a.jsonl", "1", "4", "--out", name, *more]) == 0
    assert asked == [3, 2]


def test_the_official_call(here, capsys):
    texts = words(300)
    jsonl("demo.jsonl", texts)
    assert main(["demo.jsonl", "3", "16"]) == 0
    assert sorted(os.listdir()) == ["demo.bin", "demo.idx", "demo.jsonl"]
    made = texts_of("demo")
    copies = [made[k * 300 : (k + 1) * 300] for k in range(3)]
    assert all(Counter(c) == Counter(texts) for c in copies)
    assert copies[0] != copies[1] != copies[2] != copies[0] and copies[0] != texts
    out = capsys.readouterr().out
    n = BinIdx("demo").n_tokens
    assert BinIdx("demo").dtype == np.uint16 and f"--my_exit_tokens {n} --magic_prime " in out and "--ctx_len 16" in out
    assert "document 0" in out and "document 899" in out and f"{n / (16 * 40320):.3f} mini-epochs of" in out and "--vocab_size 65536" in out


def test_the_only_document_is_shown_once(here, capsys):
    jsonl("one.jsonl", ["a text of some words"])
    assert main(["one.jsonl", "1", "1"]) == 0
    assert capsys.readouterr().out.count("a text of some words") == 1


def test_the_shim_runs_as_a_program(here):
    jsonl("demo.jsonl", ["a\xff", "中"])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, str(SHIM), "demo.jsonl", "2", "1"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "--my_exit_tokens 10 --magic_prime 5 --ctx_len 1" in done.stdout, done.stderr
    done = subprocess.run([sys.executable, str(SHIM), "none.jsonl", "2", "1"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: input none.jsonl does not exist\n")


def test_same_seed_same_bytes(here):
    jsonl("demo.jsonl", words(100))
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        assert main(["demo.jsonl", "2", "16", "--out", name, "--seed", str(seed), "--val_split", "0.1"]) == 0
    a, b, c = (Path(f"{n}.bin").read_bytes() + Path(f"{n}.idx").read_bytes() + Path(f"{n}.val.bin").read_bytes() for n in "abc")
    assert a == b != c


@pytest.mark.parametrize("split, docs", [("0.2", None), ("7", 7)])
def test_validation_split(here, split, docs):
    texts = [f"{i} {t}" for i, t in enumerate(words(200))]
    jsonl("demo.jsonl", texts)
    assert main(["demo.jsonl", "2", "16", "--out", "sub/x", "--val_split", split]) == 0
    train, val = texts_of("sub/x"), texts_of("sub/x.val")
    assert Counter(train) == Counter({t: 2 for t in texts if t not in val}) and val == [t for t in texts if t in val]
    if docs:
        assert len(val) == docs
    else:
        total = BinIdx("sub/x").n_tokens // 2 + BinIdx("sub/x.val").n_tokens
        assert 0.2 * total <= BinIdx("sub/x.val").n_tokens < 0.2 * total + 100


def test_inputs_of_all_kinds(here):
    jsonl("a.jsonl", ["one", ""], key="content")
    with gzip.open("b.jsonl.gz", "wt", encoding="utf-8") as f:
        f.write('\ufeff{"content": "two\\u0000"}\r\n\r\n  {"content": "three", "x": NaN}  ')
    Path("c.txt").write_bytes(b"four\r\nlines\n")
    assert main(["a.jsonl", "[b]*.gz", "c.txt", "1", "2", "--out", "x", "--text_key", "content"]) == 0
    assert sorted(texts_of("x")) == ["", "four\r\nlines\n", "one", "three", "two\0"]
    assert main(["b.jsonl.gz", "1", "2", "--text_key", "content"]) == 0 and Path("b.bin").exists()


def test_it_says_how_fast_it_is_and_how_long_it_will_take(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    say = command._progress(100.0)
    for seconds, stage in (
        (4, Stage("reading", 0.1, 1, 9, False)),
        (10, Stage("reading", 0.25, 7, 640 << 20, False)),
        (12, Stage("reading", 0.3, 8, 9, False)),
        (20, Stage("reading", 0.5, 9, 640 << 20, True)),
        (30, Stage("writing", 0.9, 3, 0, False)),
    ):
        now[0] = 100.0 + seconds
        say(stage)
    lines = [
        "reading  25%  7 documents  640.00 MiB, 64.00 MiB/s, 0:00:30 left",
        "reading  50%  9 documents  640.00 MiB, 32.00 MiB/s",
        "writing  90%  3 documents",
    ]
    assert capsys.readouterr().err.splitlines() == lines, "every five seconds; of a run that was gone on with the rate alone"


def test_hugging_face_tokenizer(here, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    engine.train_from_iterator(words(20), tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    engine.save("tok.json")
    jsonl("demo.jsonl", words(20))
    assert main(["demo.jsonl", "1", "4", "--tokenizer", "tok.json"]) == 0
    tok, data = load_tokenizer("tok.json"), BinIdx("demo")
    assert Counter(tok.decode(data.doc(i)[:-1]) for i in range(20)) == Counter(words(20))

    jsonl("end.jsonl", [*["fine"] * 41, "!Fine!"])  # behind the first documents few are decoded again
    assert tok.encode("!") == [0] and main(["end.jsonl", "1", "4", "--tokenizer", "tok.json"]) == 2
    assert (
        "end.jsonl, line 42: the tokenizer makes token 0, which ends a document, of a part of the text; use one that keeps it for that ("
        in capsys.readouterr().err
    )
    engine.add_special_tokens(["!"])  # its name, as <|endoftext|> would be
    engine.save("ends.json")
    assert main(["end.jsonl", "1", "4", "--tokenizer", "ends.json"]) == 0
    engine.normalizer = tokenizers.normalizers.Lowercase()
    engine.save("lower.json")
    jsonl("caps.jsonl", ["fine", "Not fine"])
    capsys.readouterr()
    assert main(["caps.jsonl", "1", "4", "--tokenizer", "lower.json"]) == 2
    assert (
        capsys.readouterr().err == "error: caps.jsonl, line 2: the text does not come back from its tokens; "
        "use a tokenizer that keeps all text (--tokenizer world)\n"
    )
    assert not Path("caps.bin").exists()


GOOD = b'{"text": "good"}\n'
BAD_LINES = [
    (b'{"text": "cut\n', "line 2: not JSON: Unterminated string starting at column 10"),
    (b'{"text": "a"} trailing\n', "line 2: not JSON: Extra data at column 15"),
    (b'{"txt": "a"}\n', "line 2: no key 'text' (keys: txt); see --text_key"),
    (b"{}\n", "line 2: no key 'text' (keys: none)"),
    (b"[1, 2]\n", "line 2: a JSON list, not an object"),
    (b'{"text": 5}\n', "line 2: the value of 'text' is int, not text"),
    (b'{"text": null}\n', "line 2: the value of 'text' is NoneType"),
    (b'{"text": "a\\ud83d"}\n', r"line 2: the text has a lone surrogate, '\ud83d', at character 1"),
    (b'{"text": "a\xff"}\n', "line 2: invalid UTF-8 at byte 11 of the line"),
    (b'{"text": ' + b"[" * 100000 + b"\n", "line 2: not JSON"),
]


@pytest.mark.parametrize("bad, words", BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_lines(here, capsys, bad, words):
    Path("demo.jsonl").write_bytes(GOOD + bad + GOOD)
    assert main(["demo.jsonl", "1", "1"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: demo.jsonl, " + words) and err.count("\n") == 1 and "--skip_bad" in err
    assert os.listdir() == ["demo.jsonl"]
    assert main(["demo.jsonl", "1", "1", "--skip_bad"]) == 0
    assert texts_of("demo") == ["good", "good"]
    assert "skipped 1 bad inputs:\n  demo.jsonl, " + words in capsys.readouterr().out


def test_bad_files(here, capsys):
    Path("empty.jsonl").write_bytes(b"\n \n")
    Path("empty.txt").write_bytes(b"")
    Path("latin.txt").write_bytes(b"one\ntwo\n\xe9t\xe9\n")
    Path("utf16.jsonl").write_text('{"text": "a"}\n', encoding="utf-16")
    jsonl("good.jsonl", ["good"])
    packed = gzip.compress(b"".join(json.dumps({"text": random.Random(k).randbytes(50).hex()}).encode() + b"\n" for k in range(2000)))
    Path("cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    Path("plain.jsonl.gz").write_bytes(GOOD)
    Path("x.zst").touch(), Path("x.jsonl.xz").touch(), Path("x.csv").touch(), Path("x.json").touch(), Path("folder.jsonl").mkdir()
    before = sorted(os.listdir())
    for name, words in [
        ("empty.jsonl", "empty.jsonl: the file is empty"),
        ("empty.txt", "empty.txt: the file is empty"),
        ("latin.txt", "latin.txt, line 3: invalid UTF-8 at byte 8 of the file"),
        ("utf16.jsonl", "utf16.jsonl, line 1: invalid UTF-8 at byte 0 of the line"),
        ("cut.jsonl.gz", "cut.jsonl.gz, line "),
        ("plain.jsonl.gz", "plain.jsonl.gz, line 1: the .gz file is damaged here"),
        ("x.zst", "input x.zst: its kind is not known"),
        ("x.jsonl.xz", "input x.jsonl.xz: .xz is not read; unpack it first: unxz"),
        ("x.json", "input x.json: .json is not read; make a .jsonl of it first, one object a line; of a list: jq -c '.[]'"),
        ("x.csv", "input x.csv: its kind is not known"),
        ("folder.jsonl", "input folder.jsonl is a folder"),
        ("none*.jsonl", "input none*.jsonl does not exist"),
    ]:
        assert main(["good.jsonl", name, "1", "1", "--out", "x"]) == 2, name
        err = capsys.readouterr().err
        assert err.startswith("error: " + words) and err.count("\n") == 1 and ("iconv -t UTF-8" in err) == ("UTF-8" in words), err
        assert sorted(os.listdir()) == before
    assert main(["empty.jsonl", "latin.txt", "plain.jsonl.gz", "good.jsonl", "1", "1", "--out", "x", "--skip_bad"]) == 0
    assert texts_of("x") == ["good"]
    assert main(["empty.jsonl", "latin.txt", "1", "1", "--out", "y", "--skip_bad"]) == 2
    assert "no document in empty.jsonl, latin.txt (2 bad ones skipped)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["demo.jsonl", "3"], "usage"),
        (["demo.jsonl", "three", "16"], "COPIES: invalid int value: 'three'"),
        (["demo.jsonl", "0", "16"], "number of copies 0"),
        (["demo.jsonl", "1", "0"], "CTX_LEN 0"),
        (["demo.jsonl", "512", "3"], "512 COPIES and CTX_LEN 3 look swapped; give 3 512, COPIES first"),
        (["demo.jsonl", "1", "16", "--seed", "-1"], "--seed -1"),
        (["demo.jsonl", "1", "16", "--val_split", "-0.1"], "--val_split -0.1"),
        (["demo.jsonl", "1", "16", "--val_split", "nan"], "--val_split nan must be"),
        (["demo.jsonl", "1", "16", "--val_split", "inf"], "--val_split inf must be"),
        (["demo.jsonl", "1", "16", "--val_split", "1.5"], "--val_split 1.5"),
        (["demo.jsonl", "1", "16", "--val_split", "10"], "hold out all 10 documents"),
        (["demo.jsonl", "1", "16", "--val_split", "11"], "hold out all 10 documents"),
        (["demo.jsonl", "1", "16", "--val_split", "0.999"], "hold out all 10 documents"),
        (["demo.jsonl", "1", "16", "--tokenizer", "gpt2"], "tokenizer 'gpt2' is not known"),
        (["demo.jsonl", "1", "16", "--out", "demo.jsonl/x"], "cannot write demo.jsonl/x.bin"),
        (["demo.jsonl", "1", "16", "--out", "/"], "--out / is a folder"),
        (["demo.jsonl", "1", "16", "--out", "x.bin"], "--out x.bin is to be without .bin"),
        (["demo.jsonl", "1", "16", "--out", "x/"], "--out x/ is a folder; add a name, for example x/demo"),
        (
            ["demo.jsonl", "1", "16", "--report", "demo.jsonl/facts.json"],
            "--report demo.jsonl/facts.json cannot be written: Not a directory",
        ),
        (["demo.jsonl", "1", "16", "--report", "."], "--report . is a folder; give the name of a file"),
        (["demo.jsonl", "1000000000000", "32"], "demo needs "),
        (
            ["/dev/null", "1", "16"],
            "input /dev/null is not a file but a pipe or a device; give JSON lines from a pipe as standard input (-)",
        ),
        (["demo.jsonl", "-", "1", "16"], "2 input files need --out"),
        (["-", "-", "1", "16", "--out", "x"], "input - is named twice; name it once"),
        (["demo.jsonl", "*.jsonl", "1", "16", "--out", "x"], "input demo.jsonl is named twice; name it once"),
        (["demo.jsonl", "1", "16", "--bogus"], "bogus"),
    ],
)
def test_bad_arguments(here, capsys, arguments, words):
    jsonl("demo.jsonl", ["some text"] * 10)
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and words in err and err.count("\n") == 1
    assert os.listdir() == ["demo.jsonl"]


def test_one_file_under_two_names(here, capsys):
    jsonl("demo.jsonl", ["some text"] * 10)
    os.symlink("demo.jsonl", "link.jsonl")
    for other in ("link.jsonl", os.path.abspath("demo.jsonl")):
        assert main(["demo.jsonl", other, "1", "16", "--out", "x"]) == 2
        assert f"input {other} is named twice; name it once" in capsys.readouterr().err


@pytest.mark.parametrize("inputs", [["book.txt"], ["other.txt", "book.txt"]], ids=str)
def test_an_input_that_is_written_to_meanwhile(here, capsys, monkeypatch, inputs):
    """A download that has not ended, say: of a .txt, or at the end of a line, nothing else tells."""
    for name in inputs:
        Path(name).write_text("some text")
    add = pack_module._add
    monkeypatch.setattr(pack_module, "_add", lambda *args: (add(*args), Path("book.txt").open("a").write(" and more")))
    assert main([*inputs, "1", "2", *(["--out", "made"] if len(inputs) > 1 else [])]) == 2
    assert (
        capsys.readouterr().err == "error: input book.txt has been written to while it was read: "
        "what is in it now may be missing; start again when it is complete\n"
    )
    assert sorted(os.listdir()) == sorted(inputs)


def test_one_document_cannot_be_divided(here, capsys):
    """A book as one .txt: neither fewer nor more of it could be held out."""
    Path("book.txt").write_text("some text")
    assert main(["book.txt", "1", "16", "--val_split", "0.01"]) == 2
    assert "--val_split 0.01 would hold out all 1 document; leave it out, or divide the text into several files" in capsys.readouterr().err
    jsonl("one.jsonl", ["more"])
    assert main(["book.txt", "one.jsonl", "1", "16", "--out", "two", "--val_split", "2"]) == 2
    assert "would hold out all 2 documents; hold out fewer or give more data" in capsys.readouterr().err


def test_a_failing_round_trip_is_exit_code_2(here, capsys, monkeypatch):
    monkeypatch.setattr(WorldTokenizer, "decode_bytes", lambda self, ids: b"other")
    jsonl("demo.jsonl", ["a"])
    assert main(["demo.jsonl", "1", "1"]) == 2
    assert "demo.jsonl, line 1: the text does not come back" in capsys.readouterr().err and os.listdir() == ["demo.jsonl"]


def test_stale_held_out_data_is_not_left_beside_new_data(here, capsys):
    jsonl("demo.jsonl", words(20))
    assert main(["demo.jsonl", "1", "4", "--val_split", "3"]) == 0
    assert main(["demo.jsonl", "1", "4"]) == 2
    assert "demo.val.idx is left from an earlier run" in capsys.readouterr().err
    assert main(["demo.jsonl", "1", "4", "--val_split", "2"]) == 0 and BinIdx("demo.val").n_docs == 2


def test_too_short_for_the_context_is_said(here, capsys):
    jsonl("demo.jsonl", ["abc"])
    assert main(["demo.jsonl", "1", "4096"]) == 0
    assert "--ctx_len 4096 needs at least 8193 tokens and the data have 2" in capsys.readouterr().out
    jsonl("demo.jsonl", words(20))
    for held_out, told in (("1", True), ("10", False)):  # before a training refuses the pair
        assert main(["demo.jsonl", "1", "32", "--val_split", held_out]) == 0
        assert (BinIdx("demo.val").n_tokens < 33) is told
        assert ("too little to validate with: --ctx_len 32 needs at least 33 tokens" in capsys.readouterr().out) is told


@pytest.mark.parametrize("failing", ["demo.idx", "demo.val.idx"])
def test_a_full_disk_leaves_nothing(here, capsys, monkeypatch, failing):
    seal = pack_module.BinIdxWriter.seal

    def full(self):
        if self.idx_path.name == failing:
            raise OSError(28, "No space left on device")
        seal(self)

    monkeypatch.setattr(pack_module.BinIdxWriter, "seal", full)
    jsonl("demo.jsonl", words(20))
    assert main(["demo.jsonl", "1", "4", "--val_split", "2"]) == 2
    assert "cannot write demo.bin: No space left on device" in capsys.readouterr().err and os.listdir() == ["demo.jsonl"]


def test_fuzzed_lines_end_in_one_line_or_in_tokens(here, capsys):
    rng = random.Random(5)
    good = "".join(json.dumps({"text": t}, ensure_ascii=k % 2 == 0) + "\n" for k, t in enumerate(words(6))).encode()
    codes = Counter()
    for _ in range(300):
        raw = bytearray(good)
        for _ in range(rng.randrange(1, 3)):
            raw[rng.randrange(len(raw))] = rng.choice(b'"\\{}\n\r\0\xff\xc3u:,d8 ')
        Path("demo.jsonl").write_bytes(raw)
        code = main(["demo.jsonl", "1", "4"])
        err = capsys.readouterr().err
        codes[code] += 1
        if code == 0:
            expected = [json.loads(line)["text"] for line in bytes(raw).split(b"\n") if line.strip()]
            assert Counter(texts_of("demo")) == Counter(expected)
        else:
            assert code == 2 and err.startswith("error: demo.jsonl, line ") and err.count("\n") == 1
            assert not [*Path().glob("demo.*partial"), *Path().glob("*.unfinished")]
    assert codes[0] > 20 and codes[2] > 20


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_terminal_that_only_prints_gets_no_codes(tmp_path, monkeypatch, capsys, term):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(command, "PAUSE", 0.0)
    (tmp_path / "a.txt").write_text("hello")
    assert main([str(tmp_path / "a.txt"), "1", "2", "--out", str(tmp_path / "a")]) == 0
    told = capsys.readouterr().err
    assert "reading" in told and ("\033" in told) == (term == "xterm")
