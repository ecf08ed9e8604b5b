"""Cells from the literature that do not ship, as a reader would write them: forward alone, a few lines each.

Where a paper puts a matrix behind a gate (the reset of MUT1), the matrix product comes first here, as in cuDNN's GRU.
"""

from gpurnn.cells import Cell, exp, log, maximum, relu, sigmoid, tanh, where


def janet(x, r, state, params):
    """van der Westhuizen & Lasenby 2018: a forget gate and nothing else, the input's a little more closed."""
    s = x[0] + r[0]
    return (sigmoid(s) * state[0] + (1 - sigmoid(s - 1)) * tanh(x[1] + r[1]),)


def ugrnn(x, r, state, params):
    """Collins et al. 2017, the update gate RNN."""
    g = sigmoid(x[0] + r[0])
    return (g * state[0] + (1 - g) * tanh(x[1] + r[1]),)


def intersection(x, r, state, params):
    """Collins et al. 2017, the +RNN: one gate through depth, one through time; x[4] is what goes past.  h is what others read."""
    y_in, h_in = relu(x[0] + r[0]), tanh(x[1] + r[1])
    g_y, g_h = sigmoid(x[2] + r[2]), sigmoid(x[3] + r[3])
    return g_h * state[0] + (1 - g_h) * h_in, g_y * x[4] + (1 - g_y) * y_in


def mut1(x, r, state, params):
    """Jozefowicz et al. 2015, found by evolution; the update gate sees x alone."""
    z, reset = sigmoid(x[0]), sigmoid(x[1] + r[1])
    return (tanh(reset * r[2] + tanh(x[2])) * z + state[0] * (1 - z),)


def mut3(x, r, state, params):
    z, reset = sigmoid(x[0] + tanh(r[0])), sigmoid(x[1] + r[1])
    return (tanh(reset * r[2] + x[2]) * z + state[0] * (1 - z),)


def fast_grnn(x, r, state, params):
    """Kusupati et al. 2018: gate and candidate share their matrices, and have a bias each."""
    b_z, b_h, zeta, nu = params
    z = sigmoid(x[0] + r[0] + b_z)
    return ((sigmoid(zeta) * (1 - z) + sigmoid(nu)) * tanh(x[0] + r[0] + b_h) + z * state[0],)


def antisymmetric(x, r, state, params):
    """Chang et al. 2019, with gating: a step of Euler's method."""
    return (state[0] + 0.1 * sigmoid(x[1] + r[1]) * tanh(x[0] + r[0]),)


def star(x, r, state, params):
    """Turkoglu et al. 2021, the stackable recurrent cell."""
    k = sigmoid(x[0] + r[0])
    return (tanh((1 - k) * state[0] + k * tanh(x[1])),)


def leaky_rate(x, r, state, params):
    """Jaeger et al. 2007, Song et al. 2016: the voltage leaks, others see its rate.  States: rate, voltage."""
    v = 0.8 * state[1] + 0.2 * (x[0] + r[0])
    return relu(v), v


def bistable(x, r, state, params):
    """Vecoven et al. 2021, the neuromodulated BRC."""
    a, c = 1 + tanh(x[0] + r[0]), sigmoid(x[1] + r[1])
    return (c * state[0] + (1 - c) * tanh(x[2] + a * state[0]),)


def chaos_free(x, r, state, params):
    """Laurent & von Brecht 2017."""
    return (sigmoid(x[0] + r[0]) * tanh(state[0]) + sigmoid(x[1] + r[1]) * tanh(x[2]),)


def addition_subtraction(x, r, state, params):
    """Zhang et al. 2018, twin-gated: two gates from one sum and one difference."""
    return (sigmoid(x[0] + r[0]) * x[0] + sigmoid(x[0] - r[0]) * state[0],)


def light_gru(x, r, state, params):
    """Ravanelli et al. 2018, without its batch normalisation."""
    z = sigmoid(x[0] + r[0])
    return (z * state[0] + (1 - z) * relu(x[1] + r[1]),)


def oscillators(x, r, state, params):
    """Rusch & Mishra 2021, coRNN: positions and velocities of damped oscillators."""
    gamma, epsilon = params
    z = state[1] + 0.1 * (tanh(x[0] + r[0]) - gamma * state[0] - epsilon * state[1])
    return state[0] + 0.1 * z, z


def exponential_gates(x, r, state, params):
    """Beck et al. 2024, sLSTM with a head of one unit: exponential input gate, a normaliser and a stabiliser."""
    _, c, n, m = state
    i, f = x[0] + r[0], x[1] + r[1]
    log_f = where(f < 0, f, 0) - log(1 + exp(where(f < 0, f, -f)))
    m_next = maximum(log_f + m, i)
    i, f = exp(i - m_next), exp(log_f + m - m_next)
    c, n = f * c + i * tanh(x[2] + r[2]), f * n + i
    return sigmoid(x[3] + r[3]) * c / n, c, n, m_next


LITERATURE = {
    forward.__name__: Cell(forward.__name__, gates, states, forward, params=params)
    for forward, gates, states, params in (
        (janet, 2, 1, ()),
        (ugrnn, 2, 1, ()),
        (intersection, 5, 2, ()),
        (mut1, 3, 1, ()),
        (mut3, 3, 1, ()),
        (fast_grnn, 1, 1, ("b_z", "b_h", "zeta", "nu")),
        (antisymmetric, 2, 1, ()),
        (star, 2, 1, ()),
        (leaky_rate, 1, 2, ()),
        (bistable, 3, 1, ()),
        (chaos_free, 3, 1, ()),
        (addition_subtraction, 1, 1, ()),
        (light_gru, 2, 1, ()),
        (oscillators, 1, 2, ("gamma", "epsilon")),
        (exponential_gates, 4, 4, ()),
    )
}
