"""`gpurnn.torch` against torch.nn: the same results, gradients, states, masks, errors and files."""

import copy
import io
import pickle
import threading
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[oracle]'")

import gpurnn  # noqa: E402
from gpurnn import environment  # noqa: E402
from gpurnn import torch as ours  # noqa: E402
from tests.fake_cupy.backend import as_backend  # noqa: E402

pytestmark = pytest.mark.oracle
nn = torch.nn
NAMES = ("LSTM", "GRU", "RNN")


def pair(name, *args, dtype=torch.float64, **options):
    torch.manual_seed(0)
    reference = getattr(nn, name)(*args, **options).to(dtype)
    module = getattr(ours, name)(*args, **options).to(dtype)
    module.load_state_dict(reference.state_dict())
    return module, reference


def leaves(value):
    return [part for part in torch.utils._pytree.tree_leaves(value) if isinstance(part, torch.Tensor)]


def results(module, given, seed=1):
    """Outputs and gradients, of everything that has one."""
    torch.manual_seed(seed)
    module.zero_grad()
    given = [
        tuple(g.clone().requires_grad_() for g in part) if isinstance(part, tuple) else part.clone().requires_grad_()
        for part in given
    ]
    y, state = module(*given)
    outs = [y, *leaves(state)]
    sum((out.square() * (k + 1)).sum() for k, out in enumerate(outs)).backward()
    return [*outs, *(part.grad for part in leaves(given)), *(part.grad for part in module.parameters())]


def same(a, b, tolerance=1e-12):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def state_for(module, N, batched=True):
    shape = (module.num_layers * (1 + module.bidirectional), *([N] if batched else []), module.hidden_size)
    parts = tuple(torch.randn(shape, dtype=module.weight_ih_l0.dtype) for _ in range(module.cell.states))
    return parts if len(parts) > 1 else parts[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "layers, dropout, bidirectional", [(1, 0, False), (2, 0.5, False), (3, 0.3, True), (2, 1, True)]
)
@pytest.mark.parametrize("bias, batch_first", [(True, False), (False, True)])
def test_layers(name, layers, dropout, bidirectional, bias, batch_first):
    options = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional, "dropout": dropout}
    module, reference = pair(name, 5, 7, layers, **options)
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    N = 4 if batch_first else 6
    assert module.reason(x) is None
    for given in [x], [x, state_for(module, N)]:
        same(results(module, given), results(reference, given))
    module.eval(), reference.eval()
    same(results(module, [x]), results(reference, [x]))


@pytest.mark.parametrize("name", NAMES)
def test_float32(name):
    module, reference = pair(name, 5, 7, 2, bidirectional=True, dtype=torch.float32)
    x = torch.randn(20, 6, 5)
    same(results(module, [x]), results(reference, [x]), 1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sorted", [True, False])
@pytest.mark.parametrize("dropout, bidirectional", [(0, False), (0.5, True)])
def test_packed(name, sorted, dropout, bidirectional):
    module, reference = pair(name, 5, 7, 2, dropout=dropout, bidirectional=bidirectional)
    padded = torch.randn(6, 4, 5, dtype=torch.float64)
    lengths = [6, 6, 3, 1] if sorted else [3, 6, 1, 6]
    state = state_for(module, 4)

    class Padded(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, state=None):
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=sorted)
            y, state = self.inner(packed, state)
            return nn.utils.rnn.pad_packed_sequence(y)[0], state

    for given in [padded], [padded, state]:
        same(results(Padded(module), given), results(Padded(reference), given))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(name, batch_first):
    module, reference = pair(name, 5, 7, 2, batch_first=batch_first)
    x = torch.randn(6, 5, dtype=torch.float64)
    for given in [x], [x, state_for(module, 1, batched=False)]:
        same(results(module, given), results(reference, given))


