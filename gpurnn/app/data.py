"""Text to training windows: a corpus as one stream of tokens, and the windows of truncated backpropagation through time.

    corpus = load_corpus(None)                                 # Python's own standard library
    training, validation = split(corpus.tokens, 0.05)
    inputs, targets, first = Windows(training, batch=64, steps=128).at(0)

Tokens stay on the host, in memory or mapped from a file; a window is what moves to the device.
"""

import hashlib
import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gpurnn import files
from gpurnn.app.text import (
    Alphabet,
    BinaryFileError,
    Unit,
    check_encoding,
    choose_alphabet,
    code_points,
    folder_files,
    read_bytes,
    read_text,
    standard_library,
)
from gpurnn.files import named

__all__ = ["Alphabet", "Corpus", "Windows", "load_corpus", "split", "standard_library"]

# Tokens below this many bytes live in memory: encoding them again takes a second, and no file stays behind.
IN_MEMORY = 64 << 20
_ABANDONED = 24 * 3600  # seconds after which a half-written token file belongs to a process that died


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text as tokens.

    tokens: (length,) uint8, uint16 or uint32, read-only, in memory or memory-mapped (a mapped file must not be
    shortened while it is in use).  sha256: of the raw bytes of all files, in order.  description: one line to print.
    """

    tokens: np.ndarray
    alphabet: Alphabet
    sha256: str
    description: str


def load_corpus(
    path: str | Path | None = None,
    *,
    unit: Unit = "chars",
    encoding: str | None = None,
    pattern: str = "*",
    max_alphabet: int = 512,
    cache_dir: str | Path | None = None,
) -> Corpus:
    """Reads a text of any size into a stream of tokens.

    path: a file; a folder, whose files that match `pattern` are joined in the order of their relative paths, hidden
    files left out and, for characters, binary files skipped; None: Python's standard library.
    unit: "chars", or "bytes" for any content.  encoding: None detects UTF-8, -16 and -32 by the byte order mark, the
    coding line of a .py file, else takes UTF-8.  max_alphabet: rarer characters beyond it become U+FFFD.
    cache_dir: where token files of long texts live; default: `gpurnn` in the user's cache directory.

    Raises FileNotFoundError where there is nothing to read, ValueError where a file is empty, binary or not valid in
    the encoding, or an option is wrong; other OSErrors pass through.
    """
    if unit not in ("chars", "bytes"):
        raise ValueError(f'unit: expected "chars" or "bytes", got {unit!r}')
    if not 2 <= max_alphabet <= 1 << 20:
        raise ValueError(f"max_alphabet: expected 2 to {1 << 20}, got {max_alphabet}")
    if encoding is not None:
        if unit == "bytes":
            raise ValueError(f'encoding: bytes are not decoded, expected None with unit="bytes", got {encoding!r}')
        check_encoding(encoding)
    name, files = _sources(path, pattern)
    survey = _survey(files, unit, encoding, skip_binary=path is None or Path(path).is_dir())
    if not survey.length:
        raise ValueError(f"{name}: expected text, got {len(files)} file(s), {survey.skipped} binary, the others empty")
    alphabet = Alphabet("bytes") if unit == "bytes" else choose_alphabet(survey.counts, max_alphabet)
    tokens = _tokens(survey, alphabet, encoding, cache_dir)
    return Corpus(tokens, alphabet, survey.sha256, _describe(name, survey, alphabet))


def split(tokens: np.ndarray, validation_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation tokens, views of `tokens`; the tail is validation.  0 gives an empty validation part."""
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction: expected a number in [0, 1), got {validation_fraction}")
    cut = len(tokens) - round(len(tokens) * validation_fraction)
    return tokens[:cut], tokens[cut:]


