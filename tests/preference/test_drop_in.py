"""In the place of TRL's trainer: what can be evaluated, and when there is no reference for it."""

import datasets
import pytest
from trl import DPOConfig

from support.pairs import TRAJECTORIES
from support.slow import slow_but_for
from support.small_files import write_model
from support.trainers import SETTINGS, dpo_trainer
from trl_singlepass import SinglePassDPOTrainer


EVALUATIONS = {
    "dataset": lambda rows: rows,
    "dataset_dict": lambda rows: datasets.DatasetDict(data1=rows, data2=rows),
    "dict_of_dataset": lambda rows: {"data1": rows, "data2": rows},
    "iterable_dataset": lambda rows: rows.to_iterable_dataset(),
    "iterable_dataset_dict": lambda rows: datasets.IterableDatasetDict(
        data1=rows.to_iterable_dataset(), data2=rows.to_iterable_dataset()
    ),
    "dict_of_iterable_dataset": lambda rows: {name: rows.to_iterable_dataset() for name in ("data1", "data2")},
}


@pytest.mark.parametrize("precomputed", slow_but_for([False], [False, True]))
@pytest.mark.parametrize("kind", slow_but_for(["dict_of_iterable_dataset"], EVALUATIONS))
def test_raw_datasets_are_evaluated(tmp_path, tokenizer, kind, precomputed):
    make = EVALUATIONS[kind]
    trainer = dpo_trainer(tmp_path, tokenizer, TRAJECTORIES, precompute_ref_log_probs=precomputed)
    rows = make(datasets.Dataset.from_list(TRAJECTORIES))
    if precomputed and "iterable" in kind:
        with pytest.raises(ValueError, match=r"precompute_ref_log_probs.*not supported with IterableDataset"):
            trainer.evaluate(rows)
        return
    metrics = trainer.evaluate(rows)
    losses = [value for name, value in metrics.items() if name.endswith("loss")]
    assert len(losses) == (2 if "dict" in kind else 1)
    expected = trainer.evaluate(datasets.Dataset.from_list(TRAJECTORIES))["eval_loss"]
    assert losses == pytest.approx([expected] * len(losses), rel=1e-6)


@pytest.mark.slow
def test_there_is_no_reference_for_new_pairs_once_the_policy_has_moved(tmp_path):
    rows, model = datasets.Dataset.from_list(TRAJECTORIES), write_model(tmp_path / "model")
    args = DPOConfig(str(tmp_path), **SETTINGS, precompute_ref_log_probs=True)
    trainer = SinglePassDPOTrainer(model, args=args, train_dataset=rows, eval_dataset=rows)
    assert trainer.evaluate(rows)["eval_loss"] is not None
    trainer.train()
    assert trainer.evaluate()["eval_loss"] is not None
    with pytest.raises(ValueError, match="Cannot compute reference log-probs for a dataset passed to"):
        trainer.evaluate(rows)
