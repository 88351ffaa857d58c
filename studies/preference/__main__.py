"""
Run the study of preference pairs: `python -m studies.preference --help`.

Results that are there already are kept, so a run that was stopped goes on with the next seed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import datasets
from transformers.utils import logging

from studies.preference.runs import RESULTS, SEEDS, Sizes, run_study


def main(arguments: Sequence[str] | None = None, sizes: Sizes | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.preference", description=__doc__.splitlines()[1])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), metavar="SEED")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    args = parser.parse_args(arguments)
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    run_study(args.seeds, args.output, sizes or Sizes())


if __name__ == "__main__":
    main()
