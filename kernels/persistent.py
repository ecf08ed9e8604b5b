"""All T steps of any cell in one launch: weight_hh stays in the registers and shared memory of a group of blocks.

A group has a few batch rows and all H units; groups never wait for each other.  A block has some of the units, and a
thread all gates of a few (unit, row) pairs, whose states never leave its registers.  A step is: the product
(`products`), the cell, the new vector to all blocks of the group (`exchange`).  While the others' share is on its way a
thread stores what backward will read and loads what the next step needs.  With one block to a group nobody waits for
another SM.

The first look for the others' share waits for those loads too, so memory's latency stands in every step.  Where the
kernel is AHEAD, they are given out before the product, into registers of their own.  That is so where it was faster on
an H200 (bench/results): LSTM 768 forward 1.87 -> 1.68 us a step, LSTM 256 of 64 rows back 4.82 -> 3.70; cells of one
gate lose.  `newer`: the chip has sm_90 or later; before, some kernels have no registers for it, nor for what makes a
warp wait as one.

    forward    slots (x W_ih^T, no biases) -> h, the other states, and in the slots what backward reads
    backward   dy, dL/d(final state) -> in the slots dL/dr and dL/dx; dL/d(initial state)

Slots and states are laid out as in `step`, and both write the same: one's tape is the other's.  Rows are sorted by
length, longest first, so a group stops at its first row's end.  Work on persistent kernels and what it rests on: Diamos
et al., "Persistent RNNs: stashing recurrent weights on-chip", ICML 2016.
"""

from .persistent_backward import backward
from .persistent_forward import forward

__all__ = ["backward", "forward"]
