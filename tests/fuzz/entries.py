"""The doors of the library, as functions whose defaults work: each is called with some of them replaced.

A default that has to be made anew for each call is a partial.  Of `which...` one is drawn, and nothing else takes its place.
"""

from functools import partial
from typing import Any

import numpy as np

import gpurnn
from gpurnn import diagnose, initializers
from gpurnn.optim import schedules
from tests.fuzz.values import H, I, N, T

X = np.random.default_rng(0).standard_normal((T, N, I)).astype("f4")
LONG = np.random.default_rng(1).standard_normal((6, 2, I)).astype("f4")
TOKENS, LOGITS = np.zeros((T, N), int), np.ones((T, N, 5), "f4")
LOSS = gpurnn.softmax_cross_entropy
GRADIENT, OUTPUT = np.ones((T, N, H), "f4"), np.ones((6, 2, H), "f4")
CELL = gpurnn.LSTM(1, 1).cell
OWN = object()  # what was saved

lstm = partial(gpurnn.LSTM, I, H, rng=0)
small = partial(gpurnn.RNN, 2, 2, dtype="float64", rng=0)
embedding, head = partial(gpurnn.Embedding, 5, I, rng=0), partial(gpurnn.Linear, H, 5, rng=0)
generator = partial(np.random.default_rng, 0)


def _model() -> gpurnn.SequenceModel:
    return gpurnn.SequenceModel(embedding(), lstm(), head(), dropout=gpurnn.Dropout(0.1, rng=0))


model = partial(_model)


def call_rnn(
    input_size=I, hidden_size=H, num_layers=1, nonlinearity="tanh", bias=True, bidirectional=False, dropout=0.0,
    trainable_h0=False, clip_in_time=None, init=None, dtype="float32", precision="float32", executor=None, rng=0,
):  # fmt: skip
    options = {
        name: value for name, value in locals().items() if name not in ("input_size", "hidden_size", "num_layers")
    }
    gpurnn.RNN(input_size, hidden_size, num_layers, **options)(X)


def call_lstm(forget_bias=1.0):
    gpurnn.LSTM(I, H, forget_bias=forget_bias)(X)


def call_gru(update_bias=0.0):
    gpurnn.GRU(I, H, update_bias=update_bias)(X)


def call_recurrent(cell=CELL):
    gpurnn.Recurrent(cell, I, H)


def call_linear(in_features=I, out_features=2, bias=True, dtype="float32", rng=0, x=X):
    gpurnn.Linear(in_features, out_features, bias=bias, dtype=dtype, rng=rng)(x)


def call_embedding(num=5, dim=I, dtype="float32", rng=0, tokens=TOKENS):
    gpurnn.Embedding(num, dim, dtype=dtype, rng=rng)(tokens)


def call_dropout(p=0.5, dtype="float32", rng=0, x=X, dy=X):
    gpurnn.Dropout(p, dtype=dtype, rng=rng)(x)[1](dy)


def call_a_layer(x=X, state=None, lengths=None, training=True, copy=True):
    lstm()(x, state, lengths=lengths, training=training, copy=copy)


def call_backward(dy=GRADIENT, dstate=None, keep=False, flow=None):
    lstm()(X)[2](dy, dstate, keep, flow)


def call_backwards_of_layers(which=(0, 1), dy=X):
    layer, x = ((gpurnn.Linear(I, I, rng=0), X), (embedding(), TOKENS))[which]
    layer(x)[1](dy)


def call_sequence_model(embedding=embedding, recurrent=lstm, head=head, dropout=None):
    gpurnn.SequenceModel(embedding, recurrent, head, dropout=dropout)


def call_a_model(x=TOKENS, state=None, lengths=None, training=True):
    _model()(x, state, lengths=lengths, training=training)


def call_backward_of_a_model(dout=LOGITS, dstate=None, keep=False, flow=None):
    _model()(TOKENS)[2](dout, dstate, keep, flow)


