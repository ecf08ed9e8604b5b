"""Random numbers of a place: which words of Philox a unit has, and what is made of one of them.

    counter   (unit + 2^28 block, row, step, call)      key   of the layer and direction

The call has 64 bits, of which the upper are added to the key's second word.  A number for each step has its step there,
one for the whole sequence SEQUENCE.  A block is four words, one for each of four numbers that a cell asks for.

This file imports nothing: the same lines run on NumPy's arrays and emit code (`lanes`).  They multiply, add and shift
and nothing else, each rounded by itself, so that all executors get the same bits.
"""

SEQUENCE = 0xFFFFFFFF  # in the place of the step
EACH = 4  # numbers to a block
MOST_UNITS = 1 << 28


def words(philox, key, call, row, step, unit, block):
    """The four words of a block; key: a pair; call: the lower half."""
    return philox(unit + block * MOST_UNITS, row, step, call, *key)


def threshold(p):
    """A word is below it with probability p, 0 < p < 1."""
    return max(1, min(round(p * 2**32), 2**32 - 1))


# log(1 + x), after Cephes' logf (Moshier), highest power first.
LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
# erfinv(x) / x of w = -log(1 - x^2), in single precision: M. Giles, "Approximating the erfinv function", 2012.
CENTRE = (
    2.81022636e-08,
    3.43273939e-07,
    -3.5233877e-06,
    -4.39150654e-06,
    0.00021858087,
    -0.00125372503,
    -0.00417768164,
    0.246640727,
    1.50140941,
)
TAIL = (
    -0.000200214257,
    0.000100950558,
    0.00134934322,
    -0.00367342844,
    0.00573950773,
    -0.0076224613,
    0.00943887047,
    1.00167406,
    2.83297682,
)


def normal(word, machine):
    """The normal deviate of a word, float32: the inverse of the distribution function at (word + 0.5) / 2^32.

    It is within 2e-6 of it up to 5, and within 3e-3 beyond, where one word in 1.7 million is; the largest is 6.34.
    machine has `f32` (a number, or a whole number converted), `bits` and `real`, which take a float's bits for a whole
    number and back, and `where`.
    """
    f32, bits, real, where = machine.f32, machine.bits, machine.real, machine.where

    def polynomial(x, coefficients):
        value = f32(coefficients[0])
        for coefficient in coefficients[1:]:
            value = value * x + f32(coefficient)
        return value

    below = word < 0x80000000
    p = (f32(where(below, word, word ^ 0xFFFFFFFF)) + f32(0.5)) * f32(2.0**-32)  # of the nearer tail
    x, s = f32(1) - f32(2) * p, f32(4) * p * (f32(1) - p)
    power = 127 - ((bits(s) + 0x4AFB0D) >> 23)  # s = m / 2^power, m from sqrt(1/2) to sqrt(2)
    m = real(bits(s) + (power << 23)) - f32(1)
    k, mm = f32(power), m * m
    log = m + (polynomial(m, LOG) * m * mm - f32(0.5) * mm)
    w = k * f32(0.693359375) + (k * f32(-2.12194440e-4) - log)
    r = real(0x5F3759DF - (bits(w) >> 1))  # 1 / sqrt(w), by Newton's method
    for _ in range(3):
        r = r * (f32(1.5) - f32(0.5) * w * r * r)
    centre, tail = polynomial(w - f32(2.5), CENTRE), polynomial(w * r - f32(3), TAIL)
    size = x * where(w < f32(5), centre, tail) * f32(1.4142135623730951)
    return where(below, f32(0) - size, size)
