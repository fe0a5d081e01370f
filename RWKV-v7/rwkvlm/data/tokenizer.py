"""Text to tokens and back: RWKV's World tokenizer, and any tokenizer file of Hugging Face's `tokenizers`.

Both have one face, `Tokenizer`. Encoding never drops or changes text; decoding never fails: what is no text becomes U+FFFD.
Token 0 ends a document and stands for no text in the World vocabulary.
"""

from __future__ import annotations

import ast
import codecs
import ctypes
import hashlib
import importlib.util
import itertools
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from .. import native
from ..config import UserError
from ..config.errors import pip_install

END_OF_DOCUMENT = 0
REPLACEMENT = "\ufffd"
VOCABULARY = "rwkv_vocab_v20230424.txt"
TOKENIZER = "tokenizer.json"  # in the folder of a run, of data that define their vocabulary
PART = 1 << 16  # tokens decoded or counted at once: as Python objects they are large


@dataclass(frozen=True)
class Texts:
    """Texts in UTF-8, one after the other: data [bytes] uint8, and where each stops, ends [n] int64."""

    data: np.ndarray
    ends: np.ndarray

    @classmethod
    def join(cls, texts: Sequence[bytes]) -> Texts:
        return cls(np.frombuffer(b"".join(texts), dtype=np.uint8), np.cumsum([*map(len, texts)], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, k: int) -> bytes:
        if not 0 <= k < len(self):
            raise IndexError(k)
        return self.data[self.ends[k - 1] if k else 0 : self.ends[k]].tobytes()


class Stream(ABC):
    """Decodes tokens one at a time, giving out text as soon as its characters are complete."""

    @abstractmethod
    def push(self, token: int) -> str:
        """The text that this token completes; possibly empty."""

    @abstractmethod
    def finish(self) -> str:
        """What is left at the end; characters cut short become U+FFFD."""


class Tokenizer(ABC):
    """The face of both tokenizers.

    vocab_size: the size of the embedding that a model needs: every id lies below it.
    identity: a text that is another one for a tokenizer that gives other ids.
    largest_text: bytes of a text that are encoded at once; 0: any number, and `settled` knows how to encode a text in parts.
    zero_is_kept: token 0 comes out of no text, but for one in which its name stands, as <|endoftext|>.
    """

    vocab_size: int
    identity: str
    largest_text = 0
    zero_is_kept = True

    @abstractmethod
    def encode(self, text: str | bytes) -> list[int]:
        """Token ids of the text, without an end-of-document token. UserError where it is not valid Unicode."""

    def encode_batch(self, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts at once, each followed by token 0: (ids [total], ends [len(texts)] int64), text k up to ends[k].

        Threads may call it at the same time, and where the work is native they do not wait for each other.
        """
        return _end_to_end([[*self.encode(text), END_OF_DOCUMENT] for text in texts])

    def occurring(self, ids: np.ndarray) -> np.ndarray:
        """Which ids occur, [vocab_size] bool."""
        seen = np.zeros(self.vocab_size, dtype=bool)
        for first in range(0, len(ids), PART):  # NumPy counts with 8 bytes for each
            seen |= np.bincount(ids[first : first + PART], minlength=self.vocab_size) > 0
        return seen

    @abstractmethod
    def settled(self, ids: np.ndarray, n_bytes: int) -> tuple[int, int]:
        """Of the ids of a text of n_bytes: how many stand whatever text follows, and how many bytes they are.

        The bytes that are left are encoded together with what follows.
        """

    @abstractmethod
    def comes_back(self, text: bytes, ids: np.ndarray) -> bool:
        """Whether the text is what its ids decode to."""

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the tokens; an id that stands for no text gives the three bytes of U+FFFD."""

    @abstractmethod
    def stream(self) -> Stream:
        """A fresh incremental decoder."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens; bytes that are not UTF-8 and ids that stand for no text become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _end_to_end(lists: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([*itertools.chain(*lists)], dtype=np.int32), np.cumsum([*map(len, lists)], dtype=np.int64)


def utf8(text: str | bytes) -> bytes:
    """The text's UTF-8; bytes as they are. UserError for a str that is not valid Unicode."""
    if isinstance(text, bytes):
        return text
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text has a lone surrogate, {ascii(text[error.start])}, at character {error.start}: not valid Unicode"
        ) from None


def load_tokenizer(name: str = "world") -> Tokenizer:
    """The tokenizer called `name`: "world", or the path of a tokenizer.json. Loaded once per process."""
    return _load(str(name))


def tokenizer_of(weights: str | Path) -> str:
    """The name of a model's tokenizer: what its run has put beside its file, of data that define their vocabulary, else "world"."""
    beside = (Path(os.path.dirname(path), TOKENIZER) for path in (weights, os.path.realpath(weights)))  # of a link, also where it leads
    return next((str(path) for path in beside if path.is_file()), "world")


@lru_cache(maxsize=8)
def _load(name: str) -> Tokenizer:
    if name == "world":
        try:
            return NativeWorldTokenizer(vocabulary_path())
        except native.NativeBuildError as error:
            print(f"tokenizing in Python, at a thirtieth of the speed: {error}", file=sys.stderr, flush=True)
            return WorldTokenizer(vocabulary_path())
    if name.endswith(".json"):
        return HuggingFaceTokenizer(Path(name))
    raise UserError(f"tokenizer {name!r} is not known; use world, or the path of a Hugging Face tokenizer file (.json)")


def vocabulary_path() -> Path:
    """The vocabulary inside the installed PyPI package `rwkv`, which is located but not imported (it compiles kernels)."""
    spec = importlib.util.find_spec("rwkv")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / VOCABULARY).is_file():
            return path
    raise UserError(f"the World vocabulary ({VOCABULARY}) is missing: it comes with the package rwkv; run: {pip_install('rwkv')}")


