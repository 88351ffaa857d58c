"""Parameters of a test of which a few run by default."""

import pytest


def slow_but_for(fast, cases):
    """Return parameters of a test, one or a tuple each: those that are not among the fast ones are slow."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else [case]), marks=() if case in fast else pytest.mark.slow)
        for case in cases
    ]
