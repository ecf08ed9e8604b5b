"""gpurnn.torch.Recurrent in heads: the engine, PyTorch's own operations, and the layer of NumPy arrays give the same."""

import numpy as np
import pytest

import gpurnn
from gpurnn import backend

torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[oracle]'")

from gpurnn import torch as ours  # noqa: E402

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(backend.name == "cuda", reason="the layer beside it is on the CPU"),
]


@pytest.mark.parametrize("cell", ["lstm", "gru", "slstm"])
def test_heads(cell):
    module = ours.Recurrent(cell, 3, 12, 2, bidirectional=True, heads=3, dtype=torch.float64)
    layer = gpurnn.Recurrent(cell, 3, 12, 2, bidirectional=True, heads=3, dtype="float64")
    layer.load_state_dict({name: value.detach().numpy() for name, value in module.state_dict().items()})
    assert module.weight_hh_l0.shape == layer.params["weight_hh_l0"].shape and "heads=3" in repr(module)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    y, _ = module(x)
    expected, _, backward = layer(x.detach().numpy())
    dy = torch.randn_like(y)
    dx, _ = backward(dy.numpy())
    y.backward(dy)
    np.testing.assert_allclose(y.detach().numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(x.grad.numpy(), dx, atol=1e-12)
    for name, weight in module.named_parameters():
        np.testing.assert_allclose(weight.grad.numpy(), layer.grads[name], atol=1e-12, err_msg=name)


def test_gradients_of_gradients():
    """In PyTorch's operations, where the engine does not go."""
    module = ours.Recurrent("lstm", 2, 4, heads=2, dtype=torch.float64)
    x = torch.randn(3, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], (x,))


def test_what_is_refused():
    with pytest.raises(ValueError, match="heads: expected a divisor of hidden_size = 12, got 5"):
        ours.Recurrent("lstm", 3, 12, heads=5)
