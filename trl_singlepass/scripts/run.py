"""What the training scripts have in common: their arguments, the trainer, and a run from checkpoint to model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser, get_peft_config

from ..preference.trainer import SinglePassDPOTrainer
from ..training.base_config import SinglePassConfig
from ..training.checkpoints import checkpoint_to_resume
from ..training.compatibility import check_before_loading
from ..training.preemption import PreemptionCallback
from ..training.trainer import SinglePassSFTTrainer
from .dataset import get_split, load_splits, name_on_hub


TrainerOf = TypeVar("TrainerOf", SinglePassSFTTrainer, SinglePassDPOTrainer)


def make_parser_of(
    config: type[SinglePassConfig], prog: str | None = None, parser_class: type[TrlParser] = TrlParser, **kwargs: Any
) -> TrlParser:
    """Return the parser of the arguments of the script whose trainer has this configuration."""
    return parser_class((ScriptArguments, config, ModelConfig, DatasetMixtureConfig), prog=prog, **kwargs)


def make_trainer(
    trainer_class: type[TrainerOf],
    script_args: ScriptArguments,
    training_args: SFTConfig | DPOConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
    **kwargs: Any,
) -> tuple[TrainerOf, PreemptionCallback]:
    """Return the trainer that the arguments of a script ask for, and the callback that saves it after a signal."""
    training_args.model_init_kwargs = _model_kwargs(model_args, training_args)
    check_before_loading(training_args)
    dataset = load_splits(script_args, dataset_args)
    wants_evaluation = training_args.eval_strategy != "no"
    preemption = PreemptionCallback()
    trainer = trainer_class(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=get_split(dataset, script_args.dataset_train_split),
        eval_dataset=get_split(dataset, script_args.dataset_test_split) if wants_evaluation else None,
        peft_config=get_peft_config(model_args),
        callbacks=[preemption],
        **kwargs,
    )
    return trainer, preemption


def _model_kwargs(model_args: ModelConfig, training_args: SFTConfig | DPOConfig) -> dict[str, object]:
    """Return the arguments by which the model is loaded; `model_init_kwargs` override those of the command line."""
    owner = training_args if hasattr(training_args, "trust_remote_code") else model_args  # moved in TRL 1.12
    return {
        "revision": model_args.model_revision,
        "trust_remote_code": owner.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


def train_and_save(
    trainer: SinglePassSFTTrainer | SinglePassDPOTrainer, preemption: PreemptionCallback, script_args: ScriptArguments
) -> None:
    """
    Train from the checkpoint that is asked for, if any, then write the model and its card.

    `preemption` is one of the trainer's callbacks: after a signal, there is a checkpoint, and nothing else is written.
    """
    args = trainer.args
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir))
    if preemption.was_preempted:
        trainer.accelerator.print("Stopped by a signal. --resume_from_checkpoint auto resumes the run.")
        return
    trainer.save_model(args.output_dir)
    trainer.accelerator.print(f"Model saved to {args.output_dir}.")
    trainer.create_model_card(
        model_name=Path(args.output_dir).name, dataset_name=name_on_hub(script_args.dataset_name)
    )
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
