"""PyTorch's recurrent layers on this engine: `gpurnn.torch.LSTM` for `torch.nn.LSTM`, and any cell as a module.

    from gpurnn import torch as gtorch
    model = gtorch.from_torch(model)            # every LSTM, GRU and RNN of a model, in place
    lstm = gtorch.LSTM(128, 256, num_layers=2)  # or one by one: torch.nn's constructor, call forms and state dict

Needs PyTorch: pip install 'gpurnn[torch]'.  `module.reason(input)` says why a call is PyTorch's own and not the engine's.
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"gpurnn.torch needs PyTorch: pip install 'gpurnn[torch]' ({error})", name=error.name
    ) from error

# isort: split
from gpurnn.torch.convert import from_torch, to_torch
from gpurnn.torch.modules import GRU, LSTM, RNN
from gpurnn.torch.recurrent import Recurrent

__all__ = ["GRU", "LSTM", "RNN", "Recurrent", "from_torch", "to_torch"]
