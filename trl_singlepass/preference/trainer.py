"""`SinglePassDPOTrainer`: TRL's `DPOTrainer` on rows of prefix trees. See docs/internals.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from datasets import Dataset
from torch import nn, optim
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import EvalPrediction
from trl import DPOConfig, DPOTrainer

from ..data.bad_rows import BadRows
from ..data.collator import Batch, Collator, check_collator
from ..data.dataset_format import column_names
from ..data.images import hide_image_columns
from ..data.labelled_rows import check_rows_fit
from ..data.pairs import PAIR_COLUMNS, REFERENCE_COLUMNS, TOKEN_COLUMNS
from ..data.preparation import PAIR_KIND, prepare
from ..engine.borrowed_state import attributes
from ..engine.enable import check_not_compiled
from ..engine.pieces import Pieces
from ..images.loading import image_loader_of
from ..training.compatibility import check_arguments, check_pairs, read_images, show_images
from ..training.config import complete_config
from ..training.dataset import AnyDataset
from ..training.loss import Loss
from ..training.mixin import ReferenceMixin
from ..training.refusals import ENGINES, PAIRS, check
from ..training.situation import Situation
from .collator import DataCollatorForSinglePassPreference
from .config import SinglePassDPOConfig, pair_settings, turn_weights


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig, DataCollator


class SinglePassDPOTrainer(ReferenceMixin, DPOTrainer):
    """
    Trainer that prefers trajectories by their turns, each in the context that the model sees at inference.

    A drop-in replacement of [`~trl.DPOTrainer`]. log π of a trajectory is the sum over its assistant turns after the
    prompt; what users, tools and the template write is never in it. Losses, reference model and metrics are TRL's own.
    Pairs of a single turn, plain text and tokenised pairs are trained as `DPOTrainer` trains them. Its arguments are
    those of `DPOTrainer`, of which these differ:

    - `model`: its `attn_implementation` chooses the attention kernel.
    - `args`: a [`SinglePassDPOConfig`]; a [`~trl.DPOConfig`] gets the settings that it lacks, at their defaults.
    - `data_collator`: a [`DataCollatorForSinglePassPreference`].
    - `compute_metrics`: gets one row per trajectory, the chosen ones of a batch first: the tokens that count.

    Raises:
        `ValueError`: If a setting, model or dataset cannot be trained in one pass; the error names a fix.
        `TypeError`: If a dataset is a dictionary of splits or a list, as in TRL.

    Example: `SinglePassDPOTrainer("Qwen/Qwen3-0.6B", train_dataset=dataset).train()`, with the columns "prompt",
    "chosen" and "rejected".
    """

    _tag_names: ClassVar = ["trl", "dpo", "single-pass"]
    _name = "SinglePassDPO"
    precompute_ref_logps: bool
    _row_columns: ClassVar = (*PAIR_COLUMNS, *REFERENCE_COLUMNS)
    _moved_as_they_are: ClassVar = ("tree", *REFERENCE_COLUMNS)
    _pair_collator: DataCollatorForSinglePassPreference | None = None
    _pieces: Pieces

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[optim.Optimizer | None, optim.lr_scheduler.LRScheduler | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        args = complete_config(args, SinglePassDPOConfig, model)
        if train_dataset is not None:
            check_pairs(train_dataset, "train")
        check_not_compiled(ref_model)
        run = Situation(args, model, dataset=train_dataset, peft_config=peft_config)
        check_arguments(run, data_collator, DataCollatorForSinglePassPreference, PAIRS)
        self._given_collator = data_collator
        with attributes(args, padding_free=False):  # rows have no padding, but TRL would say that it is ignored
            super().__init__(
                model,
                ref_model,
                args,
                None,
                hide_image_columns(train_dataset),
                eval_dataset,
                processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        self._enable_pairs()

    def _enable_pairs(self) -> None:
        """Run the policy and its reference on trees; TRL may need them before its constructor has ended."""
        if self._pair_collator is not None:
            return
        check(self._situation, ENGINES, PAIRS)
        self._run_on_trees()
        self._pair_collator = self._given_collator or DataCollatorForSinglePassPreference(
            self._tokenizer.pad_token_id,
            self.args.pad_to_multiple_of,
            turn_weights(self.args),
            self.args.max_row_tokens,
        )
        self._pieces = self._make_pieces("wave_tokens", "max_row_tokens")
        rows = self._pair_collator.row_collator
        rows.load_images = rows.load_images or image_loader_of(self.processing_class)
        if show_images(self.train_dataset, self.eval_dataset):
            read_images(self._situation, rows, *self._models)
        self.data_collator = self._pair_collator

    def _checked_collator(self, collator: Collator) -> Collator:
        before = self._pair_collator
        if before is not None and collator is not before:
            check_collator(collator, DataCollatorForSinglePassPreference)
            assert isinstance(collator, DataCollatorForSinglePassPreference)
            self._pair_collator = collator.reading_images_as(before)
        return self._pair_collator or collator

    def _prepare_dataset(
        self,
        dataset: AnyDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: DPOConfig,
        dataset_name: str,
    ) -> AnyDataset:
        """Turn pairs into rows; TRL makes one sequence of each trajectory, in which all turns share one context."""
        check_pairs(dataset, dataset_name)
        columns = set(column_names(dataset))
        if set(PAIR_COLUMNS) <= columns:
            if args.max_row_tokens is not None and isinstance(dataset, Dataset):
                check_rows_fit(dataset, args.max_row_tokens)
            return dataset
        if not set(TOKEN_COLUMNS) <= columns and not isinstance(next(iter(dataset))["chosen"], list):
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)  # plain text
        with args.main_process_first(desc=f"preparing the {dataset_name} dataset"):
            return prepare(
                dataset,
                PAIR_KIND,
                processing_class,
                pair_settings(args),
                bad_rows=BadRows(args.bad_rows),
                num_proc=args.dataset_num_proc,
                name=dataset_name,
                is_main_process=args.process_index == 0,
            )

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Enable trees first; TRL computes these log-probabilities at the end of its own constructor."""
        self._enable_pairs()
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _check_models(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        rows = [row for batch in batches for row in batch["tree"].rows]
        assert self._pair_collator is not None
        # Not `filter`: a compiled model has a length, which raises.
        for each in (model,) if self.ref_model is None else (model, self.ref_model):
            self._self_check.check(each, rows, self._pair_collator.row_collator)

    def compute_ref_log_probs(self, model: nn.Module, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the reference on the trees of the rows; TRL runs it on each trajectory as one sequence."""
        runner = self._pieces.runner(model, inputs["tree"].rows, trains=False)
        inputs = {**inputs, "tree": inputs["tree"].handled()}
        return super().compute_ref_log_probs(model if runner is None else runner, inputs)

    def _compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool) -> Loss:
        """Run the policy on the trees of the rows; TRL runs it on each trajectory as one sequence."""
        rows = inputs["tree"].rows
        if not self.precompute_ref_logps:
            reference = self.model if self.ref_model is None else self.ref_model
            logps = self.compute_ref_log_probs(reference, inputs)
            inputs = {**inputs, **dict(zip(REFERENCE_COLUMNS, logps, strict=True))}
        divisor = getattr(self, "current_gradient_accumulation_steps", 1)
        runner = self._pieces.runner(model, rows, divisor=divisor, trains=self.model.training)
        if self.model.training:
            num_tokens = self.accelerator.gather(inputs["completion_mask"].sum()[None]).sum()
            self._counts.add(rows, num_tokens)
            self._metrics["train"]["num_rows"].append(float(len(rows)))
            if self.args.wave_tokens is not None:
                self._metrics["train"]["num_waves"].append(float(1 if runner is None else runner.num_pieces))
        inputs = {**inputs, "tree": inputs["tree"].handled()}
        with attributes(self, precompute_ref_logps=True):  # the reference's log-probabilities are in the batch
            loss: Loss = super()._compute_loss(model if runner is None else runner, inputs, return_outputs)
        if runner is None or not isinstance(loss, torch.Tensor) or not loss.requires_grad:
            return loss
        return runner.backward(loss)
