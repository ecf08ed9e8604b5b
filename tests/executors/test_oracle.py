"""The engine against PyTorch: vectors that torch has written, always; torch itself, where it is installed.

A tensor's error is the largest difference, relative to the tensor's largest entry in PyTorch.
"""

from pathlib import Path

import numpy as np
import pytest

from gpurnn import backend
from gpurnn.backend import to_numpy
from gpurnn.cells import CELLS, RATE_CELLS
from gpurnn.layers import Embedding, Linear
from gpurnn.losses import softmax_cross_entropy
from gpurnn.model import SequenceModel
from gpurnn.recurrent import GRU, LSTM, RNN, Recurrent

EXECUTORS = ["numpy"] if backend.name == "cuda" else ["numpy", "compiled"]
TOLERANCE = {"float32": 2e-4, "float64": 1e-10}
VECTORS = Path(__file__).with_name("reference") / "vectors.npz"

KINDS = ["rnn_tanh", "rnn_relu", "lstm", "gru"]
T_CHOICES, N_CHOICES, I_CHOICES, H_CHOICES = (1, 2, 5, 13), (1, 3, 8, 19), (1, 4, 17), (1, 5, 33, 48)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[oracle]'")


def _compare(got, expected, dtype):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        value = np.asarray(value)
        assert got[name].shape == value.shape, name
        scale = max(float(np.abs(value).max(initial=0)), 1e-3)
        error = float(np.abs(to_numpy(got[name]) - value).max(initial=0)) / scale
        assert error <= TOLERANCE[dtype], f"{name}: {error:.1e} of {scale:.1e}"


def _parts(state):
    return state if isinstance(state, tuple) else (state,)


def _packed(states):
    return states[0] if len(states) == 1 else tuple(states)


def _results(layer, x, states, lengths, dy, dstates):
    """Ours: all that a forward and a backward pass give, by name."""
    y, final, backward = layer(x, _packed(states) if states else None, lengths=lengths)
    dx, dinitial = backward(dy, _packed(dstates))
    named = {"y": y, "dx": dx} | {f"grads/{name}": value for name, value in layer.grads.items()}
    for name, part, dpart in zip(layer.cell.state_names, _parts(final), _parts(dinitial), strict=True):
        named |= {f"final/{name}": part, f"dinitial/{name}": dpart}
    return named


def _read(case):
    """One case of the vectors: what goes in, and what must come out."""
    with np.load(VECTORS, allow_pickle=False) as file:
        arrays = {name.removeprefix(f"{case}/"): file[name] for name in file.files if name.startswith(f"{case}/")}
    outputs = ("y", "dx", "final/", "dinitial/", "grads/")
    return arrays, {name: value for name, value in arrays.items() if name.startswith(outputs)}


def _cases():
    with np.load(VECTORS, allow_pickle=False) as file:
        return sorted({name.split("/")[0] for name in file.files})


NOT_TORCHS = {*(cell.name for cell in RATE_CELLS.values()), "slstm", "peephole", "cifg", "mgu"}


def test_every_cell_with_a_matrix_has_vectors():
    torchs = {name for name, cell in CELLS.items() if cell.recurrent and name not in NOT_TORCHS}
    assert {case.split("-")[0] for case in _cases()} == torchs
    assert len(_cases()) == 4 * 3 + 2 * 2
    assert VECTORS.stat().st_size < 300_000


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("case", _cases())
def test_vectors_of_torch(case, executor, dtype):
    arrays, expected = _read(case)
    params = {name.removeprefix("params/"): value for name, value in arrays.items() if name.startswith("params/")}
    H, I = params["weight_hh_l0"].shape[1], arrays["x"].shape[2]
    layer = Recurrent(
        CELLS[case.split("-")[0]], I, H, sum(name.startswith("weight_ih") for name in params if "reverse" not in name),
        bias="bias_ih_l0" in params, bidirectional="weight_ih_l0_reverse" in params, dtype=dtype, executor=executor,
    )  # fmt: skip
    layer.load_state_dict(params)
    states, dstates = (
        [arrays[f"{what}/{name}"] for name in layer.cell.state_names if f"{what}/{name}" in arrays]
        for what in ("state", "dstate")
    )
    got = _results(layer, arrays["x"], states, arrays.get("lengths"), arrays["dy"], dstates)
    _compare(got, expected, dtype)


