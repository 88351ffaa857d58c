"""`SinglePassSFTTrainer`: TRL's `SFTTrainer` on rows of prefix trees. The only file that touches TRL's trainer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from transformers import (
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    logging,
)

from ..attention import Tree, tree_context
from ..data.collator import DataCollatorForSinglePass, TreeOrPlainCollator
from ..data.dataset_format import check_is_dataset, column_names, holds_messages, holds_rows, holds_turns
from ..data.formatted_text import format_as_text
from ..data.preparation import prepare_dataset
from ..data.sampler import make_train_sampler
from ..trees.rows import ROW_COLUMNS
from .compatibility import (
    check_collator,
    check_dataset,
    check_parallelism,
    check_peft,
    check_run,
    check_weights_reach_the_loss,
)
from .config import (
    SinglePassSFTConfig,
    as_single_pass_config,
    default_config,
    with_packed_length,
    without_redundant_settings,
)
from .loss import normalized, weighted_model
from .metrics import MeasuringTrainer
from .model import check_every_layer_attended, check_model, enable_tree, without_adapters
from .paper import PAPER
from .sequence_parallel import SequenceParallel
from .setting_compatibility import check_turn_settings
from .waves import WaveTraining


logger = logging.get_logger(__name__)


class SinglePassSFTTrainer(MeasuringTrainer):
    """
    Trainer that trains every turn of a conversation exactly as one sample per turn would, in one pass.

    A drop-in replacement of [`~trl.SFTTrainer`]. Datasets of conversations (`messages`, conversational `prompt` +
    `completion`, ShareGPT `conversations`) are trained on every assistant message, each in the context that the model
    sees at inference; loss and gradients are those of the separate samples. Plain text and tokenised datasets are
    trained as `SFTTrainer` trains them.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`], [`~peft.PeftModel`]):
            Model to train, as in [`~trl.SFTTrainer`]. Its `attn_implementation` chooses the attention kernel.
        args ([`SinglePassSFTConfig`], [`~trl.SFTConfig`], *optional*):
            Configuration.
        data_collator ([`DataCollatorForSinglePass`], *optional*):
            Collator of conversations.
        train_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`]):
            Dataset to train on.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], `dict`, *optional*):
            Dataset to evaluate on. `eval_loss` is the mean over all its trained tokens, whatever the batch size.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer with a chat template; loaded with the model if not given.
        compute_loss_func (`Callable`, *optional*):
            Loss function, as in [`~trl.SFTTrainer`].
        compute_metrics (`Callable`, *optional*):
            Metrics of an evaluation, as in [`~trl.SFTTrainer`]; of a conversation it gets one row, with its tree in
            row order and every target beside its prediction.
        callbacks (`list[~transformers.TrainerCallback]`, *optional*):
            Callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler.
        optimizer_cls_and_kwargs (`tuple`, *optional*):
            Class and arguments of the optimizer.
        preprocess_logits_for_metrics (`Callable`, *optional*):
            What is kept of the logits for `compute_metrics`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of a model that is loaded by its name.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train.
        formatting_func (`Callable`, *optional*):
            Function from a row of the dataset to plain text. Conversations are then trained as text, as
            [`~trl.SFTTrainer`] trains it, and not turn by turn; the log says so.

    Raises:
        `ValueError`: If a setting, a model or a dataset cannot be trained in a single pass; the message names it and
            the way out.
        `TypeError`: If a dataset is none, but splits or a list, as in TRL.

    Example:

    ```python
    from trl_singlepass import SinglePassSFTConfig, SinglePassSFTTrainer

    trainer = SinglePassSFTTrainer(
        model="Qwen/Qwen3-0.6B",
        args=SinglePassSFTConfig(output_dir="out"),
        train_dataset=dataset,  # a "messages" column
    )
    trainer.train()
    ```
    """

    _tag_names: ClassVar = ["trl", "sft", "single-pass"]
    _name = "SinglePassSFT"
    _paper: ClassVar = PAPER

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
    ) -> None:
        args = default_config(model) if args is None else as_single_pass_config(args)
        trains_turns = (
            train_dataset is not None
            and formatting_func is None
            and holds_turns(train_dataset, text_field=args.dataset_text_field)
        )
        if train_dataset is not None and trains_turns:
            check_dataset(column_names(train_dataset))
            check_turn_settings(args, train_dataset)
            check_collator(data_collator)
            check_peft(model, peft_config)
            check_parallelism(args.parallelism_config)
            if isinstance(model, PreTrainedModel):
                check_model(model)  # before the dataset is prepared, which can take long
        own_collator = isinstance(data_collator, DataCollatorForSinglePass)
        with without_redundant_settings(args) if trains_turns else nullcontext():
            super().__init__(
                model,
                args,
                None if own_collator else data_collator,
                train_dataset,
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
        check_run(self)
        tree_collator: Any = data_collator
        if not own_collator:
            tree_collator = DataCollatorForSinglePass(self._tokenizer.pad_token_id, args.pad_to_multiple_of)
        self.data_collator = TreeOrPlainCollator(tree_collator, self.data_collator)
        self._trains_turns = trains_turns
        self._uses_tree_attention = False
        self._start_measuring()
        if trains_turns:
            self._count_every_step()
            self._use_tree_attention()

    def _use_tree_attention(self) -> None:
        if not self._uses_tree_attention:
            enable_tree(self.model)
            self._uses_tree_attention = True
            self._checked_layers = False
            self._waves = WaveTraining(self)
            self._sequence_parallel = SequenceParallel.of(self)

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Callable[..., Any] | None,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        check_is_dataset(dataset, dataset_name)
        if holds_rows(column_names(dataset)):
            return dataset
        is_transformed = isinstance(dataset, Dataset) and dataset.format["type"] == "custom"
        if formatting_func is not None and not is_transformed and holds_messages(dataset):
            dataset = format_as_text(dataset, formatting_func, args, dataset_name)
            formatting_func = None
        is_stock = formatting_func is not None or is_transformed
        if is_stock or not holds_turns(dataset, text_field=args.dataset_text_field, name=dataset_name):
            args = with_packed_length(args) if packing else args
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        check_turn_settings(args, dataset, packing)
        if isinstance(dataset, IterableDataset) and args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)  # conversations take less memory in its buffer than rows
        with args.main_process_first(desc=f"preparing the {dataset_name} dataset"):
            rows = prepare_dataset(
                dataset,
                self._tokenizer,
                SinglePassSFTConfig.row_settings(args, packing),  # `args` may be TRL's own
                packing=packing,
                bad_rows=args.bad_rows,
                num_proc=args.dataset_num_proc,
                name=dataset_name,
            )
        return rows.shuffle(seed=args.seed) if args.shuffle_dataset and isinstance(rows, Dataset) else rows

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = make_train_sampler(self)
        return super()._get_train_sampler(train_dataset) if sampler is None else sampler

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns  # type: ignore[has-type]
        self._signature_columns = list(dict.fromkeys([*columns, *ROW_COLUMNS]))

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """
        Return TRL's loss, computed on the tree of the row.

        Args:
            model (`torch.nn.Module`):
                Model, as the Trainer wrapped it.
            inputs (`dict[str, Any]`):
                Batch of the collator.
            return_outputs (`bool`, *optional*, defaults to `False`):
                Whether to return the model's outputs as well.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Sum of the loss weights over the whole step, all ranks and accumulated batches.

        Returns:
            `torch.Tensor` or `tuple`: The loss, with the outputs if asked for.
        """
        inputs = dict(inputs)
        plan, label_parts = inputs.pop("tree_plan", None), inputs.pop("label_parts", None)
        if plan is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._use_tree_attention()  # evaluation may bring the first conversations
        if self._sequence_parallel is not None and "shift_labels" in inputs:
            compute = super().compute_loss
            return self._sequence_parallel.loss(compute, model, plan, inputs, label_parts, num_items_in_batch)
        with tree_context(plan, inputs.pop("subtree_end"), inputs["position_ids"]) as tree:
            model = self._waves.over(model, tree, inputs, num_items_in_batch)
            weights = inputs.pop("loss_weights", None)
            model = self._by_turn(model, label_parts, weights)
            if weights is not None:
                check_weights_reach_the_loss(self)
                # Normalised here, so that TRL's guard against division by a sum below 1 changes nothing.
                model = weighted_model(model, normalized(weights, num_items_in_batch))
                num_items_in_batch = None if num_items_in_batch is None else 1
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            self._waves.check_loss(result)
        self._check_layers_once(tree)
        return result

    def _check_layers_once(self, tree: Tree) -> None:
        if not self._checked_layers:
            check_every_layer_attended(without_adapters(self.model), tree)
            self._checked_layers = True
