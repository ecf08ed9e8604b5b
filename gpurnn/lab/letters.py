"""A tiny character network learns to spell one word, and every number on the way is shown."""

import math

import numpy as np

from gpurnn import backend, diagnose, losses, optim, plot
from gpurnn.bptt import full_bptt
from gpurnn.lab.page import Page
from gpurnn.lab.tasks import with_head
from gpurnn.model import SequenceModel
from gpurnn.optim import clipping
from gpurnn.recurrent import RNN

WORD = "neuron"
UPDATES = 100


def one_hot(word: str) -> tuple[str, np.ndarray, np.ndarray]:
    """The word's letters; x (T, 1, letters), all of the word but its last letter; targets (T, 1), all but its first."""
    letters = "".join(dict.fromkeys(word))
    tokens = np.array([letters.index(letter) for letter in word])
    return letters, np.eye(len(letters))[tokens[:-1], None], tokens[1:, None].astype(np.int32)


def chances(model: SequenceModel, x: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(T,) the probability that the model gives to each letter that comes."""
    logits, _, _ = model(x, training=False)
    return backend.to_numpy(losses.softmax(logits))[np.arange(len(x)), 0, targets[:, 0]]


def experiment(page: Page) -> None:
    page.section(f'"{WORD}", letter by letter')
    rng = np.random.default_rng(page.seed)
    letters, x, targets = one_hot(WORD)
    loss = losses.softmax_cross_entropy
    layer = RNN(len(letters), 12, dtype="float64", rng=rng, executor="numpy")
    model = with_head(layer, len(letters), rng)
    before = chances(model, x, targets)
    flow = diagnose.gradient_flow(model, x, targets, loss, step=-1)
    terms = diagnose.decompose(model, x, targets, loss, steps=[-1])
    page.say(
        f"An RNN of {layer.hidden_size} units reads a letter at each step and says which comes next. The figure shows it "
        f"unrolled, before training: the error at the last letter, '{WORD[-1]}', goes back along the red arrows."
    )
    optimizer = optim.Adam(model, lr=0.02)
    for _ in range(UPDATES):
        model.zero_grad()
        full_bptt(model, x, targets, loss)
        clipping.clip_grad_norm(model, 1.0)
        optimizer.step()
    after = chances(model, x, targets)
    said = [
        f"'{letter}': {old:.2f} → {new:.2f}\nE = {-math.log(old):.2f} nats"
        for letter, old, new in zip(WORD[1:], before, after, strict=True)
    ]
    figure = page.figure("neuron", f'The network unrolled over "{WORD}", with norms of dE/dh on its way back')
    plot.unrolled(
        [f"'{letter}'" for letter in WORD[:-1]], said, flow.norms[0, 0], figure,
        title=f"chance of the next letter before → after {UPDATES} updates; red: norm of dE$_{len(x)}$/dh$_t$ before them",
    )  # fmt: skip
    of_weight_hh = terms.norms["recurrent.weight_hh_l0"][0]
    page.table(
        ["read", "to come", "chance before", "after", f"norm of dE_{len(x)}/dh_t", f"of the term of dE_{len(x)}/dW_hh"],
        [
            [WORD[t], WORD[t + 1], *(f"{values[t]:.3f}" for values in (before, after, flow.norms[0, 0], of_weight_hh))]
            for t in range(len(x))
        ],
    )
    page.say(
        f"Each step has its own term in the gradient of W_hh, dE_{len(x)}/dh_{len(x)} · dh_{len(x)}/dh_k · dh_k/dW_hh. The "
        "first is 0, since h_0 is; the others shrink with the distance. Their sum is what BPTT hands to the optimiser."
    )
