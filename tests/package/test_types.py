"""The types tell the truth: mypy passes the README's examples, and finds slips in the use of a layer."""

import re

import pytest

from tests import ROOT

api = pytest.importorskip("mypy.api", reason="mypy is not installed: pip install 'gpurnn[dev]'")

EXAMPLES = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
SLIPS = {
    "a misspelt option": ("gpurnn.LSTM(10, 32, bidirectionl=True)", "bidirectionl"),
    "an option of another layer": ("gpurnn.GRU(10, 32, forget_bias=1.0)", "forget_bias"),
    "a text for a number": ('gpurnn.RNN(10, "32")', 'has incompatible type "str"'),
    "a number for a switch": ("gpurnn.LSTM(10, 32, bias=0.5)", 'has incompatible type "float"'),
    "backward without training": (
        "y, state, backward = gpurnn.LSTM(10, 32)(x, training=False)\nbackward(y)", '"None" not callable',
    ),
    "backward of a head without training": (
        "y, backward = gpurnn.Linear(10, 32)(x, training=False)\nbackward(y)", '"None" not callable',
    ),
    "an unknown argument of backward": (
        "y, state, backward = gpurnn.LSTM(10, 32)(x)\nbackward(y, kep=True)", 'Unexpected keyword argument "kep"',
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """Every file's errors, from one run of mypy."""
    folder = tmp_path_factory.mktemp("types")
    texts = {f"example_{number}": text for number, text in enumerate(EXAMPLES)}
    for number, (text, _) in enumerate(SLIPS.values()):
        texts[f"slip_{number}"] = f"import numpy as np\nimport gpurnn\n\nx = np.ones((4, 2, 10))\n{text}\n"
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("MYPYPATH", str(ROOT))
        output, errors, _ = api.run(
            ["--cache-dir", str(folder / "cache"), "--no-warn-unused-ignores", *map(str, sorted(folder.glob("*.py")))]
        )
    assert not errors, errors
    return {
        name: [line for line in output.splitlines() if re.search(rf"\b{name}\.py:.* error: ", line)] for name in texts
    }


def test_the_readmes_examples(checked):
    found = [line for number in range(len(EXAMPLES)) for line in checked[f"example_{number}"]]
    assert EXAMPLES and not found, "\n".join(found)


@pytest.mark.parametrize("number", range(len(SLIPS)), ids=SLIPS)
def test_a_slip_is_found(checked, number):
    (found,) = checked[f"slip_{number}"]
    assert list(SLIPS.values())[number][1] in found
