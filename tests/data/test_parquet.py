"""Tables: what is read of them, what is refused, and that no damage ends in a crash or in other texts."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkvlm.cli import main as cli
from rwkvlm.data import documents
from rwkvlm.data import parquet as module
from rwkvlm.data.binidx import BinIdx
from rwkvlm.data.documents import parse, read_blocks
from rwkvlm.data.tokenizer import load_tokenizer

pyarrow = pytest.importorskip("pyarrow")


def write(path, columns, **options):
    from pyarrow import parquet

    parquet.write_table(columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns), path, **options)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*argv):
    return cli(["make_data", *map(str, argv)])


def texts_of(prefix):
    data, world = BinIdx(prefix), load_tokenizer()
    return sorted(world.decode(data.doc(i)[:-1]) for i in range(data.n_docs))


def read(path, text_key="text"):
    parsed = [parse(block, text_key) for block in read_blocks(Path(path), text_key)]
    return [text.decode() for p in parsed for text in p.texts], [str(bad) for p in parsed for bad in p.bad]


def test_rows_become_documents(here):
    texts = [f"{k} 中\0" for k in range(3000)]
    write("a.parquet", {"n": [*range(3000)], "text": texts}, row_group_size=700)
    assert run("a.parquet", 1, 4) == 0 and texts_of("a") == sorted(texts)
    blocks = [*read_blocks(Path("a.parquet"))]
    assert [*read_blocks(Path("a.parquet"), start=blocks[1].after, line=blocks[1].next_line)] == blocks[2:] != []


def test_rows_from_any_row_on(here):
    """Also from one that batches of this size, or of this version of pyarrow, do not begin with."""
    texts = [f"{k}" for k in range(2500)]
    write("a.parquet", {"text": texts}, row_group_size=700)
    for start in (0, 1, 699, 1030, 2499):
        found = [*module.read_rows(Path("a.parquet"), "text", start, documents.BLOCK)]
        assert found[0].first == start and [text.decode() for rows in found for text in rows.texts] == texts[start:]


def test_long_rows_come_a_few_at_a_time(here, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK", 10_000)
    texts = [f"{k} " + os.urandom(500 * (k % 7)).hex() for k in range(200)]
    write("a.parquet", {"text": texts}, use_dictionary=False)
    blocks = [*read_blocks(Path("a.parquet"))]
    assert read("a.parquet") == (texts, []) and max(block.size for block in blocks) < 60_000
    monkeypatch.setattr(documents, "LONGEST", 4000)
    kept, bad = read("a.parquet")
    assert kept == [t for t in texts if len(t) <= 4000]
    assert bad[0].startswith(f"a.parquet, row 5: the text is {len(texts[4])} bytes long, more than ") and len(bad) + len(kept) == 200


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_every_kind_of_string(here, kind):
    plain = pyarrow.array(["a", "中" * 30, "a"])
    write("a.parquet", {"text": plain.dictionary_encode() if kind == "dictionary" else plain.cast(getattr(pyarrow, kind)())})
    assert read("a.parquet") == (["a", "中" * 30, "a"], [])


def test_the_column_of_that_very_name(here):
    write("a.parquet", {"text": pyarrow.array([{"b": "nested"}]), "text.b": ["flat"]})
    assert read("a.parquet", "text.b") == (["flat"], [])


def invalid(*rows):
    """A column of strings that are no UTF-8."""
    return pyarrow.array(rows, pyarrow.binary()).view(pyarrow.string())


REFUSED = {
    "null": ({"text": ["a", None]}, ", row 2: there is nothing (null) in the column 'text'"),
    "utf8": ({"text": invalid(b"a", b"ab\xff")}, ", row 2: invalid UTF-8 at byte 2 of the text"),
    "surrogate": ({"text": invalid(b"\xed\xa0\x80")}, ", row 1: invalid UTF-8 at byte 0 of the text"),
    "other": ({"body": ["a"]}, ": no column 'text' (columns: body); see --text_key"),
    "none": ({}, ": no column 'text' (columns: none); see --text_key"),
    "empty": ({"text": pyarrow.array([], "string")}, ": the file is empty"),
    "int": ({"text": [1]}, ": the column 'text' has the type int64, not string; see --text_key"),
    "binary": ({"text": [b"a"]}, ": the column 'text' has the type binary, not string"),
    "nothing": ({"text": pyarrow.array([None])}, ": the column 'text' has the type null, not string"),
    "struct": ({"text": [{"b": "a"}]}, ": the column 'text' has the type struct<b: string>, not string"),
    "list": ({"text": [["a"]]}, ": the column 'text' has the type list<"),
    "time": ({"text": pyarrow.array([1 << 62], pyarrow.timestamp("ns"))}, ": the column 'text' has the type timestamp[ns], not string"),
    "codes": ({"text": pyarrow.array([1, 2]).dictionary_encode()}, ": the column 'text' has the type int64, not string"),
    "twice": (pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"]), ": 2 columns are called 'text'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_one_line(here, capsys, name):
    columns, words = REFUSED[name]
    write("x.parquet", columns)
    assert run("x.parquet", 1, 4) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: x.parquet{words}") and err.count("\n") == 1 and os.listdir() == ["x.parquet"], err


def test_what_is_no_table(here, capsys):
    write("good.parquet", {"text": ["good"] * 9})
    good = Path("good.parquet").read_bytes()
    for content in (
        b"",
        b"PAR1",
        b"PAR1PAR1",
        b"PAR1 not at all",
        b"PARE" + bytes(99) + b"\x10\0\0\0PARE",
        b'{"text": "a"}\n',
        good[: len(good) // 2],
        good[:-1],
        good[9:],
    ):
        Path("x.parquet").write_bytes(content)
        assert run("x.parquet", 1, 4) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: x.parquet: not a .parquet file that can be read: ") and err.count("\n") == 1, err
    assert run("good.parquet", "x.parquet", 1, 4, "--out", "y", "--skip_bad") == 0 and texts_of("y") == ["good"] * 9
    Path("x.parquet").unlink(), Path("x.parquet").mkdir()
    assert run("x.parquet", 1, 4) == 2 and "is a folder" in capsys.readouterr().err


def dies(connection, *_):
    connection.send(module.Rows(0, [b"a", b"b"], 0.5))
    os.abort()


def fails(connection, *_):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    raise RuntimeError


@pytest.mark.parametrize(
    "target, words",
    [
        (dies, f", row 3: the reader of .parquet files fails at it ({signal.SIGABRT.name})"),
        (fails, ": the reader of .parquet files fails at it (exit code 1)"),
    ],
)
def test_a_reader_that_crashes_is_one_line(here, monkeypatch, capfd, target, words):
    """pyarrow 26 aborts, for example, on some flipped bits of a footer: "Definition level histogram size mismatch"."""
    monkeypatch.setattr(module, "_send", target)
    write("x.parquet", {"text": ["a"] * 9})
    assert run("x.parquet", 1, 4) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"error: x.parquet{words}") and err.count("\n") == 1 and os.listdir() == ["x.parquet"], err


@st.composite
def damaged(draw):
    """The bytes of a table of which a part is lost, or some bytes are others; what was in it; whether its footer is another.

    The footer has no checksum.
    """
    texts = draw(st.lists(st.text(max_size=30), min_size=1, max_size=40))
    options = {
        "compression": draw(st.sampled_from(["none", "snappy", "zstd"])),
        "use_dictionary": draw(st.booleans()),
        "row_group_size": draw(st.integers(1, 50)),
    }
    sink = pyarrow.BufferOutputStream()
    write(sink, {"n": [*range(len(texts))], "text": texts}, write_page_checksum=True, **options)
    data = bytearray(sink.getvalue().to_pybytes())
    footer = int.from_bytes(data[-8:-4], "little") + 8
    in_footer = draw(st.booleans())
    for _ in range(draw(st.integers(0, 3))):
        data[draw(st.integers(len(data) - footer, len(data) - 1) if in_footer else st.integers(0, len(data) - footer - 1))] ^= draw(
            st.integers(1, 255)
        )
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 5)) == 0 else data), texts, in_footer


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(damaged())
def test_damage_ends_in_one_line_or_in_the_true_texts(tmp_path_factory, given_table):
    data, texts, in_footer = given_table
    path = tmp_path_factory.getbasetemp() / "damaged.parquet"
    path.write_bytes(data)
    found, bad = read(path)
    assert all(line.startswith(str(path)) and "\n" not in line for line in bad)
    assert in_footer or found == (texts[: len(found)] if bad else texts)
