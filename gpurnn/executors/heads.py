"""A layer's units in heads: weight_hh as the blocks of a block-diagonal matrix, a unit's weights being those from its own head.

With K heads weight_hh is (G*H, H/K).  Its row g*H + u is unit u's of gate g, as without heads; head k has the units
k*H/K and on, and a row's columns are the units of the row's own head.  So weight_hh alone says how many heads there are.
Beck et al., "xLSTM: extended long short-term memory", NeurIPS 2024; Poeppel et al., "FlashRNN", 2024.
"""

from typing import Any

from gpurnn.arguments import whole
from gpurnn.cells import Cell
from gpurnn.types import Array


def checked_heads(given: Any, H: int, cell: Cell) -> int:
    """K for a layer of H units; ValueError unless it divides them, and is 1 for a cell without a recurrent matrix."""
    heads = whole("heads", given)
    if H % heads:
        raise ValueError(f"heads: expected a divisor of hidden_size = {H}, got {heads}")
    if heads > 1 and not cell.recurrent:
        raise ValueError(f"heads: expected 1 for {cell.name}, whose units meet no others, got {heads}")
    return heads


def heads_of(weight_hh: Array | None, H: int) -> int:
    """K, of a layer of H units; 1 where it has no weight_hh."""
    return 1 if weight_hh is None else H // weight_hh.shape[1]


def product(h: Array, weight_hh: Array) -> Array:
    """h (m, H) -> r (m, G*H): each head's units times its own weights."""
    (m, H), width = h.shape, weight_hh.shape[1]
    if width == H:
        return h @ weight_hh.T
    K, wide = H // width, len(weight_hh)
    apart = h.reshape(m, K, width).swapaxes(0, 1) @ _by_heads(weight_hh, H).swapaxes(1, 2)  # (K, m, G*H/K)
    return apart.reshape(K, m, wide // H, width).transpose(1, 2, 0, 3).reshape(m, wide)


def product_back(dr: Array, weight_hh: Array, H: int) -> Array:
    """dr (..., m, G*H) -> dh (..., m, H): what the gates' gradients mean for the units that they were products of."""
    shape, width = (*dr.shape[:-1], H), weight_hh.shape[1]
    if width == H:
        return (dr.reshape(-1, len(weight_hh)) @ weight_hh).reshape(shape)
    return (_apart(dr.reshape(-1, len(weight_hh)), H, width) @ _by_heads(weight_hh, H)).swapaxes(0, 1).reshape(shape)


def gradient(dr: Array, h: Array, width: int) -> Array:
    """dr (..., m, G*H), h (m, H) -> dW_hh (..., G*H, H/K), for units in heads of `width`."""
    H, rows = h.shape[-1], dr.swapaxes(-1, -2)
    if width == H:
        return rows @ h
    K, (*outer, wide, m) = H // width, rows.shape
    per_head = rows.reshape(*outer, wide // H, K, width, m)
    return (per_head @ h.reshape(m, K, width).swapaxes(0, 1)).reshape(*outer, wide, width)


def _by_heads(weight_hh: Array, H: int) -> Array:
    """(K, G*H/K, H/K): each head's rows, gate after gate."""
    width = weight_hh.shape[1]
    apart = weight_hh.reshape(-1, H // width, width, width)
    return apart.swapaxes(0, 1).reshape(H // width, -1, width)


def _apart(dr: Array, H: int, width: int) -> Array:
    """(m, G*H) -> (K, m, G*H/K)"""
    (m, wide), K = dr.shape, H // width
    return dr.reshape(m, wide // H, K, width).transpose(2, 0, 1, 3).reshape(K, m, wide // K)