def test_memory_of_any_order():
    module, reference = pair("LSTM", 5, 7)
    x = torch.randn(5, 6, 4, dtype=torch.float64).permute(1, 2, 0)
    same(results(module, [x]), results(reference, [x]))
    wide = x[:, :1].expand(6, 4, 5)
    same(leaves(module(wide)), leaves(reference(wide)))
    for each in module, reference:
        each.weight_hh_l0 = nn.Parameter(each.weight_hh_l0.detach().t().contiguous().t())
    assert not module.weight_hh_l0.is_contiguous()
    same(results(module, [x]), results(reference, [x]))
    negative = torch.complex(x, x).conj().imag  # memory that says to be negated
    same(leaves(module(negative)), leaves(reference(negative)))


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_said_as_torch_says_it(name):
    module, reference = pair(name, 5, 7, 2)
    x, state = torch.randn(6, 4, 5, dtype=torch.float64), state_for(module, 4)
    half = tuple(part[:1] for part in state) if isinstance(state, tuple) else state[:1]
    flat = tuple(part[:, 0] for part in state) if isinstance(state, tuple) else state[:, 0]
    other = [torch.utils._pytree.tree_map(turn, state) for turn in (torch.Tensor.float, lambda part: part.to("meta"))]
    bad = [x[..., :3]], [x[0, 0]], [x[:0]], [x, half], [x, flat], [x.float()], [x[:, 0], state], [x[None]]
    bad += ([x, other[0]], [x, other[1]])
    for given in bad:
        with pytest.raises((RuntimeError, ValueError)) as expected:
            reference(*given)
        with pytest.raises(expected.type) as came:
            module(*given)
        assert str(came.value) == str(expected.value)


def test_constructor_says_what_torch_says():
    for options in {"dropout": 2}, {"bias": 1}, {"proj_size": 7}, {"num_layers": 0}:
        with pytest.raises((TypeError, ValueError)) as expected:
            nn.LSTM(5, 7, **options)
        with pytest.raises(expected.type) as came:
            ours.LSTM(5, 7, **options)
        assert str(came.value) == str(expected.value)


def test_no_rows():
    module, reference = pair("LSTM", 5, 7)
    x = torch.randn(6, 0, 5, dtype=torch.float64)
    same(leaves(module(x)), leaves(reference(x)))


@pytest.mark.parametrize("name", NAMES)
def test_copies_pickles_and_files(name):
    module, _ = pair(name, 5, 7, 2)
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    expected = leaves(module(x))
    for other in copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False):
        assert type(other) is type(module)
        same(leaves(other(x)), expected, 0)
    assert repr(module) == repr(getattr(nn, name)(5, 7, 2))


def test_a_parameter_that_is_replaced_is_heeded():
    module, reference = pair("LSTM", 5, 7)
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    doubled = {key: value.detach() * 2 for key, value in module.named_parameters()}
    call = torch.func.functional_call
    same(leaves(call(module, doubled, (x,))), leaves(call(reference, doubled, (x,))))
    for each in module, reference:
        nn.utils.parametrizations.weight_norm(each, "weight_hh_l0")
    same(results(module, [x]), results(reference, [x]))
    frozen, _ = pair("LSTM", 5, 7)
    frozen.weight_hh_l0.requires_grad_(False)
    frozen(x)[0].sum().backward()
    assert frozen.weight_hh_l0.grad is None and frozen.weight_ih_l0.grad is not None


