"""Files to characters: which files make a text, how their bytes are decoded, and the alphabet that numbers the symbols.

Everything streams in blocks, so that a text of any size passes through in bounded memory; the token stream itself is
made in `gpurnn.app.data`.
"""

import codecs
import contextlib
import fnmatch
import io
import itertools
import json
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

Unit = Literal["chars", "bytes"]

BLOCK = 1 << 20  # bytes read at a time: large enough to amortise Python, small enough for the cache
REPLACEMENT = "\ufffd"  # stands for every character that found no room in the alphabet
CODE_POINTS = 0x110000
SURROGATES = range(0xD800, 0xE000)

_SNIFFED = 1 << 16  # bytes in which a binary file is expected to show a NUL
_LIBRARY_LEFT_OUT = {"test", "tests", "idle_test", "lib-dynload", "site-packages", "dist-packages", "__pycache__"}
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)


@dataclass(frozen=True)
class Alphabet:
    """The symbols of a text; a token is a symbol's index.

    unit: "chars" or "bytes".  symbols: the characters, sorted by code point, as one string; empty for bytes, whose
    alphabet is always the 256 byte values.  `len(alphabet)` is the number of symbols.
    Raises ValueError where the symbols are not such an alphabet.
    """

    unit: Unit
    symbols: str = ""

    def __post_init__(self) -> None:
        if self.unit not in ("chars", "bytes"):
            raise ValueError(f'unit: expected "chars" or "bytes", got {self.unit!r}')
        if not isinstance(self.symbols, str) or (self.unit == "chars") != bool(self.symbols):
            raise ValueError(f"symbols: expected a string, empty for bytes only, got {self.symbols!r} for {self.unit}")
        points = [ord(symbol) for symbol in self.symbols]
        if any(a >= b for a, b in itertools.pairwise(points)) or any(p in SURROGATES for p in points):
            raise ValueError("symbols: expected distinct characters sorted by code point, without surrogates")

    def __len__(self) -> int:
        return 256 if self.unit == "bytes" else len(self.symbols)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest unsigned integer type that holds every token."""
        return np.min_scalar_type(len(self) - 1)

    def encode(self, text: str) -> np.ndarray:
        """Tokens of `text`, (len(text),) for characters, of `dtype`.

        A character outside the alphabet becomes U+FFFD; raises ValueError with those characters where the alphabet
        has no U+FFFD.
        """
        if self.unit == "bytes":  # surrogateescape: bytes of a command line that are no UTF-8 come back as they were
            return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)
        points = code_points(text)
        tokens = _token_of(self)[points]
        if REPLACEMENT not in self.symbols:
            known = _points(self)[tokens] == points
            if not known.all():
                unknown = "".join(sorted({character for character in text if character not in self.symbols}))
                raise ValueError(f"not in the alphabet of {len(self)} characters: {unknown!r}")
        return tokens

    def decode(self, tokens: Any) -> str:
        """The text of `tokens`, any array-like of integers on the host.  Bytes that are no UTF-8 decode to U+FFFD.

        Raises ValueError where a token is not in [0, len(alphabet)).
        """
        array = np.asarray(tokens).reshape(-1)
        if not array.size:
            return ""
        if array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= len(self):
            raise ValueError(f"tokens: expected integers in [0, {len(self)}), got {array.dtype} {array[:8]}")
        if self.unit == "bytes":
            return array.astype(np.uint8).tobytes().decode("utf-8", "replace")
        return _points(self)[array].tobytes().decode("utf-32-le")

    def to_json(self) -> str:
        """The alphabet as ASCII JSON text: {"unit": ..., "symbols": ...}."""
        return json.dumps({"unit": self.unit, "symbols": self.symbols})

    @classmethod
    def from_json(cls, text: str) -> "Alphabet":
        """The inverse of `to_json`; raises ValueError where `text` is anything else."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"alphabet: not valid JSON ({error})") from error
        if not isinstance(fields, dict) or set(fields) != {"unit", "symbols"}:
            raise ValueError('alphabet: expected a JSON object with "unit" and "symbols"')
        return cls(**fields)


@lru_cache(maxsize=16)
def _points(alphabet: Alphabet) -> np.ndarray:
    return code_points(alphabet.symbols).astype("<u4")


@lru_cache(maxsize=16)
def _token_of(alphabet: Alphabet) -> np.ndarray:
    """Token by code point; unknown characters share the token of U+FFFD, or 0, which `encode` then detects."""
    table = np.full(CODE_POINTS, max(alphabet.symbols.find(REPLACEMENT), 0), alphabet.dtype)
    table[_points(alphabet)] = np.arange(len(alphabet))
    return table