def _read_vocabulary(path: Path) -> list[bytes]:
    """Token of each id 1, 2, ...; a line is `id literal length`, the literal a Python str or bytes."""
    tokens: list[bytes] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            index, rest = line.split(" ", 1)
            literal, length = rest.rsplit(" ", 1)
            plain = literal[0] in "'\"" and literal[0] == literal[-1] and "\\" not in literal
            token = literal[1:-1] if plain else ast.literal_eval(literal)
            token = token.encode("utf-8") if isinstance(token, str) else token
            if (int(index), int(length)) != (number, len(token)):
                raise ValueError
        except (ValueError, SyntaxError, IndexError):
            raise UserError(f"{path}, line {number} is damaged: {line[:60]!r}; run: {pip_install('--force-reinstall rwkv')}") from None
        tokens.append(token)
    if not {bytes([b]) for b in range(256)} <= set(tokens):
        raise UserError(f"{path} lacks some of the 256 single bytes; run: {pip_install('--force-reinstall rwkv')}")
    return tokens


class WorldTokenizer(Tokenizer):
    """Greedy longest match over a vocabulary of byte strings that holds every single byte, so that any bytes can be encoded.

    This is the plain reference, about 5 MB/s: a trie whose nodes are (children by byte, id of the token that ends here).
    Source: RWKV-LM, RWKV-v5/tokenizer/rwkv_tokenizer.py, whose ids it reproduces.
    """

    vocab_size = 65536

    def __init__(self, vocabulary: Path) -> None:
        self._tokens = [b"", *_read_vocabulary(vocabulary)]
        self.identity = _digest(vocabulary)

    @cached_property
    def _root(self) -> dict[int, tuple]:
        root: dict[int, tuple] = {}
        # a node's id is known before its children come
        for i, token in sorted(enumerate(self._tokens[1:], 1), key=lambda item: len(item[1])):
            children = root
            for byte in token[:-1]:
                children = children.setdefault(byte, ({}, 0))[0]
            children[token[-1]] = (children[token[-1]][0] if token[-1] in children else {}, i)
        return root

    @cached_property
    def _length(self) -> list[int]:
        return [*map(len, self._tokens)]

    @cached_property
    def _longest(self) -> int:
        return max(self._length)

    def encode(self, text: str | bytes) -> list[int]:
        text = utf8(text)
        root, length, longest = self._root, self._length, self._longest
        ids: list[int] = []
        at, end = 0, len(text)
        while at < end:
            children, best = root, 0
            for byte in text[at : at + longest]:
                node = children.get(byte)
                if node is None:
                    break
                children, token = node
                best = token or best
            ids.append(best)
            at += length[best]
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        tokens, n = self._tokens, len(self._tokens)
        if isinstance(ids, list) and ids and min(ids) > 0 and max(ids) < n:
            return b"".join(map(tokens.__getitem__, ids))
        return b"".join([tokens[i] if 0 < i < n else b"\xef\xbf\xbd" for i in ids])

    def settled(self, ids: np.ndarray, n_bytes: int) -> tuple[int, int]:
        """Where a match begins so far from the end that the longest token would fit, what follows could not have made it longer.

        So the ids up to the last such match stand: each begins where the one before ends, and is the longest match whatever text follows.
        """
        n, end = len(ids), n_bytes
        while n and (begin := end - self._length[ids[n - 1]]) > n_bytes - self._longest:
            n, end = n - 1, begin
        return n, end

    def comes_back(self, text: bytes, ids: np.ndarray) -> bool:
        at = 0
        for first in range(0, len(ids), PART):
            part = self.decode_bytes(ids[first : first + PART])
            if text[at : at + len(part)] != part:
                return False
            at += len(part)
        return at == len(text)

    def stream(self) -> Stream:
        return _BytesStream(self)


