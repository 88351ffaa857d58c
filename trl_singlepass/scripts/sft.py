"""
Train as `trl sft` does, with every turn of a conversation exact in one pass.

```bash
accelerate launch -m trl_singlepass.scripts.sft \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name data.jsonl \
    --output_dir out
```
"""

from functools import partial

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from ..training.config import SinglePassSFTConfig
from ..training.trainer import SinglePassSFTTrainer
from .run import make_parser_of, train


make_parser = partial(make_parser_of, SinglePassSFTConfig)


def main(
    script_args: ScriptArguments,
    training_args: SinglePassSFTConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    """Train a model, as `trl.scripts.sft` does."""
    train(SinglePassSFTTrainer, script_args, training_args, model_args, dataset_args)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
