"""What `import gpurnn` and each command say before they do anything: variables, the backend, --help."""

import argparse
import os
import subprocess
import sys

import pytest

from gpurnn import backend, environment, variables
from gpurnn.cli import _parser, main
from tests import ROOT

COMMANDS = next(action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)).choices
BAD = {
    "GPURNN_BACKEND": "cdua",
    "GPURNN_EXECUTOR": "complied",
    "GPURNN_NUM_THREADS": "two",
    "GPURNN_VECTOR_BYTES": "24",
    "GPURNN_TUNE": "yes",
    "GPURNN_CACHE_DIR": __file__,
}


def ran(*arguments: str, **given: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name not in BAD} | {"PYTHONPATH": str(ROOT)} | given
    return subprocess.run(
        [sys.executable, *arguments], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_table_is_all_variables_of_the_library():
    sources = "\n".join(path.read_text() for path in (ROOT / "gpurnn").rglob("*.py"))
    assert set(variables._TABLE) == set(BAD)
    assert all(f'environ.get("{name}")' not in sources for name in BAD if name != "GPURNN_CACHE_DIR")
    assert all(f"| `{name}` |" in (ROOT / "README.md").read_text() for name in BAD)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_variable_is_told_at_once_and_an_empty_one_is_unset(name, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv(name, BAD[name])
        with pytest.raises(ValueError, match=f"^{name}: expected .*, got '{BAD[name]}'"):
            variables.check()
        patch.setenv(name, "")
        variables.check()
        assert variables.given(name) is None


def test_empty_variables_change_nothing():
    code = "from gpurnn import backend, environment; print(backend.name, environment.cpu_threads())"
    done = ran("-c", code, **dict.fromkeys(BAD, ""))
    assert done.stdout.split() == ran("-c", code).stdout.split() and not done.stderr


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("GPURNN_BACKEND", "cdua", "got 'cdua'"), ("GPURNN_NUM_THREADS", "0", "got '0'")]
    + [
        ("GPURNN_BACKEND", "cuda", "was asked for, but "),
        ("GPURNN_EXECUTOR", "step", "on the numpy backend, got 'step'"),
    ]
    * (backend.name == "numpy"),
)
def test_a_command_says_it_in_one_sentence(name, value, words):
    done = ran("-m", "gpurnn.cli", "info", **{name: value})
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"gpurnn: error: {name}") and words in done.stderr and done.stderr.count("\n") == 1


def test_every_way_in_says_a_bad_variable():
    name, value, words = "GPURNN_BACKEND", "cdua", "got 'cdua'"
    done = ran("-m", "gpurnn.cli", "info", **{name: value})
    script = ran("-c", "import sys; sys.argv[0] = '/usr/bin/gpurnn'; from gpurnn.cli import main", **{name: value})
    assert (script.returncode, script.stderr) == (2, done.stderr), "as the script that pip makes"
    library = ran("-c", "import gpurnn", **{name: value})
    assert library.returncode == 1 and "Traceback" in library.stderr and words in library.stderr
    bench = ran("-m", "bench", "model", **{name: value})
    assert bench.returncode == 2 and bench.stderr.startswith("python -m bench model: error: " + name), bench.stderr


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    shown = capsys.readouterr()
    assert ended.value.code == 0 and shown.out.startswith("usage: gpurnn") and not shown.err
    assert "%(" not in shown.out and "%%" not in shown.out


def test_help_of_every_benchmark(capsys):
    from bench import __main__ as bench

    for command in bench.COMMANDS:
        with pytest.raises(SystemExit) as ended:
            bench.main([command, "--help"])
        assert ended.value.code == 0 and f"usage: python -m bench {command}" in capsys.readouterr().out


def test_threads_of_an_empty_variable(monkeypatch):
    monkeypatch.setenv("GPURNN_NUM_THREADS", "")
    monkeypatch.setattr(environment, "_usable_cpus", lambda: 5)
    assert environment.cpu_threads() == 5
