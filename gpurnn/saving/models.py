"""Models in one file each: their parameters, and how to build them again.

A file is safetensors, so other programs read its tensors; the description is JSON in its metadata.  It names classes and
cells, which are looked up in tables, of this library or the caller's: nothing is imported, unpickled or executed.
"""

import hashlib
import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpurnn._version import __version__
from gpurnn.cells import CELLS, RNN_CELLS, Cell
from gpurnn.files import StrPath, write_atomically
from gpurnn.layers import Dropout, Embedding, Layer, Linear, Pool
from gpurnn.model import Model, SequenceModel
from gpurnn.recurrent import GRU, LSTM, RNN, Recurrent
from gpurnn.saving.tensors import CHECKPOINT, FORMAT, MODEL, read_tensors, tensor_bytes

CLASSES: dict[str, type[Layer]] = {
    kind.__name__: kind for kind in (Linear, Embedding, Dropout, Pool, Recurrent, RNN, LSTM, GRU, Model, SequenceModel)
}
NOT_KEPT = ("self", "cell", "init", "rng")  # what a layer was drawn from; a cell is described by itself
SEQUENCE = ("embedding", "recurrent", "head", "dropout")


def save(model: Layer, path: StrPath) -> None:
    """Writes a layer or model, with what is frozen and tied and where its dropout stands, atomically.

    A model of a class of your own is saved with the name of the class, which `load` has to be given.  Raises TypeError for
    what is no layer, OSError as files do.
    """
    if not isinstance(model, Layer):
        raise TypeError(f"model: expected a layer or a model, got {type(model).__name__}")
    params = model.params
    tied = {name: other for name in params.tied for other in params.shapes if params.owner(name) == params.owner(other)}
    meta = {"format": FORMAT, "version": __version__, "model": _described(model), "frozen": params.frozen, "tied": tied}
    write_atomically(path, tensor_bytes(model.state_dict(), MODEL, json.dumps(meta)))


def load(
    path: StrPath,
    *,
    cells: Mapping[str, Cell] | None = None,
    classes: Mapping[str, Callable[[], Any]] | None = None,
) -> Any:
    """Builds the model that `save` wrote, with the same bits.

    cells    cells of your own by name, for models that have such; a warning where its equations are not those of the time.
    classes  model classes of your own by name: each a class or function that makes one when called without arguments.
    Raises ValueError that names the file for one that is damaged, foreign or newer, or that needs a cell or class which is
    not given; OSError as files do.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path}: expected a file, got a folder; gpurnn.load_run reads a run's folder")
    tensors, kind, meta = read_tensors(path)
    if kind != MODEL:
        came = "a run's checkpoint: gpurnn.load_run reads its folder" if kind == CHECKPOINT else "other tensors"
        raise ValueError(f"{path}: expected a model that gpurnn.save wrote, got {came}")
    try:
        model = _built(meta["model"], dict(cells or {}), dict(classes or {}))
        for name, other in meta["tied"].items():
            if name not in model.params.tied:
                model.tie(name, other)
        model.load_state_dict(tensors)
        if meta["frozen"]:
            model.freeze(*meta["frozen"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        said = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise ValueError(f"{path}: {said}") from error
    return model


def _described(model: Any) -> dict[str, Any]:
    kind = type(model)
    known = CLASSES.get(kind.__name__) is kind
    found: dict[str, Any] = {"class": kind.__name__}
    if not known:
        if not isinstance(model, Layer):
            raise TypeError(f"expected a layer or a model in every place, got {kind.__name__}")
        return found
    if kind is SequenceModel:
        parts = {name: getattr(model, name) for name in SEQUENCE}
        described = {name: None if part is None else _described(part) for name, part in parts.items()}
        return found | {"parts": described, "pooling": model.pooling}
    if kind is Model:
        return found | {"parts": {name: _described(part) for name, part in model.parts.items()}}
    maker = Recurrent if isinstance(model, Recurrent) else kind
    names = [name for name in inspect.signature(maker.__init__).parameters if name not in NOT_KEPT]
    found["arguments"] = {name: _plain(getattr(model, name)) for name in names}
    if isinstance(model, Recurrent):
        found["cell"] = {"name": model.plain_cell.name, "sha256": _equations(model.plain_cell)}
    if hasattr(model, "masks"):
        found["masks"] = {"seed": model.masks.seed, "calls": model.masks.calls}
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _equations(cell: Cell) -> str:
    return hashlib.sha256(cell.trace.text.encode()).hexdigest()


def _built(described: Any, cells: dict[str, Cell], classes: dict[str, Callable[[], Any]]) -> Any:
    name = described["class"]
    if name in classes:
        return classes[name]()
    if name not in CLASSES:
        raise ValueError(f"it has a {name}, a class of somebody's own: give it, classes={{{name!r}: {name}}}")
    kind: Any = CLASSES[name]
    if kind in (Model, SequenceModel):
        parts = {name: part and _built(part, cells, classes) for name, part in described["parts"].items()}
        return SequenceModel(**parts, pooling=described.get("pooling")) if kind is SequenceModel else Model(parts)
    arguments = described["arguments"]
    if kind not in (Dropout, Pool):
        arguments = {**arguments, **_blank(kind, described, cells)}
    layer = kind(**arguments)
    if "masks" in described:
        layer.masks.seed, layer.masks.calls = (int(described["masks"][what]) for what in ("seed", "calls"))
    return layer


def _blank(kind: Any, described: Any, cells: dict[str, Cell]) -> dict[str, Any]:
    """What else a layer is made of: its cell, and parameters that cost nothing, as they are loaded next."""
    if not issubclass(kind, Recurrent):
        return {"rng": 0}
    cell = _cell(described["cell"], cells)
    blank: dict[str, Any] = {"rng": 0, "init": dict.fromkeys(("weight_ih", "weight_hh")[: 1 + cell.recurrent], "zeros")}
    if kind is RNN:
        return blank | {"nonlinearity": next(name for name, known in RNN_CELLS.items() if known is cell)}
    return blank | ({"cell": cell} if kind is Recurrent else {})


def _cell(described: Any, cells: dict[str, Cell]) -> Cell:
    name = described["name"]
    cell = cells.get(name, CELLS.get(name))
    if not isinstance(cell, Cell):
        raise ValueError(f"it has the cell {name!r}, which does not ship: give it, cells={{{name!r}: YOUR_CELL}}")
    if described["sha256"] != _equations(cell):
        warnings.warn(f"the equations of cell {name!r} are not those that the model was saved with", stacklevel=6)
    return cell
