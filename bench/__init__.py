"""Benchmarks, run from a checkout as `python -m bench`: one table of cases, one harness, one results format.

`run` measures and appends to a file of JSON lines, most important cases first; everything else (`report`, `plot`,
`compare`) reads such files and measures nothing, and `profile` looks into one case.  bench/README.md explains them.
"""
