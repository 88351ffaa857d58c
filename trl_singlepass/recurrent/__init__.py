"""Recurrent and convolutional layers on trees: each branch sees its own history, and no sibling."""

from __future__ import annotations

from .introspection import path_dependent_layers as path_dependent_layers
from .layer import disable_tree_recurrence as disable_tree_recurrence
from .layer import enable_tree_recurrence as enable_tree_recurrence