class Windows:
    """The training stream of truncated backpropagation through time; `len(windows)` is the windows of one epoch.

    The tokens are cut into `batch` contiguous substreams of (len(tokens) - 1) // batch tokens, read side by side,
    `steps` tokens at a time, with the state carried from window to window.  Each epoch starts at another place, and
    the tokens are a ring, so that windows cut the text elsewhere and no tail is left out for good.

    Raises ValueError where the tokens do not fill one window.
    """

    def __init__(self, tokens: np.ndarray, batch: int, steps: int):
        if batch < 1 or steps < 1:
            raise ValueError(f"batch and steps: expected at least 1, got {batch} and {steps}")
        needed = batch * steps + 1
        if len(tokens) < needed:
            raise ValueError(
                f"the text has {len(tokens)} tokens, but batch {batch} and steps {steps} need {needed} "
                "(batch * steps + 1): lower batch or steps, or give a longer text"
            )
        self.tokens = np.asarray(tokens)  # a plain view: indexing a memmap object is slower
        self.batch, self.steps = batch, steps
        self._pairs = len(tokens) - 1  # a token and its follower; the last token is only ever a target
        self._substream = self._pairs // batch
        # Steps of the golden section spread the starts of any number of epochs evenly; epoch 0 starts at 0.
        self._shift = max(1, round(self._substream * 0.6180339887))
        self._offsets = np.arange(steps)[:, None] + np.arange(batch) * self._substream

    def __len__(self) -> int:
        return self._substream // self.steps

    def at(self, index: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Window `index`, counted through all epochs: a function of nothing else, so that training resumes exactly.

        Returns inputs (steps, batch) and targets (steps, batch), the inputs' followers, both int32 (the smallest type
        that every backend gathers with and that holds any alphabet); and whether the state must start anew.
        """
        if index < 0:
            raise ValueError(f"index: expected a window number from 0, got {index}")
        epoch, window = divmod(index, len(self))
        start = epoch * self._shift % self._substream + window * self.steps
        positions = (self._offsets + start) % self._pairs
        inputs = self.tokens[positions].astype(np.int32)
        return inputs, self.tokens[positions + 1].astype(np.int32), window == 0


@dataclass
class _Survey:
    """What a first reading found: the files that are text, and all that the second reading must find again."""

    files: list[Path]
    counts: np.ndarray  # characters by code point, (CODE_POINTS or fewer,) int64; empty for bytes
    skipped: int
    size: int  # bytes
    length: int  # tokens
    sha256: str


def _sources(path: str | Path | None, pattern: str) -> tuple[str, list[Path]]:
    """The corpus's name, printable on any terminal, and its files in order."""
    if path is not None and Path(path).is_dir():
        return _printable(path), folder_files(Path(path), pattern)
    if pattern != "*":
        raise ValueError(f"pattern: expected a folder to search for {pattern!r}, got {path}")
    if path is None:
        return f"Python {platform.python_version()} standard library", standard_library()
    if not Path(path).exists():
        raise FileNotFoundError(f"{_printable(path)}: no such file or folder")
    if not Path(path).is_file():
        raise ValueError(f"{_printable(path)}: expected a file or a folder, got a pipe or a device")
    return _printable(path), [Path(path)]


def _printable(path: str | Path) -> str:
    return os.fsencode(path).decode("utf-8", "replace")


def _survey(files: list[Path], unit: Unit, encoding: str | None, skip_binary: bool) -> _Survey:
    """Reads all files once: counts, sizes, content hash."""
    digest = hashlib.sha256()
    counts = np.zeros(0, np.int64)
    kept, length = [], 0
    for path in files:
        before = digest.copy()
        file_counts = np.zeros(0, np.int64)
        try:
            if unit == "bytes":
                length += sum(len(block) for block in read_bytes(path, digest))
            else:
                for text in read_text(path, encoding, digest):
                    file_counts = _add(file_counts, np.bincount(code_points(text)))
        except BinaryFileError:
            if not skip_binary:
                raise
            digest = before
            continue
        counts = _add(counts, file_counts)
        kept.append(path)
    size = sum(path.stat().st_size for path in kept)
    return _Survey(kept, counts, len(files) - len(kept), size, length + int(counts.sum()), digest.hexdigest())


