"""Runs a model on rows: which models can, how its call takes the tree of a batch, and the check that measures it."""
