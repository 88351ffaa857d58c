"""
Train as `trl dpo` does, on preference pairs of several turns, each turn exact in one pass.

```bash
accelerate launch -m trl_singlepass.scripts.dpo \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name pairs.jsonl \
    --output_dir out
```
"""

from functools import partial

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from ..preference.config import SinglePassDPOConfig
from ..preference.trainer import SinglePassDPOTrainer
from .run import make_parser_of, train


make_parser = partial(make_parser_of, SinglePassDPOConfig)


def main(
    script_args: ScriptArguments,
    training_args: SinglePassDPOConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    """Train a model, as `trl.scripts.dpo` does."""
    train(SinglePassDPOTrainer, script_args, training_args, model_args, dataset_args)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
