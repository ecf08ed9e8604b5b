"""The plan's model of a step beside what an H200 took: how far off it is, and whether it takes the faster of two ways.

The kernels of 2026-11-28 (bench/results/nvidia-h200-2026-11-28.md), with the tiles that they had then.
"""

import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

from bench import cases, model
from gpurnn.cells import CELLS
from gpurnn.cuda.tuning import registers
from gpurnn.kernels import exchange, plan, tiles
from gpurnn.kernels.tiles import Ffma, Mma, Shape

CHIP = model.GPUS["h200"].chip

# cell, N, H, backward, tile, blocks, exchange, us a step
# fmt: off
KERNELS = [  # by the profiler
    ("lstm", 16, 768, False, Mma("float16", 2, 4, 8, 4), 48, "flagged", 1.68),
    ("lstm", 16, 768, True, Mma("float16", 4, 8, 8, 8), 24, "flagged", 2.39),
    ("lstm", 64, 1024, True, Mma("float16", 4, 8, 8, 8), 32, "flagged", 6.23),
    ("rnn_tanh", 64, 1024, False, Mma("float16", 4, 4, 8, 8), 16, "flagged", 1.61),
    ("rnn_tanh", 64, 1024, True, Mma("float16", 4, 4, 8, 8), 16, "flagged", 1.69),
    ("gru", 64, 1024, True, Mma("bfloat16", 4, 8, 16, 8), 32, "flagged", 4.05),
    ("lstm", 1, 256, False, Ffma(1, 16, 1, 4), 64, "flagged", 0.8),
    ("lstm", 1, 256, True, Ffma(1, 16, 1, 16), 64, "flagged", 1.02),
    ("lstm", 32, 256, False, Mma("bfloat16", 2, 2, 8, 4), 8, "clustered", 1.32),
    ("lstm", 32, 256, True, Mma("bfloat16", 4, 4, 8, 8), 8, "clustered", 1.83),
    ("lstm", 64, 256, False, Ffma(1, 4, 4, 10), 8, "clustered", 2.75),
    ("lstm", 64, 256, True, Ffma(2, 8, 4, 21), 8, "clustered", 3.7),
    ("rnn_tanh", 1, 64, False, Ffma(1, 1, 1, 16), 1, "alone", 0.39),
    ("rnn_tanh", 1, 64, True, Ffma(1, 1, 1, 16), 1, "alone", 0.28),
    ("lstm", 1, 64, False, Ffma(1, 2, 1, 8), 1, "alone", 0.38),
    ("lstm", 1, 64, True, Ffma(1, 2, 1, 32), 1, "alone", 0.48),
    ("lstm", 64, 64, False, Ffma(1, 2, 1, 8), 1, "alone", 0.57),
    ("lstm", 64, 64, True, Ffma(1, 2, 1, 32), 1, "alone", 0.58),
]
PASSES = [  # whole passes, less the products around them at the measured peak
    ("lstm", 64, 1024, False, Mma("float16", 2, 4, 16, 3), 32, "flagged", 3.4),
    ("rnn_tanh", 1, 256, False, Ffma(1, 4, 1, 16), 8, "clustered", 0.66),
    ("rnn_tanh", 1, 256, True, Ffma(1, 4, 1, 16), 8, "clustered", 0.61),
    ("rnn_tanh", 1, 256, False, Ffma(4, 4, 1, 11), 1, "alone", 0.98),
    ("rnn_tanh", 1, 256, True, Ffma(4, 4, 1, 11), 1, "alone", 0.91),
    ("rnn_tanh", 1, 64, False, Ffma(1, 2, 1, 8), 2, "clustered", 0.39),
    ("rnn_tanh", 1, 64, True, Ffma(1, 2, 1, 8), 2, "clustered", 0.39),
    ("lstm", 1, 64, False, Ffma(1, 8, 1, 2), 8, "clustered", 0.58),
    ("lstm", 1, 64, True, Ffma(1, 8, 1, 8), 8, "clustered", 0.72),
    ("lstm", 32, 256, False, Ffma(2, 8, 2, 5), 8, "clustered", 1.83),
    ("lstm", 32, 256, True, Ffma(2, 8, 2, 22), 8, "clustered", 3.15),
    ("lstm", 64, 1024, False, Ffma(1, 16, 8, 7), 64, "flagged", 21.8),
    ("lstm", 64, 1024, True, Ffma(1, 16, 4, 37), 64, "counted", 54.0),
    ("gru", 64, 1024, False, Ffma(1, 16, 16, 5), 64, "counted", 17.2),
    ("gru", 64, 1024, True, Ffma(1, 8, 8, 35), 64, "counted", 43.0),
]
# fmt: on


