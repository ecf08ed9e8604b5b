"""What can go wrong in a kernel, or with the interpreter's knowledge of PTX."""


class PtxError(RuntimeError):
    """thread: the index, in the whole grid, of a thread that did it; None where the message says all that is known."""

    def __init__(self, message: str, thread: int | None = None):
        super().__init__(message)
        self.thread = thread


class OutOfBounds(PtxError):
    """An address outside of every allocation of its space."""


class Misaligned(PtxError):
    """An address that is not a multiple of the access's size."""


class Uninitialised(PtxError):
    """A byte or a register that nobody has written yet, or an mbarrier that nobody has initialised."""


class Race(PtxError):
    """Two accesses to the same bytes, one of them a write, that nothing orders."""


class Divergence(PtxError):
    """A warp-wide instruction without the whole warp, or one barrier reached at different places."""


class Deadlock(PtxError):
    """Nothing will ever happen again."""


class BarrierMisuse(PtxError):
    """A cluster's barrier or an mbarrier used against its rules, or an mbarrier's bytes used as data."""


class PeerExited(PtxError):
    """An access to the shared memory of a block that has exited by then, or may have: nothing orders the two."""


class Trap(PtxError):
    """The kernel executed `trap`."""


class UnknownInstruction(PtxError):
    """PTX that the interpreter does not know: raised before anything runs, never skipped."""
