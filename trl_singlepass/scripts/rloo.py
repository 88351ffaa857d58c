"""
Train as `trl rloo` does, with the prefixes that completions share computed once.

```bash
accelerate launch -m trl_singlepass.scripts.rloo \
    --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name prompts.jsonl \
    --reward_funcs rewards.mine \
    --output_dir out
```
"""

from functools import partial

from trl.scripts.rloo import RLOOScriptArguments

from ..groups.config import SinglePassRLOOConfig
from ..groups.trainer import SinglePassRLOOTrainer
from .run import make_parser_of, train


make_parser = partial(make_parser_of, SinglePassRLOOConfig, script_arguments=RLOOScriptArguments)
main = partial(train, SinglePassRLOOTrainer)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
