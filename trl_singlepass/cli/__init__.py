"""The `trl-singlepass` command."""

from .main import main as main
