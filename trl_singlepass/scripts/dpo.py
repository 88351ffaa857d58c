"""Train as `trl dpo` does, every turn exact in one pass: `accelerate launch -m trl_singlepass.scripts.dpo …`."""

from functools import partial

from ..preference.config import SinglePassDPOConfig
from ..preference.trainer import SinglePassDPOTrainer
from .run import make_parser_of, train


make_parser = partial(make_parser_of, SinglePassDPOConfig)
main = partial(train, SinglePassDPOTrainer)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