def errors(measured):
    """Of each line: predicted over measured, less 1."""
    for cell, N, H, transposed, tile, blocks, kind, us in measured:
        shape = Shape(H, CELLS[cell].gates, transposed, blocks)
        pair = registers(CELLS[cell], transposed)
        yield plan.predicted(shape, tile, kind, pair, N, CHIP).cycles / CHIP.clock * 1e6 / us - 1


def test_what_was_measured_is_predicted_within_a_quarter():
    found = [abs(error) for error in errors(KERNELS + PASSES)]
    assert sum(error <= 0.25 for error in found) >= 0.9 * len(found)
    assert max(found) < 0.4, "nothing is off by more"
    kernels = sorted(abs(error) for error in errors(KERNELS))
    assert kernels[len(kernels) // 2] < 0.1


def test_the_model_leans_neither_way():
    found = list(errors(KERNELS))
    assert abs(sum(found) / len(found)) < 0.08


@pytest.mark.parametrize(
    "name, executor",
    [
        ("latency/rnn/T1024-N1-I256-H256-float32", "persistent"),  # us a step in training: 1.27, resident 1.89
        ("latency/lstm/T1024-N1-I64-H64-float32", "resident"),  # 1.04, persistent 1.30
        ("gaps/lstm/T512-N64-I1024-H1024-float32", "step"),  # 96.6, persistent 119.3
        ("gaps/gru/T512-N64-I1024-H1024-float32", "persistent"),  # 92.5, step 104.7
        ("persistent/lstm/T512-N64-I1024-H1024-float16", "persistent"),  # 20.9, step 59.7
    ],
)
def test_of_two_ways_that_were_measured_the_faster_is_taken(name, executor):
    assert {way.executor for way in model.directions(cases.find(name), model.GPUS["h200"])} == {executor}


def test_memory_shows_where_nothing_hides_it():
    """A step's loads come from L2 or from beyond it, a step ahead or not; mail through L2 takes as long as they do."""
    tile, cell = Ffma(1, 2, 1, 8), CELLS["lstm"]

    def loads(N, transposed=False, kind="alone", blocks=1):
        shape = Shape(64, 4, transposed, blocks)
        assert tiles.ahead(shape, tile, kind) == (not transposed if blocks == 1 else transposed)
        return plan.predicted(shape, tile, kind, registers(cell, transposed), N, CHIP).loads

    assert loads(1) == 0 < loads(512) < plan.AT_LEAST[True], "a short step takes as long as what it has loaded ahead"
    assert 0 < loads(1, True) < loads(512, True)
    assert loads(1, False, "clustered", 2) == 0 < loads(512, False, "clustered", 2)
    assert loads(1, False, "flagged", 2) == loads(512, False, "flagged", 2) == 0


def test_further_rounds_of_mail_cost():
    tile, shape = Mma("bfloat16", 2, 4, 8, 0), Shape(1024, 4, True, 32)
    assert exchange.rounds(shape, tile) == 2
    pair = registers(CELLS["lstm"], True)
    both = [plan.predicted(shape, tile, "flagged", pair, N, CHIP).exchange for N in (1, 64)]
    assert plan.LATENCY["flagged"][0] + plan.ROUND < both[0] < both[1], "and more where slots lie beyond L2"


def test_one_more_cluster_crowds_the_others():
    cell, shape, tile = CELLS["lstm"], Shape(256, 4, True, 8), Ffma(2, 8, 4, 21)
    few, many = (plan.predicted(shape, tile, "clustered", registers(cell, True), N, CHIP).exchange for N in (16, 64))
    assert many > 2 * few