def call_softmax(x=X, axis=-1):
    gpurnn.softmax(x, axis)


def call_cross_entropy(logits=X, targets=TOKENS, reduction="mean", ignore_index=None, lengths=None):
    LOSS(logits, targets, reduction=reduction, ignore_index=ignore_index, lengths=lengths)


def call_squared_error(pred=X, target=X, output="linear", reduction="mean", lengths=None):
    gpurnn.mean_squared_error(pred, target, output=output, reduction=reduction, lengths=lengths)


def _stepped(optimizer: Any) -> None:
    optimizer.model.grads.flat[...] = 0.1
    optimizer.step()


def call_sgd(model=lstm, lr=0.1, momentum=0.0, nesterov=False, weight_decay=0.0):
    _stepped(gpurnn.SGD(model, lr, momentum, nesterov, weight_decay))


def call_rmsprop(model=lstm, lr=0.1, alpha=0.9, eps=1e-8, momentum=0.0, centered=False, weight_decay=0.0):
    _stepped(gpurnn.RMSprop(model, lr, alpha, eps, momentum, centered, weight_decay))


def call_adam(which=(gpurnn.Adam, gpurnn.AdamW), model=lstm, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0):
    _stepped(which(model, lr, betas, eps, weight_decay))


def call_set_lr(lr=0.1):
    optimizer = gpurnn.Adam(lstm())
    optimizer.lr = lr
    _stepped(optimizer)


def call_clip(which=(gpurnn.clip_grad_norm, gpurnn.clip_grad_value), model=lstm, limit=1.0):
    which(model, limit)
    gpurnn.grad_norm(model)


def call_schedule(which=(0, 1, 2), total=10, warmup=2, floor=0.5, step=3):
    if which == 2:
        schedules.step_decay(total, floor)(step)
    else:
        (schedules.warmup_cosine, schedules.linear_decay)[which](total, warmup, floor)(step)


def call_initializer(which=(0, 1, 2, 3, 4), value=0.5, rng=generator, rows=2, columns=3):
    made = [initializers.uniform, initializers.normal, partial(initializers.scaled, initializers.identity)]
    draw = made[which](value) if which < 3 else (initializers.orthogonal, initializers.glorot_uniform)[which - 3]
    draw(rng, rows, columns)


def call_full_bptt(model=model, x=TOKENS, targets=TOKENS, loss=LOSS, state=None, lengths=None, flow=None):
    gpurnn.full_bptt(model, x, targets, loss, state, lengths=lengths, flow=flow)


def call_truncated_bptt(
    model=model, k1=2, k2=4, x=TOKENS, targets=TOKENS, loss=LOSS, lengths=None, flow=None, state=None
):
    bptt = gpurnn.TruncatedBPTT(model, loss, k1, k2)
    bptt.reset(state)
    for _ in range(2):
        bptt.step(x, targets, lengths=lengths, flow=flow)


def call_load_bptt(which=("begin0", "carried1", "stretch", "lengths"), value=OWN):
    bptt = gpurnn.TruncatedBPTT(_model(), LOSS, T)
    bptt.step(TOKENS, TOKENS)
    other = bptt.state_dict()
    bptt.load_state_dict(other if value is OWN else other | {which: value})
    bptt.step(TOKENS, TOKENS)


def call_load(which=("weight_ih_l0", "bias_hh_l0"), value=OWN):
    layer = lstm()
    layer.load_state_dict(layer.state_dict() | ({} if value is OWN else {which: value}))


def call_load_all(which=(0, 1, 2), values=OWN):
    makes = (lstm, lambda: gpurnn.Adam(lstm()), lambda: gpurnn.TruncatedBPTT(_model(), LOSS, T))
    other = makes[which]()
    other.load_state_dict(other.state_dict() if values is OWN else values)


