"""Train as `trl sft` does, every turn exact in one pass: `accelerate launch -m trl_singlepass.scripts.sft …`."""

from functools import partial

from ..training.config import SinglePassSFTConfig
from ..training.trainer import SinglePassSFTTrainer
from .run import make_parser_of, train


make_parser = partial(make_parser_of, SinglePassSFTConfig)
main = partial(train, SinglePassSFTTrainer)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
