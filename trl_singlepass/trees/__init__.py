"""Samples, the tree of their shared prefixes, and the rows that lay it out."""
