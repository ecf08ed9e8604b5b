"""The CPU's executor `compiled`: whole time loops in machine code, by Numba and LLVM, shared between threads."""