def call_load_optimizer(which=("step", "lr", "exp_avg.weight_ih_l0", "exp_avg_sq.bias_hh_l0"), value=OWN):
    optimizer = gpurnn.Adam(lstm())
    optimizer.load_state_dict(optimizer.state_dict() | ({} if value is OWN else {which: value}))
    _stepped(optimizer)


def call_cell(name="c", gates=1, states=1, params=(), returned=None, saved=None):
    def forward(x, r, state, params):
        new = tuple(gpurnn.tanh(x[0] + r[0] + s) for s in state) if returned is None else returned
        return new, () if saved is None else saved

    def backward(dnext, saved, state, next_state, params):
        return (dnext[0],) * len(gate), (dnext[0],) * len(gate), dnext, (0,) * len(params)

    gate = range(gates) if isinstance(gates, int) and gates < 100 else ()
    gpurnn.Recurrent(gpurnn.Cell(name, gates, states, forward, backward, params), I, H, rng=0)(X)


def call_operation(which=(0, 1, 2, 3, 4, 5, 6, 7, 8), value=1.0):
    """A cell that combines its values with one from outside."""

    def forward(x, r, state, params):
        z = x[0] + r[0]
        operations = [
            lambda: z + value, lambda: value - z, lambda: z * value, lambda: value / z, lambda: gpurnn.maximum(z, value),
            lambda: gpurnn.where(z > 0, value, z), lambda: gpurnn.where(z > value, z, z), lambda: z <= value,
            lambda: z**value,
        ]  # fmt: skip
        result = operations[which]()
        return (gpurnn.where(result, z, 0) if which == 7 else result,), ()

    def backward(dnext, saved, state, next_state, params):
        return (dnext[0],), (dnext[0],), (0,), ()

    gpurnn.Recurrent(gpurnn.Cell("c", 1, 1, forward, backward), I, H, rng=0, executor="numpy")(X)


def call_monitor(model=lstm, every=1, reach=10, log=None, x=LONG, dout=OUTPUT):
    monitor = gpurnn.Monitor(model, every, reach=reach, log=log)
    monitor.zero_grad()
    monitor(x)[2](dout)


def call_check(layer=small, T=2, N=2, lengths=None, tolerance=1e-6, executor=None, rng=0):
    gpurnn.check_gradients(layer, T=T, N=N, lengths=lengths, tolerance=tolerance, executor=executor, rng=rng)


def call_diagnose(
    which=("gradient_flow", "decompose", "verdicts", "singular_values", "jacobians", "influence", "lyapunov_exponents"),
    model=lstm, x=LONG, state=None,
):  # fmt: skip
    getattr(diagnose, which)(model, x, state=state)


def call_diagnose_of_a_loss(
    which=(diagnose.gradient_flow, diagnose.decompose), x=LONG, targets=LONG, loss=None, lags=None
):
    which(lstm(), x, None if loss is None else targets, loss)
    diagnose.singular_values(lstm(), x, lags=lags)


def call_diagnose_steps(step=-1, steps=(-1,), leading=2, layer="l0", outputs=None):
    diagnose.gradient_flow(lstm(), LONG, step=step)
    diagnose.decompose(lstm(), LONG, steps=steps)
    diagnose.jacobians(lstm(), LONG, steps=steps, layer=layer)
    diagnose.lyapunov_exponents(lstm(), LONG, leading=leading)
    diagnose.influence(lstm(), LONG, step=step, outputs=outputs)


def call_biases(model=lstm, x=LONG, targets=None, loss=None, k1=2, k2=None, norm=1.0, parts=1):
    diagnose.truncation_bias(model, x, targets, loss, k1, k2)
    diagnose.clipping_bias(model, x, targets, loss, norm=norm, parts=parts)


def call_spectrum(model=lstm, layer="l0", norms=(1.0, 2.0, 3.0)):
    diagnose.recurrent_spectrum(model, layer)
    diagnose.clip_threshold(norms)


def call_captured(function=len, when=None, x=X):
    gpurnn.captured(function)
    gpurnn.captured(lambda x: x, when=when)(x)
