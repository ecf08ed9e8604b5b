"""`gpurnn flow`: the gradient laboratory on the model of a run, trained or in training.  It reads the last checkpoint."""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

LAGS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # shown on the screen
LEAST_STEPS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="run folder")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="time steps to look at (default: twice k2, at least 100)"
    )
    parser.add_argument(
        "--batch", type=int, default=16, metavar="N", help="places in the text, side by side (default 16)"
    )
    parser.add_argument("--data", metavar="TEXT", help="where the run's text is now (default: where it was)")


def run(options: argparse.Namespace) -> int:
    """Prints verdicts, a table and biases; leaves flow.json and flow_*.png, .svg in the run folder."""
    from gpurnn import diagnose, files, losses, plot
    from gpurnn.app import character_model, checkpoint
    from gpurnn.app.metrics import plain, read_metrics
    from gpurnn.backend import one_line

    folder = Path(options.folder)
    model, alphabet, config = character_model.load_run(folder)
    step = checkpoint.entry(checkpoint.load(folder / checkpoint.MODEL).meta, "step", int)
    metrics = read_metrics(folder / checkpoint.METRICS) if (folder / checkpoint.METRICS).is_file() else []
    reach = config.k2 or config.k1
    tokens = _validation(options.data or config.data, alphabet, config)
    x, targets = _windows(tokens, options.steps, max(2 * reach, LEAST_STEPS), options.batch)
    T, N = x.shape
    print(f"run       {folder}, step {step}: {config.cell} {config.num_layers} x {config.hidden_size}")
    print(f"text      {N} windows of {T} symbols; the loss of the last step is followed back\n", flush=True)

    loss = functools.partial(losses.softmax_cross_entropy, reduction="mean")
    norms = [line["grad_norm"] for line in metrics if line.get("grad_norm") is not None]
    found = diagnose.verdicts(model, x, targets, loss, reach=reach, grad_norms=norms or None)
    print("\n".join(map(str, found)), end="\n\n")
    flow = diagnose.gradient_flow(model, x, targets, loss, step=-1)
    curves = {f"{layer} {name}": flow.by_lag(layer)[s] for layer in flow.layers for s, name in enumerate(flow.states)}
    terms = _terms(diagnose.decompose(model, x, targets, loss, steps=[-1]))
    _print_table(curves, terms)
    biases = _biases(model, x, targets, loss, config)

    result = {
        "step": step, "steps": T, "batch": N, "verdicts": [verdict.to_mapping() for verdict in found],
        "norms_by_lag": curves, "terms_by_lag": terms, "biases": biases,
    }  # fmt: skip
    files.write_atomically(folder / "flow.json", json.dumps(plain(result), indent=1).encode() + b"\n")
    figures = f"{folder}/flow_*.png and .svg"
    if reason := plot.why_not():
        figures = f"none: {reason}"
    else:
        try:
            _draw(folder, model, config, len(alphabet), curves, terms, metrics)
        except Exception as error:  # the numbers are there
            figures = f"none: drawing failed: {one_line(error)}"
    print(f"figures   {figures}; all numbers in {folder / 'flow.json'}")
    return 0


def _validation(data: str | None, alphabet: Any, config: Any) -> Any:
    """The run's validation text, or all of its text where none was kept."""
    from gpurnn.app.data import load_corpus, split

    corpus = load_corpus(
        data, unit=config.unit, encoding=config.encoding, pattern=config.pattern, max_alphabet=config.max_alphabet
    )
    if corpus.alphabet != alphabet:
        raise ValueError(f"expected the text that the run was trained on (--data), got another: {corpus.description}")
    return split(corpus.tokens, config.validation)[1 if config.validation else 0]


def _windows(tokens: Any, asked: int | None, usual: int, batch: int) -> tuple[Any, Any]:
    """x and targets (steps, batch), from places evenly spread over `tokens`."""
    import numpy as np

    from gpurnn.arguments import whole

    steps = min(usual, len(tokens) - 1) if asked is None else whole("--steps", asked, 4)
    whole("--batch", batch)
    if len(tokens) < steps + 1:
        raise ValueError(f"--steps: expected fewer than the validation text's {len(tokens)} symbols, got {steps}")
    starts = np.linspace(0, len(tokens) - steps - 1, batch).astype(np.int64)
    positions = starts + np.arange(steps)[:, None]
    return tokens[positions].astype(np.int32), tokens[positions + 1].astype(np.int32)


