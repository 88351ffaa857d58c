"""
The model as TRL's DPO calls it: per-token outputs of trajectories, from one forward on the tree of the row.

Shape letters: B pairs, M trained tokens of the longest trajectory, L tokens of the row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..attention import tree_context
from ..data.collator import Batch
from ..training.model import Forward, check_every_layer_attended
from ..trees.prefix_tree import IGNORE_INDEX


# What TRL's fused head returns per token.
_PER_TOKEN_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


def on_pairs(model: nn.Module, base: PreTrainedModel, checked: set[PreTrainedModel]) -> Forward:
    """
    Return a model that takes batches of pairs and returns what TRL's DPO expects of padded trajectories.

    Args:
        model (`torch.nn.Module`):
            Model, as it is wrapped for training.
        base (`transformers.PreTrainedModel`):
            The same model without adapters and wrappers, with trees enabled.
        checked (`set[transformers.PreTrainedModel]`):
            Models of which every layer is known to receive the tree; the first forward adds the model.

    Returns:
        `Forward`: Takes the batch of [`DataCollatorForSinglePassPreference`]. With `labels`, it returns the outputs of
        TRL's fused head, each of shape `(2B, M)`; without, `logits` of shape `(2B, M + 1, vocabulary)`, of which
        `[:, i]` predicts `input_ids[:, i + 1]`.

    Raises:
        `UnsupportedModelError`: In the first forward, if a layer did not receive the tree.
    """

    def forward(
        *,
        row: Batch,
        targets: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        token_weights: torch.Tensor | None = None,
        **inputs: object,
    ) -> ModelOutput:
        inputs |= {"input_ids": row["input_ids"], "position_ids": row["position_ids"]}
        if labels is not None:
            inputs["labels"] = row["labels"]
        with tree_context(row["tree_plan"], row["subtree_end"], row["position_ids"]) as tree:
            outputs = model(**inputs, attention_mask=attention_mask)
        if base not in checked:
            check_every_layer_attended(base, tree)
            checked.add(base)
        if labels is None:
            outputs["logits"] = F.pad(outputs["logits"][0][targets], (0, 0, 0, 1))
            return outputs
        outputs = _laid_out(outputs, targets, is_padding=labels[:, 1:] == IGNORE_INDEX)
        if token_weights is not None:
            outputs["log_probs"] = outputs["log_probs"] * token_weights
        return outputs

    return forward


def _laid_out(outputs: ModelOutput, targets: torch.Tensor, is_padding: torch.Tensor) -> ModelOutput:
    """Return the outputs of the row at the targets of each trajectory, 0 behind its last one."""
    for name in _PER_TOKEN_OUTPUTS:
        if outputs.get(name) is not None:
            outputs[name] = outputs[name][0][targets].masked_fill(is_padding, 0)
    return outputs
