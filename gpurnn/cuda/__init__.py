"""The executors on CUDA, and a training step's device side: launches, faults, captured graphs."""
