"""What every trainer does with a run: tokens counted, the model measured, checkpoints with a manifest, model cards."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer

from ..data.collator import Batch, Collator
from ..data.dataset_format import column_names
from ..data.row_tree import LineView, RowTree
from ..engine.borrowed_state import attributes
from ..engine.enable import enable_tree
from ..engine.model_call import check_receipt
from ..engine.pieces import Pieces
from ..trees.rows import IMAGE_COLUMNS
from .checkpoints import add_state_to_manifest, resume_counts, write_manifest
from .dataset import AnyDataset
from .loss import NumItems
from .metrics import TokenCounts
from .model_card import complete_model_card
from .refusals import check_parts
from .self_check import SelfCheck
from .sharding import gather_head_with_model, prepare_sharding, stop_prefetching
from .situation import Situation


# Deprecations that TRL's own code causes and no user can act on: the module that each names, and how it begins.
_OF_TRL = {
    r"transformers\.modeling_utils": "`(is_)?gradient_checkpointing(_enable|_disable)?` is deprecated",
    r"trl_singlepass\.": "`return_outputs=True`, and the logits it passes to `compute_metrics`",
}


class SinglePassTrainerMixin(Trainer):
    """What every trainer overrides alike; a trainer derives from it first, and then from TRL's."""

    train_dataset: AnyDataset
    model_accepts_loss_kwargs: bool
    aux_loss_enabled: bool
    _signature_columns: list[str]
    _row_columns: ClassVar[tuple[str, ...]] = ()
    _collate: Collator
    _tree: RowTree | LineView | None = None  # of the batch that is being trained
    _listed: str | None = None  # the checkpoint that is being saved, once it has a manifest
    _moved_as_they_are: ClassVar[tuple[str, ...]] = ("tree",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for module, message in _OF_TRL.items():
            warnings.filterwarnings("ignore", message, FutureWarning, module)
        super().__init__(*args, **kwargs)
        self._counts = TokenCounts()
        self._self_check = SelfCheck(self.accelerator, is_on=self.args.self_check)

    @property
    def _situation(self) -> Situation:
        """What is known of the run once the engine has been set up."""
        return Situation(
            self.args,
            self.model,
            self.accelerator,
            compute_loss_func=self.compute_loss_func,
            accepts_loss_kwargs=self.model_accepts_loss_kwargs,
            tp_size=self.get_tp_size(),
        )

    @property
    def data_collator(self) -> Collator:
        """Makes batches of examples, with the trees of their rows."""
        return self._collate

    @data_collator.setter
    def data_collator(self, collator: Collator) -> None:
        # TRL and the Trainer set theirs in their constructors; afterwards, it is the user who does.
        self._collate = self._checked_collator(collator)

    @abstractmethod
    def _checked_collator(self, collator: Collator) -> Collator:
        """Return the collator to use where another one is set, or raise `ValueError` if it makes no trees."""

    def _make_pieces(self, *settings: str, knows_loss: bool = False) -> Pieces:
        """Return what runs the rows of a batch: in several pieces, if one of some settings bounds them."""
        bounding = [name for name in settings if getattr(self.args, name) is not None]
        if bounding:
            stop_prefetching(self.accelerator)
            check_parts(self._situation)
        return Pieces(
            self.model,
            self.args,
            self.accelerator,
            setting=bounding[0] if bounding else None,
            knows_loss=knows_loss,
            has_router_loss=self.aux_loss_enabled,
        )

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns of rows; TRL removes those that it does not know."""
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *self._row_columns, *IMAGE_COLUMNS]))

    def _remove_unused_columns(self, dataset: AnyDataset, description: str | None = None) -> AnyDataset:
        """Read the numbers of rows as arrays; the Trainer reads lists, which take most of the time of a batch."""
        dataset = super()._remove_unused_columns(dataset, description)
        columns = [name for name in self._row_columns if name in column_names(dataset)]
        if not isinstance(dataset, Dataset) or dataset.format["type"] is not None or not columns:
            return dataset
        return dataset.with_format("numpy", columns=columns, output_all_columns=True)

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        """Resume token counts, from a checkpoint that has not changed; the Trainer does not know them."""
        resume_counts(self, self._counts, args[3])  # the checkpoint
        position: tuple[int, int] = super()._init_training_state(*args)
        return position

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, DataLoader[Batch]]:
        """Gather the head with the model; FSDP2 leaves it sharded, and TRL's fused head reads it without a call."""
        model, loader = super()._prepare_for_training(*args, **kwargs)
        gather_head_with_model(self.model)
        return model, loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], NumItems]:
        """Measure models before they run on their first rows; TRL trains whatever it gets."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self._self_check.has_measured(self.model_wrapped):
            self._check_models(self.model_wrapped, batches)
        return batches, num_items

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Measure what callbacks have changed; see that the loss is that of a tree before its backward."""
        tree = inputs.get("tree") if isinstance(inputs, dict) else None
        if tree is not None:
            self._check_models(model, [inputs])
        with attributes(self, _tree=tree):
            loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    @contextmanager
    def compute_loss_context_manager(self) -> Iterator[None]:
        """See that the model ran on the tree of the batch; DeepSpeed's backward also steps."""
        with super().compute_loss_context_manager():
            yield
        if self._tree is not None:
            check_receipt(self._tree)

    def _check_models(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        """Measure a model, and others that run on some batches, unless their rows are made later."""

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        """Move trees too, and log-probabilities unrounded; the Trainer moves tensors only, and DeepSpeed rounds."""
        prepared: Batch = super()._prepare_inputs(inputs)
        moved = {name: inputs[name].to(self.args.device) for name in self._moved_as_they_are if name in inputs}
        return {**prepared, **moved} if moved else prepared

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the sharing factor, the tokens trained so far and metrics by turn; TRL does not measure them."""
        if self.model.training:
            logs.update(self._pop_training_metrics())
        super().log(logs, start_time)

    def _pop_training_metrics(self) -> dict[str, float]:
        return self._counts.pop()

    def _save_rng_state(self, output_dir: str) -> None:
        """List the files of all ranks; the first goes on to write the file that marks a checkpoint as complete."""
        super()._save_rng_state(output_dir)
        write_manifest(self, self._counts, output_dir)
        self._listed = output_dir

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """List the file that marks a checkpoint as complete; the Trainer writes it last."""
        super()._save_checkpoint(model, trial)
        if self._listed is not None:  # not weights alone
            add_state_to_manifest(self, self._listed)
            self._listed = None

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Add data, tokens and the sharing factor; TRL does not know them, nor models that are not on the Hub."""
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            complete_model_card(self.args.output_dir, self.model, self.train_dataset, self.state.log_history)


class ReferenceMixin(SinglePassTrainerMixin):
    """What trainers override whose loss compares the policy with a reference."""

    _ref_model: nn.Module | None = None

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference, as the engine wrapped it; `None` where the policy without its adapters serves as one."""
        return self._ref_model

    @ref_model.setter
    def ref_model(self, model: nn.Module | None) -> None:
        # TRL loads the model and hands it to DeepSpeed in its own constructor, one after the other.
        if isinstance(model, PreTrainedModel):
            prepare_sharding(model, self.accelerator)
        self._ref_model = model

    @property
    def _models(self) -> list[PreTrainedModel]:
        """The reference, if it is a model of its own, and the policy, without what an engine has put around them."""
        models = (self.model,) if self.ref_model is None else (self.ref_model, self.model)
        return [self.accelerator.unwrap_model(model, keep_torch_compile=False) for model in models]

    def _run_on_trees(self) -> None:
        """Let the policy and its reference take trees, before the engine takes the policy."""
        prepare_sharding(self.model, self.accelerator)
        for model in self._models:
            enable_tree(model)
