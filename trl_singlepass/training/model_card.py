"""The model card: what TRL's lacks about a run on conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset, IterableDataset

from .. import __version__
from ..engine.enable import without_adapters


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PROJECT = "https://github.com/trl-singlepass/trl-singlepass"
_UNNAMED = "[None](https://huggingface.co/None)"  # what TRL writes for a model that is not on the Hub
_NEXT_SECTION = "### Framework versions\n"


def complete_model_card(
    folder: str,
    model: PreTrainedModel | PeftModel,
    dataset: Dataset | IterableDataset | None,
    log_history: Sequence[Mapping[str, object]],
) -> None:
    """
    Name the base model in a card that TRL has written, and add what was trained and with what.

    Args:
        folder (`str`):
            Folder with the card, `README.md`.
        model (`transformers.PreTrainedModel` or `peft.PeftModel`):
            The trained model.
        dataset (`datasets.Dataset`, `datasets.IterableDataset`, *optional*):
            Prepared training dataset, whose description is the summary of its preparation.
        log_history (`Sequence[Mapping[str, object]]`):
            What the trainer has logged.
    """
    base = without_adapters(model)
    source = Path(str(base.config._name_or_path)).name
    path = Path(folder) / "README.md"
    card = path.read_text("utf-8").replace(_UNNAMED, f"`{source or type(base).__name__}`")
    card = card.replace('model="None"', f'model="{folder}"')  # not on the Hub
    facts = [f"- Trainer: [trl-singlepass]({PROJECT}) {__version__}, every turn in the context of its inference"]
    summary = None if dataset is None else dataset.info.description
    if summary:
        facts.append(f"- Data: {summary}")
    for name, label in (("num_trained_tokens", "Trained tokens"), ("sharing_factor", "Sharing factor")):
        values = [entry[name] for entry in log_history if name in entry]
        if values:
            facts.append(f"- {label}: {values[-1]:.10g}")
    section = "### Single pass\n\n" + "\n".join(facts) + "\n\n"
    path.write_text(card.replace(_NEXT_SECTION, section + _NEXT_SECTION), "utf-8")
