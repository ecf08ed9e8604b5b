"""One update of all parameters in one launch: each buffer is read once and written once.

Bytes a float32 value: SGD 12, with momentum 20; RMSprop 20, and 8 more each for its mean and for momentum; Adam 28.
`scalars` (groups, 4) come from `begin_update`: the step size, eps, 1 - lr weight_decay, and weight_decay, all for the
update under way, so that a captured launch works for every update; a rule sees those of its own group, `now`.
`numbers` are a, b, 1 - a and 1 - b: 1 - b of a rounded b would be off by more than a rounding.  Where there are several
groups, or something is frozen, `marks` says which group each line of 64 bytes belongs to, and a negative one that it
stays as it is.  Where the record holds a fault nothing changes.  A parameter that would not be finite keeps its value,
and the first such position goes to the record's FIRST.
"""

import math

from .build import Source
from .faults import FIRST, NOW, RECORD, SITE, VALUES, WARP, note, settle_first
from .last import is_last
from .numba_cuda import cuda, types
from .ptx import global_address, u64
from .vectors import WIDTH, accesses, division, finite, least

i64, f64 = types.int64, types.float64
THREADS = 256
LARGEST = {"float32": 2.0**63, "float64": 2.0**511}  # of a gradient, so that its square is finite


def begin_update(_, *, dtype):
    """Assigns the scalars of the update under way, from lr (1,) and the updates done, steps (1,) int64.

    groups (count, 3): of each what lr is multiplied by, weight_decay, and the updates that it has missed.
    1 - beta^t takes log2(t) products, always the same ones: a run that is resumed at t computes the same bits.
    loss (1,): a fault, named by `site`, where it is not finite; site 0: nobody looks.
    """
    real = getattr(types, dtype)

    def begin_an_update(record, fractions, site, loss, steps, lr, groups, count, scalars, beta1, beta2, eps):
        group = i64(cuda.threadIdx.x)
        if group == 0 and site != 0 and not finite(loss[0]):
            note(record, fractions, site, i64(0), loss[0])
        while group < count:
            rate, decay = lr[0] * groups[3 * group], groups[3 * group + 1]
            power1, power2 = f64(1), f64(1)
            square1, square2 = beta1, beta2
            t = steps[0] + 1 - i64(groups[3 * group + 2])
            while t > 0:
                if t & 1:
                    power1 *= square1
                    power2 *= square2
                square1 *= square1
                square2 *= square2
                t >>= 1
            root = math.sqrt(1 - power2)
            scalars[4 * group] = real(rate * root / (1 - power1))
            scalars[4 * group + 1] = real(eps * root)
            scalars[4 * group + 2] = real(1 - rate * decay)
            scalars[4 * group + 3] = real(decay)
            group += WARP

    signature = (RECORD, VALUES, i64, VALUES, RECORD, VALUES, VALUES, i64, types.CPointer(real), f64, f64, f64)
    return Source(begin_an_update, signature, WARP)


@cuda.jit(device=True)
def end_update(record, fractions, site, params, steps):
    """Counts the update; a fault where FIRST says that it left a parameter that is not finite.  By one thread."""
    settle_first(record, fractions, site, params)
    if record[SITE] == 0:
        steps[0] += 1
        record[NOW] += 1


def sgd(_, *, dtype, grouped, momentum, nesterov):
    """moments: momentum_buffer, or none.  a: momentum."""

    @cuda.jit(device=True)
    def rule(param, grad, moments, now, numbers):
        a, _, _, _ = numbers
        grad += now[3] * param
        if momentum:
            moments[0] = moments[0] * a + grad
            grad = moments[0] * a + grad if nesterov else moments[0]
        return param - now[0] * grad

    return _update(dtype, grouped, rule, int(momentum))


def rmsprop(_, *, dtype, grouped, centered, momentum):
    """moments: square_avg, grad_avg if centered, momentum_buffer if momentum.  a: alpha.  b: momentum."""
    real = getattr(types, dtype)
    root, ratio = division(dtype)
    LIMIT = LARGEST[dtype]
    LAST = int(centered) + int(momentum)

    @cuda.jit(device=True)
    def rule(param, grad, moments, now, numbers):
        a, b, rest_a, _ = numbers
        grad = max(min(grad + now[3] * param, real(LIMIT)), real(-LIMIT))
        moments[0] = moments[0] * a + rest_a * (grad * grad)
        spread = moments[0]
        if centered:
            moments[1] += rest_a * (grad - moments[1])
            spread = max(spread - moments[1] * moments[1], real(0))
        step = ratio(grad, root(spread) + now[1])
        if momentum:
            moments[LAST] = moments[LAST] * b + step
            step = moments[LAST]
        return param - now[0] * step

    return _update(dtype, grouped, rule, 1 + LAST)


