"""A character model: embedding, recurrent layers, softmax over the alphabet.  Built, loaded, measured, sampled."""

import codecs
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpurnn import backend
from gpurnn.app import checkpoint
from gpurnn.app.config import TrainConfig
from gpurnn.app.data import Alphabet
from gpurnn.arguments import number, whole
from gpurnn.layers import Dropout, Embedding, Linear
from gpurnn.losses import softmax_cross_entropy
from gpurnn.model import SequenceModel
from gpurnn.recurrent import GRU, LSTM, RNN, Recurrent

STREAMS, WINDOW = 64, 128  # of a measurement: the text is read at 64 places side by side, 128 symbols at a time


def build(config: TrainConfig, alphabet_size: int, rng: np.random.Generator) -> SequenceModel:
    """The model that `config` describes; `rng` draws its parameters, and the seeds of its dropout masks."""
    common: dict[str, Any] = {"dtype": config.dtype, "rng": rng}
    embedding = Embedding(alphabet_size, config.embedding_size, **common)
    options = common | {
        "num_layers": config.num_layers,
        "dropout": config.dropout if config.num_layers > 1 else 0.0,
        "trainable_h0": config.trainable_h0,
        "clip_in_time": config.clip_in_time or None,
        "precision": config.precision,
    }
    biases = {"forget_bias": config.forget_bias, "update_bias": config.update_bias}
    options |= {name: value for name, value in biases.items() if value is not None}
    sizes = config.embedding_size, config.hidden_size
    recurrent: Recurrent
    if config.cell == "rnn":
        recurrent = RNN(*sizes, nonlinearity=config.nonlinearity, **options)
    elif config.cell == "lstm":
        recurrent = LSTM(*sizes, **options)
    else:
        recurrent = GRU(*sizes, **options)
    head = Linear(config.hidden_size, alphabet_size, **common)
    dropout = Dropout(config.dropout, **common) if config.dropout else None
    return SequenceModel(embedding, recurrent, head, dropout=dropout)


class Run(NamedTuple):
    """What `load_run` gives.  alphabet: `encode` and `decode` turn text into tokens and back.  config: the run's options."""

    model: SequenceModel
    alphabet: Alphabet
    config: TrainConfig


def load_run(folder: str | Path, *, best: bool = False) -> Run:
    """What `gpurnn train` left in a run folder: `model, alphabet, config = gpurnn.load_run("runs/lstm256-...")`.

    best: the checkpoint whose validation was best, not the last.  Raises ValueError or OSError where it cannot be read.
    """
    run = Path(folder)
    if not (run / checkpoint.CONFIG).is_file():
        raise FileNotFoundError(f"{run}: expected a run folder, {checkpoint.CONFIG} is not there")
    config = TrainConfig.from_mapping(checkpoint.read_config(run / checkpoint.CONFIG), str(run / checkpoint.CONFIG))
    path = run / (checkpoint.BEST if best else checkpoint.MODEL)
    if best and not path.exists():
        raise FileNotFoundError(f"{run}: there is no {path.name}: the run had no validation yet")
    saved = checkpoint.load(path)
    try:
        alphabet = Alphabet.from_json(checkpoint.entry(saved.meta, "alphabet", str))
        model = build(config, len(alphabet), np.random.default_rng(0))
        model.load_state_dict(saved.tensors)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: {error.args[0]}") from None
    return Run(model, alphabet, config)


def bits_per_symbol(model: SequenceModel, tokens: np.ndarray, limit: int | None = None) -> float:
    """Cross-entropy in bits of predicting each of `tokens` from those before it, over the first `limit` of them.

    The text is cut into up to 64 streams that start from the initial state, which costs the model a little.
    """
    tokens = tokens[: limit + 1] if limit else tokens
    if len(tokens) < 2:
        raise ValueError(f"tokens: expected at least 2, got {len(tokens)}")
    streams = max(1, min(STREAMS, (len(tokens) - 1) // WINDOW))
    length = (len(tokens) - 1) // streams
    starts = np.arange(streams) * length
    total, state = 0.0, None
    for t in range(0, length, WINDOW):
        positions = starts + np.arange(t, min(length, t + WINDOW))[:, None]
        logits, state, _ = model(tokens[positions].astype(np.int32), state, training=False)
        loss, _ = softmax_cross_entropy(logits, tokens[positions + 1].astype(np.int32), reduction="sum")
        total += float(loss)
    return total / (streams * length) / math.log(2)


def sample(
    model: SequenceModel,
    alphabet: Alphabet,
    prompt: str,
    length: int,
    temperature: float,
    rng: np.random.Generator,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Iterator[int]:
    """Tokens drawn one after the other from the model, behind `prompt`; temperature 0 takes the likeliest each time.

    top_k: only the k likeliest may come.  top_p: only the fewest likeliest that have p of the probability together, at that
    temperature (Holtzman et al. 2020).
    The iterator raises FloatingPointError where the model's output is not finite.
    Raises ValueError for a prompt outside the alphabet, a negative length or temperature, top_k below 1, top_p outside (0, 1].
    """
    if top_k is not None:
        whole("top_k", top_k)
    if top_p is not None:
        number("top_p", top_p, lambda p: 0 < p <= 1, "in (0, 1]")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a number from 0, got {temperature!r}")
    if length < 0:
        raise ValueError(f"length: expected a number from 0, got {length}")
    tokens = alphabet.encode(prompt)
    if not len(tokens):
        tokens = np.array([rng.integers(len(alphabet))])
    return _draws(
        model, tokens, length, functools.partial(_draw, temperature=temperature, top_k=top_k, top_p=top_p, rng=rng)
    )


def first_prompt(alphabet: Alphabet) -> str:
    """What a sample starts from where nothing else is asked for: a new line, if the text has any."""
    return "\n" if alphabet.unit == "bytes" or "\n" in alphabet.symbols else alphabet.symbols[0]


def _draws(model: SequenceModel, tokens: np.ndarray, length: int, draw: Callable[[np.ndarray], int]) -> Iterator[int]:
    logits, state, _ = model(tokens.astype(np.int32)[:, None], training=False)
    for _ in range(length):
        token = draw(backend.to_numpy(logits[-1, 0]))
        yield token
        logits, state, _ = model(np.array([[token]], np.int32), state, training=False)


def _draw(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None, rng: np.random.Generator
) -> int:
    if not np.isfinite(logits).all():
        raise FloatingPointError("the model's output is not finite: its training has diverged")
    if temperature == 0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):  # a tiny temperature leaves the likeliest alone
        scaled = (logits.astype(np.float64) - logits.max()) / temperature
    chances = np.exp(scaled)
    if top_k is not None or top_p is not None:
        order = np.argsort(-chances, kind="stable")
        order = order[:top_k]
        before = np.cumsum(chances[order]) - chances[order]
        kept = order if top_p is None else order[before < top_p * chances[order].sum()]
        chances = np.where(np.isin(np.arange(len(chances)), kept), chances, 0.0)
    cumulative = np.cumsum(chances)
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))


def write(alphabet: Alphabet, prompt: str, tokens: Iterator[int]) -> None:
    """Prints the prompt, and the tokens as they come; bytes wait until they are whole characters."""
    print(prompt.lstrip("\n"), end="", flush=True)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        text = alphabet.decode([token]) if alphabet.unit == "chars" else decoder.decode(bytes([token]))
        print(text, end="", flush=True)
    print(decoder.decode(b"", final=True), flush=True)
