"""A plain NumPy loop, as one writes it from the equations, without anything of gpurnn; in float64 it is the reference.

Gate order and variants are PyTorch's: LSTM i, f, g, o; GRU r, z, n with the reset behind the product.  One product
projects all inputs, one product a step recurs, one product each at the end gives dW_ih, dW_hh and dx.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from bench.cases import STATES, Case
from bench.peers.workload import Workload
from bench.problem import Problem

Arrays = dict[str, np.ndarray]
State = tuple[np.ndarray, ...]


class NumpyLoop(Workload):
    """The `numpy-loop` implementation, in float32 with NumPy's own BLAS threads."""

    def __init__(self, problem: Problem, phase: str):
        from threadpoolctl import ThreadpoolController

        self.case, self.problem, self.training = problem.case, problem, phase == "training"
        self.weights = named(problem.weights)
        self.last: Arrays = {}
        self.blas = ThreadpoolController()
        self.threads = self._threads()

    def prepare(self) -> None:
        if self._threads() != self.threads:
            raise RuntimeError(f"BLAS threads: expected {self.threads} as at the start, got {self._threads()}")

    def step(self, k: int) -> None:
        problem = self.problem
        dy = problem.dy[k % len(problem.dy)] if self.training else None
        self.last = layer(self.case, self.weights, problem.x[k % len(problem.x)], problem.state, problem.lengths, dy)

    def results(self) -> Arrays:
        self.step(0)
        return self.last

    def _threads(self) -> list[int]:
        return [library["num_threads"] for library in self.blas.info() if library["user_api"] == "blas"]


def reference(problem: Problem, training: bool) -> Arrays:
    """What every implementation must give for input set 0, in float64."""

    def wide(array: np.ndarray) -> np.ndarray:
        return array.astype(np.float64)

    weights = {name: wide(value) for name, value in named(problem.weights).items()}
    dy = wide(problem.dy[0]) if training else None
    return layer(problem.case, weights, wide(problem.x[0]), tuple(map(wide, problem.state)), problem.lengths, dy)


def named(weights: Mapping[str, np.ndarray]) -> Arrays:
    return {name.removesuffix("_l0"): value for name, value in weights.items()}


def layer(
    case: Case, weights: Arrays, x: np.ndarray, state: State, lengths: np.ndarray | None, dy: np.ndarray | None
) -> Arrays:
    """y (T, N, H), and with dy the gradients by name: dx, dweight_ih, ..., dh_0 (and dc_0)."""
    T, N, I = x.shape
    G, H = case.gates, case.H
    recurrent = _blocks(case, weights["weight_hh"])
    projected = (x.reshape(T * N, I) @ weights["weight_ih"].T + weights["bias_ih"]).reshape(T, N, G, H)
    bias_hh = weights["bias_hh"].reshape(G, H)
    forward, backward = _STEPS[case.cell]
    states, saved = [state], []
    y = np.zeros((T, N, H), x.dtype)
    for t in range(T):
        r = _times(case, states[t][0], recurrent) + bias_hh
        new, kept = forward(projected[t], r, states[t])
        if lengths is not None:
            living = (t < lengths)[:, None]
            new = tuple(np.where(living, after, before) for after, before in zip(new, states[t], strict=True))
            y[t] = np.where(living, new[0], 0)
        else:
            y[t] = new[0]
        if dy is None:
            states[t] = ()
        else:
            saved.append(kept)
        states.append(new)
    if dy is None:
        return {"y": y}
    dp, dr, dstate = np.empty_like(projected), np.empty_like(projected), tuple(np.zeros_like(s) for s in state)
    back = recurrent.swapaxes(1, 2)
    for t in reversed(range(T)):
        alive: Any = True if lengths is None else (t < lengths)[:, None]
        dnew = tuple(np.where(alive, d, 0) for d in (dstate[0] + dy[t], *dstate[1:]))
        held = tuple(np.where(alive, 0, d) for d in dstate)  # rows that have ended hand their state's gradient on
        dp[t], dr[t], direct = backward(dnew, saved[t], states[t], states[t + 1])
        direct = (direct[0] + _times_back(case, dr[t], back), *direct[1:])
        dstate = tuple(np.where(alive, a, 0) + b for a, b in zip(direct, held, strict=True))
    return {"y": y, **_gradients(case, weights, x, states, dp, dr, dstate)}