def adam(_, *, dtype, grouped, decoupled):
    """moments: exp_avg, exp_avg_sq.  a, b: betas.  decoupled: AdamW's decay of the parameter."""
    real = getattr(types, dtype)
    root, ratio = division(dtype)
    LIMIT = LARGEST[dtype]

    @cuda.jit(device=True)
    def rule(param, grad, moments, now, numbers):
        _, b, rest_a, rest_b = numbers
        if decoupled:
            param *= now[2]
        else:
            grad += now[3] * param
        grad = max(min(grad, real(LIMIT)), real(-LIMIT))
        moments[0] += rest_a * (grad - moments[0])
        moments[1] = moments[1] * b + rest_b * (grad * grad)
        return param - now[0] * ratio(moments[0], root(moments[1]) + now[1])

    return _update(dtype, grouped, rule, 2)


def _update(dtype, grouped, rule, count):
    """params, m0, m1, m2 (size,): updated; of the moments the first `count` are used.  grads, scalars, marks: read.

    marks: int32, one for each 64 bytes of params; not read unless `grouped`.

    steps (1,) int64: one more, unless there is a fault.  site: of the parameters.  done: see `last`.
    """
    real = getattr(types, dtype)
    EACH, KEPT = WIDTH[dtype], max(1, count)
    LINE = 4 if dtype == "float32" else 3  # log2 of the values that share a mark
    load, store = accesses(dtype)

    def update(
        record, fractions, site, scalars, marks, params, grads, m0, m1, m2, size, a, b, rest_a, rest_b, steps, done
    ):  # fmt: skip
        change(record, scalars, marks, params, grads, m0, m1, m2, size, (a, b, rest_a, rest_b))
        if is_last(done) and cuda.threadIdx.x == 0:
            end_update(record, fractions, site, params, steps)

    @cuda.jit(device=True)
    def change(record, scalars, marks, params, grads, m0, m1, m2, size, numbers):
        k = (i64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x) * EACH
        if k >= size or record[SITE] != 0:
            return
        group = i64(0)
        if grouped:
            group = 4 * i64(marks[k >> LINE])
            if group < 0:
                return
        now = scalars[group], scalars[group + 1], scalars[group + 2], scalars[group + 3]
        param = cuda.local.array(EACH, real)
        grad = cuda.local.array(EACH, real)
        x0 = cuda.local.array(EACH, real)
        x1 = cuda.local.array(EACH, real)
        x2 = cuda.local.array(EACH, real)
        moments = cuda.local.array(KEPT, real)
        load(params, k, param)
        load(grads, k, grad)
        if count > 0:
            load(m0, k, x0)
        if count > 1:
            load(m1, k, x1)
        if count > 2:
            load(m2, k, x2)
        first = i64(EACH)
        for i in range(EACH):
            if count > 0:
                moments[0] = x0[i]
            if count > 1:
                moments[1] = x1[i]
            if count > 2:
                moments[2] = x2[i]
            value = rule(param[i], grad[i], moments, now, numbers)
            if finite(value):
                param[i] = value
            else:
                first = min(first, i64(i))
            if count > 0:
                x0[i] = moments[0]
            if count > 1:
                x1[i] = moments[1]
            if count > 2:
                x2[i] = moments[2]
        if first < EACH:
            least(global_address(record, FIRST), u64(k + first))
        store(params, k, param)
        if count > 0:
            store(m0, k, x0)
        if count > 1:
            store(m1, k, x1)
        if count > 2:
            store(m2, k, x2)

    pointer = types.CPointer(real)
    marks_of = types.CPointer(types.int32)
    signature = (RECORD, VALUES, i64, pointer, marks_of, *[pointer] * 5, i64, *[real] * 4, RECORD, RECORD)
    return Source(update, signature, THREADS)
