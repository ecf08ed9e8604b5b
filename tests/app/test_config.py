"""Options of a run: one table for command line, file and run folder."""

from dataclasses import fields

import pytest

from gpurnn.app import checkpoint
from gpurnn.app.config import TrainConfig


def test_what_is_written_is_read_back(tmp_path):
    for config in (TrainConfig(), TrainConfig(minutes=3), TrainConfig(clip_norm=0, k2=99, data="x", trainable_h0=True)):
        (tmp_path / "c.toml").write_bytes(checkpoint.config_bytes(config.to_mapping()))
        assert TrainConfig.from_mapping(checkpoint.read_config(tmp_path / "c.toml"), "c.toml") == config


def test_a_budget_is_steps_unless_minutes_are_given():
    assert TrainConfig().steps and TrainConfig().minutes is None
    assert TrainConfig(minutes=2).steps is None
    assert TrainConfig(minutes=2, steps=7).steps == 7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hiden_size": 3}, "f.toml: no option is called 'hiden_size'; did you mean hidden_size?"),
        ({"zzz": 3}, "f.toml: no option is called 'zzz'$"),
        ({"hidden_size": 0}, "f.toml: hidden_size: expected a number above 0, got 0"),
        ({"hidden_size": 2.5}, "hidden_size: expected a whole number, got 2.5"),
        ({"hidden_size": True}, "hidden_size: expected a whole number, got True"),
        ({"hidden_size": "big"}, "hidden_size: expected a whole number, got 'big'"),
        ({"lr": "fast"}, "lr: expected a number, got 'fast'"),
        ({"lr": float("nan")}, "lr: expected a number above 0, got nan"),
        ({"lr": float("inf")}, "lr: expected a number above 0, got inf"),
        ({"cell": "transformer"}, "cell: expected one of lstm, gru, rnn, got 'transformer'"),
        ({"trainable_h0": 1}, "trainable_h0: expected true or false, got 1"),
        ({"dropout": 1.0}, r"dropout: expected a number in \[0, 1\), got 1.0"),
        ({"clip_norm": -1.0}, "clip_norm: expected a number from 0, got -1.0"),
        ({"k1": 8, "k2": 7}, "k2: expected at least k1 = 8, got 7"),
        ({"data": 7}, "data: expected a text, got 7"),
        ({"nonlinearity": "relu"}, "only the cell rnn has a choice"),
        ({"momentum": 0.9}, "adam has its own"),
        ({"precision": "half"}, "precision: expected one of float32, tf32, bfloat16, float16, got 'half'"),
        ({"precision": "bfloat16", "dtype": "float64"}, "precision: expected float32 for dtype float64"),
        ({"seed": 2**63}, "expected a number up to"),
    ],
)
def test_bad_options_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_mapping(values, "f.toml")


def test_every_option_says_what_it_is():
    for option in fields(TrainConfig):
        assert option.metadata["help"] and option.metadata["group"]
