"""Files that are whole or not there, whatever happens while they are written; and where what can be made again is kept.

Compiled code and the tokens of large texts can be made again.
"""

import errno
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from gpurnn.kernels.entries import is_ours, tell

TEMPORARY = ".tmp-gpurnn-"  # clean() removes whatever starts with it, so it must be nobody else's

StrPath = str | os.PathLike[str]


def write_atomically(path: StrPath, data: bytes) -> None:
    """Writes `data` to `path`; see `replacing`."""
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: StrPath) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path` at the end: a reader, or the next boot, finds the old file or the new one.

    Where anything fails, the temporary file goes, the old file stands, and the error is passed on.
    """
    path = Path(path)
    temporary = path.parent / temporary_name()
    try:
        with named(path), open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # before the rename: else the new name may outlive a power loss, and its data not
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


@contextmanager
def named(path: StrPath) -> Iterator[None]:
    """Within it an OSError that names no file, as a full disk's, names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


def clean(folder: StrPath, older_than: float = 0.0) -> None:
    """Removes the temporary files and folders that killed processes left in `folder`.

    older_than: seconds; younger ones stay.  Leave it at 0 only where no other process is writing.
    """
    for leftover in Path(folder).glob(TEMPORARY + "*"):
        with suppress(OSError):  # its owner was faster after all, or it is another user's
            if time.time() - leftover.stat().st_mtime < older_than:
                continue
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def temporary_name() -> str:
    return TEMPORARY + secrets.token_hex(8)


def make_folders(folder: Path) -> None:
    """Makes `folder` and its parents, and forces them to the disk."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    for parent in reversed(missing):
        parent.mkdir(exist_ok=True)
        sync_folder(parent.parent)


def sync_folder(folder: Path) -> None:
    """Forces a folder's entries to the disk, where the platform can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def parse_json(text: str | bytes) -> dict[str, Any]:
    """A JSON object without duplicate names, or ValueError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(names := {name for name, _ in pairs}) < len(pairs):
            raise ValueError(f"duplicate names among {sorted(names)}")
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("too deeply nested") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def code_folder() -> Path | None:
    """`cache_folder` for compiled code.  None, and one warning, where it cannot be used.

    What is in it will be run.  So it belongs to this user or to root, nobody else can write to it, and it is made for
    this user alone.
    """
    place = cache_folder()
    if place is None:
        tell("a folder of the user's", "there is no home folder")
        return None
    reason = _objection(place)
    if reason:
        tell(place, reason)
    return None if reason else place


def cache_folder() -> Path | None:
    """Of what can be made again: GPURNN_CACHE_DIR, or `gpurnn` in the user's cache folder; None where this user has no home.

    It need not exist.
    """
    given = os.environ.get("GPURNN_CACHE_DIR")
    if given:
        return Path(given)
    try:
        if sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except (RuntimeError, KeyError):
        return None
    return base / "gpurnn" if base.is_absolute() else None


def make(place: Path) -> str | None:
    """Makes the folder, for this user alone, where it is missing.  Returns why it cannot be written, or None."""
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror or str(error)
    return None if os.access(place, os.W_OK | os.X_OK) else "it cannot be written"


def _objection(place: Path) -> str | None:
    """Why code is not read from there, or None."""
    reason = make(place)
    if reason:
        return reason
    status = place.stat()  # of what a link leads to
    if is_ours(status):
        return None
    if status.st_uid not in (0, os.geteuid()):
        return f"it belongs to user {status.st_uid}, and this is user {os.geteuid()}"
    return f"others can write to it (mode {status.st_mode & 0o7777:04o}); chmod go-w makes it yours alone"
