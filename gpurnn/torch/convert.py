"""Whole models from torch.nn's layers to this engine's and back, in place: parameters, hooks and optimisers stay."""

from torch import nn

from gpurnn.torch.modules import GRU, LSTM, RNN

_OURS: dict[type[nn.Module], type[nn.Module]] = {nn.LSTM: LSTM, nn.GRU: GRU, nn.RNN: RNN}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_OWN = ("executor", "fallback")  # attributes that torch.nn does not know


def from_torch(model: nn.Module) -> nn.Module:
    """The same model, each torch.nn.LSTM, GRU and RNN in it now run by this engine.

    Nothing is copied: the modules stay the objects that they were, with their parameters, and turn into `gpurnn.torch`'s.
    Subclasses of torch.nn's layers, which may do something of their own, stay what they are.
    Raises TypeError for anything but a module.
    """
    return _turned(model, _OURS)


def to_torch(model: nn.Module) -> nn.Module:
    """The way back: each gpurnn.torch.LSTM, GRU and RNN is torch.nn's again.  `Recurrent` has none, and stays."""
    for module in _turned(model, _THEIRS).modules():
        if type(module) in _OURS:
            for name in _OWN:
                module.__dict__.pop(name, None)
    return model


def _turned(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
    return model
