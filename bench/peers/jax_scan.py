"""JAX: the loop as jax.lax.scan, compiled by XLA as one program; gradients by reverse-mode differentiation of it."""

import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX takes the GPU's memory from all others

import jax
import jax.numpy as jnp
import numpy as np

from bench.cases import STATES
from bench.peers.workload import Workload
from bench.problem import Problem

PRECISION = {"float32": "highest", "tf32": "tensorfloat32"}


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


class JaxScan(Workload):
    """`jax-scan`"""

    def __init__(self, problem: Problem, phase: str):
        case, self.training = problem.case, phase == "training"
        dtype = {"tf32": "float32"}.get(case.dtype, case.dtype)
        self.cell, self.case = case.cell, case
        self.weights = {name: jnp.asarray(value, dtype) for name, value in problem.weights.items()}
        self.x, self.dy = ([jnp.asarray(a, dtype) for a in arrays] for arrays in (problem.x, problem.dy))
        self.state = tuple(jnp.asarray(part, dtype) for part in problem.state)
        steps = jnp.arange(case.T)[:, None, None]
        self.alive = None if problem.lengths is None else steps < jnp.asarray(problem.lengths)[:, None]
        self.run: Callable = jax.jit(self._backward if self.training else self._forward)

    def _forward(self, weights, x, state, alive):
        step = _STEPS[self.cell]
        back, bias = weights["weight_hh_l0"].T, weights["bias_hh_l0"]
        projected = x @ weights["weight_ih_l0"].T + weights["bias_ih_l0"]

        def advance(before, inputs):
            x_t, live = inputs
            after = step(x_t, before, before[0] @ back + bias)
            if live is None:
                return after, after[0]
            held = tuple(jnp.where(live, new, old) for new, old in zip(after, before, strict=True))
            return held, jnp.where(live, after[0], 0)

        return jax.lax.scan(advance, state, (projected, alive))[1]

    def _backward(self, weights, x, state, alive, dy):
        def forward(weights: Any, x: Any, state: Any) -> Any:
            return self._forward(weights, x, state, alive)

        y, pull = jax.vjp(forward, weights, x, state)
        return y, pull(dy)

    def step(self, k: int) -> None:
        k %= len(self.x)
        arguments = (self.weights, self.x[k], self.state, self.alive)
        with jax.default_matmul_precision(PRECISION.get(self.case.dtype, "default")):
            self.out = self.run(*arguments, self.dy[k]) if self.training else self.run(*arguments)

    def results(self) -> dict[str, np.ndarray]:
        self.step(0)
        if not self.training:
            return {"y": np.asarray(self.out, np.float32)}
        y, (dweights, dx, dstate) = self.out
        named = {"y": y, "dx": dx}
        named |= {f"d{name}": part for name, part in zip(STATES[self.cell], dstate, strict=True)}
        named |= {f"d{name.removesuffix('_l0')}": grad for name, grad in dweights.items()}
        return {name: np.asarray(value, np.float32) for name, value in named.items()}

    def time(self, steps: int) -> float:
        jax.block_until_ready(self.out)
        start = time.perf_counter()
        for k in range(steps):
            self.step(k)
        jax.block_until_ready(self.out)
        return time.perf_counter() - start


def _rnn(x, state, r):
    return (jnp.tanh(x + r),)


def _lstm(x, state, r):
    i, f, g, o = jnp.split(x + r, 4, axis=1)
    c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _gru(x, state, r):
    (x_r, x_z, x_n), (r_r, r_z, r_n) = jnp.split(x, 3, axis=1), jnp.split(r, 3, axis=1)
    z = jax.nn.sigmoid(x_z + r_z)
    n = jnp.tanh(x_n + jax.nn.sigmoid(x_r + r_r) * r_n)
    return (n + z * (state[0] - n),)


_STEPS = {"rnn": _rnn, "lstm": _lstm, "gru": _gru}
