"""What PyTorch asks of a function beyond its gradient: gradients of gradients, torch.func, its own module database."""

import functools
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[oracle]'")

from gpurnn import torch as ours  # noqa: E402
from gpurnn.cells import CELLS  # noqa: E402
from gpurnn.torch import composite  # noqa: E402
from gpurnn.torch.stack import Stack, parameters_of  # noqa: E402
from gpurnn.torch.sweep import Sweep  # noqa: E402

pytestmark = pytest.mark.oracle
nn = torch.nn
T, N, I, H = 4, 3, 2, 3
SMOOTH = ("rnn_tanh", "lstm", "gru", "mingru")  # as many kinds: one state, two, gates that are split, no matrix


def case(cell, layers=1, directions=1):
    """A stack, and random x, states and weights that want gradients."""
    torch.manual_seed(0)

    def made(*shape):
        return (torch.randn(*shape, dtype=torch.float64) * 0.5).requires_grad_()

    G, weights = cell.gates, []
    for layer in range(layers):
        for _ in range(directions):
            shapes = {"weight_ih": (G * H, I if layer == 0 else directions * H), "weight_hh": (G * H, H)}
            shapes |= dict.fromkeys(("bias_ih", "bias_hh"), (G * H,)) | dict.fromkeys(cell.params, (H,))
            weights += [made(*shapes[kind]) for kind in parameters_of(cell, True)]
    states = [made(layers * directions, N, H) for _ in range(cell.states)]
    return Stack(cell, layers, directions, True, 0.0, None), made(T, N, I), states, weights


