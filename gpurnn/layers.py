"""Layers without memory, and the base of all layers.

A layer is called forward and answers with its output and a closure: `y, backward = layer(x)`.  `backward(dy)` adds to
`layer.grads` and returns dx.  What backward needs lives in the closure and goes when it goes: x is copied for it, so that
a caller may fill his buffer anew, unless copy=False promises that x stays as it is.  Parameters must stay until backward.
One thread at a time calls a closure; a second one gets RuntimeError.
"""

from collections.abc import Mapping
from typing import Any, Literal, overload

import numpy as np

from gpurnn import backend
from gpurnn.arguments import Turn, checked, generator, probability, supported, switch, whole
from gpurnn.cuda import faults
from gpurnn.executors.random import Masks
from gpurnn.initializers import glorot_uniform, normal
from gpurnn.parameters import Parameters
from gpurnn.parameters.values import load
from gpurnn.types import Array, LayerBackward


class Layer:
    """Parameters and gradients by name, each a view of one flat buffer."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: Any, symbols: Mapping[str, str] | None = None):
        self.dtype = supported(dtype)
        self.params = Parameters(shapes, self.dtype, symbols)
        self.grads = Parameters(shapes, self.dtype, symbols)

    def zero_grad(self) -> None:
        """Sets every gradient to 0."""
        backend.ops.clear(self.grads.flat)

    def state_dict(self) -> dict[str, np.ndarray]:
        """The parameters by name, as NumPy arrays of their own.  Raises what `gpurnn.synchronize` raises."""
        faults.check()
        return {name: backend.to_numpy(value).copy() for name, value in self.params.items()}

    @property
    def num_params(self) -> int:
        """How many values are learnt or frozen, tied ones counted once."""
        return self.params.count

    def freeze(self, *patterns: str) -> None:
        """Optimisers leave what matches as it is: no update, no weight decay, moments and their clock stand still.

        patterns: names, "head.bias", with wildcards, "*bias*", or of a part, "embedding"; without one, everything.  Its
        gradient counts as 0 in norms and clipping.  Raises ValueError for a pattern that matches nothing.
        """
        self.params.freeze(*patterns)

    def unfreeze(self, *patterns: str) -> None:
        """What matches learns again, as `freeze` has it; without a pattern, everything."""
        self.params.unfreeze(*patterns)

    def tie(self, name: str, to: str) -> None:
        """Makes the parameter `name` another name of `to`: one matrix, whose gradient is the sum.

        `model.tie("head.weight", "embedding.weight")` (Press and Wolf 2017).  Before an optimiser is made.  Raises KeyError
        for no such name, ValueError where shapes differ or both are one already.
        """
        self.params.tie(name, to)
        self.grads.tie(name, to)

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Takes parameters by name, from NumPy, CuPy or PyTorch.  Nothing is written unless all of it fits.

        Raises TypeError for anything but a mapping of arrays, KeyError where names are missing or unknown, ValueError
        where a shape differs or a value is not finite.
        """
        load(self.params, values)

    def _set(self, name: str, value: np.ndarray) -> None:
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, and is refused
            array = backend.asarray(value, self.dtype, name)
        if not bool(backend.xp.isfinite(array).all()):
            raise ValueError(f"{name}: expected an initial value that is finite in {self.dtype}, got one that is not")
        self.params[name][...] = array


