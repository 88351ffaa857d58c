"""What the training scripts have in common: the model's arguments, and a run from its checkpoint to its model card."""

from __future__ import annotations

from pathlib import Path

from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig

from ..preference.trainer import SinglePassDPOTrainer
from ..training.checkpoints import checkpoint_to_resume
from ..training.preemption import PreemptionCallback
from ..training.trainer import SinglePassSFTTrainer
from .dataset import name_on_hub


def model_kwargs(model_args: ModelConfig, training_args: SFTConfig | DPOConfig) -> dict[str, object]:
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