def _pair(torch, kind, dtype, executor, I, H, **options):
    """A layer of torch's and ours with its parameters."""
    if kind.startswith("rnn"):
        options["nonlinearity"] = kind.removeprefix("rnn_")
    theirs, ours = {"lstm": (torch.nn.LSTM, LSTM), "gru": (torch.nn.GRU, GRU)}.get(kind, (torch.nn.RNN, RNN))
    theirs = theirs(I, H, dtype=getattr(torch, dtype), **options)
    ours = ours(I, H, dtype=dtype, executor=executor, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def _torch_results(torch, layer, x, states, lengths, dy, dstates):
    """Theirs, by the names of `_results`."""
    rnn = torch.nn.utils.rnn
    x = x.clone().requires_grad_()
    states = [state.clone().requires_grad_() for state in states]
    given = x if lengths is None else rnn.pack_padded_sequence(x, torch.from_numpy(lengths), enforce_sorted=False)
    y, final = layer(given, _packed(states))
    if lengths is not None:
        y, _ = rnn.pad_packed_sequence(y, total_length=len(x))
    finals = _parts(final)
    torch.autograd.backward((y, *finals), (dy, *dstates))
    named = {"y": y, "dx": x.grad} | {f"grads/{name}": p.grad for name, p in layer.named_parameters()}
    for name, part, state in zip(("h", "c"), finals, states, strict=False):
        named |= {f"final/{name}": part, f"dinitial/{name}": state.grad}
    return {name: value.detach().numpy() for name, value in named.items()}


def _against_torch(torch, kind, dtype, executor, seed):
    """Random sizes and options; torch tensors go in as they are."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    T, N, I, H = (int(rng.choice(choices)) for choices in (T_CHOICES, N_CHOICES, I_CHOICES, H_CHOICES))
    torch.manual_seed(seed)
    options = {
        "num_layers": int(rng.integers(1, 4)),
        "bidirectional": bool(rng.integers(2)),
        "bias": bool(rng.integers(2)),
    }
    theirs, ours = _pair(torch, kind, dtype, executor, I, H, **options)
    rows = (options["num_layers"] * ours.directions, N, H)
    lengths = rng.integers(1, T + 1, N) if rng.integers(2) else None

    def normal(*shape):
        return torch.from_numpy(rng.standard_normal(shape).astype(dtype))

    given = bool(rng.integers(2))
    states = [normal(*rows) if given else torch.zeros(rows, dtype=getattr(torch, dtype)) for _ in ours.cell.state_names]
    x, dy, dstates = normal(T, N, I), normal(T, N, ours.directions * H), [normal(*rows) for _ in states]
    expected = _torch_results(torch, theirs, x, states, lengths, dy, dstates)
    _compare(_results(ours, x, states if given else None, lengths, dy, dstates), expected, dtype)


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_layers(torch, kind, executor, dtype, seed):
    _against_torch(torch, kind, dtype, executor, seed)


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 60))
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("kind", KINDS)
def test_more_recurrent_layers(torch, kind, executor, dtype, seed):
    _against_torch(torch, kind, dtype, executor, seed)


@pytest.mark.oracle
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "gru"])
def test_long_sequences_do_not_drift(torch, kind, executor):
    """float32 over 200 steps: the layers are contracting, so rounding does not pile up."""
    torch.manual_seed(0)
    theirs, ours = _pair(torch, kind, "float32", executor, 8, 33)
    x, dy, state = torch.randn(200, 3, 8), torch.randn(200, 3, 33), torch.zeros(1, 3, 33)
    states = [state] * ours.cell.states
    expected = _torch_results(torch, theirs, x, states, None, dy, states)
    _compare(_results(ours, x, states, None, dy, states), expected, "float32")


@pytest.mark.oracle
def test_parameters_go_to_torch_and_back(torch):
    theirs, ours = _pair(torch, "lstm", "float32", "numpy", 3, 5, num_layers=2, bidirectional=True)
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in ours.state_dict().items()})
    assert list(theirs.state_dict()) == list(ours.params)
    with pytest.raises(TypeError, match=r"weight_ih_l0: expected plain values, got torch.* detach\(\) it first"):
        ours.load_state_dict(dict(theirs.named_parameters()))


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(torch, dtype, bias):
    torch.manual_seed(0)
    theirs, ours = torch.nn.Linear(4, 7, bias=bias, dtype=getattr(torch, dtype)), Linear(4, 7, bias=bias, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    x, dy = (torch.randn(5, 3, size, dtype=getattr(torch, dtype)) for size in (4, 7))
    x.requires_grad_()
    theirs(x).backward(dy)
    y, backward = ours(x.detach())
    got = {"y": y, "x": backward(dy), **ours.grads}
    expected = {"y": theirs(x), "x": x.grad} | {name: p.grad for name, p in theirs.named_parameters()}
    _compare(got, {name: value.detach().numpy() for name, value in expected.items()}, dtype)


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_embedding(torch, dtype):
    torch.manual_seed(0)
    theirs, ours = torch.nn.Embedding(6, 4, dtype=getattr(torch, dtype)), Embedding(6, 4, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    tokens, dy = torch.randint(0, 5, (50, 3)), torch.randn(50, 3, 4, dtype=getattr(torch, dtype))
    theirs(tokens).backward(dy)
    y, backward = ours(tokens)
    backward(dy)
    expected = {"y": theirs(tokens).detach().numpy(), "weight": theirs.weight.grad.numpy()}
    _compare({"y": y, **ours.grads}, expected, dtype)


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_whole_model_with_cross_entropy(torch, kind, executor, dtype):
    torch.manual_seed(0)
    kinds = {"lstm": (torch.nn.LSTM, LSTM), "gru": (torch.nn.GRU, GRU)}[kind]
    options = {"dtype": getattr(torch, dtype)}
    theirs = torch.nn.ModuleDict(
        {
            "embedding": torch.nn.Embedding(11, 6, **options),
            "recurrent": kinds[0](6, 33, 2, **options),
            "head": torch.nn.Linear(33, 11, **options),
        }
    )
    ours = SequenceModel(
        Embedding(11, 6, dtype=dtype),
        kinds[1](6, 33, 2, dtype=dtype, executor=executor),
        Linear(33, 11, dtype=dtype),
    )
    ours.load_state_dict(theirs.state_dict())
    tokens, targets = torch.randint(0, 11, (2, 13, 3))
    hidden, _ = theirs["recurrent"](theirs["embedding"](tokens))
    logits = theirs["head"](hidden)
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 11), targets.reshape(-1))
    loss.backward()
    out, _, backward = ours(tokens)
    value, dout = softmax_cross_entropy(out, targets)
    backward(dout)
    expected = {"logits": logits, "loss": loss} | {name: p.grad for name, p in theirs.named_parameters()}
    got = {"logits": out, "loss": value, **ours.grads}
    _compare(got, {name: tensor.detach().numpy() for name, tensor in expected.items()}, dtype)
