"""
Train as `trl grpo` does, with the prefixes that completions share computed once.

```bash
accelerate launch -m trl_singlepass.scripts.grpo \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name prompts.jsonl \
    --reward_funcs rewards.mine \
    --output_dir out
```
"""

from functools import partial

from trl.scripts.grpo import GRPOScriptArguments

from ..groups.config import SinglePassGRPOConfig
from ..groups.trainer import SinglePassGRPOTrainer
from .run import make_parser_of, train


make_parser = partial(make_parser_of, SinglePassGRPOConfig, script_arguments=GRPOScriptArguments)
main = partial(train, SinglePassGRPOTrainer)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
