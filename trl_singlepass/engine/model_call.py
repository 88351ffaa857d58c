"""
The call of a model with a batch: its entry `tree` is taken out, and the model runs on the tree.

Whoever calls `model(**batch)` runs the tree: TRL's loss, a `compute_loss` of one's own, a callback, a plain loop. The
entry is taken out where the model's own `forward` begins, inside of adapters and engines: PEFT calls the `forward` of
the model that it wraps, past its hooks.

Shape letters: L tokens of a row, N lines, M tokens of the longest line.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..attention.context import Tree, current_tree, running_on
from ..attention.registry import own_attention
from ..attention.row_group import RowGroup
from ..data.row_tree import LineView, RowTree
from ..images.reading import showing_images
from ..trees.prefix_tree import IGNORE_INDEX


if TYPE_CHECKING:
    from ..data.collator import Batch

PER_TOKEN_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")
"""What TRL's fused head returns per token."""


def take_trees(model: PreTrainedModel) -> None:
    """Make a model, without adapters, take the entry `tree` of a batch; called again after TRL adds a fused head."""
    if _is_outermost(model):
        return
    # A fused head may have been put around an earlier one of these: each calls the forward that it found.
    found: list[Any] = vars(model).get("_forwards_without_trees", [])
    level = len(found)
    model._forwards_without_trees = [*found, model.forward]

    # `generate` and the Trainer read the signature.
    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel, *args: Any, tree: RowTree | LineView | None = None, **inputs: Any
    ) -> ModelOutput:
        model_forward = self._forwards_without_trees[level]
        if tree is None:
            with nullcontext() if current_tree() else own_attention(self):
                return model_forward(*args, **inputs)
        if isinstance(tree, LineView):
            return _run_lines(self, model_forward, tree, inputs)
        return _run_row(self, model_forward, tree, *args, **inputs)

    # Compiled models leave this function, which sets context variables, and compile the forward that it calls.
    taking: Any = torch.compiler.disable(forward, recursive=False)  # type: ignore[no-untyped-call]
    taking._takes_trees = True
    model.forward = MethodType(taking, model)


def takes_trees(model: PreTrainedModel) -> bool:
    """Return whether a model takes the entry `tree` of a batch, whatever has been put around its `forward` since."""
    return bool(vars(model).get("_forwards_without_trees"))


def has_fused_head(model: PreTrainedModel) -> bool:
    """Return whether TRL's fused head was added to a model that takes trees, before or after it did."""
    forwards = (model.forward, *vars(model).get("_forwards_without_trees", ()))
    return any("fused_lm_head" in forward.__code__.co_varnames for forward in forwards if hasattr(forward, "__code__"))


def _is_outermost(model: PreTrainedModel) -> bool:
    return getattr(model.forward, "_takes_trees", False)


def leave_trees(model: PreTrainedModel) -> None:
    """Undo [`take_trees`], unless something else has been put around the model's `forward` since."""
    if not _is_outermost(model):
        return
    before = model._forwards_without_trees.pop()
    if getattr(before, "__func__", None) is type(model).forward:
        del model.forward
    else:
        model.forward = before


def refuse_own_calls(model: PreTrainedModel, setting: str) -> None:
    """Refuse to train rows in calls that are not the trainer's, because they would not follow one of its settings."""
    model._rows_are_run_by = setting


@contextmanager
def row_context(tree: RowTree, device: torch.device | None = None) -> Iterator[Tree]:
    """Run the model calls inside on a row and on the images that it shows, on a device if one is given."""
    tree = tree if device is None else tree.to(device)
    with showing_images(tree.image_features, tree.plan), running_on(as_tree(tree)) as context:
        yield context


def as_tree(tree: RowTree, group: RowGroup | None = None) -> Tree:
    """Return the tree of a row as layers read it, with the ranks that share the row, if any."""
    return Tree(tree.plan, tree.subtree_end, tree.depth, group=group)


