"""The World tokenizer against the official one, its decoder on bad input, and Hugging Face tokenizer files."""

import json
import random
import sys

import numpy as np
import pytest
import torch

from rwkvlm.config import UserError
from rwkvlm.data import tokenizer as module
from rwkvlm.data.tokenizer import Texts, WorldTokenizer, load_tokenizer

WORLD = load_tokenizer("world")
VOCABULARY = module.vocabulary_path()


@pytest.fixture(scope="module")
def official():
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    return TRIE_TOKENIZER(str(VOCABULARY))


def some_text(rng, n):
    """Words of the vocabulary, code points of all planes, runs: the hard cases of a greedy match."""
    parts = []
    while sum(map(len, parts)) < n:
        kind = rng.randrange(6)
        if kind == 0:
            parts.append(WORLD.decode([rng.randrange(1, 65530)]).replace("\ufffd", ""))
        elif kind == 1:
            token = WORLD.decode_bytes([rng.randrange(1, 65530)])
            parts.append(token[: rng.randrange(len(token)) + 1].decode("utf-8", "ignore"))
        elif kind == 2:
            code = rng.choice([rng.randrange(0x250), rng.randrange(0x3000), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])
            parts.append(chr(code))
        elif kind == 3:
            parts.append(rng.choice(" \n=-#\t0aA") * rng.randrange(1, 140))
        else:
            parts.append("".join(rng.choice(" etaoinshrdlu,.ETA\n") for _ in range(rng.randrange(20))))
    return "".join(parts)


def test_ids_equal_the_official_ones(official):
    rng = random.Random(0)
    for _ in range(4000):
        text = some_text(rng, rng.randrange(1, 120))
        ids = WORLD.encode(text)
        assert ids == official.encode(text) and WORLD.decode(ids) == text
    for _ in range(2000):
        data = rng.randbytes(rng.randrange(1, 80))
        ids = WORLD.encode(data)
        assert ids == official.encodeBytes(data) and WORLD.decode_bytes(ids) == data


def test_every_token_encodes_to_itself(official):
    for i in range(1, 65530):
        token = WORLD.decode_bytes([i])
        assert token == official.idx2token[i]
        assert WORLD.encode(token) == [i]


def test_every_code_point_round_trips():
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    assert WORLD.decode(WORLD.encode(text)) == text
    assert WORLD.encode("") == [] and WORLD.decode([]) == ""
    ids = np.array(WORLD.encode(text[:1000]), dtype=np.uint16)
    assert [WORLD.comes_back(other.encode(), ids) for other in (text[:1000], text[:999], text[:1001], text[1:1001])] == [
        True,
        False,
        False,
        False,
    ]


def test_decoding_never_fails():
    cut = WORLD.encode("é".encode()[:1])
    bad = [0, 65530, 65535, 65536, -1, 10**12]
    assert WORLD.decode(bad) == "".join(WORLD.decode([i]) for i in bad) == "\ufffd" * 6
    assert WORLD.decode([*WORLD.encode("a"), *cut, *WORLD.encode("b"), 0]) == "a\ufffdb\ufffd"
    rng = random.Random(1)
    for _ in range(200):
        ids = [rng.randrange(-5, 65545) for _ in range(50)]
        text = WORLD.decode(ids)
        stream = WORLD.stream()
        assert "".join(map(stream.push, ids)) + stream.finish() == text
    ids = WORLD.encode("numpy and torch: 中文")
    for container in (np.array(ids, dtype=np.uint16), torch.tensor(ids), tuple(ids), iter(ids)):
        assert WORLD.decode(container) == "numpy and torch: 中文"


def test_stream_holds_back_half_characters():
    stream, said = WORLD.stream(), []
    for byte in "a中\U0001f600".encode():
        said.append(stream.push(WORLD.encode(bytes([byte]))[0]))
    assert said == ["a", "", "", "中", "", "", "", "\U0001f600"] and stream.finish() == ""
    stream.push(WORLD.encode(b"\xf0")[0])
    assert stream.finish() == "\ufffd"


def test_lone_surrogate_is_named():
    with pytest.raises(UserError, match=r"lone surrogate, '\\ud83d', at character 2"):
        WORLD.encode("ab\ud83d")


