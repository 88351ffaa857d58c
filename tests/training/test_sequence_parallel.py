"""What sequence parallelism makes of a row before and after ranks share it, without any ranks."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from support.sample_sets import sample_sets
from trl_singlepass.data.collator import DataCollatorForSinglePass, pad_batch
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row


SETS = st.lists(sample_sets(max_samples=5, max_length=20), min_size=1, max_size=3)
PAD = 7


def columns(sets):
    return [Row.from_tree(PrefixTree.from_samples(samples)).columns() for samples in sets]


@given(SETS, st.integers(1, 16))
def test_padding_a_batch_is_padding_its_rows(sets, multiple):
    rows = columns(sets)
    padded_rows = DataCollatorForSinglePass(PAD, pad_to_multiple_of=multiple)(rows)
    batch = DataCollatorForSinglePass(PAD)(rows)
    padded = pad_batch(batch, padded_rows["tree"].plan.length, PAD)
    assert padded["tree"].plan.runs == padded_rows["tree"].plan.runs
    for name in padded.keys() - {"tree"}:
        assert torch.equal(padded[name], padded_rows[name]), name
    for name in ("subtree_end", "depth", "label_parts"):
        assert torch.equal(getattr(padded["tree"], name), getattr(padded_rows["tree"], name)), name
