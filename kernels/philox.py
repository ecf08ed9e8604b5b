"""Random words that are a function of where they are used: Philox 4x32-10.

Four words of counter and two of key give four random words: ten rounds of two multiplications (Salmon, Moraes, Dror and
Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the authors' Random123 has it, cuRAND and PyTorch use it).
Nobody has a state to keep, and any thread can have any word at once.  This file imports nothing: the same lines are
compiled for a GPU and for a CPU, and run on NumPy's arrays.
"""

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
STEPS = 0x9E3779B9, 0xBB67AE85  # of the key, from round to round: the golden ratio, and the square root of 3


def generator(u32, u64):
    """`philox(c0, c1, c2, c3, k0, k1)`: four words; u32 and u64 make unsigned numbers of what is at hand."""
    first, second, low, half = (u64(number) for number in (*MULTIPLIERS, 0xFFFFFFFF, 32))
    step0, step1 = u32(STEPS[0]), u32(STEPS[1])

    def philox(c0, c1, c2, c3, k0, k1):
        for _ in range(ROUNDS):
            a, b = u64(c0) * first, u64(c2) * second
            c0, c1 = u32(u32(b >> half) ^ c1 ^ k0), u32(b & low)
            c2, c3 = u32(u32(a >> half) ^ c3 ^ k1), u32(a & low)
            k0, k1 = u32(k0 + step0), u32(k1 + step1)
        return c0, c1, c2, c3

    return philox
