"""What tests with weights in 4 bits have in common."""

from importlib.util import find_spec

import pytest


NEEDS_BITSANDBYTES = [
    pytest.mark.slow,  # `make test-slow` installs it
    pytest.mark.skipif(
        find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install trl-singlepass[quantization]"
    ),
]
