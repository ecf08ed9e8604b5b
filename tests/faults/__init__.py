"""A file for each kind of fault, whatever module it is in."""