def test_missing_or_damaged_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="-m pip install rwkv"):
        module.vocabulary_path()
    lines = VOCABULARY.read_text(encoding="utf-8").splitlines(keepends=True)
    for k, (at, line) in enumerate([(300, "garbage\n"), (300, "301 'abc' 4\n"), (300, "7 'abc' 3\n"), (300, "301 __import__('os') 3\n")]):
        path = tmp_path / f"{k}.txt"
        path.write_text("".join([*lines[:at], line, *lines[at + 1 :]]), encoding="utf-8")
        with pytest.raises(UserError, match="line 301 is damaged"):
            WorldTokenizer(path)
    (tmp_path / "short.txt").write_text("".join(lines[:100]), encoding="utf-8")
    with pytest.raises(UserError, match="single bytes"):
        WorldTokenizer(tmp_path / "short.txt")


def test_loading_does_not_import_the_package_rwkv():
    import subprocess

    code = "import sys; from rwkvlm.data.tokenizer import load_tokenizer; load_tokenizer(); sys.exit('rwkv' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture(scope="module")
def hugging_face_file(tmp_path_factory):
    """A small byte-level BPE, trained here."""
    tokenizers = pytest.importorskip("tokenizers")
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(["the cat sat on the mat and the dog sat on the cat"] * 5, trainer)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    engine.save(str(path))
    return path


def test_hugging_face_file(hugging_face_file):
    tok = load_tokenizer(str(hugging_face_file))
    text = "the cat, 中文 and \U0001f600\n"
    ids = tok.encode(text)
    assert tok.encode(text.encode()) == ids and tok.decode(ids) == text and max(ids) < tok.vocab_size <= 400
    assert len(tok.encode("the cat sat")) < 8
    assert tok.decode([*ids, 99999, -1]) == text + "\ufffd\ufffd" and tok.decode([0]) == "<|endoftext|>"
    stream = tok.stream()
    said = [stream.push(i) for i in ids]
    assert "".join(said) + stream.finish() == text and "\ufffd" not in "".join(said)
    endless = [stream.push(99999) for _ in range(20)]  # no text at all: said after a while, not never
    assert "".join(endless) + stream.finish() == "\ufffd" * 20 and any(endless)
    with pytest.raises(UserError, match="not UTF-8 at byte 1"):
        tok.encode(b"a\xff")
    with pytest.raises(UserError, match="lone surrogate"):
        tok.encode("\ud800")


def test_hugging_face_templates_padding_and_truncation_are_left_out(hugging_face_file, tmp_path):
    """All of them belong to training other models; here a text is its tokens, no more and no fewer."""
    from tokenizers import Tokenizer, processors

    engine = Tokenizer.from_file(str(hugging_face_file))
    engine.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    engine.enable_padding(length=100)
    engine.enable_truncation(5)
    engine.save(str(tmp_path / "tokenizer.json"))
    plain, other = load_tokenizer(str(hugging_face_file)), load_tokenizer(str(tmp_path / "tokenizer.json"))
    texts = ["the cat sat on the mat", "", "the dog"]
    assert [other.encode(text) for text in texts] == [plain.encode(text) for text in texts]
    ids, ends = other.encode_batch(Texts.join([text.encode() for text in texts]))
    assert (
        ids.tolist() == [i for text in texts for i in [*plain.encode(text), 0]]
        and ends.tolist() == np.cumsum([len(plain.encode(text)) + 1 for text in texts]).tolist()
    )


def test_a_stream_keeps_what_depends_on_the_token_before(tmp_path):
    """The space before a word, which the first word of a text has not."""
    tokenizers = pytest.importorskip("tokenizers")
    engine = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"\u2581{word}": i for i, word in enumerate(("the", "cat", "sat"))}, unk_token="\u2581the")
    )
    engine.pre_tokenizer, engine.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    engine.save(str(tmp_path / "tokenizer.json"))
    tok = load_tokenizer(str(tmp_path / "tokenizer.json"))
    ids, stream = tok.encode("the cat sat"), tok.stream()
    assert len(ids) == 3 and [stream.push(i) for i in ids] == ["the", " cat", " sat"]


def test_unknown_tokenizers(tmp_path):
    for name, words in [("gpt2", "not known"), (str(tmp_path / "none.json"), "does not exist")]:
        with pytest.raises(UserError, match=words):
            load_tokenizer(name)
    (tmp_path / "bad.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(UserError, match="not a Hugging Face tokenizer file") as caught:
        load_tokenizer(str(tmp_path / "bad.json"))
    assert "\n" not in str(caught.value)
