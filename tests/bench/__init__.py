"""The benchmarks' own correctness; nothing here judges a time."""