class NativeWorldTokenizer(WorldTokenizer):
    """The same ids from cuda/tokenizer/, about 300 MB/s a thread; NativeBuildError where it cannot be built."""

    def __init__(self, vocabulary: Path) -> None:
        super().__init__(vocabulary)
        library = native.library("tokenizer")
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        library.rwkvlm_world.restype, library.rwkvlm_world.argtypes = pointer, [pointer, pointer, count]
        library.rwkvlm_world_encode.restype, library.rwkvlm_world_encode.argtypes = (
            None,
            [pointer, pointer, pointer, count, pointer, pointer],
        )
        lengths = np.array([*map(len, self._tokens[1:])], dtype=np.int64)
        library.rwkvlm_occurring.restype, library.rwkvlm_occurring.argtypes = None, [pointer, count, pointer]
        self._encode, self._occurring = library.rwkvlm_world_encode, library.rwkvlm_occurring
        self._world = library.rwkvlm_world(b"".join(self._tokens), lengths.ctypes.data, len(lengths))
        if not self._world:
            raise MemoryError("no memory for the tokenizer's table")

    def encode(self, text: str | bytes) -> list[int]:
        return self.encode_batch(Texts.join([utf8(text)]))[0][:-1].tolist()

    def encode_batch(self, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
        data, ends = np.ascontiguousarray(texts.data, np.uint8), np.ascontiguousarray(texts.ends, np.int64)
        ids = np.empty(len(data) + len(ends), dtype=np.uint16)  # a token has at least a byte
        id_ends = np.empty(len(ends), dtype=np.int64)
        self._encode(self._world, data.ctypes.data, ends.ctypes.data, len(ends), ids.ctypes.data, id_ends.ctypes.data)
        return ids[: id_ends[-1] if len(ends) else 0], id_ends

    def occurring(self, ids: np.ndarray) -> np.ndarray:
        ids, seen = np.ascontiguousarray(ids, np.uint16), np.zeros(self.vocab_size, dtype=bool)
        self._occurring(ids.ctypes.data, len(ids), seen.ctypes.data)
        return seen


class _BytesStream(Stream):
    """For tokenizers whose tokens are bytes: an incremental UTF-8 decoder."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.decode_bytes([int(token)]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json of Hugging Face's `tokenizers`, used without its special-token templates.

    Where such a tokenizer could cut a text is not known in general, so that it takes whole ones, with about 200 bytes
    of memory for each byte.
    """

    largest_text = 64 << 20

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Engine
        except ImportError:
            raise UserError(f"tokenizer {path} needs the package tokenizers; run: {pip_install('tokenizers')}") from None
        if not path.is_file():
            raise UserError(f"tokenizer file {path} does not exist; use world, or the path of a Hugging Face tokenizer file (.json)")
        try:
            self._engine = Engine.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"{path} is not a Hugging Face tokenizer file: {' '.join(str(error).split())}; use world, or a tokenizer.json"
            ) from None
        self.identity = _digest(path)
        self._turn = threading.Lock()
        self._engine.no_padding()
        self._engine.no_truncation()
        self.vocab_size = 1 + max(self._engine.get_vocab(with_added_tokens=True).values(), default=0)
        self.zero_is_kept = END_OF_DOCUMENT in self._engine.get_added_tokens_decoder()

    def encode(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"the text is not UTF-8 at byte {error.start}, and this tokenizer takes characters only") from None
        utf8(text)
        return self._engine.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
        with self._turn:  # it uses all cores by itself, and for each further batch as much memory again
            found = self._engine.encode_batch([text.decode("utf-8") for text in texts], add_special_tokens=False)
            return _end_to_end([[*one.ids, END_OF_DOCUMENT] for one in found])

    def settled(self, ids: np.ndarray, n_bytes: int) -> tuple[int, int]:
        raise NotImplementedError("takes whole texts")

    def comes_back(self, text: bytes, ids: np.ndarray) -> bool:
        return self.decode_bytes(ids) == text

    def decode(self, ids: Iterable[int]) -> str:
        text, run = "", []
        for i in [*map(int, ids), -1]:
            if 0 <= i < self.vocab_size and self._engine.id_to_token(i) is not None:
                run.append(i)
                continue
            text += self._engine.decode(run, skip_special_tokens=False) + REPLACEMENT
            run = []
        return text[:-1]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.decode(ids).encode("utf-8")

    def stream(self) -> Stream:
        return _TextStream(self)


class _TextStream(Stream):
    """For tokenizers that decode to text only: decode a short window, and give out what the newest tokens add to it.

    A window is needed because a token's text can depend on its neighbours (spaces, characters cut in two).
    """

    PATIENCE = 8  # tokens after which a character that is still not complete is given out as U+FFFD

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._told: list[int] = []
        self._new: list[int] = []

    def _added(self) -> str:
        return self._tokenizer.decode(self._told + self._new)[len(self._tokenizer.decode(self._told)) :]

    def push(self, token: int) -> str:
        self._new.append(int(token))
        text = self._added()
        if text.endswith(REPLACEMENT) and len(self._new) < self.PATIENCE:
            return ""
        self._told, self._new = self._new, []
        return text

    def finish(self) -> str:
        return self._added()
