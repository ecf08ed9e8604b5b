"""The types that signatures are written in."""

from typing import Any, Protocol

Array = Any  # numpy.ndarray or cupy.ndarray, the backend's


class LayerBackward(Protocol):
    """dy -> dx; adds to the layer's gradients."""

    def __call__(self, dy: Array, /) -> Array: ...


class RecurrentBackward(Protocol):
    """dy, dL/d(final state) -> dx, dL/d(initial state); adds to the layer's gradients.  See `Recurrent.__call__`."""

    def __call__(
        self, dy: Array, /, dstate: Any = None, keep: bool = False, flow: Array | None = None
    ) -> tuple[Array, Any]: ...
