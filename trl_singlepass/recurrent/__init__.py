"""Recurrent and convolutional layers on trees: each runs from fork to fork, and sees the history once."""

from __future__ import annotations

from .layer import stop_tree_recurrence as stop_tree_recurrence
from .layer import use_tree_recurrence as use_tree_recurrence
from .layer_kinds import recurrent_layers as recurrent_layers