def test_backward_twice_and_changes_in_place_are_told():
    module, _ = pair("LSTM", 5, 7)
    x = torch.randn(6, 4, 5, dtype=torch.float64, requires_grad=True)
    y, _ = module(x)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    y, _ = module(x)
    loss = y.square().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)
    same(torch.autograd.grad(loss, x), first, 0)
    for spoil in (
        (lambda y: y.add_(1)),
        (lambda y: module.weight_hh_l0.data.add_(0) is None or module.weight_hh_l0.add_(1)),
    ):
        y, _ = module(x)
        loss = y.sum()
        with torch.no_grad():
            spoil(y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_hooks_on_saved_tensors(reentrant):
    module, _ = pair("LSTM", 5, 7, 2, dropout=0.5)
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    expected = results(module, [x])

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            def flat(x):  # the older kind sees no tensors within tuples
                y, (h, c) = self.inner(x)
                return y, h, c

            y, h, c = torch.utils.checkpoint.checkpoint(flat, x, use_reentrant=reentrant)
            return y, (h, c)

    same(results(Checkpointed(), [x]), expected, 0)
    with torch.autograd.graph.save_on_cpu():
        same(results(module, [x]), expected, 0)


def test_threads():
    module, _ = pair("LSTM", 5, 7, 2)
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    expected, failed = results(module, [x]), []

    def work():
        mine = copy.deepcopy(module)
        for _ in range(5):
            mine.zero_grad()
            outs = leaves(mine(x))
            sum((out.square() * (k + 1)).sum() for k, out in enumerate(outs)).backward()
            for mine_, theirs in zip(mine.parameters(), expected[-len(list(mine.parameters())) :], strict=True):
                if not torch.equal(mine_.grad, theirs):
                    failed.append(mine_)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed and not any(thread.is_alive() for thread in threads)
    y, _ = module(x)
    module.zero_grad()
    thread = threading.Thread(target=y.sum().backward)
    thread.start()
    thread.join(60)
    assert module.weight_hh_l0.grad is not None


def test_as_many_threads_as_torch_has():
    seen, module = [], ours.LSTM(3, 4)

    class Counting:
        def forward(self, *_):
            seen.append(environment.cpu_threads())
            raise InterruptedError

    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("gpurnn.torch.stack.Stack.engine", lambda self: Counting())
                with pytest.raises(InterruptedError):
                    module(torch.zeros(2, 1, 3))
    finally:
        torch.set_num_threads(before)
    most = environment.cpu_threads()
    assert seen == [min(1, most), min(2, most)]


def test_reasons():
    x = torch.randn(6, 4, 5)
    lstm = ours.LSTM(5, 7)
    assert lstm.reason(x) is None and lstm.reason(nn.utils.rnn.pack_sequence([x[:, 0]])) is None
    assert "projections" in ours.LSTM(5, 7, proj_size=3).reason(x)
    assert "bfloat16" in ours.LSTM(5, 7).bfloat16().reason(x.bfloat16())
    assert "meta" in ours.LSTM(5, 7, device="meta").reason(x.to("meta"))
    with torch.autocast("cpu"):
        assert "autocast" in lstm.reason(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_the_engine_does_not_run_torch_does(dtype):
    module, reference = pair("GRU", 5, 7, dtype=dtype)
    x = torch.randn(6, 4, 5, dtype=dtype)
    same(results(module, [x]), results(reference, [x]), 0)
    module, reference = pair("LSTM", 5, 7, proj_size=3)
    same(results(module, [x.double()]), results(reference, [x.double()]), 0)
    module, reference = pair("LSTM", 5, 7, dtype=torch.float32)
    with torch.autocast("cpu"):
        same(leaves(module(x.float())), leaves(reference(x.float())), 0)


def test_fallback_is_told_once_or_refused():
    module, x = ours.LSTM(5, 7).bfloat16(), torch.zeros(2, 1, 5, dtype=torch.bfloat16)
    with warnings.catch_warnings(record=True) as none:
        warnings.simplefilter("always")
        module(x)
    assert not none
    module.fallback = "warn"
    with pytest.warns(UserWarning, match="LSTM runs on PyTorch's own operations: dtype: .* got torch.bfloat16"):
        module(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(x)
    module.fallback = "raise"
    with pytest.raises(RuntimeError, match="bfloat16"):
        module(x)
    module.fallback = "no"
    with pytest.raises(ValueError, match="expected allow, warn or raise, got 'no'"):
        module(x)


def test_executors():
    module, reference = pair("LSTM", 5, 7, 2, bidirectional=True)
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    module.executor = "numpy"
    same(results(module, [x]), results(reference, [x]))
    module.executor = "step"
    with pytest.raises(ValueError, match="expected one of compiled, numpy for tensors on the CPU, got 'step'"):
        module(x)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_on_the_cpu_of_a_machine_with_a_gpu(name):
    module, reference = pair(name, 5, 7, 2, bidirectional=True)
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    with as_backend():
        same(results(module, [x]), results(reference, [x]))
        module.executor = "numpy"
        with pytest.raises(ValueError, match="expected one of compiled for tensors on the CPU, got 'numpy'"):
            module(x)


def test_models_turn_and_turn_back():
    model = nn.ModuleDict({"a": nn.LSTM(5, 7), "b": nn.Sequential(nn.GRU(7, 7, 2), nn.Linear(7, 7)), "c": nn.RNN(7, 7)})
    lstm, parameters = model["a"], list(model.parameters())
    assert ours.from_torch(model) is model and model["a"] is lstm and type(lstm) is ours.LSTM
    assert [type(part) for part in (model["b"][0], model["b"][1], model["c"])] == [ours.GRU, nn.Linear, ours.RNN]
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    lstm.fallback = "raise"
    assert lstm.reason(torch.zeros(2, 1, 5)) is None
    lstm(torch.zeros(2, 1, 5))
    assert ours.to_torch(model) is model and type(lstm) is nn.LSTM and not hasattr(lstm, "fallback")
    assert type(ours.from_torch(nn.LSTM(5, 7))) is ours.LSTM

    class Own(nn.LSTM):
        pass

    assert type(ours.from_torch(Own(5, 7))) is Own
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got Tensor"):
        ours.from_torch(torch.zeros(1))


LEAKY = gpurnn.Cell(
    "leaky",
    gates=1,
    states=2,
    forward=lambda x, r, state, params: (
        (params[0] * state[0] + gpurnn.tanh(x[0] + r[0]), state[1] * 0.5 + state[0]),
        (gpurnn.tanh(x[0] + r[0]),),
    ),
    backward=lambda dnext, saved, state, next_state, params: (
        (dnext[0] * (1 - saved[0] * saved[0]),),
        (dnext[0] * (1 - saved[0] * saved[0]),),
        (dnext[0] * params[0] + dnext[1], dnext[1] * 0.5),
        (dnext[0] * state[0],),
    ),
    params=("leak",),
)


@pytest.mark.parametrize("cell", [LEAKY, gpurnn.cells.CELLS["indrnn"]], ids=lambda cell: cell.name)
@pytest.mark.parametrize("layers, bidirectional", [(1, False), (2, True)])
@pytest.mark.parametrize("bias, batch_first", [(True, False), (False, True)])
def test_any_cell(cell, layers, bidirectional, bias, batch_first):
    torch.manual_seed(0)
    module = ours.Recurrent(cell, 5, 7, layers, bias, batch_first, bidirectional=bidirectional, dtype=torch.float64)
    layer = gpurnn.Recurrent(cell, 5, 7, layers, bias=bias, bidirectional=bidirectional, dtype="float64")
    with torch.no_grad():
        getattr(module, f"{cell.params[0]}_l0").fill_(0.3)
    layer.load_state_dict({name: value.detach().numpy() for name, value in module.state_dict().items()})
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    y, state = module(x.transpose(0, 1) if batch_first else x)
    expected, states, backward = layer(x.numpy())
    y = y.transpose(0, 1) if batch_first else y
    same([y, *leaves(state)], [torch.tensor(part) for part in (expected, *(states if cell.states > 1 else [states]))])
    y.square().sum().backward()
    backward(2 * np.asarray(expected))
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(parameter.grad.numpy(), layer.grads[name], rtol=1e-10, atol=1e-10)
    slow, _ = module.float().bfloat16()(x.transpose(0, 1).bfloat16() if batch_first else x.bfloat16())
    slow = slow.transpose(0, 1) if batch_first else slow
    torch.testing.assert_close(slow.double(), y, rtol=0.1, atol=0.1)


def test_any_cell_in_words():
    module = ours.Recurrent(LEAKY, 5, 7, 2)
    assert repr(module) == "Recurrent(leaky, 5, 7, num_layers=2)"
    assert list(module.state_dict())[:5] == ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "leak_l0"]
    assert not module.leak_l1.any() and module.weight_hh_l0.any()
    expected = (
        r"leaky: expected input \(T, N, I\) with I = 5 .* a tuple of 2 tensors .*\(2, N, 7\).*got input \(6, 4, 3\)"
    )
    with pytest.raises(ValueError, match=expected):
        module(torch.zeros(6, 4, 3))
    with pytest.raises(TypeError, match=r"cell: expected a gpurnn\.Cell or one of .*mingru.*, got 'nosuch'"):
        ours.Recurrent("nosuch", 5, 7)
    assert copy.deepcopy(module).cell == LEAKY
    named = ours.Recurrent("mingru", 5, 7)
    assert named.cell is gpurnn.cells.CELLS["mingru"] and "weight_hh_l0" not in named.state_dict()


def test_cells_with_random_numbers_are_refused():
    cell = gpurnn.cells.noisy(gpurnn.cells.CELLS["lstm"], zoneout=0.1)
    with pytest.raises(ValueError, match=r"cell: expected one without random numbers, .*, got lstm with zoneout 0.1"):
        ours.Recurrent(cell, 3, 4)