def _terms(decomposition: Any) -> dict[str, Any]:
    """{parameter: norms by lag} of the last step's loss."""
    return {
        name.removeprefix("recurrent."): norms[0, ::-1]
        for name, norms in decomposition.norms.items()
        if "weight_" in name
    }


def _print_table(curves: dict[str, Any], terms: dict[str, Any]) -> None:
    """Norms by lag, those of each layer relative to its h at lag 0, of each parameter to its term at lag 0."""
    columns = {f"dE/d({name})": values / (curves[f"{name.split()[0]} h"][0] or 1.0) for name, values in curves.items()}
    columns |= {name: values / (values[0] or 1.0) for name, values in terms.items()}
    wide = max(map(len, columns))
    lags = [lag for lag in LAGS if lag < len(next(iter(columns.values())))]
    print("relative to lag 0".ljust(wide + 10) + "".join(f"{lag:>9}" for lag in lags))
    for name, values in columns.items():
        print(f"          {name:<{wide}}" + "".join(f"{values[lag]:9.2g}" for lag in lags))
    print()


def _biases(model: Any, x: Any, targets: Any, loss: Any, config: Any) -> dict[str, Any]:
    """What this run's truncation and clipping do to the gradient of these windows; printed, and as numbers."""
    from gpurnn import diagnose

    k2 = config.k2 or config.k1
    found = {}
    if len(x) > config.k1:
        found[f"truncation (k1 = {config.k1}, k2 = {k2})"] = diagnose.truncation_bias(
            model, x, targets, loss, config.k1, k2
        )
    limits = {"norm": config.clip_norm, "value": config.clip_value, "in_time": config.clip_in_time}
    given = {name: limit for name, limit in limits.items() if limit}
    if given:
        named = ", ".join(f"{name.replace('_', ' ')} {limit:g}" for name, limit in given.items())
        found[f"clipping ({named})"] = diagnose.clipping_bias(model, x, targets, loss, **given)
    for name, bias in found.items():
        print(f"bias      {name}: {bias}")
    return {name: {"degrees": bias.degrees, "cosine": bias.cosine, "ratio": bias.ratio} for name, bias in found.items()}


def _draw(
    folder: Path, model: Any, config: Any, symbols: int, curves: dict[str, Any], terms: dict[str, Any], metrics: list
) -> None:
    import numpy as np

    from gpurnn import diagnose, plot
    from gpurnn.app import character_model

    plot.by_lag(curves, folder / "flow_by_lag.png", quantity="L2 norm of dE/dstate", title="the last step's loss")
    plot.by_lag(
        terms, folder / "flow_terms.png", quantity="Frobenius norm", title="terms of dE/dW of the last step's loss"
    )
    begun = character_model.build(config, symbols, np.random.default_rng(config.seed))  # the run's first parameters
    spectra = {
        f"{layer} {moment}": diagnose.recurrent_spectrum(each, layer).eigenvalues
        for layer in dict.fromkeys(name.split()[0] for name in curves)
        for moment, each in (("before training", begun), ("now", model))
    }
    plot.eigenvalues(spectra, folder / "flow_eigenvalues.png", title="eigenvalues of weight_hh, of all gates together")
    reached = [line for line in metrics if line.get("reach")]
    reached = [line for line in reached if len(line["reach"][0]) == max(len(line["reach"][0]) for line in reached)]
    for k in range(config.num_layers if len(reached) > 1 else 0):
        rows, steps = [line["reach"][k] for line in reached], [line["step"] for line in reached]
        name = f"flow_over_training{f'_l{k}' if config.num_layers > 1 else ''}.png"
        plot.flow_map(rows, folder / name, rows=steps, title=f"l{k}: dE/dh of a window's last step")
