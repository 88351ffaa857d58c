"""From a row to the batches of its pieces, and back."""

import torch

from support.tree_masks import plan_of_eleven
from trl_singlepass.recurrent.layout import Layout, SelectRepeatedly
from trl_singlepass.recurrent.schedule import fork_schedule, path_schedule
from trl_singlepass.trees.prefix_tree import PrefixTree
from trl_singlepass.trees.rows import Row, TreePlan
from trl_singlepass.trees.sample import Sample


def test_gradients_of_replayed_tokens_add_up_in_float32():
    tokens = torch.ones(2, 1, dtype=torch.bfloat16, requires_grad=True)
    SelectRepeatedly.apply(tokens, torch.zeros(1001, dtype=torch.long)).backward(torch.ones(1001, 1).bfloat16())
    assert tokens.grad.flatten().tolist() == [1000, 0]  # 1001 rounded; in bfloat16, ones add up to 256


def test_arguments_are_split_and_outputs_put_back():
    plan = plan_of_eleven()
    layout = Layout(plan.length, path_schedule(plan), torch.device("cpu"))
    x = torch.arange(22).reshape(1, 11, 2)
    batches = layout.gather({"hidden": x, "rotary": (x, x), "scale": 3.0})
    assert [batch["hidden"].shape for batch in batches] == [(2, 7, 2), (1, 4, 2)]
    assert [batch["scale"] for batch in batches] == [3.0, 3.0]
    assert torch.equal(layout.scatter([batch["hidden"] for batch in batches]), x)
    output, weights = layout.scatter([(batch["rotary"][0], None) for batch in batches])
    assert torch.equal(output, x)
    assert weights is None


def test_no_layer_takes_a_single_token_for_a_generation_step():
    # The last token of the second sample is not trained, so its branch is that token and no more.
    samples = [Sample(range(5, 12), [0.0] + [1.0] * 6, 1), Sample([5, 6, 7, 30], [0.0, 1.0, 1.0, 0.0], 1)]
    row = Row.from_tree(PrefixTree.from_samples(samples))
    plan = TreePlan.from_rows([row])
    layout = Layout(plan.length, fork_schedule(plan), torch.device("cpu"))
    starts = [layout.schedule.pieces[batch[0]].source < 0 for batch in layout.schedule.batches]
    lengths = [length for _, length in layout.shapes]
    assert 1 in [piece.length for piece in layout.schedule.pieces if piece.source >= 0]
    assert all(length >= 2 or start for length, start in zip(lengths, starts, strict=True))
