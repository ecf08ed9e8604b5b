"""Layers without memory, the base of all layers, and SequenceModel, which joins them.

A layer is called forward and answers with its output and a closure: `y, backward = layer(x)`.  `backward(dy)` adds to
`layer.grads` and returns dx.  What backward needs lives in the closure and goes when it goes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.initializers import glorot_uniform, normal
from gpurnn.parameters import Parameters, load

Array = Any
DTYPES = ("float32", "float64")


class Layer:
    """Parameters and gradients by name, each a view of one flat buffer."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: Any, symbols: Mapping[str, str] | None = None):
        name = np.dtype(dtype).name if not isinstance(dtype, str) else dtype
        if name not in DTYPES:
            raise ValueError(f"dtype: expected {' or '.join(DTYPES)}, got {name}")
        self.dtype = np.dtype(name)
        self.params = Parameters(shapes, self.dtype, symbols)
        self.grads = Parameters(shapes, self.dtype, symbols)

    def zero_grad(self) -> None:
        """Sets every gradient to 0."""
        self.grads.flat[...] = 0

    def state_dict(self) -> dict[str, np.ndarray]:
        """The parameters by name, as NumPy arrays of their own."""
        return {name: backend.to_numpy(value).copy() for name, value in self.params.items()}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Takes parameters by name, from NumPy, CuPy or PyTorch.  Nothing is written unless all of it fits.

        Raises KeyError where names are missing or unknown, ValueError where a shape differs or a value is not finite.
        """
        load(self.params, values)

    def _set(self, name: str, value: np.ndarray) -> None:
        self.params[name][...] = backend.asarray(value, self.dtype, name)


class Linear(Layer):
    """y = x weight^T + bias, over the last axis.  weight (out, in): Glorot uniform; bias (out,): 0."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, dtype: Any = "float32", rng: Any = None):
        self.in_features = whole("in_features", in_features)
        self.out_features = whole("out_features", out_features)
        shapes: dict[str, tuple[int, ...]] = {"weight": (out_features, in_features)}
        if bias:
            shapes["bias"] = (out_features,)
        super().__init__(shapes, dtype, {"weight": "(out_features, in_features)", "bias": "(out_features,)"})
        self._set("weight", glorot_uniform(np.random.default_rng(rng), out_features, in_features))

    def __call__(self, x: Array, *, training: bool = True) -> tuple[Array, Callable | None]:
        """x (..., in) -> y (..., out), backward.  `backward(dy)` adds to grads and returns dx (..., in)."""
        x = backend.asarray(x, self.dtype, "x")
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected (..., in_features) = (..., {self.in_features}), got {x.shape}")
        flat = x.reshape(-1, self.in_features)
        y = flat @ self.params["weight"].T
        if "bias" in self.params:
            y += self.params["bias"]

        def backward(dy: Array) -> Array:
            dy = checked(dy, self.dtype, "dy", (*x.shape[:-1], self.out_features)).reshape(-1, self.out_features)
            self.grads["weight"][...] += dy.T @ flat
            if "bias" in self.params:
                self.grads["bias"][...] += dy.sum(0)
            return (dy @ self.params["weight"]).reshape(x.shape)

        return y.reshape(*x.shape[:-1], self.out_features), backward if training else None


