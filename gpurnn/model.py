"""Parts as one model, whose parameters are one buffer: Model of any parts, SequenceModel of an embedding, a recurrent layer
and a head."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

from gpurnn import backend
from gpurnn.arguments import Turn, checked, switch, trained, uncopied
from gpurnn.layers import Dropout, Embedding, Layer, Linear, Pool
from gpurnn.parameters import Parameters, side_by_side
from gpurnn.sequence import prepare_lengths
from gpurnn.types import Array, RecurrentBackward


class Model(Layer):
    """Any parts as one: `Model(lstm=lstm, head=head)`, or `Model(lstm, head)`, whose parts are called 0 and 1.

    Names are prefixed, `lstm.weight_ih_l0`, and a part is an attribute, `model.lstm`.  The parts become views of the model's
    buffers and can be used as before; one optimiser step, norm or `zero_grad` of the model is one operation on a buffer.
    How they are called one after another is a subclass's to say:

        class Tagger(gpurnn.Model):
            def __init__(self):
                super().__init__(lstm=gpurnn.LSTM(16, 32), head=gpurnn.Linear(32, 5))

            def __call__(self, x):
                y, _, lstm_backward = self.lstm(x)
                out, head_backward = self.head(y)
                return out, lambda dout: lstm_backward(head_backward(dout))

    A part is a layer, a model, or an object of your own with `params` and `grads`.  Parts may make up several models, as
    long as they lie side by side in the first one's buffer.  Raises TypeError for what is no part, ValueError for parts that
    cannot be joined (see `Parameters.join`).
    """

    def __init__(self, *parts: Any, **named: Any):
        several = len(parts) == 1 and _are_several(parts[0])
        self.parts = {**_named(parts[0] if several else parts), **named}
        for name, part in self.parts.items():
            trained(part, name)
            if name.isidentifier():
                if hasattr(type(self), name) or name in ("parts", "params", "grads", "dtype"):
                    raise ValueError(f"expected parts of other names, {name!r} is a model's own")
                setattr(self, name, part)
        self.params = Parameters.join({name: part.params for name, part in self.parts.items()})
        self.grads = Parameters.join({name: part.grads for name, part in self.parts.items()})
        self.dtype = self.params.dtype

    def __repr__(self) -> str:
        parts = dict(self.parts)
        dropout = getattr(self, "dropout", None)  # a SequenceModel's, which has no parameters
        if dropout is not None:
            parts["dropout"] = dropout
        lines = [f"{name}: {part!r}".replace("\n", "\n  ") for name, part in parts.items()]
        tied = [name for name in self.params.tied if not isinstance(parts.get(name.partition(".")[0]), Model)]
        lines += [f"{name}: {self.params.meaning(name)}" for name in tied]
        return "\n  ".join([super().__repr__(), *lines])

    def _signature(self) -> str:
        return type(self).__name__


def _named(parts: Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
    return dict(parts) if isinstance(parts, Mapping) else {str(k): part for k, part in enumerate(parts)}


def together(model: Any) -> Any:
    """`model`, or a Model of its parts where it is a list or mapping of such; TypeError for what cannot be trained."""
    return Model(model) if _are_several(model) else trained(model)


def _are_several(model: Any) -> bool:
    return isinstance(model, Sequence | Mapping) and not isinstance(model, str | bytes) and len(model) > 0


def pieces(model: Any) -> list[Any]:
    """`model` alone; of a list or mapping its parts, as one model where they lie side by side in one buffer already.

    Nothing is moved.  Raises TypeError for what cannot be trained, ValueError for parts that overlap.
    """
    if not _are_several(model):
        return [trained(model)]
    parts = _named(model)
    joined = side_by_side({name: trained(part, name).params for name, part in parts.items()})
    return [Model(parts)] if joined else list(parts.values())


class SequenceModel(Model):
    """embedding (or None) -> recurrent -> dropout (or None) -> head (or None), with all parameters in one buffer.

    Where the recurrent layer is `batch_first`, so is the model.
    pooling: None, or how the steps of a row become one before dropout and head, "last", "mean" or "max" (see `Pool`); out and
    dout are (N, C) then, targets (N,), as in classifying whole sequences.

    Names are prefixed: `embedding.weight`, `recurrent.weight_ih_l0`, `head.bias`.  The parts become views of the model's
    buffers and can be used as before.
    """

    def __init__(
        self, embedding: Any, recurrent: Any, head: Any, *, dropout: Dropout | None = None, pooling: str | None = None
    ):
        self.embedding, self.recurrent, self.dropout, self.head = embedding, recurrent, dropout, head
        named = {"embedding": embedding, "recurrent": recurrent, "head": head}
        parts = {name: part for name, part in named.items() if part is not None}
        self._check_parts(parts)
        self.batch_first = getattr(recurrent, "batch_first", False)
        super().__init__(parts)
        options = {"directions": recurrent.directions, "batch_first": self.batch_first, "dtype": self.dtype}
        self.pooling = pooling
        self.pool = None if pooling is None else Pool(pooling, **options)

    @overload
    def __call__(
        self,
        x: Array,
        state: Any = ...,
        *,
        lengths: Any = ...,
        resets: Any = ...,
        training: Literal[True] = ...,
        copy: bool = ...,
    ) -> tuple[Array, Any, RecurrentBackward]: ...
    @overload
    def __call__(
        self,
        x: Array,
        state: Any = ...,
        *,
        lengths: Any = ...,
        resets: Any = ...,
        training: Literal[False],
        copy: bool = ...,
    ) -> tuple[Array, Any, None]: ...
    @overload
    def __call__(
        self,
        x: Array,
        state: Any = ...,
        *,
        lengths: Any = ...,
        resets: Any = ...,
        training: bool,
        copy: bool = ...,
    ) -> tuple[Array, Any, RecurrentBackward | None]: ...
    def __call__(
        self,
        x: Array,
        state: Any = None,
        *,
        lengths: Any = None,
        resets: Any = None,
        training: bool = True,
        copy: bool = True,
    ) -> tuple[Array, Any, RecurrentBackward | None]:
        """x: tokens (T, N), or (T, N, I) without an embedding -> out (T, N, C), state, backward.

        `dx, dstate0 = backward(dout, dstate=None, keep=False, flow=None)`; dx is None behind an embedding.  The other
        arguments are those of `Recurrent`: behind a row's length x and dout are not read, and out is 0; resets (T, N).
        """
        training, copy = switch("training", training), switch("copy", copy)
        padding = None
        if lengths is not None:
            x, padding = self._without_padding(x, lengths)
        embed_backward = pool_backward = drop_backward = head_backward = None
        copy = copy and padding is None
        if self.embedding is not None:
            x, embed_backward = self.embedding(x, training=training, **({} if copy else uncopied(self.embedding)))
            copy = copy and type(self.embedding) not in (Embedding, Linear)  # whose y is in memory of its own
        options: dict[str, Any] = {} if copy else {**uncopied(self.recurrent)}
        if resets is not None:
            options["resets"] = resets
        y, state, recurrent_backward = self.recurrent(x, state, lengths=lengths, training=training, **options)
        T, N = self._steps_and_rows(y)
        if self.pool is not None:
            y, pool_backward = self.pool(y, lengths=lengths)
            padding = None
        if self.dropout is not None:
            y, drop_backward = self.dropout(y, training=training)
        if self.head is not None:
            y, head_backward = self.head(y, training=training, **uncopied(self.head))
            y = self._blank(y, padding)
        turn = Turn()

        def backward(
            dout: Array, dstate: Any = None, keep: bool = False, flow: Array | None = None
        ) -> tuple[Array, Any]:
            with turn:
                keep = switch("keep", keep)
                # The head's gradients are added before the recurrent layer looks at its arguments: look now.
                self.recurrent.check_backward(dstate, flow, T, N)
                dy = None if dout is None else self._blank(checked(dout, self.dtype, "dout", y.shape), padding)
                turn.gone = not keep
                for back in (head_backward, drop_backward, pool_backward):
                    dy = back(dy) if back is not None and dy is not None else dy
                dx, dstate0 = recurrent_backward(dy, dstate, keep=keep, flow=flow)
                return (embed_backward(dx) if embed_backward else dx), dstate0

        return y, state, backward if training else None

    def _check_parts(self, parts: Mapping[str, Any]) -> None:
        """Raises TypeError for what is not a layer, ValueError where neighbours differ in size."""
        for name, part in {"recurrent": self.recurrent, **parts}.items():
            if not isinstance(part, Layer):
                raise TypeError(f"{name}: expected a layer, got {type(part).__name__}")
        for name in ("embedding", "head"):
            if isinstance(parts.get(name), SequenceModel) or hasattr(parts.get(name), "check_backward"):
                kind = type(parts[name]).__name__
                raise TypeError(f"{name}: expected a layer without memory, such as Embedding or Linear, got {kind}")
        if not hasattr(self.recurrent, "check_backward"):
            raise TypeError(f"recurrent: expected a recurrent layer, got {type(self.recurrent).__name__}")
        if self.dropout is not None and not isinstance(self.dropout, Dropout):
            raise TypeError(f"dropout: expected a Dropout layer or None, got {self.dropout!r}")
        inputs, outputs = self.recurrent.input_size, self.recurrent.directions * self.recurrent.hidden_size
        if isinstance(self.embedding, Embedding) and self.embedding.embedding_dim != inputs:
            came = self.embedding.embedding_dim
            raise ValueError(f"embedding: expected embedding_dim = recurrent.input_size = {inputs}, got {came}")
        if isinstance(self.head, Linear) and self.head.in_features != outputs:
            raise ValueError(f"head: expected in_features = D*H of recurrent = {outputs}, got {self.head.in_features}")

    def _without_padding(self, x: Array, lengths: Any) -> tuple[Array, Array | None]:
        """x with 0 behind each row's end, and where that is, (T, N, 1); None where every row is full."""
        x = backend.asarray(x, None, "x")
        prepared = prepare_lengths(lengths, *self._steps_and_rows(x)) if x.ndim > 1 else None
        if prepared is None:
            return x, None
        padding = prepared.padding.swapaxes(0, 1) if self.batch_first else prepared.padding
        x = x.copy()
        x[padding[..., 0]] = 0
        return x, padding

    def _steps_and_rows(self, value: Array) -> tuple[int, int]:
        first, second = value.shape[:2]
        return (second, first) if self.batch_first else (first, second)

    def _blank(self, value: Array, padding: Array | None) -> Array:
        """value (T, N, C) with 0 behind each row's end."""
        return value if padding is None else backend.xp.where(padding, backend.xp.zeros((), self.dtype), value)
