"""`SinglePassSFTTrainer`: TRL's `SFTTrainer` on rows of prefix trees, in the order of a run. See docs/internals.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch import nn, optim
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction
from trl import SFTConfig, SFTTrainer

from ..data.arrow import COST_COLUMNS
from ..data.collator import Batch, Collator, DataCollatorForSinglePass, TreeOrPlainCollator
from ..data.dataset_format import holds_turns
from ..data.images import hide_image_columns
from ..engine.borrowed_state import attributes
from ..images.loading import image_loader_of
from ..trees.rows import ROW_COLUMNS
from .compatibility import check_arguments, read_images, show_images
from .config import complete_sft_config, packed_length
from .dataset import AnyDataset, FormattingFunction, find_turns, needs_preparation, prepare_conversations
from .epochs import EpochsMixin, scale_router_loss, without_repeated_examples
from .loss import Loss, NumItems, PiecewiseSmoother, TreeLoss, mean_of_means_divisor, step_weights, total_weight
from .metrics import PooledLoss, TurnMetrics, print_by_turn, split_by_example
from .mixin import SinglePassTrainerMixin
from .model_card import PAPER, STOCK_CARD
from .refusals import CONVERSATIONS, ENGINES, OLDER_TRL, TENSOR_PARALLELISM, check
from .sharding import prepare_sharding
from .situation import Situation


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig, DataCollator


class SinglePassSFTTrainer(EpochsMixin, SinglePassTrainerMixin, SFTTrainer):
    """
    Trainer that trains every turn of a conversation exactly as one sample per turn would, in one pass.

    A drop-in replacement of [`~trl.SFTTrainer`]. Conversations (`messages`, conversational `prompt` + `completion`,
    ShareGPT `conversations`) are trained on every assistant message, each in the context that the model sees at
    inference, with the loss and the gradients of separate samples; plain text and tokenised datasets are trained as
    `SFTTrainer` trains them. Its arguments are those of `SFTTrainer`, of which these differ:

    - `model`: its `attn_implementation` chooses the attention kernel.
    - `args`: a [`SinglePassSFTConfig`]; a [`~trl.SFTConfig`] gets the settings that it lacks, at their defaults.
    - `data_collator`: a [`DataCollatorForSinglePass`], for conversations.
    - `eval_dataset`: `eval_loss` is the mean over all its trained tokens, whatever the batch size.
    - `compute_metrics`: gets one row per conversation, its tree in row order, every target beside its prediction.
    - `formatting_func`: conversations are trained as the text it returns, not turn by turn; the log says so.

    Raises:
        `ValueError`: If a setting, model or dataset cannot be trained in one pass; the error names a fix.
        `TypeError`: If a dataset is a dictionary of splits or a list, as in TRL.

    Example: `SinglePassSFTTrainer("Qwen/Qwen3-0.6B", train_dataset=dataset).train()`, with a "messages" column.
    """

    _tag_names: ClassVar = ["trl", "sft", "single-pass"]
    _name = "SinglePassSFT"
    _paper: ClassVar = PAPER
    _row_columns: ClassVar = (*ROW_COLUMNS, "num_pairs")
    label_smoother: LabelSmoother | PiecewiseSmoother | None
    _tree_loss: TreeLoss | None = None
    _pooled_loss: PooledLoss | None = None  # of the evaluation in progress

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_loss_func: Callable[..., torch.Tensor] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[optim.Optimizer | None, optim.lr_scheduler.LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[optim.Optimizer], dict[str, object]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: FormattingFunction | None = None,
    ) -> None:
        args = complete_sft_config(args, model)
        has_turns = train_dataset is not None and formatting_func is None
        self._trains_turns = has_turns and holds_turns(train_dataset, text_field=args.dataset_text_field)
        if self._trains_turns:
            run = Situation(
                args,
                model,
                dataset=train_dataset,
                packing=args.packing,
                peft_config=peft_config,
                compute_loss_func=compute_loss_func,
            )
            check_arguments(run, data_collator, DataCollatorForSinglePass, CONVERSATIONS, TENSOR_PARALLELISM)
        self.__dict__.update({} if self._trains_turns else STOCK_CARD)
        collator = data_collator if isinstance(data_collator, DataCollatorForSinglePass) else None
        # Rows have no padding and train assistant messages alone: TRL would change the template to do as much.
        fulfilled = {"assistant_only_loss": None, "padding_free": None} if self._trains_turns else {}
        with attributes(args, **fulfilled):
            super().__init__(
                model,
                args,
                data_collator if collator is None else None,
                hide_image_columns(train_dataset) if self._trains_turns else train_dataset,
                eval_dataset,
                processing_class,
                compute_loss_func=compute_loss_func,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                quantization_config=quantization_config,
                peft_config=peft_config,
                formatting_func=formatting_func,
            )
        check(self._situation, ENGINES, TENSOR_PARALLELISM)
        prepare_sharding(self.model, self.accelerator, self.get_tp_size())
        self._collate = TreeOrPlainCollator(
            collator or DataCollatorForSinglePass(self._tokenizer.pad_token_id, args.pad_to_multiple_of), self._collate
        )
        self._collator.load_images = self._collator.load_images or image_loader_of(self.processing_class)
        self._turn_metrics = TurnMetrics(args.device) if args.log_turn_metrics else None
        if args.log_turn_metrics:
            print_by_turn(self.callback_handler.callbacks)
        if self._trains_turns:
            self._enable_tree()

    def _checked_collator(self, collator: Collator) -> Collator:
        before = vars(self).get("_collate")
        return before.exchanged(collator, self._trains_turns) if isinstance(before, TreeOrPlainCollator) else collator

    @property
    def _collator(self) -> DataCollatorForSinglePass:
        assert isinstance(self._collate, TreeOrPlainCollator)
        return self._collate.tree

    def _enable_tree(self) -> TreeLoss:
        if self._tree_loss is None:
            self._tree_loss = TreeLoss(self)
            self.label_smoother = self._tree_loss.smoother or self.label_smoother
            self._sequence_parallel = self._tree_loss.sequence_parallel
            if show_images(self.train_dataset, self.eval_dataset):
                read_images(self._situation, self._collator, self.model)
            if self._trains_turns:  # the divisor comes from here, even if the model's class takes the mean of a batch
                check(self._situation, OLDER_TRL)
                self.model_accepts_loss_kwargs = True
        return self._tree_loss

    def _prepare_dataset(
        self,
        dataset: AnyDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: SFTConfig,
        packing: bool,
        formatting_func: FormattingFunction | None,
        dataset_name: str,
    ) -> AnyDataset:
        """Turn conversations into rows; TRL makes one sequence of each, in which all turns share one context."""
        dataset, formatting_func, has_turns = find_turns(dataset, formatting_func, args, dataset_name)
        if has_turns:
            return prepare_conversations(dataset, processing_class, args, packing=packing, name=dataset_name)
        max_length = packed_length(args) if packing and args.max_length is None else args.max_length
        with attributes(args, max_length=max_length):  # where TRL reads the length of a packed row
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def get_test_dataloader(self, test_dataset: AnyDataset) -> DataLoader[Batch]:
        """Prepare a raw dataset, in its order; the Trainer takes only what is prepared."""
        if needs_preparation(test_dataset):
            with attributes(self.args, shuffle_dataset=False):
                test_dataset = self._prepare_dataset(
                    test_dataset, self.processing_class, self.args, False, None, "test"
                )
        return super().get_test_dataloader(test_dataset)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, DataLoader[Batch]]:
        """Share rows with their trees; DeepSpeed drops masks, and accelerate refuses recurrent layers."""
        shared = self._sequence_parallel
        with nullcontext() if shared is None else shared.preparing():
            model, loader = super()._prepare_for_training(*args, **kwargs)
        if shared is not None:
            loader = shared.connect(loader, self._without_repeats, self._tokenizer.pad_token_id, self._epoch)
        return model, loader

    def _check_models(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        group = None if self._sequence_parallel is None else self._sequence_parallel.group
        rows = [batch for batch in batches if "tree" in batch]
        self._self_check.check(model, rows, self._collator, group, self._longest_rows)

    def _longest_rows(self) -> list[Batch]:
        """Return the longest rows of the training set in one batch, as long as any of the run."""
        rows = self.train_dataset
        if not (self._trains_turns and isinstance(rows, Dataset) and set(COST_COLUMNS) <= set(rows.column_names)):
            return []
        lengths = rows.select_columns(list(COST_COLUMNS)).with_format("numpy")[:][COST_COLUMNS[0]]
        longest = np.argsort(lengths)[-self._train_batch_size :]
        return [self._collator([rows[int(i)] for i in longest[::-1]])]

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> NumItems:
        """Sum the loss weights of a step over all ranks; the Trainer counts labels, and each of them once."""
        if not any("tree" in batch for batch in batch_samples):
            return super()._get_num_items_in_batch(batch_samples, device)
        if self._pooled_loss is not None:
            return None  # an evaluation pools the means of batches, so each must be the mean of its own batch
        scale_router_loss(batch_samples, self.accelerator, is_trained=self.aux_loss_enabled)
        own, everyone = step_weights(batch_samples, self.accelerator)
        num_items = everyone.sum() / (self.get_tp_size() * self.get_sp_size())  # ranks that share rows have the same
        self._counts.add(batch_samples, num_items)
        pools_ranks = self.args.average_tokens_across_devices or self._sequence_parallel is not None
        return num_items if pools_ranks else mean_of_means_divisor(own, everyone)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: NumItems = None
    ) -> Loss:
        """Compute TRL's loss on the tree of a row, each target with its weight; TRL has no trees and no weights."""
        if "tree" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        tree_loss = self._enable_tree()
        if self._pooled_loss is not None:  # an evaluation, which may come before any training
            self._check_models(model, [inputs])
        return tree_loss.compute(super().compute_loss, model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Pool the loss over tokens, and split predictions by example; TRL takes a row for one example."""
        batch, inputs = inputs, without_repeated_examples(inputs, self.accelerator, self.args.eval_batch_size)
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if "tree" in inputs and loss is not None and self._pooled_loss is not None:
            self._pooled_loss.add(loss, total_weight(inputs))
        if "tree" in inputs and logits is not None:
            logits, labels = split_by_example(logits, batch), split_by_example(labels, batch)
        return loss, logits, labels

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Report means over all trained tokens, also by turn; the Trainer's loss is a mean of batch means."""
        pooled, by_turn = PooledLoss(self.args.device), self._turn_metrics and TurnMetrics(self.args.device)
        with attributes(self, _pooled_loss=pooled, _turn_metrics=by_turn):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = pooled.pop(self.accelerator) | (by_turn.pop(self.accelerator) if by_turn else {})
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def _pop_training_metrics(self) -> dict[str, float]:
        by_turn = self._turn_metrics.pop(self.accelerator) if self._turn_metrics else {}
        return super()._pop_training_metrics() | by_turn
