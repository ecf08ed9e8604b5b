"""What the compiled time loops are made of: packed weights, products, the sums over time and batch, against NumPy."""

import numpy as np
import pytest

from gpurnn import backend
from gpurnn.cpu import costs, crew
from gpurnn.cpu.combine import combine
from gpurnn.cpu.dot import dot
from gpurnn.cpu.gemm import make_gemm, may_lie
from gpurnn.cpu.packing import make_pack_gates, make_pack_rows, packed_size, panel_columns
from gpurnn.cpu.reduction import few_are_summed, reduction, reduction_size
from gpurnn.cpu.simd import address, host

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="the compiled executor runs on the CPU backend only")

TOLERANCES = {"float64": 1e-12, "float32": 2e-5}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rows", [1, 3, costs.FEW_SUM_ROWS, costs.FEW_SUM_ROWS + 1, 16, 17, 40, 512, 513, 1100])
def test_weight_gradients_in_blocks_of_rows_and_columns(rows, dtype):
    """Around the edges of a vector, a block of time and batch, a block of a gate's units.

    Slots as a cell of three gates has them whose gate 2 is split: r of it, 0 and 1 joint, x of it; and one slot more.
    """
    rng = np.random.default_rng(rows)
    H, I, orders = 200, 70, np.array([[2, 0, 1], [0, 1, 2]])
    slots, h, x = (rng.standard_normal((rows, n)).astype(dtype) for n in (5 * H, H, I))
    sums, weight_hh, weight_ih = np.ones(4 * H), np.ones((3 * H, H), dtype), np.ones((3 * H, I), dtype)
    for first, last in ((0, 17), (17, 433), (433, 4 * H)):
        work = np.full(reduction_size(rows, H, H, I, np.dtype(dtype)), np.nan, dtype)
        places = map(address, (slots, orders, h, x, sums, weight_ih, weight_hh))
        by = combine(np.dtype(dtype)).address if few_are_summed(rows) else 0
        crew.run(reduction(np.dtype(dtype)), (rows, H, H, I, 5, 3, 1, by, *places), [(first, last, address(work))])
    limit = 1e-5 if dtype == "float32" else 1e-13
    wide = slots.astype("float64").reshape(rows, 5, H)
    for found, b, gates, order in ((weight_hh, h, wide[:, :3], orders[0]), (weight_ih, x, wide[:, 1:4], orders[1])):
        expected = np.empty((3, H, b.shape[1]))
        expected[order] = np.einsum("kgj,kn->gjn", gates, b)
        np.testing.assert_allclose(
            found, 1 + expected.reshape(found.shape), atol=limit * np.abs(expected).max(), rtol=0
        )
    np.testing.assert_allclose(sums, 1 + wide[:, :4].sum(0).ravel(), atol=limit * rows, rtol=0)


def panels(matrix):
    """The packed form of a matrix: wide panels, then panels of one vector, each row-major, the last filled up with zeros."""
    wide, width, parts = panel_columns(matrix.dtype), host().width(matrix.dtype), []
    while matrix.shape[1]:
        columns = wide if matrix.shape[1] >= wide else width
        panel, matrix = matrix[:, :columns], matrix[:, columns:]
        parts.append(np.pad(panel, ((0, 0), (0, columns - panel.shape[1]))).ravel())
    return np.concatenate(parts)


