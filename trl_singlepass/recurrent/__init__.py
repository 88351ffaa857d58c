"""Recurrent and convolutional layers on trees: each runs from fork to fork, and sees the history once."""

from __future__ import annotations

from .layer import disable_tree_recurrence as disable_tree_recurrence
from .layer import enable_tree_recurrence as enable_tree_recurrence
from .layer_kinds import path_dependent_layers as path_dependent_layers
