"""Train as `trl grpo` does, shared prefixes computed once: `accelerate launch -m trl_singlepass.scripts.grpo …`."""

from dataclasses import make_dataclass
from functools import partial

from trl.scripts.grpo import GRPOScriptArguments

from ..groups.config import SinglePassGRPOConfig
from ..groups.trainer import SinglePassGRPOTrainer
from .run import RolloutArguments, make_parser_of, train


_arguments = make_dataclass("GRPOArguments", [], bases=(RolloutArguments, GRPOScriptArguments))
make_parser = partial(make_parser_of, SinglePassGRPOConfig, script_arguments=_arguments)
main = partial(train, SinglePassGRPOTrainer)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
