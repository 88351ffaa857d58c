"""Recurrent and convolutional layers on trees: each branch sees its own history, and no sibling."""
