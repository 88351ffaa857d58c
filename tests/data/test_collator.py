"""A batch is its rows side by side, padded with a chain that nothing attends to and nothing trains."""

import pytest
import torch

from trl_singlepass import PrefixTree, Sample
from trl_singlepass.data.collator import DataCollatorForSinglePass, TreeOrPlainCollator
from trl_singlepass.trees.rows import Row


FORK = Row.from_tree(
    PrefixTree.from_samples([Sample([1, 2, 3], [0, 0, 1], 2), Sample([1, 2, 4, 5], [0, 0, 1, 1], 2)])
).columns()
CHAIN = Row.from_tree(PrefixTree.from_samples([Sample([6, 8], [0, 1], 1)])).columns()
PAD = 7


def test_a_batch_holds_its_rows_side_by_side():
    batch = DataCollatorForSinglePass(PAD, pad_to_multiple_of=5)([FORK, CHAIN])
    assert batch["input_ids"].tolist() == [[1, 2, 4, 5, 2, 3, 6, 8, PAD, PAD]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 1, 2, 0, 1, 0, 1]]
    assert batch["tree"].subtree_end.tolist() == [[6, 4, 4, 4, 6, 6, 8, 8, 10, 10]]
    assert batch["labels"].tolist() == [[-100, -100, 4, 5, -100, 3, -100, 8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[2, 1, 1, 1, 1, 1, 1, 1, 0, 0]]
    assert batch["tree"].plan.example_ends == (6, 8, 10)
    assert batch["tree"].plan.num_sample_tokens == 9
    assert {value.dtype for value in batch.values() if torch.is_tensor(value)} == {torch.int64}


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_loss_weights_are_there_if_one_is_not_1(weight):
    weighted = Row.from_tree(PrefixTree.from_samples([Sample([6, 8, 9], [0, 1, weight], 1)])).columns()
    batch = DataCollatorForSinglePass(PAD)([CHAIN, weighted])
    weights = batch["tree"].loss_weights
    assert (weights is not None) == (weight != 1)
    if weights is not None:
        assert weights.dtype == torch.float32
        assert weights.tolist() == [[0, 1, 0, 1, 0.5]]


def test_trees_and_plain_sequences_have_their_own_collators():
    collate = TreeOrPlainCollator(lambda examples: {"trees": len(examples)}, lambda examples: {"plain": len(examples)})
    assert collate([FORK, CHAIN]) == {"trees": 2}
    assert collate([{"input_ids": [5, 6]}]) == {"plain": 1}
