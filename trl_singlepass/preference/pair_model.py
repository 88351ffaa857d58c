"""
The model as TRL's DPO calls it: per-token outputs of trajectories, from forwards on the trees of a batch's rows.

Shape letters: B pairs, M trained tokens of the longest trajectory, L tokens of all rows.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..attention import Tree, tree_context
from ..data.collator import Batch
from ..images.reading import ImageReader
from ..training.model import check_every_layer_attended
from ..trees.prefix_tree import IGNORE_INDEX


# What TRL's fused head returns per token.
PER_TOKEN_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


class PairModel:
    """
    A model that takes batches of pairs and returns what TRL's DPO expects of padded trajectories.

    A batch of one row runs in one forward; [`PairModelInParts`] runs others.

    Args:
        model (`torch.nn.Module`):
            Model, as it is wrapped for training.
        base (`transformers.PreTrainedModel`):
            The same model without adapters and wrappers, with trees enabled.
        checked (`set[transformers.PreTrainedModel]`):
            Models of which every layer is known to receive the tree; the first forward adds the model.
        image_reader (`ImageReader`, *optional*):
            How it reads images; needed for rows with images.
    """

    def __init__(
        self,
        model: nn.Module,
        base: PreTrainedModel,
        checked: set[PreTrainedModel],
        image_reader: ImageReader | None = None,
    ) -> None:
        self.model, self._base, self._checked, self.image_reader = model, base, checked, image_reader

    def __call__(
        self,
        *,
        rows: list[Batch],
        targets: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        token_weights: torch.Tensor | None = None,
        **inputs: object,
    ) -> ModelOutput:
        """
        Run the rows of a batch.

        Args:
            rows (`list[Batch]`):
                Rows, from [`DataCollatorForSinglePassPreference`], as the other arguments.
            targets (`torch.Tensor` of shape `(2B, M)`):
                Position among the tokens of all rows that predicts each token.
            input_ids (`torch.Tensor`):
                Not read: the tokens are in the rows.
            attention_mask (`torch.Tensor`):
                Not read: it is in the rows.
            labels (`torch.Tensor` of shape `(2B, M + 1)`, *optional*):
                Targets of the trajectories, -100 where there is none.
            token_weights (`torch.Tensor` of shape `(2B, M)`, *optional*):
                Factor of each log-probability.
            **inputs (`object`):
                Further inputs of the model.

        Returns:
            `ModelOutput`: With `labels`, the outputs of TRL's fused head, each of shape `(2B, M)`; without, `logits`
            of shape `(2B, M + 1, vocabulary)`, of which `[:, i]` predicts `input_ids[:, i + 1]`.

        Raises:
            `UnsupportedModelError`: In the first forward, if a layer did not receive the tree.
        """
        outputs = self.run(rows, inputs, has_labels=labels is not None)
        if labels is None:
            outputs["logits"] = F.pad(outputs["logits"][0][targets], (0, 0, 0, 1))
            return outputs
        outputs = _laid_out(outputs, targets, is_padding=labels[:, 1:] == IGNORE_INDEX)
        if token_weights is not None:
            outputs["log_probs"] = outputs["log_probs"] * token_weights
        return outputs

    def run(self, rows: list[Batch], inputs: dict[str, object], *, has_labels: bool) -> ModelOutput:
        """Return the outputs of all tokens of the rows, one after the other: per-token tensors of shape `(1, L)`."""
        (row,) = rows
        of_row = self.row_inputs(row, has_labels=has_labels)
        with self.showing(row), tree_context(row["tree_plan"], row["subtree_end"], row["position_ids"]) as tree:
            outputs: ModelOutput = self.model(**of_row, **inputs)
        self.check_layers(tree)
        return outputs

    def check_layers(self, tree: Tree) -> None:
        """Check, once per model, that every layer received the tree."""
        if self._base not in self._checked:
            check_every_layer_attended(self._base, tree)
            self._checked.add(self._base)

    def row_inputs(self, row: Batch, *, has_labels: bool) -> dict[str, torch.Tensor]:
        """
        Return what the model reads of a row.

        Args:
            row (`Batch`):
                Row.
            has_labels (`bool`):
                Whether it is to score targets.

        Returns:
            `dict[str, torch.Tensor]`: Tensors of shape `(1, row_length)`, with targets shifted already, and what it
            reads of images.

        Raises:
            `ValueError`: If the row shows images, and the model was not made to read any.
        """
        inputs = {name: row[name] for name in ("input_ids", "position_ids", "attention_mask")}
        if has_labels:
            inputs["shift_labels"] = F.pad(row["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
        if "image_features" not in row:
            return inputs
        if self.image_reader is None:
            raise ValueError(
                "The model was not made to read images, because neither train_dataset nor eval_dataset had any when "
                "the trainer was made. Pass pairs with images as one of them."
            )
        return inputs | self.image_reader.model_inputs(row)

    def showing(self, row: Batch) -> AbstractContextManager[None]:
        """Run the model calls inside on the images of a row, if it has any."""
        if "image_features" not in row or self.image_reader is None:
            return nullcontext()
        return self.image_reader.showing(row)

    def backward(self, loss: torch.Tensor) -> torch.Tensor:
        """Return a loss whose backward gives the gradients of all parameters; `loss` is what TRL computed."""
        return loss


def _laid_out(outputs: ModelOutput, targets: torch.Tensor, is_padding: torch.Tensor) -> ModelOutput:
    """Return the outputs of the rows at the targets of each trajectory, 0 behind its last one."""
    for name in PER_TOKEN_OUTPUTS:
        if outputs.get(name) is not None:
            outputs[name] = outputs[name][0][targets].masked_fill(is_padding, 0)
    return outputs
