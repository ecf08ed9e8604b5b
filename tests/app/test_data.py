"""Text to tokens to windows: `gpurnn.app.text` and `gpurnn.app.data`."""

import codecs
import hashlib
import itertools
import json
import os
import sysconfig
import tempfile
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpurnn import files
from gpurnn.app import data, text
from gpurnn.app.data import Alphabet, Windows, load_corpus, split, standard_library

MIXED = "naïve café €5 → 日本 😀\r\n" * 3 + "end\n"


@pytest.fixture(params=["memory", "token file", "no cache folder"])
def storage(request, monkeypatch, tmp_path_factory):
    """Each place that tokens may live in."""
    if request.param != "memory":
        monkeypatch.setattr(data, "IN_MEMORY", 0)
    home = tmp_path_factory.mktemp("cache")
    if request.param == "no cache folder":
        home = home / "file"
        home.write_text("in the way of a folder")
    monkeypatch.setenv("GPURNN_CACHE_DIR", str(home))
    return request.param


# Block sizes that cut multi-byte characters, and their byte order marks, at every place.
@pytest.mark.parametrize("block", [1, 2, 3, 5, 1 << 20])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be", "gb18030"])
def test_decodes_across_block_edges(tmp_path, monkeypatch, block, encoding):
    monkeypatch.setattr(text, "BLOCK", block)
    path = tmp_path / "notes.txt"
    raw = MIXED.encode(encoding)
    path.write_bytes(raw)
    detected = encoding not in ("utf-16-be", "gb18030")
    corpus = load_corpus(path, encoding=None if detected else encoding)
    assert corpus.alphabet.decode(corpus.tokens) == MIXED
    assert corpus.alphabet.symbols == "".join(sorted(set(MIXED)))
    assert corpus.sha256 == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize("mark, codec", [(codecs.BOM_UTF16_BE, "utf-16-be"), (codecs.BOM_UTF32_BE, "utf-32-be")])
def test_big_endian_marks(tmp_path, mark, codec):
    (tmp_path / "a.txt").write_bytes(mark + MIXED.encode(codec))
    corpus = load_corpus(tmp_path / "a.txt")
    assert corpus.alphabet.decode(corpus.tokens) == MIXED


def test_python_source_is_decoded_by_its_coding_line(tmp_path):
    source = "# -*- coding: latin-1 -*-\n# François\n"
    (tmp_path / "a.py").write_bytes(source.encode("latin-1"))
    corpus = load_corpus(tmp_path / "a.py")
    assert corpus.alphabet.decode(corpus.tokens) == source


@pytest.mark.parametrize("count, dtype", [(256, "u1"), (257, "u2"), (70_000, "u4")])
def test_token_type_and_storage(tmp_path, storage, count, dtype):
    symbols = [chr(code) for code in range(1, count + 2050) if code not in text.SURROGATES][:count]
    content = "".join(reversed(symbols)) + "a"
    (tmp_path / "a.txt").write_text(content, encoding="utf-8", newline="")
    corpus = load_corpus(tmp_path / "a.txt", max_alphabet=count)
    assert corpus.tokens.dtype == dtype and not corpus.tokens.flags.writeable
    assert isinstance(corpus.tokens, np.memmap) == (storage != "memory")
    assert corpus.alphabet.decode(corpus.tokens) == content


def test_folder_is_joined_in_order_of_relative_paths(tmp_path, storage):
    for name, content in {"b.txt": "B", "a/z.txt": "Z", "a.txt": "A", "a/empty.txt": "", "c.md": "C"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.txt").write_text("hidden")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "a" / "sound.txt").write_bytes(b"RIFF\0\0")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.txt")
    corpus = load_corpus(str(tmp_path), pattern="*.txt")
    assert corpus.alphabet.decode(corpus.tokens) == "AZB"
    assert corpus.sha256 == hashlib.sha256(b"AZB").hexdigest()
    assert "1 binary files skipped" in corpus.description and "4 files, 3 bytes" in corpus.description
    assert load_corpus(tmp_path, pattern="a/*").alphabet.symbols == "Z"
    assert bytes(load_corpus(tmp_path, unit="bytes", pattern="*.txt").tokens) == b"ARIFF\0\0ZB"


