"""Arguments of `SinglePassGRPOTrainer` and `SinglePassRLOOTrainer`: those of TRL's configurations, and their own."""

from __future__ import annotations

from dataclasses import dataclass

from trl import GRPOConfig, RLOOConfig

from ..training.config import EngineConfig, check_engine_settings, use_new_names


@dataclass
class SinglePassGRPOConfig(EngineConfig, GRPOConfig):
    """Configuration class for the [`SinglePassGRPOTrainer`]: arguments of [`~trl.GRPOConfig`] and [`EngineConfig`]."""

    def __post_init__(self) -> None:
        use_new_names(self)
        super().__post_init__()
        check_engine_settings(self)


@dataclass
class SinglePassRLOOConfig(EngineConfig, RLOOConfig):
    """Configuration class for the [`SinglePassRLOOTrainer`]: arguments of [`~trl.RLOOConfig`] and [`EngineConfig`]."""

    def __post_init__(self) -> None:
        use_new_names(self)
        super().__post_init__()
        check_engine_settings(self)
