"""CUDA kernels, written in Numba.  Installed as `gpurnn.kernels`; depends on Numba alone, never on the rest of gpurnn."""
