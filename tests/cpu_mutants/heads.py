"""Layers in heads: on NumPy, in the compiled loop, and how threads share them."""

PRODUCTS, ORACLE, REDUCTION = "gpurnn/cpu/head_products", "gpurnn/executors/heads", "gpurnn/cpu/reduction"
SHARING, LAYER = "gpurnn/cpu/sharing", "gpurnn/recurrent/layer"
LSTM, SPLIT = (
    "heads::compiled_agrees_with_the_oracle[lstm-2-34-float64]",
    "heads::compiled_agrees_with_the_oracle[gru-3-48-float64]",
)
THREADS = "heads::threads_have_whole_heads_or_meet[0-3-2-96-True-None]"
LYING = "heads::threads_have_whole_heads_or_meet[1000000000-3-2-96-True-None]"
DENSE = "heads::heads_are_a_block_diagonal_layer[LSTM-2-10-numpy]"
STEP = "heads_cuda::step_in_fewer_bits[tf32]"
EVEN = "heads::heads_that_are_shared_evenly_leave_no_thread_waiting"

# fmt: off
MUTANTS = {
    "index: a head reads its neighbour's units": (PRODUCTS, "dot, 1, h + start * size", "dot, 1, h + (H - head - start) * size",
        LSTM, SPLIT),
    "index: the next head's packed weights": (PRODUCTS, "            if not dot:\n                weights += gates",
        "            if dot:\n                weights += gates", LSTM),
    "index: of a gate's gradients a part of a head reads from itself on": (PRODUCTS, "at = d + (place * H + start) * size",
        "at = d + (place * H + unit) * size", THREADS, LYING),
    "index: back through a neighbour's weights, which lie": (PRODUCTS,
        "w = weights + (word(order + place * 8) * H + start) * row", "w = weights + (word(order + place * 8) * H) * row", LYING),
    "index: a part of a head packs the head's first columns": (PRODUCTS, "* H + start) * row + (unit - start) * size\n"
        "                pack(", "* H + start) * row\n                pack(", THREADS),
    "sum: the last head's gradient is lost": (REDUCTION, "for one in range(H // head if weight_hh else 0):",
        "for one in range(H // head - 1 if weight_hh else 0):", LSTM),
    "sum: only the first head of a block of columns gets a gradient": (REDUCTION, "                    done += some",
        "                    done += count", LSTM),
    "index: a gradient from another head's units": (REDUCTION, "packed_h + one * k * of_row, head, to",
        "packed_h, head, to", LSTM, SPLIT),
    "NumPy: heads in reverse": (ORACLE, "(per_head @ h.reshape(m, K, width).swapaxes(0, 1))",
        "(per_head @ h.reshape(m, K, width).swapaxes(0, 1)[::-1])", DENSE),
    "NumPy: gates and heads change places": (ORACLE, "return apart.swapaxes(0, 1).reshape(H // width, -1, width)",
        "return apart.reshape(H // width, -1, width)", DENSE),
    "threads: none waits for the other part of its head": (SHARING, "any(cut.start % head for cut in units)",
        "any(cut.start % 2 for cut in units)", THREADS),
    "threads: heads are not shared": (SHARING, "if most > 1 and H // head % most == 0:", "if most > H:", EVEN),
    "CUDA: the last head's gradient is lost": ("gpurnn/cuda/sweeps", "add_products(*blocks, H // width, precision)",
        "add_products(*blocks, H // width - 1, precision)", STEP),
    "CUDA: a head reads the first one's units": ("gpurnn/cuda/heads", "(head * block, head * width, head * width)",
        "(head * block, 0, head * width)", STEP),
    "CUDA: groups for the first head alone": ("gpurnn/cuda/passes", "groups = self.heads * device.grid(self.N, rows)",
        "groups = device.grid(self.N, rows)", "heads_cuda::more_heads_than_run_at_once"),
    "start: all heads of a gate drawn as one matrix": (LAYER, 'self.heads if kind == "weight_hh" else 1', "1",
        "heads::parameters_begin_head_by_head"),
}
# fmt: on
