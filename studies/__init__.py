"""Questions that the package raises, answered by training runs; one folder each, with what was measured."""
