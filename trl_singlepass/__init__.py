"""Exact single-pass supervised fine-tuning on multi-turn reasoning conversations, for Hugging Face TRL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .data.collator import DataCollatorForSinglePass as DataCollatorForSinglePass
    from .data.preparation import prepare_dataset as prepare_dataset
    from .data.settings import RowSettings as RowSettings
    from .engine.check.tree_check import check_tree as check_tree
    from .engine.enable import enable_images as enable_images
    from .engine.enable import enable_tree as enable_tree
    from .groups.async_trainer import SinglePassAsyncGRPOConfig as SinglePassAsyncGRPOConfig
    from .groups.async_trainer import SinglePassAsyncGRPOTrainer as SinglePassAsyncGRPOTrainer
    from .groups.config import SinglePassGRPOConfig as SinglePassGRPOConfig
    from .groups.config import SinglePassRLOOConfig as SinglePassRLOOConfig
    from .groups.lines import tree_log_probs as tree_log_probs
    from .groups.rollouts import RecordedRollouts as RecordedRollouts
    from .groups.rollouts import ServedRollout as ServedRollout
    from .groups.rollouts import audit_rollouts as audit_rollouts
    from .groups.trainer import SinglePassGRPOTrainer as SinglePassGRPOTrainer
    from .groups.trainer import SinglePassRLOOTrainer as SinglePassRLOOTrainer
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
    "DataCollatorForSinglePass",
    "PrefixTree",
    "RecordedRollouts",
    "RowSettings",
    "Sample",
    "ServedRollout",
    "SinglePassAsyncGRPOConfig",
    "SinglePassAsyncGRPOTrainer",
    "SinglePassDPOConfig",
    "SinglePassDPOTrainer",
    "SinglePassGRPOConfig",
    "SinglePassGRPOTrainer",
    "SinglePassRLOOConfig",
    "SinglePassRLOOTrainer",
    "SinglePassSFTConfig",
    "SinglePassSFTTrainer",
    "audit",
    "audit_rollouts",
    "check_tree",
    "enable_images",
    "enable_tree",
    "prepare_dataset",
    "render_samples",
    "to_npass",
    "tree_log_probs",
    "verify",
]

_HOME = {
    "AuditReport": "reports.audit",
    "DataCollatorForSinglePass": "data.collator",
    "PrefixTree": "trees.prefix_tree",
    "RecordedRollouts": "groups.rollouts",
    "RowSettings": "data.settings",
    "Sample": "trees.sample",
    "ServedRollout": "groups.rollouts",
    "SinglePassAsyncGRPOConfig": "groups.async_trainer",
    "SinglePassAsyncGRPOTrainer": "groups.async_trainer",
    "SinglePassDPOConfig": "preference.config",
    "SinglePassDPOTrainer": "preference.trainer",
    "SinglePassGRPOConfig": "groups.config",
    "SinglePassGRPOTrainer": "groups.trainer",
    "SinglePassRLOOConfig": "groups.config",
    "SinglePassRLOOTrainer": "groups.trainer",
    "SinglePassSFTConfig": "training.config",
    "SinglePassSFTTrainer": "training.trainer",
    "audit": "reports.audit",
    "audit_rollouts": "groups.rollouts",
    "check_tree": "engine.check.tree_check",
    "enable_images": "engine.enable",
    "enable_tree": "engine.enable",
    "prepare_dataset": "data.preparation",
    "render_samples": "rendering.samples",
    "to_npass": "reference.export",
    "tree_log_probs": "groups.lines",
    "verify": "reference",
}


def __getattr__(name: str) -> Any:
    # Data tools import only what they use: without this, `from trl_singlepass import PrefixTree` would load torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
