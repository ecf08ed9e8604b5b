"""gpurnn.torch's modules in torch.nn's place: the same script, with one line changed."""

from typing import ClassVar

from bench.peers.torch_nn import TorchLayer
from gpurnn import torch as modules


class GpurnnTorchLayer(TorchLayer):
    """`gpurnn-torch`: what the way through PyTorch's autograd adds to `gpurnn-compiled`."""

    layers: ClassVar = {"rnn": modules.RNN, "gru": modules.GRU, "lstm": modules.LSTM}
