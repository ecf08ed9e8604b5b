"""Files of a cache of code, which is run when it is read: each whole or absent, under its own name, written by ourselves.

An entry is a digest of its name and of what follows.  One that is damaged, renamed, a link, another user's or open to
writers other than its owner is none.
"""

import contextlib
import hashlib
import importlib.util
import os
import pkgutil
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Collection
from pathlib import Path

DIGEST = 32  # bytes
ABANDONED = 3600.0  # s, after which a temporary file is removed though a process of its number is running

_told: set[str] = set()


def is_ours(status: os.stat_result) -> bool:
    """Whether nobody but this user, or root, can have written it.  Windows keeps users' folders apart by itself."""
    if not hasattr(os, "geteuid"):
        return True
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def tell(place: Path | str, reason: str) -> None:
    """Warns that a folder is not used, once in a process for each folder."""
    if str(place) not in _told:
        _told.add(str(place))
        warnings.warn(
            f"compiled code is not kept in {place}: {reason}; each process compiles anew. "
            "GPURNN_CACHE_DIR names another folder",
            RuntimeWarning,
            stacklevel=2,
        )


def key(text: str) -> str:
    """What an entry is called after: a digest of all that decides what is in it."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read(path: Path) -> bytes | None:
    """What was written there, or None."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            entry = file.read() if stat.S_ISREG(status.st_mode) and is_ours(status) else b""
    except OSError:
        return None
    payload = entry[DIGEST:]
    return payload if entry[:DIGEST] == _digest(path, payload) else None


def write(path: Path, payload: bytes) -> None:
    """A full or read-only disk costs the next process a compilation, and is told."""
    try:
        replace(path, _digest(path, payload) + payload)
    except OSError as error:
        tell(path.parent, error.strerror or str(error))


def replace(path: Path, content: bytes) -> None:
    """`content` under a name that nobody can foresee, then renamed.  Raises OSError, and leaves nothing behind."""
    _sweep(path.parent)
    descriptor, temporary = tempfile.mkstemp(prefix=f".tmp-{os.getpid()}-", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _digest(path: Path, payload: bytes) -> bytes:
    return hashlib.sha256(hashlib.sha256(path.name.encode()).digest() + payload).digest()


def _sweep(folder: Path) -> None:
    """Removes what processes left there that were killed while they wrote."""
    for path in folder.glob(".tmp-*"):
        with contextlib.suppress(OSError):  # another process may have removed it first
            number = path.name.split("-")[1]
            left = number.isdigit() and not _runs(int(number))
            if left or time.time() - path.lstat().st_mtime > ABANDONED:
                path.unlink()


def _runs(process: int) -> bool:
    if sys.platform == "win32":
        return True  # to ask by a signal would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # it is another user's, or no process's number
    return True


def sources(package: str, version: str, only: Collection[str] = ()) -> str:
    """A digest of a package's modules, or of `only` some of them, however it is installed: as files, in a zip, compiled.

    version: what stands for a module whose loader gives none of its bytes.
    """
    found = importlib.util.find_spec(package)
    places = found.submodule_search_locations if found else None
    names = sorted(only or (module.name for module in pkgutil.iter_modules(places)))
    text = hashlib.sha256(version.encode())
    for name in names:
        module = importlib.util.find_spec(f"{package}.{name}")
        with contextlib.suppress(OSError, AttributeError, TypeError):
            text.update(name.encode() + module.loader.get_data(module.origin))  # type: ignore[union-attr]
    return text.hexdigest()
