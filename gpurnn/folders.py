"""Where gpurnn keeps what it can make again: compiled code, the tokens of large texts."""

import os
import sys
from pathlib import Path

from gpurnn.kernels.entries import is_ours, tell


def code_folder() -> Path | None:
    """Of compiled code: GPURNN_CACHE_DIR, or `user_folder`.  None, and one warning, where it cannot be used.

    What is in it will be run.  So it belongs to this user or to root, nobody else can write to it, and it is made for
    this user alone.
    """
    given = os.environ.get("GPURNN_CACHE_DIR")
    place = Path(given) if given else user_folder()
    if place is None:
        tell("a folder of the user's", "there is no home folder")
        return None
    reason = _objection(place)
    if reason:
        tell(place, reason)
    return None if reason else place


def user_folder() -> Path | None:
    """`gpurnn` in the user's cache folder; None where this user has no home.  It need not exist."""
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