def test_binary_content_far_into_a_file_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 1 << 15)
    (tmp_path / "a.txt").write_bytes(b"x" * 100_000 + b"\0")
    (tmp_path / "b.txt").write_bytes(b"text")
    corpus = load_corpus(tmp_path)
    assert corpus.alphabet.symbols == "etx" and len(corpus.tokens) == 4
    assert corpus.sha256 == hashlib.sha256(b"text").hexdigest()
    with pytest.raises(ValueError, match=r"a\.txt: looks binary"):
        load_corpus(tmp_path / "a.txt")


def test_bytes_of_a_large_file_are_mapped_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "IN_MEMORY", 100)
    raw = bytes(range(256)) * 3
    (tmp_path / "a.bin").write_bytes(raw)
    corpus = load_corpus(tmp_path / "a.bin", unit="bytes")
    assert isinstance(corpus.tokens, np.memmap) and os.path.samefile(corpus.tokens.filename, tmp_path / "a.bin")
    assert corpus.tokens.tobytes() == raw and len(corpus.alphabet) == 256
    assert corpus.sha256 == hashlib.sha256(raw).hexdigest()


def test_rare_characters_become_the_replacement(tmp_path):
    (tmp_path / "a.txt").write_text("aaabbbccdé", encoding="utf-8")
    corpus = load_corpus(tmp_path / "a.txt", max_alphabet=3)
    assert corpus.alphabet.symbols == "ab\ufffd"
    assert corpus.alphabet.decode(corpus.tokens) == "aaabbb\ufffd\ufffd\ufffd\ufffd"
    assert "3 rare characters (4 tokens) as U+FFFD" in corpus.description
    assert corpus.alphabet.decode(corpus.alphabet.encode("b😀")) == "b\ufffd"


def test_lone_surrogates_of_a_codec_become_the_replacement(tmp_path):
    (tmp_path / "a.txt").write_bytes(rb"a\ud800b")
    corpus = load_corpus(tmp_path / "a.txt", encoding="unicode_escape")
    assert corpus.alphabet.decode(corpus.tokens) == "a\ufffdb"


def test_token_file_is_reused_and_a_damaged_one_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    (tmp_path / "a.txt").write_text("some text")
    cache = tmp_path / "deep" / "cache"
    load_corpus(tmp_path / "a.txt", cache_dir=cache)
    (token_file,) = cache.iterdir()
    good, written = token_file.read_bytes(), token_file.stat().st_mtime_ns
    load_corpus(tmp_path / "a.txt", cache_dir=cache)
    assert token_file.stat().st_mtime_ns == written
    for damaged in (good[:-1], good + b"\0", b"\xff" * len(good)):  # too short, too long, tokens out of range
        token_file.unlink()  # a new file: the old one is still mapped
        token_file.write_bytes(damaged)
        assert load_corpus(tmp_path / "a.txt", cache_dir=cache).tokens.tobytes() == good
    load_corpus(tmp_path / "a.txt", cache_dir=cache, max_alphabet=3)
    assert len(list(cache.iterdir())) == 2


def test_unfinished_token_files_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    cache = tmp_path / "cache"
    cache.mkdir()
    (tmp_path / "a.txt").write_text("some text")
    for name, age in (("killed", 2 * 24 * 3600), ("running", 60)):
        (cache / f"{files.TEMPORARY}{name}").write_bytes(b"x")
        os.utime(cache / f"{files.TEMPORARY}{name}", (time.time() - age,) * 2)
    monkeypatch.setattr(os, "fsync", lambda handle: 1 / 0)  # the disk fails
    with pytest.raises(ZeroDivisionError):
        load_corpus(tmp_path / "a.txt", cache_dir=cache)
    assert [path.name for path in cache.iterdir()] == [f"{files.TEMPORARY}running"]


def test_a_text_that_changes_while_it_is_read_is_refused(tmp_path, storage, monkeypatch):
    path = tmp_path / "a.txt"
    choose = data.choose_alphabet
    for later in ("abd", "aab", "abcabc"):  # another character, another order, a longer text
        path.write_text("abc")

        def change(*args, later=later):
            path.write_text(later)
            return choose(*args)

        monkeypatch.setattr(data, "choose_alphabet", change)
        with pytest.raises(ValueError, match="changed while it was read"):
            load_corpus(path)


