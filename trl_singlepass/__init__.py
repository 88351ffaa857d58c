"""Exact single-pass supervised fine-tuning on multi-turn reasoning conversations, for Hugging Face TRL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .preference.config import SinglePassDPOConfig as SinglePassDPOConfig
    from .preference.trainer import SinglePassDPOTrainer as SinglePassDPOTrainer
    from .reference import verify as verify
    from .reference.export import to_npass as to_npass
    from .rendering.samples import render_samples as render_samples
    from .reports.audit import AuditReport as AuditReport
    from .reports.audit import audit as audit
    from .training.config import SinglePassSFTConfig as SinglePassSFTConfig
    from .training.trainer import SinglePassSFTTrainer as SinglePassSFTTrainer
    from .trees.prefix_tree import PrefixTree as PrefixTree
    from .trees.sample import Sample as Sample

__version__ = "0.1.0"

__all__ = [
    "AuditReport",
    "PrefixTree",
    "Sample",
    "SinglePassDPOConfig",
    "SinglePassDPOTrainer",
    "SinglePassSFTConfig",
    "SinglePassSFTTrainer",
    "audit",
    "render_samples",
    "to_npass",
    "verify",
]

_HOME = {
    "AuditReport": "reports.audit",
    "PrefixTree": "trees.prefix_tree",
    "Sample": "trees.sample",
    "SinglePassDPOConfig": "preference.config",
    "SinglePassDPOTrainer": "preference.trainer",
    "SinglePassSFTConfig": "training.config",
    "SinglePassSFTTrainer": "training.trainer",
    "audit": "reports.audit",
    "render_samples": "rendering.samples",
    "to_npass": "reference.export",
    "verify": "reference",
}


def __getattr__(name: str) -> Any:
    # Data tools import only what they use: without this, `from trl_singlepass import PrefixTree` would load torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
