"""The command line as people meet it: what it prints, what it leaves, and how it says no."""

import subprocess
import sys

import pytest

from gpurnn import plot
from gpurnn.app import checkpoint, training
from gpurnn.app.config import TrainConfig
from gpurnn.app.metrics import read_metrics
from gpurnn.cli import main
from tests.app.conftest import COMMAND, ENVIRONMENT, SMALL

pytestmark = pytest.mark.usefixtures("blank_figures")  # processes draw theirs, in `test_processes`


def refused(capsys, *arguments) -> str:
    """The one line of an error."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("gpurnn: error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err.removeprefix("gpurnn: error: ").strip()


def test_train_leaves_a_whole_run(text, tmp_path, capsys):
    assert main(["train", "--data", str(text), *SMALL, "--run", str(tmp_path / "runs" / "a")]) == 0
    output = capsys.readouterr().out
    folder = tmp_path / "runs" / "a"
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.safetensors", "config.toml", "gradient_flow.png", "loss.png", "metrics.jsonl", "model.safetensors",
    ]  # fmt: skip
    for expected in (
        "backend ",
        "sha256",
        "parameters, float32",
        "order-3 Witten-Bell model:",
        "step      8",
        "chars/s",
    ):
        assert expected in output
    assert "bits/char on all" in output and "sample " in output
    metrics = read_metrics(folder / checkpoint.METRICS)
    assert [line["step"] for line in metrics] == [1, 2, 4, 6, 8, 8]
    assert metrics[-1]["validation_all"] > 0 and metrics[-1]["witten_bell"] > 0
    assert TrainConfig.from_mapping(checkpoint.read_config(folder / "config.toml"), "").data == str(text)


def test_without_figures_and_live_lines(text, tmp_path, capsys, monkeypatch):
    """Packages that a result does not need: a run goes without, and gets its figures later."""
    run = tmp_path / "run"
    with monkeypatch.context() as lacking:
        for name in ("matplotlib", "tqdm"):
            lacking.setitem(sys.modules, name, None)
        lacking.setattr("sys.stderr.isatty", lambda: True)
        assert main(["train", "--data", str(text), *SMALL, "--run", str(run)]) == 0
        output = capsys.readouterr().out
        assert "figures   none: matplotlib is not installed; with it, gpurnn train --resume" in output
        assert "step      8" in output and "bits/char on all" in output
        assert main(["flow", str(run), "--steps", "9"]) == 0
        assert "figures   none: matplotlib is not installed; all numbers in" in capsys.readouterr().out
        assert "the tour is a page of figures, and matplotlib is not" in refused(
            capsys, "lab", "--out", tmp_path / "lab"
        )
        assert not list(tmp_path.rglob("*.png")) and not (tmp_path / "lab").exists()
    assert main(["train", "--resume", str(run)]) == 0
    assert (run / "loss.png").exists() and "gradient_flow.png" in capsys.readouterr().out


def test_what_a_command_needs_and_lacks_is_named(text, tmp_path, capsys, monkeypatch):
    for name in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    run = tmp_path / "run"
    assert "this needs safetensors" in refused(capsys, "train", "--data", text, *SMALL, "--run", run)
    assert not run.exists()


def test_resume_and_extend(run, capsys):
    assert main(["train", "--resume", str(run)]) == 0
    assert "nothing left to do: 8 steps are done" in capsys.readouterr().out
    assert main(["train", "--resume", str(run), "--steps", "10"]) == 0
    assert "from step 8" in capsys.readouterr().out
    assert checkpoint.load(run / "model.safetensors").meta["step"] == 10
    assert checkpoint.read_config(run / "config.toml")["steps"] == 10


def test_a_budget_given_to_resume_takes_the_place_of_the_old_one(run, capsys):
    before = (run / "config.toml").read_bytes()
    assert main(["train", "--resume", str(run), "--steps", "5"]) == 0
    assert "nothing left to do: 8 steps are done" in capsys.readouterr().out
    assert (run / "config.toml").read_bytes() == before
    assert main(["train", "--resume", str(run), "--minutes", "0.01"]) == 0
    config = checkpoint.read_config(run / "config.toml")
    assert config["minutes"] == 0.01 and "steps" not in config
    assert checkpoint.load(run / "model.safetensors").meta["step"] > 8


def test_a_text_that_has_moved(run, text, tmp_path, capsys):
    text.rename(tmp_path / "moved.txt")
    assert "text.txt: no such file" in refused(capsys, "train", "--resume", run, "--steps", "9")
    assert main(["train", "--resume", str(run), "--steps", "9", "--data", str(tmp_path / "moved.txt")]) == 0
    assert main(["train", "--resume", str(run), "--steps", "10"]) == 0


def test_a_text_in_one_line_and_a_name_that_no_terminal_shows(tmp_path, capsys):
    text = tmp_path / "Füße.txt"
    text.write_text("no line ends here, " * 50)
    assert main(["train", "--data", str(text), *SMALL, "--run", str(tmp_path / "run")]) == 0
    assert main(["sample", str(tmp_path / "run"), "--length", "5"]) == 0
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    again = [*COMMAND, "train", "--resume", str(tmp_path / "run"), "--steps", "9"]
    done = subprocess.run(again, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0 and b"F??e.txt: 1 file" in done.stdout and not done.stderr


def test_a_training_that_diverges_says_so_and_can_be_loaded(text, tmp_path, capsys):
    """Parameters of 1e15 are finite, and so is the loss that they give."""
    wild = ["--lr", "1e15", "--clip-norm", "0"]
    assert main(["train", "--data", str(text), *SMALL, *wild, "--run", str(tmp_path / "run")]) in (0, 2)  # the sample
    captured = capsys.readouterr()
    assert "this has diverged" in captured.out and "Warning" not in captured.err
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0


def test_a_result_is_of_all_the_validation_text_and_worse_than_guessing_is_told(text, tmp_path, capsys, monkeypatch):
    looked_at = []
    monkeypatch.setattr(plot, "why_not", lambda: "they are not looked at")
    monkeypatch.setattr(training.Training, "validate", lambda self, limit=1: (looked_at.append(limit), bits)[1])
    for bits, told in ((11.0, True), (5.0, False)):  # of an alphabet of some 32
        assert main(["train", "--data", str(text), *SMALL, "--run", str(tmp_path / f"{bits}")]) == 0
        output = capsys.readouterr().out
        assert f"result    {bits:.3f} bits/char on all" in output and ("this has diverged" in output) == told
        assert looked_at[-1] is None and set(looked_at[:-1]) == {1}
        looked_at.clear()


def test_a_run_killed_before_its_figures_gets_them(run, capsys):
    before = checkpoint.load(run / "model.safetensors").tensors
    (run / "loss.png").unlink()
    (run / "gradient_flow.png").unlink()
    assert main(["train", "--resume", str(run)]) == 0
    assert "bits/char on all" in capsys.readouterr().out
    assert (run / "loss.png").exists() and (run / "gradient_flow.png").exists()
    after = checkpoint.load(run / "model.safetensors").tensors
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


def test_a_relative_text_is_found_from_anywhere(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", "text.txt", *SMALL, "--run", "run"]) == 0
    monkeypatch.chdir("/")
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "9"]) == 0


def test_a_config_file_makes_the_same_run(run, tmp_path, capsys):
    assert main(["train", "--config", str(run / "config.toml"), "--run", str(tmp_path / "again")]) == 0
    first, second = (checkpoint.load(folder / "model.safetensors").tensors for folder in (run, tmp_path / "again"))
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)


@pytest.mark.parametrize(
    "options",
    [
        ["--unit", "bytes"],
        ["--cell", "gru", "--num-layers", "2", "--dropout", "0.3", "--k2", "9", "--trainable-h0"],
        ["--cell", "rnn", "--nonlinearity", "relu", "--clip-value", "0.1", "--clip-in-time", "0.1", "--clip-norm", "0"],
        ["--optimizer", "sgd", "--momentum", "0.9", "--schedule", "linear", "--lr", "0.1", "--dtype", "float64"],
        ["--optimizer", "rmsprop", "--schedule", "constant", "--weight-decay", "0.01"],
        ["--validation", "0"],
        ["--max-alphabet", "10"],
    ],
)
def test_options(options, text, tmp_path, capsys):
    assert main(["train", "--data", str(text), *SMALL, *options, "--run", str(tmp_path / "run")]) == 0
    assert "sample " in capsys.readouterr().out
    assert main(["sample", str(tmp_path / "run"), "--length", "5", "--prompt", "the"]) == 0
    assert capsys.readouterr().out.startswith("the")


@pytest.mark.parametrize(
    ("codec", "given"), [("utf-16", []), ("latin-1", ["--encoding", "latin-1"]), ("utf-8-sig", [])]
)
def test_encodings_and_folders(codec, given, tmp_path, capsys):
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_bytes(("Füße und Möwen. " * 30).encode(codec))
    (tmp_path / "texts" / "deep" / "b.txt").write_bytes(("Ähren im Wind. " * 30).encode(codec))
    (tmp_path / "texts" / "c.bin").write_bytes(bytes(50))
    given = [*given, "--pattern", "*.txt"]
    assert main(["train", "--data", str(tmp_path / "texts"), *SMALL, *given, "--run", str(tmp_path / "run")]) == 0
    assert "2 files" in capsys.readouterr().out
    assert main(["sample", str(tmp_path / "run"), "--prompt", "Möwe", "--length", "3"]) == 0


def test_sample(run, capsys):
    def sample(*options) -> str:
        assert main(["sample", str(run), *options]) == 0
        return capsys.readouterr().out

    assert sample("--seed", "3") == sample("--seed", "3")
    assert sample("--seed", "3") != sample("--seed", "4")
    assert sample("--temperature", "0", "--seed", "1") == sample("--temperature", "0", "--seed", "2")
    assert len(sample("--prompt", "the q", "--length", "7")) == 5 + 7 + 1
    assert "the model" not in refused(capsys, "sample", run, "--prompt", "漢字")
    assert "temperature: expected a number from 0, got -1.0" in refused(capsys, "sample", run, "--temperature", "-1")
    assert "length: expected a number from 0, got -5" in refused(capsys, "sample", run, "--length", "-5")
    assert "expected a run folder" in refused(capsys, "sample", run.parent)


def test_info(capsys):
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in ("gpurnn", "numpy", "numba", "backend", "reason", "threads"))


def test_bad_texts_are_refused_and_leave_nothing(tmp_path, capsys):
    cases = {
        "empty.txt": (b"", "empty", True),
        "binary.txt": (b"text\x00more" * 50, "binary", True),
        "latin.txt": (("naïve " * 60).encode("latin-1"), "not valid utf-8", True),
        "short.txt": (b"short " * 3, "need", False),
        "tiny.txt": (b"tiny", "too short", False),
    }
    for name, (content, words, named) in cases.items():
        (tmp_path / name).write_bytes(content)
        message = refused(capsys, "train", "--data", tmp_path / name, *SMALL, "--run", tmp_path / "run")
        assert words in message and (name in message) == named, message
    assert "missing.txt" in refused(capsys, "train", "--data", tmp_path / "missing.txt", "--run", tmp_path / "run")
    (tmp_path / "folder").mkdir()
    assert "folder" in refused(capsys, "train", "--data", tmp_path / "folder", "--run", tmp_path / "run")
    assert "--data: expected a file or folder" in refused(capsys, "train", "--data", "", "--run", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_options_are_refused(text, run, tmp_path, capsys):
    new = ["train", "--data", text, *SMALL, "--run", tmp_path / "new"]
    assert "hidden_size: expected a number above 0" in refused(capsys, *new, "--hidden-size", "0")
    assert "k2: expected at least k1" in refused(capsys, *new, "--k2", "3")
    assert "exists already" in refused(capsys, *new[:-1], run)
    assert "exists already" in refused(capsys, "train", "--data", tmp_path / "missing", "--run", run), "told at once"
    only = "only --steps, --minutes and --data may be given, got "
    assert only + "--lr" in refused(capsys, "train", "--resume", run, "--lr", "1")
    assert only + "--run" in refused(capsys, "train", "--resume", run, "--run", tmp_path / "new")
    for name in ("--run", "--resume", "--config"):
        assert f"{name}: expected a name, got an empty one" in refused(capsys, "train", name, "")
    assert "no run to resume" in refused(capsys, "train", "--resume", tmp_path / "nowhere")
    (tmp_path / "bad.toml").write_text("hidden_size = 5\nhiden = 3\n")
    assert "bad.toml: no option is called 'hiden'" in refused(capsys, *new, "--config", tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_text("hidden_size = \n")
    assert "bad.toml: " in refused(capsys, *new, "--config", tmp_path / "bad.toml")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--no-such-option"], "unknown option --no-such-option"),
        (["train", "--hiden-size", "3"], "unknown option --hiden-size; did you mean --hidden-size?"),
        (["train", "notes.txt"], "unknown argument notes.txt; did you mean --data notes.txt?"),
        (["train", "--cell", "x"], "argument --cell: invalid choice: 'x'"),
        (["train", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["sample", "run", "--lenght=3"], "unknown option --lenght=3; did you mean --length?"),
        (["trian"], "invalid choice: 'trian'"),
        ([], "COMMAND"),
    ],
)
def test_mistyped_arguments_are_told_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1


def test_damaged_runs_are_refused(run, text, capsys):
    model = run / "model.safetensors"
    whole = model.read_bytes()
    for damaged in (whole[:-100], whole[:50], b"", b"not at all"):
        model.write_bytes(damaged)
        for command in (["train", "--resume", run, "--steps", "9"], ["sample", run]):
            assert "model.safetensors" in refused(capsys, *command)
        assert model.read_bytes() == damaged
    model.write_bytes(whole)
    text.write_text("something else " * 90)
    assert "text that this run began with" in refused(capsys, "train", "--resume", run, "--steps", "9")