def code_points(text: str) -> np.ndarray:
    """The code points of `text`, (len(text),) uint8 for ASCII, else uint32."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def choose_alphabet(counts: np.ndarray, limit: int) -> Alphabet:
    """The alphabet of a text with `counts[c]` characters of code point c, at most `limit` symbols.

    Where there are more, the most frequent stay (of equals, the lower code point) and U+FFFD stands for the rest.
    Lone surrogates, which a few exotic codecs produce, are no characters and count among the rest.
    """
    found = np.flatnonzero(counts)
    points = found[(found < SURROGATES.start) | (found >= SURROGATES.stop)]
    if len(points) < len(found) or len(points) > limit:
        points = points[points != ord(REPLACEMENT)]
        frequent = points[np.argsort(-counts[points], kind="stable")[: limit - 1]]
        points = np.append(frequent, ord(REPLACEMENT))
    return Alphabet("chars", "".join(map(chr, sorted(points))))


def standard_library() -> list[Path]:
    """Python's own standard-library sources, sorted by relative path, without tests and installed packages.

    Raises FileNotFoundError where this Python keeps no sources on disk.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _LIBRARY_LEFT_OUT and not name.startswith("test_")]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise FileNotFoundError(f"no standard-library sources (.py) in {root}: give a file or a folder of text")
    return _sorted(files, root)


def folder_files(folder: Path, pattern: str = "*") -> list[Path]:
    """The regular files below `folder` whose name or relative path matches `pattern`, sorted by relative path.

    Hidden files and folders are left out; links to folders are followed, each folder once.  Raises FileNotFoundError
    where no file matches; OSError where a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    files, seen = [], {os.path.realpath(folder)}
    for parent, subfolders, names in os.walk(folder, onerror=fail, followlinks=True):
        shown, subfolders[:] = sorted(name for name in subfolders if not name.startswith(".")), []
        for name in shown:
            if (real := os.path.realpath(Path(parent, name))) not in seen:
                seen.add(real)
                subfolders.append(name)
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            relative = path.relative_to(folder).as_posix()
            matches = fnmatch.fnmatchcase(path.name, pattern) or fnmatch.fnmatchcase(relative, pattern)
            if matches and path.is_file():  # a pipe or a device would block or never end
                files.append(path)
    if not files:
        raise FileNotFoundError(f"{folder}: no file matches {pattern!r} (hidden files are left out)")
    return _sorted(files, folder)


def _sorted(files: list[Path], root: Path) -> list[Path]:
    """By relative POSIX path: the same order on every system and in every language setting."""
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


class BinaryFileError(ValueError):
    """The file holds a NUL character: it is no text."""


def check_encoding(encoding: str) -> None:
    """Raises ValueError where `encoding` names no text codec that can stream."""
    if not _streams(encoding):
        raise ValueError(f"encoding: unknown text encoding {encoding!r}; try utf-8, latin-1, cp1252, utf-16")


def _streams(encoding: str) -> bool:
    """Whether it names a codec that makes text of bytes, block by block: not hex, zlib, rot13 or undefined."""
    try:
        codecs.getincrementaldecoder(encoding)
        return "a".encode(encoding).decode(encoding) == "a"
    except (LookupError, ValueError):  # ValueError: of `undefined`, and of a NUL in the name
        return False


def read_bytes(path: Path, digest: Any) -> Iterator[bytes]:
    """The content of `path` in blocks; each is also fed to `digest.update`."""
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            yield block


def read_text(path: Path, encoding: str | None, digest: Any) -> Iterator[str]:
    """The decoded text of `path` in blocks; the raw bytes are also fed to `digest.update`.

    encoding None: by byte order mark, for a .py file by its coding line (PEP 263), else UTF-8.  Line ends stay.
    Raises BinaryFileError at a NUL, ValueError with the offset at a byte that is not valid in the encoding.
    """
    with open(path, "rb") as file:
        head = file.read(_SNIFFED)
        mark, codec = (b"", encoding) if encoding else _detect(path, head)
        digest.update(mark)
        end = file.seek(len(mark))
        decoder = codecs.getincrementaldecoder(codec)()
        block = b"start"
        while block:
            block = file.read(BLOCK)
            digest.update(block)
            end += len(block)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeError as error:
                raise ValueError(_invalid(path, codec, error, end)) from error
            if "\0" in text:
                raise BinaryFileError(_binary(path, f"a NUL character in {codec}"))
            yield text


def _detect(path: Path, head: bytes) -> tuple[bytes, str]:
    """Byte order mark and codec of a file that begins with `head`."""
    for mark, codec in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return mark, codec
    if b"\0" in head:
        raise BinaryFileError(_binary(path, f"NUL byte at offset {head.index(0)}"))
    if path.suffix == ".py":
        with contextlib.suppress(SyntaxError):  # a coding line that Python does not know either, or no UTF-8
            codec = tokenize.detect_encoding(io.BytesIO(head).readline)[0]
            if _streams(codec):
                return b"", codec
    return b"", "utf-8"


def _binary(path: Path, why: str) -> str:
    return f"{path}: looks binary ({why}): if it is UTF-16 or UTF-32 text, give its encoding, else train on bytes"


def _invalid(path: Path, codec: str, error: UnicodeError, end: int) -> str:
    """The message for bytes that are not valid in `codec`, where `end` bytes of the file have been read."""
    advice = "give its encoding (latin-1, cp1252, ...) or train on bytes"
    if not isinstance(error, UnicodeDecodeError):
        return f"{path}: not valid {codec} ({error}): {advice}"
    # What the decoder was given ends where the reading has come to, whatever it had kept from earlier blocks.
    offset = end - len(error.object) + error.start
    return f"{path}: byte 0x{error.object[error.start]:02X} at offset {offset} is not valid {codec}: {advice}"
