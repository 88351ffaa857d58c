"""Rows packed by TRL's AsyncGRPO: log-probabilities and gradients are those of its samples one by one, in float64."""

import pytest
import torch

from support.float64_comparison import TOLERANCE, assert_same_gradients, gradients_of, pop_gradients
from support.tiny_models import model_of_type, tiny_model
from trl_singlepass import enable_tree
from trl_singlepass.groups.async_trainer import tree_of_depths


packing = pytest.importorskip("trl.experimental.async_grpo.packing")

MODELS = {  # AsyncGRPO refuses both
    "sinks": lambda: tiny_model("gpt-oss", output_router_logits=False),
    "recurrent": lambda: model_of_type("qwen3_5_text"),
}
SAMPLES = [  # prompts and completions
    ([5, 6, 7, 8], [21, 22, 23]),
    ([5, 6, 7, 8], [21, 22, 24, 25]),
    ([5, 6, 7, 8], [30]),
    ([5, 6, 9], [21, 22]),
    ([3], [4, 5, 6]),
]


def packed():
    row = packing.TreeRow()
    for prompt, completion in SAMPLES:
        mask = [0] * len(prompt) + [1] * len(completion)
        tensors = {"input_ids": prompt + completion, "completion_mask": mask, "old_log_probs": [0.0] * len(mask)}
        row.add({name: torch.tensor(x) for name, x in tensors.items()} | {"advantage": 1.0, "group_id": 0})
    return row.pack()


def log_probs(logits, labels):
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", MODELS)
def test_packed_rows(name):
    model, row = MODELS[name](), packed()
    expected = []
    for prompt, completion in SAMPLES:
        logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
        expected.append(log_probs(logits[len(prompt) - 1 : -1], torch.tensor(completion)))
    weights = torch.linspace(-1, 1, len(row["token_index"]))
    (torch.cat(expected) * weights).sum().backward()
    gradients = pop_gradients(model)
    enable_tree(model)
    depths = row["position_ids"]
    logits = model(input_ids=row["input_ids"][None], position_ids=depths[None], tree=tree_of_depths(depths)).logits[0]
    found = log_probs(logits, row["shift_labels"].clamp(min=0))[row["token_index"]]
    (found * weights).sum().backward()
    torch.testing.assert_close(found, torch.cat(expected), rtol=TOLERANCE, atol=10 * TOLERANCE)
    assert_same_gradients(gradients_of(model), gradients, 10 * TOLERANCE)


def test_what_is_no_walk_is_refused():
    assert tree_of_depths(torch.tensor([0, 1, 2, 2, 1])).subtree_end.tolist() == [[5, 4, 3, 4, 5]]
    with pytest.raises(ValueError, match="depth-first"):
        tree_of_depths(torch.tensor([0, 2]))
