"""
The call of a model with a batch: its entry `tree` is taken out, and the model runs on the tree.

Whoever calls `model(**batch)` runs the tree: TRL's loss, a `compute_loss` of one's own, a callback, a plain loop. The
entry is taken out where the model's own `forward` begins, inside of adapters and engines: PEFT calls the `forward` of
the model that it wraps, past its hooks.

Shape letters: L tokens of a row, N lines, M tokens of the longest line.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import CellType, FunctionType, MethodType
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


class _Door:
    """
    The `forward` of a model that takes trees, in the place of the one that it found.

    An object, and no function: a function would run the weights of the original from within a copy of the model.
    """

    def __init__(self, model: PreTrainedModel, inner: Callable[..., ModelOutput]) -> None:
        self.model, self.inner = model, inner

    @property
    def __signature__(self) -> inspect.Signature:  # which `generate` and the Trainer read
        return inspect.signature(MethodType(type(self.model).forward, self.model))

    # Compiled models leave this method, which sets context variables, and compile the forward that it calls.
    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def __call__(self, *args: Any, tree: RowTree | LineView | None = None, **inputs: Any) -> ModelOutput:
        if tree is None:
            with nullcontext() if current_tree() else own_attention(self.model):
                outputs = self.inner(*args, **inputs)
            if (row := current_tree()) is not None:  # a piece of a row
                _check_layers(self.model, row)
            return outputs
        if isinstance(tree, LineView):
            outputs = _run_lines(self.model, self.inner, tree, inputs)
        else:
            outputs = _run_row(self.model, self.inner, tree, *args, **inputs)
        tree.receipt.is_given = True
        return outputs

    def __reduce__(self) -> tuple[Any, ...]:  # a fused head, which trainers add, is a function that no pickle holds
        return _Door, (self.model, MethodType(type(self.model).forward, self.model))


def _copied(model: PreTrainedModel, memo: dict[int, Any]) -> PreTrainedModel:
    """Return a deep copy of a model that runs its own weights; TRL's fused head is bound to those of the original."""
    copier = vars(model).pop("__deepcopy__")
    try:
        other = copy.deepcopy(model, memo)
    finally:
        model.__deepcopy__ = copier
    other.forward = _bound_to(model.forward, model, other)
    other.__deepcopy__ = functools.partial(_copied, other)
    return other


def _bound_to(function: Any, model: PreTrainedModel, other: PreTrainedModel) -> Any:
    """Return a forward of one model as the forward of its copy, with all forwards that it calls."""
    if isinstance(function, _Door):
        return _Door(other, _bound_to(function.inner, model, other)) if function.model is model else function
    if isinstance(function, MethodType):
        bound_to_model = function.__self__ is model
        return MethodType(_bound_to(function.__func__, model, other), other) if bound_to_model else function
    if not isinstance(function, FunctionType) or not function.__closure__:
        return function
    found = [cell.cell_contents for cell in function.__closure__]
    bound = [_bound_to(x, model, other) for x in found]
    if all(x is y for x, y in zip(found, bound, strict=True)):
        return function
    cells = tuple(map(CellType, bound))
    again = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    again.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(again, function)


def take_trees(model: PreTrainedModel) -> None:
    """Make a model, without adapters, take the entry `tree` of a batch; called again after TRL adds a fused head."""
    if not isinstance(model.forward, _Door):
        model.__deepcopy__ = functools.partial(_copied, model)
        model.forward = _Door(model, model.forward)


def takes_trees(model: PreTrainedModel) -> bool:
    """Return whether a model takes the entry `tree` of a batch, whatever has been put around its `forward` since."""
    return "__deepcopy__" in vars(model)


def has_fused_head(model: PreTrainedModel) -> bool:
    """Return whether TRL's fused head was added to a model that takes trees, before or after it did."""
    forward: Any = model.forward
    while forward is not None:
        names = getattr(getattr(forward, "__code__", None), "co_varnames", ())
        if "fused_lm_head" in names:
            return True
        forward = forward.inner if isinstance(forward, _Door) else None
    return False


def leave_trees(model: PreTrainedModel) -> None:
    """Undo [`take_trees`], unless something else has been put around the model's `forward` since."""
    door: Any = model.forward
    if not isinstance(door, _Door):
        return
    if getattr(door.inner, "__func__", None) is type(model).forward:
        del model.forward
    else:
        model.forward = door.inner
    del model.__deepcopy__


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
    return Tree(tree.plan, tree.subtree_end, tree.depth, group=group, sample_ends=tree.sample_ends)


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
    with row_context(tree, given.device) as row:
        outputs = forward(*args, **inputs)
        _check_layers(model, row)
        return outputs


def expect_layers(model: PreTrainedModel, fewest: int | None = None) -> None:
    """Forget how many layers of a model ran on a tree: at least `fewest` have to, and as many as in the next run."""
    if fewest is not None:
        model._fewest_layers_on_trees = fewest
    model._layers_on_trees = model._fewest_layers_on_trees


def _check_layers(model: PreTrainedModel, row: Tree) -> None:
    """Refuse what a model computed if fewer of its layers read the tree than before, as when it was measured."""
    if len(row.seen) < model._layers_on_trees:
        raise ValueError(
            f"{len(row.seen)} attention layers of {type(model).__name__} ran on the tree of a row, and at least "
            f"{model._layers_on_trees} have to. Since trees were enabled, something has replaced its attention "
            f"(attn_implementation={str(model.config.get_text_config()._attn_implementation)!r}), some layers or the "
            "tree. Nothing was trained on this row. Undo that, or call enable_tree(model) again."
        )
    model._layers_on_trees = len(row.seen)


def check_receipt(tree: RowTree | LineView) -> None:
    """Refuse a loss of a batch whose tree has not reached the model."""
    if not tree.receipt.is_given:
        raise ValueError(
            "The loss of this batch was computed without its tree, as if its branches were one text: a compute_loss "
            "of your own does not pass batch['tree'] on, or the forward of the model was replaced. Call "
            "model(**inputs) with all inputs, or the trainer's compute_loss (`super().compute_loss(…)`)."
        )


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
