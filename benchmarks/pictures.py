"""
Draw the pictures of the docs into docs/images/, from the demo's conversations and the files under results/.

    python -m benchmarks.pictures

The loss by turn comes from training a small model, which takes minutes on a CPU. With `--train`, its numbers are
measured again and stored in results/loss_by_turn.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from datasets import load_dataset
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from benchmarks.machine import describe
from benchmarks.report import fastest
from demo.load import load_model, load_rows, load_tokenizer
from demo.make_data import DATA
from examples import screen_agent
from trl_singlepass import PrefixTree, SinglePassSFTConfig, SinglePassSFTTrainer, audit
from trl_singlepass.data.conversations import example_to_samples
from trl_singlepass.data.settings import RowSettings
from trl_singlepass.rendering.samples import render_example
from trl_singlepass.reports.curve_plots import plot_loss_by_turn, plot_sharing, plot_speedup
from trl_singlepass.reports.tree_plots import plot_mask, plot_tree


RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
LOSSES = RESULTS / "loss_by_turn.json"
STEPS, CONVERSATIONS_PER_STEP = 40, 3


def smallest_of_four_turns(tokenizer: PreTrainedTokenizerBase) -> PrefixTree:
    """Return the tree of a conversation small enough that tree and mask fit in a picture."""
    rendered = [render_example(row, tokenizer) for row in load_rows(None, 10**6)]
    turns = min((turns for turns in rendered if len(turns) == 4), key=lambda turns: sum(map(len, turns)))
    return PrefixTree.from_samples(turns)


def screens() -> Figure:
    """Return the tree of an agent whose history keeps the last two screens, with the screens in it."""
    _, processor, (episode,) = screen_agent.load(screen_agent.parse(["--episodes=1", "--turns=4", "--window=2"]))
    samples = example_to_samples(episode, 0, processor, RowSettings()).samples
    return plot_tree(PrefixTree.from_samples(samples), processor.tokenizer, episode["images"])


def speedup() -> Figure:
    result = json.loads((RESULTS / "step_time_cpu_float32.json").read_text())
    turns, measured, bound = [], [], []
    for count in result["counted"]:
        best = fastest([one for one in result["measured"] if one["turns"] == count["turns"]])
        npass = min(one["seconds"] for mode, one in best.items() if mode.startswith("npass_"))
        turns.append(count["turns"])
        measured.append(npass / best["single_pass"]["seconds"])
        bound.append(count["predicted_speedup"])
    return plot_speedup(turns, measured, bound)


def losses_by_turn(tokenizer: PreTrainedTokenizerBase, trains: bool) -> dict[str, Any]:
    """Return the losses on held-out conversations after training on the others: now, or as they are stored."""
    if trains:
        data = load_dataset("json", data_files=str(DATA), split="train").train_test_split(test_size=20, seed=0)
        trainer = SinglePassSFTTrainer(
            model=load_model(None, tokenizer),
            args=SinglePassSFTConfig(
                output_dir="out/pictures",
                bf16=False,
                max_steps=STEPS,
                per_device_train_batch_size=CONVERSATIONS_PER_STEP,
                learning_rate=2e-3,
                save_strategy="no",
                report_to="none",
                log_turn_metrics=True,
            ),
            train_dataset=data["train"],
            eval_dataset=data["test"],
            processing_class=tokenizer,
        )
        trainer.train()
        kept = {**describe("cpu", "loss_by_turn"), "steps": STEPS, "metrics": trainer.evaluate()}
        LOSSES.write_text(json.dumps(kept, indent=1) + "\n")
    return json.loads(LOSSES.read_text())["metrics"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.pictures", description=__doc__.splitlines()[1])
    parser.add_argument("--train", action="store_true", help="train the small model again")
    trains = parser.parse_args().train
    tokenizer, rows = load_tokenizer(None), load_rows(None, 10**6)
    tree = smallest_of_four_turns(tokenizer)
    pictures = {
        "tree": plot_tree(tree, tokenizer),
        "mask": plot_mask(tree, tokenizer),
        "sharing": plot_sharing(audit(rows, tokenizer, sample_size=len(rows))),
        "speedup": speedup(),
        "screens": screens(),
        "loss_by_turn": plot_loss_by_turn(losses_by_turn(tokenizer, trains)),
    }
    IMAGES.mkdir(exist_ok=True)
    for name, figure in pictures.items():
        figure.savefig(IMAGES / f"{name}.png", dpi=130)
        print(f"Wrote {IMAGES / name}.png")


if __name__ == "__main__":
    main()
