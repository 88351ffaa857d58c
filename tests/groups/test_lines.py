"""Log-probabilities of padded lines on a tree, and their gradients, are those of separate forwards, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trl.trainer.utils import add_fused_lm_head

from support.float64_comparison import TOLERANCE, assert_same_gradients, gradients_of, pop_gradients
from support.groups import padded
from support.tiny_models import model_of_type, tiny_model
from trl_singlepass import DataCollatorForSinglePass, enable_tree, tree_log_probs
from trl_singlepass.groups.lines import PaddedLines
from trl_singlepass.groups.trainer import sharing_factor


MODELS = {
    "qwen3": lambda: tiny_model("qwen3"),
    "gpt-oss": lambda: tiny_model("gpt-oss", output_router_logits=False),  # sinks, and a window
    "qwen3.5": lambda: model_of_type("qwen3_5_text"),  # recurrent layers
    "qwen3-moe": lambda: tiny_model("qwen3-moe", output_router_logits=False),
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 20]]
GROUP = [
    (PROMPTS[0], [21, 22, 23]),
    (PROMPTS[0], [21, 22, 24, 25]),  # begins as the one before
    (PROMPTS[0], [30]),
    (PROMPTS[1], [21, 22, 23, 24, 25]),
    (PROMPTS[1], []),
]


def separate_log_probs(model, input_ids, attention_mask, completion_mask):
    """Run each line by itself, without its padding."""
    result = []
    for ids, mask, of_completion in zip(input_ids, attention_mask.bool(), completion_mask, strict=True):
        logits = model(input_ids=ids[mask][None], use_cache=False).logits[0, :-1]
        chosen = logits.log_softmax(-1).gather(-1, ids[mask][1:, None])[:, 0]
        first = int(mask.int().argmax())
        line = F.pad(chosen, (first, len(ids) - 1 - first - len(chosen)))
        result.append(line * of_completion[1:])
    return torch.stack(result)


def assert_equal(model, lines, weights, max_row_tokens=None):
    expected = separate_log_probs(model, *lines)
    (expected * weights).sum().backward()
    gradients = pop_gradients(model)
    enable_tree(model)
    found = tree_log_probs(model, *lines, max_row_tokens=max_row_tokens)
    (found * weights).sum().backward()
    size = float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE * size)
    assert_same_gradients(gradients_of(model), gradients, 10 * TOLERANCE)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("max_row_tokens", [None, 14])
@pytest.mark.parametrize("name", MODELS)
def test_a_group_equals_its_lines(name, max_row_tokens):
    lines = padded(GROUP)
    torch.manual_seed(0)
    assert_equal(MODELS[name](), lines, torch.randn(lines[0][:, 1:].shape), max_row_tokens)


@pytest.mark.usefixtures("float64")
def test_tokens_that_are_not_asked_for_are_context():
    input_ids, attention_mask, completion_mask = padded(GROUP)
    completion_mask[1, 9] = 0  # what a tool has said, between two calls
    assert_equal(tiny_model("qwen3"), (input_ids, attention_mask, completion_mask), torch.ones(len(GROUP), 11))


@pytest.mark.usefixtures("float64")
def test_the_load_of_a_mixture_is_that_of_its_lines():
    """TRL adds the load-balancing loss of the padded lines to its own; padding is no part of the mean."""
    model, (input_ids, attention_mask, _) = tiny_model("qwen3-moe"), padded(GROUP)
    expected = model(input_ids=input_ids, attention_mask=attention_mask, output_router_logits=True)
    expected.aux_loss.backward()
    gradients = pop_gradients(model)
    enable_tree(model)
    view, _ = PaddedLines(input_ids, attention_mask).merge(attention_mask, DataCollatorForSinglePass(0))
    found = model(input_ids=input_ids, tree=view.handled(), output_router_logits=True)
    found.aux_loss.backward()
    torch.testing.assert_close(found.aux_loss, expected.aux_loss, rtol=TOLERANCE, atol=0)
    assert_same_gradients(gradients_of(model), gradients, 10 * TOLERANCE)


def test_what_is_saved_is_known_before_there_is_a_tree():
    input_ids, attention_mask, _ = padded(GROUP)
    # 10 + 11 + 8 + 9 + 4 tokens; 7 + 3 + 2 + 1 of the first prompt, and 1 + 5 where the second one differs.
    assert PaddedLines(input_ids, attention_mask).sharing_factor == 42 / 19


@pytest.mark.parametrize("is_added_first", [True, False])
def test_with_trls_fused_head_logits_are_not_built(is_added_first, monkeypatch):
    """Added before trees are enabled, or after: the head itself, which builds logits, is never called."""
    model, lines = tiny_model("qwen3", dtype=torch.float32), padded(GROUP)
    expected = separate_log_probs(model, *lines).detach()
    steps = [lambda: add_fused_lm_head(model), lambda: enable_tree(model)]
    for step in steps if is_added_first else [*steps[::-1], steps[1]]:
        step()
    monkeypatch.setattr(model.lm_head, "forward", None)
    torch.testing.assert_close(tree_log_probs(model, *lines).detach(), expected, rtol=1e-4, atol=1e-4)


token_lists = st.lists(st.integers(3, 6), min_size=1, max_size=6)


@pytest.mark.usefixtures("float64")
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(token_lists, token_lists), min_size=1, max_size=5))
def test_random_lines(group):
    lines = padded(group)
    model = tiny_model("llama", 16)
    expected = separate_log_probs(model, *lines).detach()
    enable_tree(model)
    torch.testing.assert_close(tree_log_probs(model, *lines).detach(), expected, rtol=1e-12, atol=1e-12)


def test_gaps_are_found_and_refused():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert PaddedLines(mask, mask).are_without_gaps
    mask[0, 3] = mask[1, 3] = 1
    assert not PaddedLines(mask, mask).are_without_gaps
    model = tiny_model("qwen3")
    enable_tree(model)
    with pytest.raises(ValueError, match="attention_mask"):
        tree_log_probs(model, torch.ones(3, 4).long(), mask, mask)


def test_a_model_without_trees_is_refused():
    with pytest.raises(ValueError, match="enable_tree"):
        tree_log_probs(tiny_model("qwen3"), *padded(GROUP))


def test_the_documented_forecast():
    assert sharing_factor([100], 4, 50) == 2.0
