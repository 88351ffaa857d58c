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

from ..preference.config import SinglePassDPOConfig
from ..preference.trainer import SinglePassDPOTrainer
from .run import make_parser_of, train


make_parser = partial(make_parser_of, SinglePassDPOConfig)
main = partial(train, SinglePassDPOTrainer)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