@pytest.mark.parametrize(
    "content, options, message",
    [
        (b"", {}, "empty"),
        (b"", {"unit": "bytes"}, "empty"),
        (codecs.BOM_UTF8, {}, "empty"),
        (b"x" * 1234 + b"\xe9t\xe9", {}, r"a\.txt: byte 0xE9 at offset 1234 is not valid utf-8: give its encoding"),
        (codecs.BOM_UTF8 + b"abc\xff", {}, "byte 0xFF at offset 6 is not valid utf-8"),
        (codecs.BOM_UTF8 + b"abc\xff", {"encoding": "utf-8-sig"}, "byte 0xFF at offset 6 is not valid utf-8-sig"),
        (b"abc\xe2\x82", {}, "byte 0xE2 at offset 3 is not valid utf-8"),  # cut off at the end
        (b"abc\xe9", {"encoding": "ascii"}, "byte 0xE9 at offset 3 is not valid ascii"),
        (b"abcd", {"encoding": "utf-16"}, r"a\.txt: .*not valid utf-16"),  # no byte order mark
        ("abc".encode("utf-16-le"), {}, "looks binary .NUL byte at offset 1.: if it is UTF-16"),
        (b"abc\0", {"encoding": "latin-1"}, "looks binary .a NUL character in latin-1"),
        (b"abc", {"encoding": "klingon"}, "unknown text encoding 'klingon'"),
        (b"abc", {"encoding": "hex"}, "unknown text encoding 'hex'"),
        (b"abc", {"encoding": "utf-8", "unit": "bytes"}, "encoding: bytes are not decoded"),
        (b"abc", {"unit": "words"}, "unit: expected"),
        (b"abc", {"max_alphabet": 1}, "max_alphabet: expected 2"),
        (b"abc", {"pattern": "*.txt"}, "pattern: expected a folder"),
    ],
)
@pytest.mark.parametrize("block", [3, 1 << 20])
def test_bad_text_is_refused(tmp_path, monkeypatch, content, options, message, block):
    monkeypatch.setattr(text, "BLOCK", block)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_corpus(tmp_path / "a.txt", **options)


def test_bad_paths_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        load_corpus(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no file matches '\*\.txt'"):
        load_corpus(tmp_path, pattern="*.txt")
    (tmp_path / "a").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"expected text, got 1 file\(s\), 1 binary"):
        load_corpus(tmp_path)
    if os.path.exists("/dev/null"):
        with pytest.raises(ValueError, match="a pipe or a device"):
            load_corpus("/dev/null")


def test_permission_errors_keep_their_path(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("x")
    (tmp_path / "a").chmod(0)
    if os.access(tmp_path / "a", os.R_OK):
        pytest.skip("this user may read every file (root)")
    with pytest.raises(PermissionError) as caught:
        load_corpus(tmp_path / "a")
    assert caught.value.filename == tmp_path / "a"


def test_standard_library():
    files = standard_library()
    root = sysconfig.get_paths()["stdlib"]
    relative = [path.relative_to(root) for path in files]
    assert [path.as_posix() for path in relative] == sorted(path.as_posix() for path in relative)
    assert {"argparse.py", "json/decoder.py"} <= {path.as_posix() for path in relative}
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}
    assert not left_out & set(itertools.chain(*(path.parent.parts for path in relative)))


def test_standard_library_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match="no standard-library sources"):
        load_corpus(None)


@given(st.text(), st.sampled_from(["chars", "bytes"]))
def test_alphabet_encodes_and_decodes(content, unit):
    alphabet = Alphabet("bytes") if unit == "bytes" else Alphabet("chars", "".join(sorted({*content, "a"})))
    assert alphabet.decode(alphabet.encode(content)) == content
    assert Alphabet.from_json(alphabet.to_json()) == alphabet


