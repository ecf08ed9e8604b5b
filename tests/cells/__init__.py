"""The cell contract, what is derived and traced from it, cells from the literature."""
