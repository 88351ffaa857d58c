"""Train as `trl rloo` does, shared prefixes computed once: `accelerate launch -m trl_singlepass.scripts.rloo …`."""

from dataclasses import make_dataclass
from functools import partial

from trl.scripts.rloo import RLOOScriptArguments

from ..groups.config import SinglePassRLOOConfig
from ..groups.trainer import SinglePassRLOOTrainer
from .run import RolloutArguments, make_parser_of, train


_arguments = make_dataclass("RLOOArguments", [], bases=(RolloutArguments, RLOOScriptArguments))
make_parser = partial(make_parser_of, SinglePassRLOOConfig, script_arguments=_arguments)
main = partial(train, SinglePassRLOOTrainer)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