def test_alphabet_meets_the_unknown():
    alphabet = Alphabet("chars", "abc")
    with pytest.raises(ValueError, match="not in the alphabet of 3 characters: 'é日'"):
        alphabet.encode("a日bé日")
    for tokens in ([3], [-1], [0.0]):
        with pytest.raises(ValueError, match=r"integers in \[0, 3\)"):
            alphabet.decode(tokens)
    assert alphabet.decode([]) == ""
    assert Alphabet("bytes").decode([0x61, 0xFF, 0xE2, 0x82]) == "a\ufffd\ufffd"
    assert Alphabet("bytes").encode("\udcff").tolist() == [0xFF]  # a byte of the command line that is no UTF-8


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "[" * 100_000,
        "[]",
        "{}",
        json.dumps({"unit": "chars"}),
        json.dumps({"unit": "chars", "symbols": ""}),
        json.dumps({"unit": "chars", "symbols": "ba"}),
        json.dumps({"unit": "chars", "symbols": "aa"}),
        json.dumps({"unit": "chars", "symbols": ["a", "b"]}),
        json.dumps({"unit": "chars", "symbols": "a\ud800"}),
        json.dumps({"unit": "bytes", "symbols": "a"}),
        json.dumps({"unit": ["chars"], "symbols": "a"}),
        json.dumps({"unit": "chars", "symbols": "a", "more": 1}),
    ],
)
def test_alphabet_from_outside_is_checked(bad):
    with pytest.raises(ValueError, match=r"expected|not valid"):
        Alphabet.from_json(bad)


def test_split():
    tokens = np.arange(101)
    train, validation = split(tokens, 0.05)
    assert np.array_equal(np.concatenate((train, validation)), tokens) and len(validation) == 5
    assert np.shares_memory(train, tokens) and np.shares_memory(validation, tokens)
    assert len(split(tokens, 0)[1]) == 0
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="validation_fraction"):
            split(tokens, fraction)


@pytest.mark.parametrize("length, batch, steps", [(103, 3, 7), (13, 3, 4), (2, 1, 1), (50, 1, 7), (41, 5, 1)])
def test_windows(length, batch, steps):
    windows = Windows(np.arange(length, dtype=np.uint8), batch, steps)
    substream = (length - 1) // batch
    assert len(windows) == substream // steps
    seen = set()
    for epoch in range(5):
        indices = range(epoch * len(windows), (epoch + 1) * len(windows))
        inputs, targets, first = zip(*map(windows.at, indices), strict=True)
        assert all(x.shape == (steps, batch) and x.dtype == np.int32 for x in inputs + targets)
        assert first == (True, *[False] * (len(windows) - 1))
        stream = np.concatenate(inputs)  # the state is carried: each column goes on where it ended
        assert np.array_equal(stream, (stream[0] + np.arange(len(stream))[:, None]) % (length - 1))
        assert len(np.unique(stream)) == stream.size  # nothing twice in an epoch
        assert np.array_equal(np.concatenate(targets), stream + 1)  # true followers, also where the ring closes
        if epoch == 0:
            assert np.array_equal(stream[0], np.arange(batch) * substream)
        seen |= set(stream.ravel().tolist())
    assert seen == set(range(length - 1))


def test_windows_are_a_function_of_the_index():
    tokens = np.random.default_rng(0).integers(0, 200, 1000).astype(np.uint8)
    again = Windows(tokens, 4, 9)
    for index in (0, 5, 1234, 77, 10**15):
        expected = Windows(tokens, 4, 9).at(index)
        assert all(np.array_equal(a, b) for a, b in zip(again.at(index), expected, strict=True))
    assert not np.array_equal(again.at(0)[0], again.at(len(again))[0])  # the next epoch cuts elsewhere


def test_windows_refuse_what_does_not_fill_one():
    assert len(Windows(np.zeros(65, np.uint8), 4, 16)) == 1
    with pytest.raises(ValueError, match=r"64 tokens, but batch 4 and steps 16 need 65 .*lower batch or steps"):
        Windows(np.zeros(64, np.uint8), 4, 16)
    with pytest.raises(ValueError, match="at least 1"):
        Windows(np.zeros(64, np.uint8), 0, 16)
    with pytest.raises(ValueError, match="index"):
        Windows(np.zeros(65, np.uint8), 4, 16).at(-1)


def test_anonymous_token_file_does_not_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    monkeypatch.setattr(data, "_cache_folder", lambda: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "a.txt").write_text("abc")
    assert load_corpus(tmp_path / "a.txt").tokens.tolist() == [0, 1, 2]
    assert list((tmp_path / "tmp").iterdir()) == []
