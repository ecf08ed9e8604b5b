"""Tests of the PTX interpreter `tests/ptx` itself; `snippets` wraps a few lines of PTX into a kernel."""
