"""The laboratory's instruments."""