class Linear(Layer):
    """y = x weight^T + bias, over the last axis.  weight (out, in): Glorot uniform; bias (out,): 0."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, dtype: Any = "float32", rng: Any = None
    ):
        self.in_features = whole("in_features", in_features)
        self.out_features = whole("out_features", out_features)
        shapes: dict[str, tuple[int, ...]] = {"weight": (out_features, in_features)}
        self.bias = switch("bias", bias)
        if self.bias:
            shapes["bias"] = (out_features,)
        super().__init__(shapes, dtype, {"weight": "(out_features, in_features)", "bias": "(out_features,)"})
        self._set("weight", glorot_uniform(generator(rng), out_features, in_features))

    @overload
    def __call__(self, x: Array, *, training: Literal[True] = ..., copy: bool = ...) -> tuple[Array, LayerBackward]: ...
    @overload
    def __call__(self, x: Array, *, training: Literal[False], copy: bool = ...) -> tuple[Array, None]: ...
    @overload
    def __call__(self, x: Array, *, training: bool, copy: bool = ...) -> tuple[Array, LayerBackward | None]: ...
    def __call__(self, x: Array, *, training: bool = True, copy: bool = True) -> tuple[Array, LayerBackward | None]:
        """x (..., in) -> y (..., out), backward.  `backward(dy)` adds to grads and returns dx (..., in).

        copy: x is copied for backward; with False it must not change before.
        """
        training, copy = switch("training", training), switch("copy", copy)
        x = backend.asarray(x, self.dtype, "x")
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected (..., in_features) = (..., {self.in_features}), got {x.shape}")
        x = x.copy() if training and copy else x
        flat = x.reshape(-1, self.in_features)
        y = backend.ops.product(flat, self.params["weight"].T)
        if "bias" in self.params:
            y += self.params["bias"]
        turn = Turn()

        def backward(dy: Array) -> Array:
            with turn:
                dy = checked(dy, self.dtype, "dy", (*x.shape[:-1], self.out_features)).reshape(-1, self.out_features)
                backend.ops.add_product(self.grads["weight"], dy.T, flat)
                if "bias" in self.params:
                    backend.ops.add_columns(self.grads["bias"], dy)
                return backend.ops.product(dy, self.params["weight"]).reshape(x.shape)

        return y.reshape(*x.shape[:-1], self.out_features), backward if training else None


class Embedding(Layer):
    """A row of `weight` (num, dim) for each token; standard normal at the start, as PyTorch's."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, dtype: Any = "float32", rng: Any = None):
        self.num_embeddings = whole("num_embeddings", num_embeddings)
        self.embedding_dim = whole("embedding_dim", embedding_dim)
        symbols = {"weight": "(num_embeddings, embedding_dim)"}
        super().__init__({"weight": (num_embeddings, embedding_dim)}, dtype, symbols)
        self._set("weight", normal(1.0)(generator(rng), num_embeddings, embedding_dim))

    @overload
    def __call__(
        self, tokens: Array, *, training: Literal[True] = ..., copy: bool = ...
    ) -> tuple[Array, LayerBackward]: ...
    @overload
    def __call__(self, tokens: Array, *, training: Literal[False], copy: bool = ...) -> tuple[Array, None]: ...
    @overload
    def __call__(self, tokens: Array, *, training: bool, copy: bool = ...) -> tuple[Array, LayerBackward | None]: ...
    def __call__(
        self, tokens: Array, *, training: bool = True, copy: bool = True
    ) -> tuple[Array, LayerBackward | None]:
        """tokens: integers in [0, num), any shape -> y (*tokens.shape, dim), backward (which returns None).

        copy: tokens are copied for backward; with False they must not change before.
        Raises ValueError for a token out of range; on CUDA its y is NaN, and `gpurnn.synchronize` raises.
        """
        training, copy = switch("training", training), switch("copy", copy)
        tokens = backend.asarray(tokens, None, "tokens")
        if tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens: expected integers, got {tokens.dtype}")
        tokens = tokens.copy() if training and copy else tokens
        y, turn = backend.ops.gather(self.params["weight"], tokens), Turn()

        def backward(dy: Array) -> None:
            with turn:
                dy = checked(dy, self.dtype, "dy", (*tokens.shape, self.embedding_dim))
                backend.ops.add_rows(self.grads["weight"], tokens.reshape(-1), dy.reshape(-1, self.embedding_dim))

        return y, backward if training else None


class Dropout(Layer):
    """Sets each value to 0 with probability p and scales the others by 1/(1-p); the identity without training.

    Which values is a function of a seed, drawn from `rng` when the layer is made, of the number of calls so far,
    `masks.calls`, and of a value's place: the same on every backend.
    """

    def __init__(self, p: float = 0.5, *, dtype: Any = "float32", rng: Any = None):
        super().__init__({}, dtype)
        self.p = probability("p", p)
        self.masks = Masks(generator(rng))

    @overload
    def __call__(self, x: Array, *, training: Literal[True] = ...) -> tuple[Array, LayerBackward]: ...
    @overload
    def __call__(self, x: Array, *, training: Literal[False]) -> tuple[Array, None]: ...
    @overload
    def __call__(self, x: Array, *, training: bool) -> tuple[Array, LayerBackward | None]: ...
    def __call__(self, x: Array, *, training: bool = True) -> tuple[Array, LayerBackward | None]:
        """x of any shape -> y, backward."""
        training = switch("training", training)
        x = backend.asarray(x, self.dtype, "x")
        if not training or self.p == 0:
            return x, (lambda dy: checked(dy, self.dtype, "dy", x.shape)) if training else None
        y, masked = self.masks(x, self.p)
        return y, lambda dy: masked(checked(dy, self.dtype, "dy", x.shape))
