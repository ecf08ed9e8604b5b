"""A step as one CUDA graph: the work that a function gives to the device is recorded once, and then launched as a whole.

A training step of a small model is dozens of short kernels, and giving them to the device one by one takes longer than
running them.
"""

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from gpurnn import arguments, backend
from gpurnn.cuda import cublas, faults
from gpurnn.parameters.buffers import Revision
from gpurnn.types import Array

WARM_UPS = 2  # calls that run as they are: they compile, load and allocate what cannot be while a stream is captured


class _Recorded(NamedTuple):
    """A graph, the memory that it reads its arguments from, and what the function returned: memory that it writes to.

    pool: where all its memory comes from.  Whatever is free in it is the graph's own: nobody may allocate there any more.
    """

    graph: Any
    given: list[Array]
    result: Any
    pool: Any


class Captured:
    """A function whose work on the device is captured; see `captured`.

    reason: one sentence on why it is not, or None.  quiet: nobody is warned then.
    """

    def __init__(self, function: Callable[..., Any], when: Callable[[], bool] | None = None, quiet: bool = False):
        self._function, self._when, self._quiet = arguments.function("function", function), when, quiet
        if when is not None:
            arguments.function("when", when)
        self.reason: str | None = None if backend.ops.GRAPHS else "NumPy has no graphs"
        self._warm: dict[tuple, tuple[int, Any]] = {}  # calls so far, and the pool that they have filled
        self._recorded: dict[tuple, _Recorded] = {}
        self._revision = Revision.number

    def __call__(self, *arrays: Array) -> Any:
        if self.reason is not None:
            return self._function(*arrays)
        given = [backend.asarray(array, None, f"argument {k + 1}") for k, array in enumerate(arrays)]
        if self._revision != Revision.number:  # what was recorded would go on with the parameters as they were
            self._warm, self._recorded, self._revision = {}, {}, Revision.number
        if self._when is not None and not self._when():
            return self._at_once(given)
        kind = tuple((array.shape, array.dtype) for array in given)
        if kind not in self._recorded:
            calls, pool = self._warm.get(kind) or (0, backend.xp.cuda.MemoryPool())
            self._warm[kind] = calls + 1, pool
            if calls < WARM_UPS:
                return self._at_once(given, pool)
            try:
                self._recorded[kind] = self._record(given, pool)
            except Exception as error:
                return self._give_up(error, given)
            del self._warm[kind]
        recorded = self._recorded[kind]
        for ours, array in zip(recorded.given, given, strict=True):
            ours[...] = array
        recorded.graph.launch()
        return recorded.result

    def _at_once(self, given: list[Array], pool: Any = None) -> Any:
        try:
            with self._aside(pool):
                return self._function(*given)
        except _Unavailable as error:
            return self._give_up(error, given)

    def _record(self, given: list[Array], pool: Any) -> _Recorded:
        """Nothing runs meanwhile: what the function computes is not there yet when it returns."""
        with self._aside(pool) as stream:
            ours = [backend.xp.empty_like(array) for array in given]
            stream.begin_capture()
            backend.thread.capturing = True
            try:
                result = self._function(*ours)
            except BaseException:
                with contextlib.suppress(Exception):  # that of a capture which has failed; the first error says why
                    stream.end_capture()
                raise
            finally:
                backend.thread.capturing = False
            return _Recorded(stream.end_capture(), ours, result, pool)

    def _give_up(self, error: Exception, given: list[Array]) -> Any:
        self.reason = backend.one_line(error)
        if not self._quiet:
            warnings.warn(f"the step runs kernel by kernel: {self.reason}", RuntimeWarning, stacklevel=3)
        return self._function(*given)

    @contextlib.contextmanager
    def _aside(self, pool: Any) -> Iterator[Any]:
        """On a stream that can be captured, behind the current one's work and before what comes on it next.

        pool: that memory comes from; None: the common one.  Whether work runs at once or is recorded, it does so with the
        same handle of cuBLAS: the same bits come out.
        """
        cuda, here = backend.xp.cuda, backend.thread
        current = cuda.get_current_stream()
        stream, handle = _lane(backend.xp, cuda.Device().id, threading.get_ident())
        faults.record()  # made while a graph is captured, every launch of it would make it anew
        stream.wait_event(current.record())
        before = here.cublas, here.stream
        here.cublas, here.stream = handle, current.ptr if here.stream is None else here.stream
        try:
            with stream, cuda.using_allocator(pool.malloc) if pool is not None else contextlib.nullcontext():
                yield stream
        finally:
            here.cublas, here.stream = before
            current.wait_event(stream.record())


class _Unavailable(Exception):
    """Why there is no stream to capture with."""


@functools.cache
def _lane(xp: Any, device: int, thread: int) -> tuple[Any, cublas.Handle]:
    """One for each thread: what another gave to its stream meanwhile would be recorded as well."""
    stream = xp.cuda.Stream(non_blocking=True)
    try:
        return stream, cublas.Handle(stream)
    except Exception as error:
        raise _Unavailable(f"cuBLAS cannot be called: {backend.one_line(error)}") from None


def captured(function: Callable[..., Any], *, when: Callable[[], bool] | None = None) -> Captured:
    """`step = gpurnn.captured(step)`: the same function, but on CUDA its kernels are launched as one graph.

        bptt, optimizer = gpurnn.TruncatedBPTT(model, loss, k1=64), gpurnn.Adam(model)

        def step(x, targets):
            model.zero_grad()
            loss = bptt.step(x, targets)
            gpurnn.clip_grad_norm(model, 1.0)
            optimizer.step()
            return loss

        step = gpurnn.captured(step, when=lambda: bptt.steady)

    function    takes arrays and returns arrays, a tuple of them, or None.  For arrays of one set of shapes and dtypes the
                first two calls run it as it is; the third records its work, and from then on its Python code is not run
                any more: the work is done again on what the arrays now hold.  So it must not look at results, nor draw
                random numbers on the host (dropout does not), nor keep what it computes anywhere but in arrays that
                stay (parameters, gradients, an optimiser's moments, TruncatedBPTT's states do).
    when        says before each call whether it would do the same work as the last one; if not, it runs as it is.
    Where parameters are joined, tied, frozen or given other settings it is recorded anew.
    Arrays of the device are returned that the next call overwrites.  An optimiser's `lr` may be set between calls.
    Where the work cannot be captured it runs as it is, with a RuntimeWarning that says why, as `reason` does.
    On NumPy the function is simply called.
    """
    return Captured(function, when)
