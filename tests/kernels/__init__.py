"""The CUDA kernels without a GPU: results, machine code, building, and bugs planted in them."""
