"""Makes `vectors.npz`: small sequences through PyTorch's own recurrent layers, in float64, with every gradient.

Parity with PyTorch is then tested where PyTorch is not installed.  Needs torch (`pip install torch==2.13.0`) and nothing
of gpurnn; inputs come from NumPy's seeded generator, so that a second run writes the same inputs:

    python tests/executors/reference/make_vectors.py

For every case, arrays are stored as `<case>/<what>`: `x`, `dy`; `state/h`, `dstate/h` (and `c`) where a state is given;
`lengths` where rows have one; `params/<name>` and, from torch, `y`, `final/h`, `dx`, `dinitial/h`, `grads/<name>`.
The loss is sum(y * dy) + sum(final * dstate).
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

# kind, then T, N, I, H, and torch's options; `state`: initial states are given; `lengths`: one for each row.
CASES = {
    "plain": {"sizes": (4, 3, 2, 5), "options": {}, "state": True, "lengths": None},
    "deep": {"sizes": (3, 2, 3, 3), "options": {"num_layers": 3, "bias": False}, "state": False, "lengths": None},
    "both": {
        "sizes": (5, 4, 2, 3),
        "options": {"num_layers": 2, "bidirectional": True},
        "state": True,
        "lengths": [2, 5, 1, 4],
    },
}
KINDS = {
    "rnn_tanh": lambda *sizes, **options: torch.nn.RNN(*sizes, nonlinearity="tanh", **options),
    "rnn_relu": lambda *sizes, **options: torch.nn.RNN(*sizes, nonlinearity="relu", **options),
    "lstm": torch.nn.LSTM,
    "gru": torch.nn.GRU,
}
ELMAN = {"rnn_sigmoid": torch.sigmoid, "rnn_identity": lambda a: a}  # torch has no layer for these: autograd does them


def elman(activation, x, params, state, layers):
    """h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), one direction, by torch's autograd."""
    finals = []
    for k in range(layers):
        h, outputs = state[k], []
        for x_t in x:
            a = x_t @ params[f"weight_ih_l{k}"].T + h @ params[f"weight_hh_l{k}"].T
            if f"bias_ih_l{k}" in params:
                a = a + params[f"bias_ih_l{k}"] + params[f"bias_hh_l{k}"]
            h = activation(a)
            outputs.append(h)
        x = torch.stack(outputs)
        finals.append(h)
    return x, torch.stack(finals)


def run(kind, layer, x, states, lengths):
    """y and the final states, a tuple."""
    if kind in ELMAN:
        y, h = elman(ELMAN[kind], x, dict(layer.named_parameters()), states[0], layer.num_layers)
        return y, (h,)
    given = states if kind == "lstm" else states[0]
    if lengths is None:
        y, final = layer(x, given)
    else:
        packed, final = layer(pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False), given)
        y, _ = pad_packed_sequence(packed, total_length=len(x))
    return y, final if kind == "lstm" else (final,)


def make(kind, case, rng):
    """One case's arrays by name."""
    T, N, I, H = case["sizes"]
    layer = KINDS.get(kind, torch.nn.RNN)(I, H, dtype=torch.float64, **case["options"])
    names = ("h", "c") if kind == "lstm" else ("h",)
    D = 1 + layer.bidirectional
    shape = (layer.num_layers * D, N, H)
    arrays = {"x": rng.standard_normal((T, N, I)), "dy": rng.standard_normal((T, N, D * H))}
    for name in names:
        arrays[f"dstate/{name}"] = rng.standard_normal(shape)
        if case["state"]:
            arrays[f"state/{name}"] = rng.standard_normal(shape)
    for name, parameter in layer.named_parameters():
        arrays[f"params/{name}"] = rng.normal(0, 0.5, parameter.shape)
        parameter.data = torch.from_numpy(arrays[f"params/{name}"])
    if case["lengths"] is not None:
        arrays["lengths"] = np.array(case["lengths"])

    x = torch.from_numpy(arrays["x"]).requires_grad_()
    states = tuple(
        torch.from_numpy(arrays.get(f"state/{name}", np.zeros(shape))).clone().requires_grad_() for name in names
    )
    y, finals = run(kind, layer, x, states, case["lengths"])
    loss = (y * torch.from_numpy(arrays["dy"])).sum()
    for name, final in zip(names, finals, strict=True):
        loss = loss + (final * torch.from_numpy(arrays[f"dstate/{name}"])).sum()
    loss.backward()

    found = {"y": y, "dx": x.grad}
    found |= {f"final/{name}": final for name, final in zip(names, finals, strict=True)}
    found |= {f"dinitial/{name}": state.grad for name, state in zip(names, states, strict=True)}
    found |= {f"grads/{name}": parameter.grad for name, parameter in layer.named_parameters()}
    return arrays | {name: tensor.detach().numpy() for name, tensor in found.items()}


def main():
    arrays = {}
    for k, kind in enumerate((*KINDS, *ELMAN)):
        for c, (name, case) in enumerate(CASES.items()):
            if kind in ELMAN and (case["lengths"] or case["options"].get("bidirectional")):
                continue
            made = make(kind, case, np.random.default_rng([k, c]))
            arrays |= {f"{kind}-{name}/{what}": array for what, array in made.items()}
    path = Path(__file__).with_name("vectors.npz")
    np.savez_compressed(path, **arrays)
    print(f"{path}: {len(arrays)} arrays, {path.stat().st_size} bytes, by torch {torch.__version__}")


if __name__ == "__main__":
    main()
