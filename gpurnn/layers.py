"""Layers without memory, and the base of all layers.

A layer is called forward and answers with its output and a closure: `y, backward = layer(x)`.  `backward(dy)` adds to
`layer.grads` and returns dx.  What backward needs lives in the closure and goes when it goes: x is copied for it, so that
a caller may fill his buffer anew, unless copy=False promises that x stays as it is.  Parameters must stay until backward.
One thread at a time calls a closure; a second one gets RuntimeError.
"""

import inspect
from collections.abc import Mapping
from typing import Any, Literal, overload

import numpy as np

from gpurnn import backend
from gpurnn.arguments import Turn, checked, generator, mapping, one_of, probability, supported, switch, whole
from gpurnn.cuda import faults
from gpurnn.executors.random import Masks
from gpurnn.initializers import glorot_uniform, normal
from gpurnn.parameters import Parameters
from gpurnn.parameters.values import load, unprefixed
from gpurnn.sequence import checked_lengths
from gpurnn.types import Array, LayerBackward


class Layer:
    """Parameters and gradients by name, each a view of one flat buffer."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: Any, symbols: Mapping[str, str] | None = None):
        self.dtype = supported(dtype)
        self.params = Parameters(shapes, self.dtype, symbols)
        self.grads = Parameters(shapes, self.dtype, symbols)

    def __repr__(self) -> str:
        frozen = sum(self.params[name].size for name in self.params.frozen if name in self.params.shapes)
        return f"{self._signature()}: {self.num_params:,} parameters" + (
            f", {frozen:,} of them frozen" if frozen else ""
        )

    def _signature(self) -> str:
        """How it is made: sizes, and the options that are not as they would be by themselves."""
        shown = []
        for name, parameter in _parameters(type(self)).items():
            value = self._given_as(name, parameter.empty)
            if isinstance(value, np.dtype):
                value = value.name
            if parameter.default is parameter.empty and value is not parameter.empty:
                shown.append(repr(getattr(value, "name", value)))
            elif value is not parameter.empty and value != parameter.default:
                shown.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def _given_as(self, name: str, default: Any) -> Any:
        """What an argument of that name was."""
        return getattr(self, name, default)

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

    def load_state_dict(self, values: Mapping[str, Any], prefix: str | Mapping[str, str] = "") -> None:
        """Takes parameters by name, from NumPy, CuPy or PyTorch.  Nothing is written unless all of it fits.

        prefix: what stands before the names in `values`, of which the others are left aside: "encoder.lstm" for that part of a
        whole module; by part of this model, {"recurrent": "lstm", "head": "fc"}, what they are called there.
        Raises TypeError for anything but a mapping of arrays, KeyError where names are missing or unknown, ValueError
        where a shape differs or a value is not finite.
        """
        load(self.params, unprefixed(mapping(values), prefix))

    def _set(self, name: str, value: np.ndarray) -> None:
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, and is refused
            array = backend.asarray(value, self.dtype, name)
        if not bool(backend.xp.isfinite(array).all()):
            raise ValueError(f"{name}: expected an initial value that is finite in {self.dtype}, got one that is not")
        self.params[name][...] = array


def _parameters(kind: type) -> dict[str, inspect.Parameter]:
    """Those of a constructor, with the options of the one that it hands its own on to; not what parameters are drawn from."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if "__init__" in vars(base):
            own = inspect.signature(vars(base)["__init__"]).parameters
            options = {name: parameter for name, parameter in own.items() if parameter.kind is parameter.KEYWORD_ONLY}
            found |= {name: options[name] for name in options if name not in found} if found else own
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
                break
    return {name: parameter for name, parameter in found.items() if name not in ("self", "init", "rng")}


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
    """A row of `weight` (num, dim) for each token; standard normal at the start, as PyTorch's.

    padding_idx: a token whose row begins at 0 and gets no gradient here; one below 0 counts from the end.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        padding_idx: int | None = None,
        dtype: Any = "float32",
        rng: Any = None,
    ):
        self.num_embeddings = whole("num_embeddings", num_embeddings)
        self.embedding_dim = whole("embedding_dim", embedding_dim)
        symbols = {"weight": "(num_embeddings, embedding_dim)"}
        super().__init__({"weight": (num_embeddings, embedding_dim)}, dtype, symbols)
        weight = normal(1.0)(generator(rng), num_embeddings, embedding_dim)
        self.padding_idx = None if padding_idx is None else _token("padding_idx", padding_idx, num_embeddings)
        if self.padding_idx is not None:
            weight[self.padding_idx] = 0
        self._set("weight", weight)

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
                grad, padding = self.grads["weight"], self.padding_idx
                before = None if padding is None else grad[padding].copy()  # a head that is tied adds to it as well
                backend.ops.add_rows(grad, tokens.reshape(-1), dy.reshape(-1, self.embedding_dim))
                if padding is not None:
                    grad[padding] = before

        return y, backward if training else None


def _token(name: str, value: Any, count: int) -> int:
    """`value` as one of 0..count-1; ValueError where it is none, counted from the end where it is below 0."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not -count <= value < count:
        raise ValueError(f"{name}: expected a whole number from {-count} to {count - 1}, got {value!r:.80}")
    return int(value) % count


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