SHAPES_TO_PACK = [(1, 1), (3, 2), (17, 33), (64, 64), (15, 130), (130, 15), (40, 200)]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("order", [(0,), (2, 0, 1), (1, 2)])
@pytest.mark.parametrize("shape", SHAPES_TO_PACK)
@pytest.mark.parametrize("parts", [1, 3])
def test_packing_rows(dtype, shape, order, parts):
    """Some columns of a matrix, the gates of its rows in an order of one's own, or as they lie."""
    dtype = np.dtype(dtype)
    H, n = shape
    matrix = np.arange(3 * H * (n + 7), dtype=dtype).reshape(3 * H, n + 7) + 1
    first = matrix[:, 5:].ctypes.data, matrix.strides[0]
    out = np.full(packed_size(len(order) * H, n, dtype) + 5, np.nan, dtype)
    numbers = np.array(order)
    for place, gates in ((numbers.ctypes.data, order), (0, range(len(order)))):
        for part in range(parts):
            make_pack_rows(dtype).python(*first, place, len(order), H, n, part, parts, out.ctypes.data)
        rows = np.concatenate([matrix[gate * H : (gate + 1) * H, 5 : 5 + n] for gate in gates])
        np.testing.assert_array_equal(out[:-5], panels(rows))
        assert np.isnan(out[-5:]).all()
        out[:-5] = np.nan


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("order", [(0,), (2, 0, 1), (1, 2), (3, 2, 1, 0)])
@pytest.mark.parametrize("shape", SHAPES_TO_PACK)
@pytest.mark.parametrize("parts", [1, 3])
def test_packing_gates(dtype, shape, order, parts):
    """The transpose of gates of a weight matrix: all their units side by side, or some units, gate by gate."""
    dtype = np.dtype(dtype)
    k, H = shape
    weights = np.arange(4 * H * k, dtype=dtype).reshape(4, H, k) + 1
    numbers, pack = np.array(order), make_pack_gates(dtype).python
    for unit, end_unit in {(0, H), (0, (H + 1) // 2), (H // 3, H)}:
        units = weights[list(order), unit:end_unit]
        whole = end_unit - unit == H
        expected = panels(units.reshape(-1, k).T) if whole else np.concatenate([panels(gate.T) for gate in units])
        out = np.full(len(expected) + 5, np.nan, dtype)
        for part in range(parts):
            pack(
                weights.ctypes.data, k, numbers.ctypes.data, len(order), H, unit, end_unit, part, parts, out.ctypes.data
            )  # fmt: skip
        np.testing.assert_array_equal(out[:-5], expected)
        assert np.isnan(out[-5:]).all()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("n", [1, 3, 8, 15, 16, 33, 70])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13])
def test_products_with_weights_as_they_lie(dtype, m, n):
    """W by its rows (`dot`) and by its columns (`gemm`), in the middle of NaN: nothing beside them is read into a sum."""
    dtype, rng = np.dtype(dtype), np.random.default_rng(m + n)
    by_rows, by_columns = dot(dtype).python, make_gemm(dtype).python
    for k in (1, 5, 16, 40):
        for accumulate in (0, 1):
            steps = 2
            a = np.full((steps, m, k + 1), np.nan, dtype)
            a[..., :k] = rng.standard_normal((steps, m, k))
            rows, columns = (np.full((count + 2, width + 2), np.nan, dtype) for count, width in ((n, k), (k, n)))
            rows[1:-1, 1:-1] = rng.standard_normal((n, k))
            columns[1:-1, 1:-1] = rows[1:-1, 1:-1].T
            given = rng.standard_normal((steps, m, n + 1)).astype(dtype)
            expected = a[..., :k].astype(float) @ rows[1:-1, 1:-1].T + accumulate * given[..., :n].astype(float)
            places = (steps, a.ctypes.data, a.strides[0], a.strides[1], m)
            for name in ("rows", "columns") if may_lie(n, dtype) else ("rows",):
                c = given.copy()
                c_place = (c.ctypes.data, c.strides[0])
                if name == "rows":
                    w = rows[1:, 1:].ctypes.data, rows.strides[0]
                    by_rows(*places, *w, k, n, *c_place, c.strides[1], accumulate)
                else:
                    w = columns[1:, 1:].ctypes.data, columns.strides[0]
                    by_columns(*places, *w, k, 1, n, *c_place, 0, c.strides[1], accumulate)
                np.testing.assert_array_equal(c[..., n], given[..., n])
                np.testing.assert_allclose(c[..., :n], expected, atol=TOLERANCES[dtype.name] * 10)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("n", [1, 15, 64, costs.COMBINE_COLUMNS - 1, costs.COMBINE_COLUMNS + 40])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 9, 16])
def test_combinations_of_rows(dtype, m, n):
    """Between NaN: nothing beside the matrices is read into a sum, nor what C holds where it is not wanted."""
    dtype, rng = np.dtype(dtype), np.random.default_rng(m + n)
    for k in (1, 2, 3, 4, 5, 8, 70):
        a, w, c = (np.full((rows + 2, columns + 3), np.nan, dtype) for rows, columns in ((m, k), (k, n), (m, n)))
        left, right, inside = a[1:-1, 1:-2], w[1:-1, 2:-1], c[1:-1, 1:-2]
        left[...], right[...] = rng.standard_normal((m, k)), rng.standard_normal((k, n))
        for accumulate in (0, 1):
            given = rng.standard_normal((m, n)).astype(dtype)
            inside[...] = given if accumulate else np.nan
            expected = left.astype(float) @ right + accumulate * given.astype(float)
            numbers = (left.ctypes.data, a.strides[0], m, right.ctypes.data, w.strides[0], k, n)
            combine(dtype).python(*numbers, inside.ctypes.data, c.strides[0], accumulate)
            np.testing.assert_allclose(inside, expected, atol=TOLERANCES[dtype.name] * 10)
            assert np.isnan(c).sum() == c.size - inside.size
