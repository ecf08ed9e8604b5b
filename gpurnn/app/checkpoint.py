"""Run folders, and the files in them: a process killed at any moment, saving included, leaves a run that resumes.

`runs/<name>/` holds `config.toml`, written once, `model.safetensors`, `best.safetensors`, `metrics.jsonl` and figures.
Whatever a training has to know to go on is in `model.safetensors`, so that one rename commits all of it or none: the model's tensors under
their own names, the optimiser's under `optimizer/`, carried states under `state/`, and step, count of dropout's masks
and the like
as JSON in the file's metadata.  Nothing read here is ever unpickled or executed.  safetensors is imported where tensors
are read or written: who keeps none does without.
"""

import json
import os
import re
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpurnn.files import StrPath, clean, make_folders, sync_folder, temporary_name, write_atomically
from gpurnn.saving.tensors import CHECKPOINT, FORMAT, Tensors, read_tensors, tensor_bytes

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONFIG, MODEL, METRICS = "config.toml", "model.safetensors", "metrics.jsonl"
BEST = "best.safetensors"  # the checkpoint whose validation was best so far

OPTIMIZER, STATE = "optimizer/", "state/"


class Checkpoint(NamedTuple):
    """All of a training's state.  `meta` is JSON: step, dropout's calls, data position, environment; tuples become lists."""

    tensors: Tensors
    optimizer: Tensors
    state: Tensors
    meta: dict[str, Any]


def save(path: StrPath, checkpoint: Checkpoint) -> None:
    """Writes `checkpoint` atomically: until the very end, the file that was there stands.

    Raises ValueError for names and dtypes that the file cannot hold, TypeError for a `meta` that is not JSON.
    """
    write_atomically(path, _checkpoint_bytes(checkpoint))


def load(path: StrPath) -> Checkpoint:
    """Reads what `save` wrote, bit for bit.  ValueError says what is wrong with a broken, foreign or newer file."""
    tensors, kind, meta = read_tensors(path)
    if kind != CHECKPOINT:
        came = "a model: gpurnn.load reads it" if kind else "a safetensors file without 'gpurnn' metadata"
        raise ValueError(f"{path}: expected a gpurnn checkpoint, got {came}")
    return Checkpoint(_model_part(tensors), _under(OPTIMIZER, tensors), _under(STATE, tensors), meta)


def save_weights(path: StrPath, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a model's tensors alone, atomically, as a plain safetensors file."""
    write_atomically(path, tensor_bytes(tensors))


def load_weights(path: StrPath) -> Tensors:
    """Reads a model's tensors from any safetensors file, PyTorch's and our checkpoints included.

    bfloat16, which NumPy lacks, becomes float32 without loss.  Raises ValueError as `load` does.
    """
    tensors, kind, _ = read_tensors(path)
    return _model_part(tensors) if kind == CHECKPOINT else tensors


def create_run(folder: StrPath, config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Makes a run folder that holds `config` and `checkpoint` from the moment it appears.

    Raises FileExistsError where it exists; of two processes that make the same run, one gets this error.
    """
    folder = Path(folder)
    check_free(folder)
    files = {CONFIG: config_bytes(config), MODEL: _checkpoint_bytes(checkpoint)}
    make_folders(folder.parent)
    clean(folder.parent, older_than=3600.0)  # seconds; a younger one may be another process's run in the making
    temporary = folder.parent / temporary_name()
    try:
        temporary.mkdir()
        for name, data in files.items():
            write_atomically(temporary / name, data)
        try:
            temporary.rename(folder)
        except OSError:  # its number differs between platforms
            check_free(folder)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def check_free(folder: StrPath) -> None:
    """Raises FileExistsError where there is something called `folder`."""
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists already: resume that run with --resume, or choose another name")


@contextmanager
def locked(folder: StrPath) -> Iterator[None]:
    """Within the block, no other process gets past its own `locked(folder)`: it raises BlockingIOError.

    The lock is on the folder itself and dies with its process, so that nothing is left behind that could block a resume.
    Platforms and network file systems without such locks go without.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{folder}: another process is training this run") from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """`config`, options by name, as lines of TOML, which has no null: options that are None are left out.

    Raises TypeError for a value that is not a text, a number, true or false.
    """
    return "".join(_toml_line(name, value) for name, value in config.items() if value is not None).encode()


def read_config(path: StrPath) -> dict[str, Any]:
    """Reads a TOML file, with a byte-order mark or without.  ValueError names the file and the line that is wrong."""
    data = Path(path).read_bytes()
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: line {line}: expected UTF-8, got byte {data[error.start]:#04x}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def entry(meta: Mapping[str, Any], name: str, kind: type) -> Any:
    """`meta[name]`; ValueError where it is missing or not of the type that JSON gives a `kind`."""
    accepted = (int, float) if kind is float else kind
    value = meta.get(name)
    if not isinstance(value, accepted) or isinstance(value, bool):
        raise ValueError(f"{name}: expected a {kind.__name__} in the checkpoint, got {value!r:.60}")
    return value


def _checkpoint_bytes(checkpoint: Checkpoint) -> bytes:
    reserved = [name for name in checkpoint.tensors if name.startswith((OPTIMIZER, STATE))]
    if reserved or "format" in checkpoint.meta:
        raise ValueError(
            f"reserved names: 'format' in meta, {OPTIMIZER!r} and {STATE!r} before a tensor; got {reserved}"
        )
    tensors = dict(checkpoint.tensors)
    for prefix, group in ((OPTIMIZER, checkpoint.optimizer), (STATE, checkpoint.state)):
        tensors |= {prefix + name: array for name, array in group.items()}
    try:
        text = json.dumps({"format": FORMAT, **checkpoint.meta})
    except TypeError as error:
        raise TypeError(f"meta: expected JSON values: {error}") from None
    return tensor_bytes(tensors, CHECKPOINT, text)


def _model_part(tensors: Tensors) -> Tensors:
    return {name: array for name, array in tensors.items() if not name.startswith((OPTIMIZER, STATE))}


def _under(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}


def _toml_line(name: str, value: Any) -> str:
    if not isinstance(value, str | bool | int | float):
        raise TypeError(f"{name}: expected a text, a number, true or false, got {value!r}")
    key = name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml_text(name)
    return f"{key} = {_toml_text(value) if isinstance(value, str) else str(value).lower()}\n"


def _toml_text(text: str) -> str:
    """As JSON writes it, but for DEL, which TOML wants escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