@pytest.mark.parametrize("rows", [[3, 3, 3, 3], [3, 3, 2, 1]])
@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_and_gradients_of_gradients(name, rows):
    stack, x, states, weights = case(CELLS[name], 2, 2)
    rows = np.array(rows)
    live = torch.as_tensor(rows)[:, None, None] > torch.arange(N)[None, :, None]

    def f(x, *tensors):
        return Sweep.apply(stack, rows, [], x * live, *tensors)

    y, final = composite.run(stack, rows, [], x * live, states, weights)
    for one, other in zip(f(x, *states, *weights), (y, *final), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(f, (x, *states, *weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x, *states, *weights), fast_mode=True)


@pytest.mark.parametrize("name", SMOOTH)
def test_many_gradients_at_once(name):
    stack, x, states, weights = case(CELLS[name], 2, 2)
    rows = np.array([3, 3, 2, 1])
    live = torch.as_tensor(rows)[:, None, None] > torch.arange(N)[None, :, None]

    def f(x, *states):
        return Sweep.apply(stack, rows, [], x * live, *states, *weights)[0].sum(1)

    at_once, one_by_one = (
        torch.autograd.functional.jacobian(f, (x.detach(), *map(torch.Tensor.detach, states)), vectorize=vectorize)
        for vectorize in (True, False)
    )
    for many, each in zip(at_once, one_by_one, strict=True):
        torch.testing.assert_close(many, each, rtol=1e-12, atol=1e-12)
    y = f(x, *states)
    many = torch.autograd.grad(y, weights, torch.stack([torch.ones_like(y), y.detach()]), is_grads_batched=True)
    for gradient, both in zip(torch.autograd.grad(f(x, *states), weights, y.detach()), many, strict=True):
        torch.testing.assert_close(both[1], gradient, rtol=1e-10, atol=1e-12)


def test_a_penalty_on_the_gradient_with_dropout_and_one_output_used():
    torch.manual_seed(0)
    module, reference = ours.LSTM(I, H, 2, dropout=0.5).double(), nn.LSTM(I, H, 2, dropout=0.5).double()
    reference.load_state_dict(module.state_dict())
    found = []
    for each in module, reference:
        torch.manual_seed(1)
        x = torch.linspace(-1, 1, T * N * I, dtype=torch.float64).reshape(T, N, I).requires_grad_()
        _, (_, c) = each(x)
        (slope,) = torch.autograd.grad(c.square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        found.append([slope, x.grad, *(p.grad for p in each.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_torch_func():
    torch.manual_seed(0)
    module, reference = ours.GRU(I, H, 2).double(), nn.GRU(I, H, 2).double()
    reference.load_state_dict(module.state_dict())
    weights = {name: value.detach() for name, value in module.named_parameters()}
    x = torch.randn(T, N, I, dtype=torch.float64)
    assert module.reason(x) is None

    def loss(weights, x):
        assert "torch.func" in module.reason(x)
        return torch.func.functional_call(module, weights, (x,))[0].square().sum()

    whole = torch.func.grad(loss)(weights, x)
    loss_of = functools.partial(torch.func.functional_call, reference)
    loss_of(dict(reference.named_parameters()), (x,))[0].square().sum().backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(whole[name], parameter.grad, rtol=1e-10, atol=1e-10)
    each = torch.func.vmap(torch.func.grad(loss), (None, 1))(weights, x.unsqueeze(2))  # of every sample
    for name in weights:
        torch.testing.assert_close(each[name].sum(0), whole[name], rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(x)
    _, slope = torch.func.jvp(lambda x: loss(weights, x), (x,), (direction,))
    expected = (torch.func.grad(loss, 1)(weights, x) * direction).sum()
    torch.testing.assert_close(slope, expected, rtol=1e-10, atol=1e-10)
    with torch.autograd.forward_ad.dual_level():
        assert "forward-mode" in module.reason(x)
        y, _ = module(torch.autograd.forward_ad.make_dual(x, direction))
        tangent = torch.autograd.forward_ad.unpack_dual(y.square().sum()).tangent
    torch.testing.assert_close(tangent, expected, rtol=1e-10, atol=1e-10)


def flat(outputs):
    return [part for part in torch.utils._pytree.tree_leaves(tuple(outputs)) if isinstance(part, torch.Tensor)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_pytorchs_module_database(name, training):
    """Its own samples for RNN, GRU and LSTM: the same outputs as torch.nn's, and its own check of the gradients."""
    pytest.importorskip("expecttest", reason="PyTorch's test tools want expecttest: pip install -e '.[oracle]'")
    from torch.testing._internal import common_modules as database

    inputs = {
        "RNN": functools.partial(database.module_inputs_torch_nn_RNN_GRU, is_rnn=True, with_packed_sequence=True),
        "GRU": functools.partial(database.module_inputs_torch_nn_RNN_GRU, is_rnn=False, with_packed_sequence=True),
        "LSTM": database.module_inputs_torch_nn_LSTM,
    }[name]
    samples = inputs(None, "cpu", torch.float64, True, training)
    assert len(samples) > 10
    for sample in samples:
        arguments = sample.constructor_input.args, dict(sample.constructor_input.kwargs, dtype=torch.float64)
        module = getattr(ours, name)(*arguments[0], **arguments[1]).train(training)
        reference = getattr(nn, name)(*arguments[0], **arguments[1]).train(training)
        reference.load_state_dict(module.state_dict())
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        for one, other in zip(flat(module(*args, **kwargs)), flat(reference(*args, **kwargs)), strict=True):
            torch.testing.assert_close(one, other)
        names, values = zip(*module.named_parameters(), strict=True)

        def f(*values, module=module, names=names, args=args, kwargs=kwargs):
            return tuple(flat(torch.func.functional_call(module, dict(zip(names, values, strict=True)), args, kwargs)))

        assert torch.autograd.gradcheck(f, values, fast_mode=True)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_pytorchs_error_database(name):
    pytest.importorskip("expecttest", reason="PyTorch's test tools want expecttest: pip install -e '.[oracle]'")
    from torch.testing._internal import common_modules as database

    errors = database.module_error_inputs_torch_nn_RNN_GRU(None, "cpu", torch.float32, False, True)
    assert len(errors) > 10
    for error in errors:
        call = error.module_error_input
        with pytest.raises(error.error_type) as came:
            module = getattr(ours, name)(*call.constructor_input.args, **call.constructor_input.kwargs)
            module(*call.forward_input.args, **call.forward_input.kwargs)
        assert re.search(error.error_regex, str(came.value))