def _gradients(case: Case, weights: Arrays, x: Any, states: Any, dp: Any, dr: Any, dstate: State) -> Arrays:
    T, N, I = x.shape
    wide, K = case.gates * case.H, case.heads
    flat_p, flat_r = dp.reshape(T * N, wide), dr.reshape(T * N, wide)
    h = np.stack([state[0] for state in states[:-1]]).reshape(T * N, K, case.H // K)
    heads = flat_r.reshape(T * N, case.gates, K, -1)
    dweight_hh = np.stack([heads[:, :, k].reshape(T * N, -1).T @ h[:, k] for k in range(K)])  # (K, G*D, D)
    dweight_hh = dweight_hh.reshape(K, case.gates, -1, case.H // K).swapaxes(0, 1).reshape(wide, -1)
    return {
        "dx": (flat_p @ weights["weight_ih"]).reshape(T, N, I),
        "dweight_ih": flat_p.T @ x.reshape(T * N, I),
        "dweight_hh": dweight_hh,
        "dbias_ih": flat_p.sum(0),
        "dbias_hh": flat_r.sum(0),
        **{f"d{name}": part for name, part in zip(STATES[case.cell], dstate, strict=True)},
    }


def _blocks(case: Case, weight_hh: np.ndarray) -> np.ndarray:
    """(heads, D, G*D): what a head's h is multiplied by from the right, D = H/heads."""
    D = case.H // case.heads
    blocks = weight_hh.reshape(case.gates, case.heads, D, D).transpose(1, 3, 0, 2)
    return np.ascontiguousarray(blocks.reshape(case.heads, D, case.gates * D))


def _times(case: Case, h: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """h (N, H) -> (N, G, H)."""
    N, K = len(h), case.heads
    if K == 1:
        return (h @ blocks[0]).reshape(N, case.gates, case.H)
    products = h.reshape(N, K, -1).swapaxes(0, 1) @ blocks  # (K, N, G*D)
    return products.reshape(K, N, case.gates, -1).transpose(1, 2, 0, 3).reshape(N, case.gates, case.H)


def _times_back(case: Case, dr: np.ndarray, back: np.ndarray) -> np.ndarray:
    """dr (N, G, H) -> (N, H)."""
    N, K = len(dr), case.heads
    by_head = dr.reshape(N, case.gates, K, -1).transpose(2, 0, 1, 3).reshape(K, N, -1)
    return (by_head @ back).swapaxes(0, 1).reshape(N, case.H)


def _sigmoid(a: np.ndarray) -> np.ndarray:
    return 0.5 * np.tanh(0.5 * a) + 0.5


def _rnn_forward(x, r, state):
    return (np.tanh(x[:, 0] + r[:, 0]),), ()


def _rnn_backward(dnew, saved, state, new):
    da = (dnew[0] * (1 - new[0] ** 2))[:, None]
    return da, da, (0,)


def _lstm_forward(x, r, state):
    a = x + r
    i, f, o = _sigmoid(a[:, 0]), _sigmoid(a[:, 1]), _sigmoid(a[:, 3])
    g = np.tanh(a[:, 2])
    c = f * state[1] + i * g
    tanh_c = np.tanh(c)
    return (o * tanh_c, c), (i, f, g, o, tanh_c)


def _lstm_backward(dnew, saved, state, new):
    i, f, g, o, tanh_c = saved
    dc = dnew[1] + dnew[0] * o * (1 - tanh_c**2)
    di, df, dg, do = dc * g * i * (1 - i), dc * state[1] * f * (1 - f), dc * i * (1 - g**2), dnew[0] * tanh_c
    da = np.stack([di, df, dg, do * o * (1 - o)], axis=1)
    return da, da, (0, dc * f)


def _gru_forward(x, r, state):
    reset, z = _sigmoid(x[:, 0] + r[:, 0]), _sigmoid(x[:, 1] + r[:, 1])
    n = np.tanh(x[:, 2] + reset * r[:, 2])
    return (n + z * (state[0] - n),), (reset, z, n, r[:, 2])


def _gru_backward(dnew, saved, state, new):
    reset, z, n, r_n = saved
    dn = dnew[0] * (1 - z) * (1 - n**2)
    dz, dreset = dnew[0] * (state[0] - n) * z * (1 - z), dn * r_n * reset * (1 - reset)
    return np.stack([dreset, dz, dn], 1), np.stack([dreset, dz, dn * reset], 1), (dnew[0] * z,)


_STEPS = {
    "rnn": (_rnn_forward, _rnn_backward),
    "lstm": (_lstm_forward, _lstm_backward),
    "gru": (_gru_forward, _gru_backward),
}
