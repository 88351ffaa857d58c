"""Releases of other libraries: what this project relies on in each, and whether its tests pass with it."""