def _run_row(
    model: PreTrainedModel, forward: Callable[..., ModelOutput], tree: RowTree, *args: Any, **inputs: Any
) -> ModelOutput:
    _check_call(model, tree)
    given: torch.Tensor = args[0] if args else inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"]
    parameters = inspect.signature(type(model).forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if "use_cache" in parameters or takes_any:
        inputs.setdefault("use_cache", False)  # of generation; a row is not continued
    if "position_ids" not in parameters and not takes_any:
        inputs.pop("position_ids", None)  # of a model whose layers do not read any
    with row_context(tree, given.device):
        return forward(*args, **inputs)


def _check_call(model: PreTrainedModel, tree: RowTree) -> None:
    """Refuse a call by someone who does not see to what the row asks for."""
    if tree.is_handled:
        return
    if tree.loss_weights is not None:
        raise ValueError(
            "The batch has loss weights other than 1, which the loss of this call would not read. Multiply the loss "
            "of each target by batch['tree'].loss_weights and pass tree=batch['tree'].handled() to the model, or call "
            "the compute_loss of the single-pass trainer."
        )
    if tree.router_loss_scale != 1:
        raise ValueError(
            f"The load-balancing loss of this batch counts {tree.router_loss_scale:.3g} times, since ranks have "
            "different numbers of new examples, and the loss of this call would not know. Set "
            "dataloader_drop_last=True, or call the compute_loss of the single-pass trainer."
        )
    _check_settings_are_followed(model)


def _check_settings_are_followed(model: PreTrainedModel) -> None:
    """Refuse to train a row all at once where a setting of the trainer asks for another way."""
    setting = getattr(model, "_rows_are_run_by", None)
    if setting is not None and model.training and torch.is_grad_enabled():
        raise ValueError(
            f"{setting} has no effect on a call of the model that is not the single-pass trainer's own. Call the "
            f"trainer's compute_loss (`super().compute_loss(…)`), or leave out {setting}."
        )


# Lines ---------------------------------------------------------------------------------------------------------------


def _run_lines(
    model: PreTrainedModel, forward: Callable[..., ModelOutput], view: LineView, inputs: dict[str, Any]
) -> ModelOutput:
    """Run the rows of a view; return the fused head's outputs, `(N, M)`, or `logits` and `loss`, in lines."""
    if not view.is_handled:
        _check_settings_are_followed(model)
    labels, is_fused = inputs.get("labels"), bool(inputs.get("fused_lm_head"))
    view = view.to(inputs["input_ids"].device)
    of_lines = ("input_ids", "attention_mask", "completion_mask", "labels")
    others, given = {name: x for name, x in inputs.items() if name not in of_lines}, {"has_labels": is_fused}
    if inputs.get("output_router_logits") and len(view.rows) > 1:
        raise ValueError(
            "output_router_logits: the load-balancing loss of several rows is a mean over the tokens of all of them, "
            "which only the single-pass trainer's own call computes. Set max_row_tokens=None, or leave it out."
        )
    outputs = join_rows(
        [_run_row(model, forward, row["tree"].handled(), **row_inputs(row, **given), **others) for row in view.rows]
    )
    if is_fused:
        assert labels is not None, "the fused head scores labels"
        return in_lines(outputs, view, is_padding=labels[:, 1:] == IGNORE_INDEX)
    if view.token_weights is not None:
        raise ValueError(
            "The turns of this batch have weights (turn_discount, turn_mean), which are factors of log-probabilities, "
            "and this call asks for logits. Pass fused_lm_head=True with labels, or leave out the weights of turns."
        )
    outputs["logits"] = logits_in_lines(outputs, view)
    if labels is not None:
        outputs["loss"] = model.loss_function(
            outputs["logits"], labels, vocab_size=model.config.get_text_config().vocab_size
        )
    return outputs


def row_inputs(row: Batch, *, has_labels: bool) -> dict[str, torch.Tensor]:
    """Return what the model reads of a row: with its targets, shifted already, if it is to score them."""
    inputs = {name: value for name, value in row.items() if name not in ("labels", "tree")}
    if has_labels:
        inputs["shift_labels"] = F.pad(row["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    return inputs


def join_rows(parts: Sequence[ModelOutput]) -> ModelOutput:
    """Return the outputs of several rows one after the other, without a load-balancing loss, which is of one row."""
    if len(parts) == 1:
        return parts[0]
    names = [name for name in ("logits", *PER_TOKEN_OUTPUTS) if parts[0].get(name) is not None]
    return type(parts[0])(**{name: torch.cat([part[name] for part in parts], dim=1) for name in names})


def in_lines(outputs: ModelOutput, view: LineView, is_padding: torch.Tensor) -> ModelOutput:
    """Return per-token outputs, `(1, L)`, at the targets of each line, `(N, M)`, with weights; 0 for padding."""
    for name in PER_TOKEN_OUTPUTS:
        if outputs.get(name) is not None:
            outputs[name] = outputs[name][0][view.targets].masked_fill(is_padding, 0)
    if view.token_weights is not None:
        outputs["log_probs"] = outputs["log_probs"] * view.token_weights
    return outputs


def logits_in_lines(outputs: ModelOutput, view: LineView) -> torch.Tensor:
    """Return the logits of rows in lines, `(N, M + 1, vocabulary)`: `[:, i]` predicts token `i + 1` of a line."""
    return F.pad(outputs["logits"][0][view.targets], (0, 0, 0, 1))
