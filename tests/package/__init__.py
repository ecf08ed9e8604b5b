"""The package as a whole: what it imports, offers and promises."""