def _add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sum of two count arrays of any lengths; one of them is overwritten."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    longer[: len(shorter)] += shorter
    return longer


def _token_blocks(survey: _Survey, alphabet: Alphabet, encoding: str | None) -> Iterator[np.ndarray]:
    """Reads the surveyed files again, as tokens.  Raises ValueError where their content has changed meanwhile."""
    digest = hashlib.sha256()
    changed = ValueError("the text changed while it was read: train on a copy that nobody writes to")
    for path in survey.files:
        if alphabet.unit == "bytes":
            yield from (np.frombuffer(block, np.uint8) for block in read_bytes(path, digest))
            continue
        for text in read_text(path, encoding, digest):
            try:
                yield alphabet.encode(text)
            except ValueError as error:
                raise changed from error
    if digest.hexdigest() != survey.sha256:
        raise changed


def _tokens(survey: _Survey, alphabet: Alphabet, encoding: str | None, cache_dir: str | Path | None) -> np.ndarray:
    """The token stream, read-only: the file itself, an array in memory, or a mapped token file."""
    dtype = alphabet.dtype.newbyteorder("<")
    blocks = _token_blocks(survey, alphabet, encoding)
    if survey.length * dtype.itemsize < IN_MEMORY:
        tokens = np.concatenate(list(blocks))
        tokens.flags.writeable = False
        return tokens
    if alphabet.unit == "bytes" and len(survey.files) == 1:
        return np.memmap(survey.files[0], np.uint8, "r", shape=(survey.length,))
    folder = _cache_folder() if cache_dir is None else Path(cache_dir)
    if folder is None:
        # Without a name it is gone with the process, however that ends.
        with named(tempfile.gettempdir()), tempfile.TemporaryFile() as file:
            _write(file, blocks)
            return np.memmap(file, dtype, "r", shape=(survey.length,))
    key = repr(("gpurnn tokens 1", survey.sha256, survey.length, encoding, alphabet.to_json()))
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.tokens"
    if not _is_valid(path, survey.length, alphabet):
        _write_safely(path, blocks)
    return np.memmap(path, dtype, "r", shape=(survey.length,))


def _cache_folder() -> Path | None:
    """None where there is none that can be written."""
    place = files.cache_folder()
    return None if place is None or files.make(place) else place


def _write(file: BinaryIO, blocks: Iterator[np.ndarray]) -> None:
    """Plain writes, not a mapping: a full disk is then an OSError instead of a killed process."""
    for block in blocks:
        file.write(block.astype(block.dtype.newbyteorder("<"), copy=False).data)
    file.flush()
    os.fsync(file.fileno())


def _write_safely(path: Path, blocks: Iterator[np.ndarray]) -> None:
    """Writes a token file that is either whole or absent, however many processes write it and whenever they die."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.clean(path.parent, older_than=_ABANDONED)
    with files.replacing(path) as file:
        _write(file, blocks)


def _is_valid(path: Path, length: int, alphabet: Alphabet) -> bool:
    """Whether `path` is a token file of the expected size that holds tokens of the alphabet only."""
    dtype = alphabet.dtype.newbyteorder("<")
    if not path.is_file() or path.stat().st_size != length * dtype.itemsize:
        return False
    return int(np.memmap(path, dtype, "r").max()) < len(alphabet)


def _describe(name: str, survey: _Survey, alphabet: Alphabet) -> str:
    parts = [f"{len(survey.files):,} files" if len(survey.files) > 1 else "1 file", f"{survey.size:,} bytes"]
    if alphabet.unit == "chars":
        rare = survey.counts.copy()
        rare[[ord(symbol) for symbol in alphabet.symbols if ord(symbol) < len(rare)]] = 0
        parts.append(f"{survey.length:,} characters, alphabet of {len(alphabet)}")
        if rare.any():
            parts.append(f"{np.count_nonzero(rare):,} rare characters ({rare.sum():,} tokens) as U+FFFD")
    if survey.skipped:
        parts.append(f"{survey.skipped:,} binary files skipped")
    return f"{name}: {', '.join(parts)}"
