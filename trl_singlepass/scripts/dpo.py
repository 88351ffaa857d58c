"""
Train as `trl dpo` does, on preference pairs of several turns, each turn exact in one pass.

```bash
accelerate launch -m trl_singlepass.scripts.dpo \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name pairs.jsonl \
    --output_dir out
```
"""

from typing import Any

import torch
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from ..preference.config import SinglePassDPOConfig
from ..preference.trainer import SinglePassDPOTrainer
from ..training.compatibility import check_before_loading
from ..training.preemption import PreemptionCallback
from .dataset import get_split, load_splits
from .run import model_kwargs, train_and_save


DATACLASSES = (ScriptArguments, SinglePassDPOConfig, ModelConfig, DatasetMixtureConfig)


def main(
    script_args: ScriptArguments,
    training_args: SinglePassDPOConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    """Train a model, as `trl.scripts.dpo` does."""
    training_args.model_init_kwargs = model_kwargs(model_args, training_args)
    check_before_loading(training_args)
    dataset = load_splits(script_args, dataset_args)
    wants_evaluation = training_args.eval_strategy != "no"
    preemption = PreemptionCallback()
    trainer = SinglePassDPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=get_split(dataset, script_args.dataset_train_split),
        eval_dataset=get_split(dataset, script_args.dataset_test_split) if wants_evaluation else None,
        callbacks=[preemption],
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if script_args.ignore_bias_buffers:  # DDP cannot synchronise boolean buffers
        ignored = [name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool]
        trainer.model._ddp_params_and_buffers_to_ignore = ignored
    train_and_save(trainer, preemption, script_args)


def make_parser(prog: str | None = None, parser_class: type[TrlParser] = TrlParser, **kwargs: Any) -> TrlParser:
    """Return the parser of the script's arguments."""
    return parser_class(DATACLASSES, prog=prog, **kwargs)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
