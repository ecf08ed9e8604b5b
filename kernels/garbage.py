"""Python's collector of cycles while Numba compiles, which makes millions of objects that stay until it is done."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def left_lying() -> Iterator[None]:
    """Without collections meanwhile, each of which would look at all there is and find next to nothing.

    They took about a tenth of a kernel's time.  Where two threads compile, they may begin again a little early.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
