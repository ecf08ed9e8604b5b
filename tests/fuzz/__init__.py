"""Fuzzers: strange arguments, strange memory, random cells, damaged files.  Each case is a function of its seed.

python -m pytest tests/fuzz              a few cases of each
python -m pytest tests/fuzz -m slow      FUZZ_CASES of each (1000; of cells a twentieth), from seed FUZZ_SEED (0) on
"""
