"""The recurrent matrix by itself: eigenvalues, spectral radius, largest singular value, and the bound they give."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.cells import RNN_CELLS
from gpurnn.cpu.threads import one_blas_thread
from gpurnn.diagnose.subject import layer_index, recurrent_part

STEEPEST = {"tanh": 1.0, "relu": 1.0, "sigmoid": 0.25, "identity": 1.0}  # max |f'|


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Of weight_hh, gate by gate, in the order of the cell; of heads, of the block-diagonal matrix that it stands for.

    eigenvalues (G, H) complex; radius (G,) the largest of their magnitudes; sigma_max (G,) the largest singular value.
    bound: max|f'| * sigma_max, which no step of a vanilla RNN can exceed: below 1 every gradient vanishes, above 1 it
    may explode (Pascanu, Mikolov and Bengio 2013).  None for other cells.
    """

    eigenvalues: np.ndarray
    radius: np.ndarray
    sigma_max: np.ndarray
    bound: float | None


def recurrent_spectrum(model: Any, layer: str = "l0") -> Spectrum:
    """The spectrum of one layer's weight_hh.

    Raises ValueError where the cell has none.  Costs G eigenvalue and singular value decompositions (H, H) on the host, or of K heads that many of (H/K, H/K): seconds each where H is 1024.
    """
    part = recurrent_part(model)
    level, direction = divmod(layer_index(part, layer), part.directions)
    weight_hh = part.weights(part.params, level, direction).weight_hh
    if weight_hh is None:
        raise ValueError(f"model: expected a cell with a recurrent matrix, got {part.cell.name}, which has none")
    weight = backend.to_numpy(weight_hh).astype(np.float64)
    if not np.isfinite(weight).all():
        raise FloatingPointError(f"weight_hh of {layer}: expected finite values, got some that are not")
    blocks = weight.reshape(part.cell.gates, part.heads, *(part.hidden_size // part.heads,) * 2)
    with one_blas_thread:
        eigenvalues = np.linalg.eigvals(blocks).reshape(part.cell.gates, -1).astype(np.complex128)
        sigma_max = np.linalg.svd(blocks, compute_uv=False)[..., 0].max(1)
    steepest = steepest_slope(part.cell)
    bound = None if steepest is None else steepest * float(sigma_max[0])
    return Spectrum(eigenvalues, abs(eigenvalues).max(axis=1), sigma_max, bound)


def steepest_slope(cell: Any) -> float | None:
    """max |f'| of a vanilla RNN's cell; None for other cells."""
    return next((STEEPEST[name] for name, shipped in RNN_CELLS.items() if shipped == cell), None)
