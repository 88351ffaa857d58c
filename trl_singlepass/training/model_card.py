"""The model card: what TRL's lacks about a run on conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset, IterableDataset
from trl import SFTTrainer

from .. import __version__
from ..data.dataset_format import column_names, holds_rows
from ..engine.enable import without_adapters


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PAPER = {
    "title": "One-Pass to Reason: Token Duplication and Block-Sparse Mask for Efficient Fine-Tuning on Multi-Turn "
    "Reasoning",
    "id": "2504.18246",
    # docstyle-ignore
    "citation": """\
            @inproceedings{goru2025onepass,
                title        = {{One-Pass to Reason: Token Duplication and Block-Sparse Mask for Efficient Fine-Tuning on Multi-Turn Reasoning}},
                author       = {Ritesh Goru and Shanay Mehta and Prateek Jain},
                year         = 2025,
                booktitle    = {Findings of the Association for Computational Linguistics: IJCNLP-AACL 2025},
                url          = {https://arxiv.org/abs/2504.18246},
            }""",  # noqa: E501
}
"""The paper that the card of a trained model cites."""
STOCK_CARD = {name: getattr(SFTTrainer, name) for name in ("_name", "_tag_names", "_paper")}
"""By what attributes of a trainer TRL writes the card of a run on plain text, which has no trees."""
PROJECT = "https://github.com/trl-singlepass/trl-singlepass"
_UNNAMED = "[None](https://huggingface.co/None)"  # what TRL writes for a model that is not on the Hub
_NEXT_SECTION = "### Framework versions\n"


def complete_model_card(
    folder: str,
    model: PreTrainedModel | PeftModel,
    dataset: Dataset | IterableDataset | None,
    log_history: Sequence[Mapping[str, object]],
) -> None:
    """Name the base model in the card that TRL has written; for conversations, add what was trained and with what."""
    base = without_adapters(model)
    source = Path(str(base.config._name_or_path)).name
    path = Path(folder) / "README.md"
    card = path.read_text("utf-8").replace(_UNNAMED, f"`{source or type(base).__name__}`")
    card = card.replace('model="None"', f'model="{folder}"')  # not on the Hub
    if dataset is not None and not holds_rows(column_names(dataset)):
        path.write_text(card, "utf-8")
        return
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
