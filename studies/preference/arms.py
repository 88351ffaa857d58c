"""The ways of preferring one trajectory to another that are compared."""

from dataclasses import dataclass
from typing import Any

from trl import DPOConfig, DPOTrainer
from trl.chat_template_utils import get_training_chat_template

from trl_singlepass import SinglePassDPOConfig, SinglePassDPOTrainer


@dataclass(frozen=True)
class Arm:
    """A trainer, and the chat template that it renders trajectories with."""

    title: str
    trainer: type
    config: type
    keeps_reasoning: bool = False

    def template(self, tokenizer: Any) -> str:
        """Return the template of training: the one that is served, or TRL's, which keeps all reasoning."""
        template: str = get_training_chat_template(tokenizer) if self.keeps_reasoning else tokenizer.chat_template
        return template


ARMS = {
    "single_pass": Arm("served contexts, single pass", SinglePassDPOTrainer, SinglePassDPOConfig),
    "stock": Arm("TRL, stock template", DPOTrainer, DPOConfig),
    "stock_keeps": Arm("TRL, training template", DPOTrainer, DPOConfig, keeps_reasoning=True),
}