POOLINGS = ("last", "mean", "max")


class Pool(Layer):
    """A row's steps as one: y (T, N, D*H) -> (N, D*H), over valid steps alone.

    how: "last", each direction's state behind its own last step, which of a bidirectional layer is h_n of its top layer side
        by side; "mean"; "max", whose gradient goes to the first of equal ones.  A row without a step gives 0.
    """

    def __init__(self, how: str = "last", *, directions: int = 1, batch_first: bool = False, dtype: Any = "float32"):
        super().__init__({}, dtype)
        self.how = one_of("how", how, POOLINGS)
        self.directions, self.batch_first = whole("directions", directions), switch("batch_first", batch_first)

    def __call__(self, y: Array, *, lengths: Any = None) -> tuple[Array, LayerBackward]:
        """y (T, N, C), or (N, T, C) with batch_first; lengths as a recurrent layer takes them -> pooled (N, C), backward."""
        y = backend.asarray(y, self.dtype, "y")
        if y.ndim != 3 or y.shape[2] % self.directions:
            raise ValueError(f"y: expected three axes, the last of {self.directions} directions, got {y.shape}")
        y = y.swapaxes(0, 1) if self.batch_first else y
        T, N, C = y.shape
        if T < 1:
            raise ValueError(f"y: expected at least one step, got {T}")
        own = None if lengths is None else checked_lengths(lengths, T, N)
        pooled, back = self._last(y, own) if self.how == "last" else self._over_steps(y, own)

        def backward(dpooled: Array) -> Array:
            dy = back(checked(dpooled, self.dtype, "dpooled", (N, C), "(N, D*H)"))
            return dy.swapaxes(0, 1) if self.batch_first else dy

        return pooled, backward

    def _last(self, y: Array, own: np.ndarray | None) -> tuple[Array, LayerBackward]:
        xp, (T, N, C) = backend.xp, y.shape
        H, places = C // self.directions, []
        for d in range(self.directions):  # the second one's last step is the first
            step: Any = T - 1 if d == 0 else 0
            if own is not None and d == 0:
                step = xp.asarray(np.maximum(own - 1, 0)), xp.arange(N)
            places.append((step, slice(d * H, (d + 1) * H)))
        some = None if own is None else xp.asarray(own > 0)[:, None]

        def valid(values: Array) -> Array:
            return values if some is None else xp.where(some, values, xp.zeros((), self.dtype))

        def back(dpooled: Array) -> Array:
            dy = xp.zeros((T, N, C), self.dtype)
            for step, half in places:
                dy[..., half][step] = valid(dpooled[:, half])
            return dy

        return valid(xp.concatenate([y[..., half][step] for step, half in places], axis=1)), back

    def _over_steps(self, y: Array, own: np.ndarray | None) -> tuple[Array, LayerBackward]:
        xp, (T, N, _) = backend.xp, y.shape
        some = xp.ones((T, N, 1), bool) if own is None else xp.asarray(np.arange(T)[:, None] < own)[..., None]
        if self.how == "mean":
            count = T if own is None else xp.asarray(np.maximum(own, 1)[:, None])
            share = some.astype(self.dtype) / xp.asarray(count, self.dtype)
        else:
            first = xp.where(some, y, -np.inf).argmax(axis=0)
            share = ((xp.arange(T)[:, None, None] == first) & some).astype(self.dtype)
        zero = xp.zeros((), self.dtype)  # NaN behind a row's end is not read
        return (xp.where(some, y, zero) * share).sum(axis=0), lambda dpooled: share * dpooled