class Embedding(Layer):
    """A row of `weight` (num, dim) for each token; standard normal at the start, as PyTorch's."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, dtype: Any = "float32", rng: Any = None):
        self.num_embeddings = whole("num_embeddings", num_embeddings)
        self.embedding_dim = whole("embedding_dim", embedding_dim)
        symbols = {"weight": "(num_embeddings, embedding_dim)"}
        super().__init__({"weight": (num_embeddings, embedding_dim)}, dtype, symbols)
        self._set("weight", normal(1.0)(np.random.default_rng(rng), num_embeddings, embedding_dim))

    def __call__(self, tokens: Array, *, training: bool = True) -> tuple[Array, Callable | None]:
        """tokens: integers in [0, num), any shape -> y (*tokens.shape, dim), backward (which returns None)."""
        tokens = backend.asarray(tokens, None, "tokens")
        if tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens: expected integers, got {tokens.dtype}")
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.num_embeddings):
            raise ValueError(
                f"tokens: expected values from 0 to {self.num_embeddings - 1}, got {tokens.min()} to {tokens.max()}"
            )

        def backward(dy: Array) -> None:
            dy = checked(dy, self.dtype, "dy", (*tokens.shape, self.embedding_dim))
            add_rows(self.grads["weight"], tokens.reshape(-1), dy.reshape(-1, self.embedding_dim))

        return self.params["weight"][tokens], backward if training else None


class Dropout(Layer):
    """Sets each value to 0 with probability p and scales the others by 1/(1-p); the identity without training."""

    def __init__(self, p: float = 0.5, *, dtype: Any = "float32", rng: Any = None):
        super().__init__({}, dtype)
        self.p = probability("p", p)
        self.rng = np.random.default_rng(rng)

    def __call__(self, x: Array, *, training: bool = True) -> tuple[Array, Callable | None]:
        """x of any shape -> y, backward."""
        x = backend.asarray(x, self.dtype, "x")
        if not training or self.p == 0:
            return x, (lambda dy: checked(dy, self.dtype, "dy", x.shape)) if training else None
        mask = dropout_mask(self.rng, self.p, x.shape, self.dtype)
        return x * mask, lambda dy: checked(dy, self.dtype, "dy", x.shape) * mask


class SequenceModel(Layer):
    """embedding (or None) -> recurrent -> head, with all parameters in one buffer.

    Names are prefixed: `embedding.weight`, `recurrent.weight_ih_l0`, `head.bias`.  The parts become views of the model's
    buffers and can be used as before.
    """

    def __init__(self, embedding: Layer | None, recurrent: Any, head: Layer | None):
        self.embedding, self.recurrent, self.head = embedding, recurrent, head
        named = {"embedding": embedding, "recurrent": recurrent, "head": head}
        parts = {name: part for name, part in named.items() if part is not None}
        self.params = Parameters.join({name: part.params for name, part in parts.items()})
        self.grads = Parameters.join({name: part.grads for name, part in parts.items()})
        self.dtype = self.params.dtype

    def __call__(
        self, x: Array, state: Any = None, *, lengths: Any = None, training: bool = True
    ) -> tuple[Array, Any, Callable | None]:
        """x: tokens (T, N), or (T, N, I) without an embedding -> out (T, N, C), state, backward.

        `dx, dstate0 = backward(dout, dstate=None, keep=False, flow=None)`; dx is None behind an embedding.  The other
        arguments are those of `Recurrent`.
        """
        embed_backward = head_backward = None
        if self.embedding is not None:
            x, embed_backward = self.embedding(x, training=training)
        y, state, recurrent_backward = self.recurrent(x, state, lengths=lengths, training=training)
        if self.head is not None:
            y, head_backward = self.head(y, training=training)

        def backward(dout: Array, dstate: Any = None, keep: bool = False, flow: Array | None = None) -> tuple[Array, Any]:
            dy = head_backward(dout) if head_backward else dout
            dx, dstate0 = recurrent_backward(dy, dstate, keep=keep, flow=flow)
            return (embed_backward(dx) if embed_backward else dx), dstate0

        return y, state, backward if training else None


def whole(name: str, value: Any) -> int:
    """`value` if it is a whole number from 1; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name}: expected a whole number from 1, got {value!r}")
    return int(value)


def probability(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a probability in [0, 1), got {value!r}")
    return float(value)


def checked(value: Array, dtype: np.dtype, name: str, shape: tuple[int, ...], form: str = "") -> Array:
    """`value` as the backend's array; ValueError unless it has this shape."""
    array = backend.asarray(value, dtype, name)
    if array.shape != shape:
        raise ValueError(f"{name}: expected {form and form + ' = '}{shape}, got {array.shape}")
    return array


def dropout_mask(rng: np.random.Generator, p: float, shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """0 with probability p, else 1/(1-p)."""
    keep = rng.random(shape, np.float32) >= p
    return backend.asarray(keep.astype(dtype) / dtype.type(1 - p), dtype, "mask")


def add_rows(target: Array, rows: Array, values: Array) -> None:
    """target[rows[k]] += values[k], rows repeated as they may be, always in the same order of additions."""
    if backend.name == "cuda" or not rows.size:
        backend.xp.add.at(target, rows, values)
        return
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    target[ordered[starts]] += np.add.reduceat(values[order], starts, axis=0)
