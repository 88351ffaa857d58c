"""Exact single-pass supervised fine-tuning on multi-turn reasoning conversations, for Hugging Face TRL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .auditing import AuditReport as AuditReport
    from .auditing import audit as audit
    from .config import SinglePassSFTConfig as SinglePassSFTConfig
    from .npass_export import to_npass as to_npass
    from .reference import verify as verify
    from .rendering.samples import render_samples as render_samples
    from .sample import Sample as Sample
    from .trainer import SinglePassSFTTrainer as SinglePassSFTTrainer
    from .tree import PrefixTree as PrefixTree

__version__ = "0.1.0"

__all__ = [
    "AuditReport",
    "PrefixTree",
    "Sample",
    "SinglePassSFTConfig",
    "SinglePassSFTTrainer",
    "audit",
    "render_samples",
    "to_npass",
    "verify",
]

_HOME = {
    "AuditReport": "auditing",
    "PrefixTree": "tree",
    "Sample": "sample",
    "SinglePassSFTConfig": "config",
    "SinglePassSFTTrainer": "trainer",
    "audit": "auditing",
    "render_samples": "rendering.samples",
    "to_npass": "npass_export",
    "verify": "reference",
}


def __getattr__(name: str) -> Any:
    # Data tools import only what they use: without this, `from trl_singlepass import PrefixTree` would load torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
