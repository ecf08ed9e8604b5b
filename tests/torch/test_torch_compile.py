"""`gpurnn.torch` in graphs: torch.compile, torch.export, and PyTorch's own check of a custom operation."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[oracle]'")

import gpurnn  # noqa: E402
from gpurnn import torch as ours  # noqa: E402
from gpurnn.torch import ops  # noqa: E402
from gpurnn.torch.stack import Stack  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]  # Dynamo's own are many
nn = torch.nn


def leaves(value):
    return [part for part in torch.utils._pytree.tree_leaves(value) if isinstance(part, torch.Tensor)]


def results(call, module, x):
    torch.manual_seed(1)
    module.zero_grad()
    x = x.clone().requires_grad_()
    y, state = call(x)
    sum((out.square() * (k + 1)).sum() for k, out in enumerate([y, *leaves(state)])).backward()
    return [y, *leaves(state), x.grad, *(p.grad for p in module.parameters())]


def same(a, b, tolerance=1e-10):
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_the_operation():
    module = ours.GRU(5, 7, 2, bidirectional=True).double()
    stack, x = Stack(module.cell, 2, 2, True, 0.0, None), torch.randn(6, 4, 5, dtype=torch.float64, requires_grad=True)
    state = [torch.randn(4, 4, 7, dtype=torch.float64, requires_grad=True)]
    for rows in None, torch.tensor([4, 4, 4, 3, 1, 1]):
        live = 1 if rows is None else (rows[:, None] > torch.arange(4))[..., None]
        given = ops.name_of(stack.cell), 2, 2, True, True, rows, [], x * live, state, list(module._flat_weights)
        torch.library.opcheck(torch.ops.gpurnn.sweep.default, given)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_whole(backend):
    """One graph without a break: of any cell at once, of torch.nn's own layers where Dynamo is told to look into them."""
    torch._dynamo.config.allow_rnn = True
    try:
        for module in (
            ours.Recurrent(gpurnn.cells.GRU_CELL, 5, 7, 2, bidirectional=True, batch_first=True).double(),
            ours.LSTM(5, 7, 2, bidirectional=True, batch_first=True).double(),
        ):
            x = torch.randn(4, 6, 5, dtype=torch.float64)
            compiled = torch.compile(module, backend=backend, fullgraph=True)
            same(results(compiled, module, x), results(module, module, x))
            with torch.no_grad():
                same(leaves(compiled(x)), leaves(module(x)))
            optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
            results(compiled, module, x)
            optimizer.step()
            same(leaves(compiled(x)), leaves(module(x)))
    finally:
        torch._dynamo.config.allow_rnn = False


def test_compiled_with_changing_lengths():
    module = ours.Recurrent(gpurnn.cells.LSTM_CELL, 5, 7).double()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for T, N in (6, 4), (9, 3), (11, 7):
        x = torch.randn(T, N, 5, dtype=torch.float64)
        same(results(compiled, module, x), results(module, module, x))


def test_a_model_with_a_layer_of_ours_is_compiled_around_it():
    model = nn.Sequential(nn.Linear(5, 5), ours.LSTM(5, 7)).double()
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    same(results(compiled, model, x), results(model, model, x))


def test_packed_sequences_when_compiled():
    module = ours.LSTM(5, 7).double()

    def run(x):
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 6, 1, 6]), enforce_sorted=False)
        y, state = module(packed)
        return nn.utils.rnn.pad_packed_sequence(y)[0], state

    x = torch.randn(6, 4, 5, dtype=torch.float64)
    same(results(torch.compile(run, backend="aot_eager"), module, x), results(run, module, x))


def test_exported(tmp_path):
    module = ours.LSTM(5, 7, 2).double().eval()
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    T, N = torch.export.Dim("T", min=2, max=1000), torch.export.Dim("N", min=2, max=1000)
    program = torch.export.export(module, (x,), dynamic_shapes={"input": {0: T, 1: N}}, strict=False)
    assert torch.ops.gpurnn.sweep.default in [node.target for node in program.graph.nodes]
    torch.export.save(program, tmp_path / "lstm.pt2")
    again = torch.export.load(tmp_path / "lstm.pt2").module()
    longer = torch.randn(9, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        same(leaves(again(longer)), leaves(module(longer)))
    with pytest.raises(RuntimeError, match="traced for inference"):
        again(longer.requires_grad_())[0].sum().backward()


def test_a_cell_that_a_process_does_not_know():
    with pytest.raises(ValueError, match="no cell 'nosuch-1' is known in this process"):
        x = torch.zeros(2, 1, 3)
        torch.ops.gpurnn.sweep("nosuch-1", 1, 1, False, False, None, [], x, [torch.zeros(1, 1, 2)], [x, x])
