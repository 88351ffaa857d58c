"""What sequence parallelism makes of a row before and after ranks share it, without any ranks."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from support.sample_sets import sample_sets
from trl_singlepass.data.collator import DataCollatorForSinglePass, pad_batch
from trl_singlepass.training.sequence_parallel import tree_from_plan
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row


SETS = st.lists(sample_sets(max_samples=5, max_length=20), min_size=1, max_size=3)
PAD = 7


def columns(sets):
    return [Row.from_tree(PrefixTree.from_samples(samples)).columns() for samples in sets]


@given(SETS)
def test_a_plan_holds_the_whole_tree(sets):
    batch = DataCollatorForSinglePass(PAD)(columns(sets))
    tree = tree_from_plan(batch["tree_plan"], torch.device("cpu"))
    assert torch.equal(tree.subtree_end, batch["subtree_end"])
    assert torch.equal(tree.depth, batch["position_ids"])


@given(SETS, st.integers(1, 16))
def test_padding_a_batch_is_padding_its_rows(sets, multiple):
    rows = columns(sets)
    padded_rows = DataCollatorForSinglePass(PAD, pad_to_multiple_of=multiple)(rows)
    batch = DataCollatorForSinglePass(PAD)(rows)
    del batch["subtree_end"]
    padded = pad_batch(batch, padded_rows["tree_plan"].length, PAD)
    assert padded["tree_plan"].runs == padded_rows["tree_plan"].runs
    for name in padded.keys() - {"tree_plan"}:
        assert torch.equal(padded[name], padded_rows[name]), name
    tree = tree_from_plan(padded["tree_plan"], torch.device("cpu"))
    assert torch.equal(tree.subtree_end, padded_rows["subtree_end"])
