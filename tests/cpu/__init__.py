"""The compiled executor and what it is made of, against the NumPy executor."""
