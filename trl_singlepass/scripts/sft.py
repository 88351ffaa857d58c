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

from ..training.config import SinglePassSFTConfig
from ..training.trainer import SinglePassSFTTrainer
from .run import make_parser_of, train


make_parser = partial(make_parser_of, SinglePassSFTConfig)
main = partial(train, SinglePassSFTTrainer)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
