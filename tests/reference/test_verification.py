"""`verify` on sound models, on defects planted on purpose, and what it leaves behind."""

import itertools

import numpy as np
import pytest
import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from support.conversations import TOOLS, chat, tool_chat
from support.planted_defects import DEFECTS, plant_defect
from support.slow import slow_but_for
from support.tiny_models import FAMILIES, tiny_model
from trl_singlepass import verify
from trl_singlepass.engine.enable import enable_tree
from trl_singlepass.recurrent.layer import runs_on_trees
from trl_singlepass.reference import single_pass
from trl_singlepass.rendering.samples import render_example


CONVERSATIONS = [chat(3), chat(2, seed=1)]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def model_for(tokenizer, family="qwen3", dtype=torch.float32, **overrides):
    return tiny_model(family, vocab_size=len(tokenizer), dtype=dtype, **overrides)


@pytest.mark.parametrize(
    ("family", "dtype"),
    slow_but_for(
        [("gpt-oss", torch.float64), *(("qwen3", dtype) for dtype in DTYPES)], itertools.product(FAMILIES, DTYPES)
    ),
)
def test_a_sound_model_agrees(tokenizer, family, dtype):
    report = verify(model_for(tokenizer, family, dtype), tokenizer, CONVERSATIONS)
    assert report.ok, str(report)
    assert report.rows[0].leak.leaked == 0
    assert len(report.rows) == 2
    assert [turn.message_index for turn in report.rows[0].turns] == [2, 4, 6]


def test_dataset_rows_with_tools_and_completions(tokenizer):
    rows = [
        {"messages": tool_chat(), "tools": TOOLS},
        {"prompt": tool_chat()[:3], "completion": tool_chat()[3:], "tools": TOOLS},
    ]
    first = {"prompt": tool_chat()[:1], "completion": tool_chat()[1:2]}
    rows.append({"requests": [rows[1], first], "tools": TOOLS})
    report = verify(model_for(tokenizer), tokenizer, rows)
    assert report.ok, str(report)
    assert [len(row.turns) for row in report.rows] == [3, 2, 3]
    with_tools = verify(model_for(tokenizer), tokenizer, [tool_chat()], tools=TOOLS)
    assert with_tools.rows[0].npass_tokens == report.rows[0].npass_tokens


def test_what_is_compared_is_what_is_trained(tokenizer):
    weighted, context = chat(3), chat(2)
    weighted[2]["weight"], weighted[4]["weight"] = 0, 2.0
    turns = [{"prompt_ids": [1, 2, 3], "completion_ids": [4, 5, 6], "completion_weights": [1.0, 0.0, 0.5]}]
    kept = {"messages": chat(3), "history": "keep"}
    rows = [weighted, [{**message, "train": False} for message in context], {"turns": turns}, kept]
    report = verify(model_for(tokenizer, dtype=torch.float64), tokenizer, rows)
    assert report.ok, str(report)
    assert [[turn.turn for turn in row.turns] for row in report.rows] == [[2, 3], [1], [1, 2, 3]]
    assert [row.turns[0].row for row in report.rows] == [0, 2, 3]
    assert "Not compared, since nothing of it is trained: 1 row." in report.verdict
    second, third = report.rows[0].turns
    assert report.rows[1].turns[0].num_tokens == 2
    weights = [2 * second.num_tokens, third.num_tokens, 1.5, *(turn.num_tokens for turn in report.rows[2].turns)]
    assert sum(row.weight for row in report.rows) == sum(weights)
    losses = [turn.npass_loss for row in report.rows for turn in row.turns]
    assert report.npass_loss == pytest.approx(np.average(losses, weights=weights), rel=1e-12)
    assert report.rows[2].npass_tokens > sum(len(sample) for sample in render_example(kept, tokenizer))
    with pytest.raises(ValueError, match="weight 0"):
        verify(model_for(tokenizer), tokenizer, rows[1:2])


def test_max_tokens_leaves_out_turns_and_says_so(tokenizer):
    model, lengths = model_for(tokenizer), [len(sample) for sample in render_example({"messages": chat(3)}, tokenizer)]
    report = verify(model, tokenizer, [chat(3)], max_tokens=sum(lengths[:2]))
    assert report.ok, str(report)
    assert [turn.turn for turn in report.rows[0].turns] == [1, 2]
    assert report.rows[0].npass_tokens == sum(lengths[:2])
    assert "Not compared, beyond max_tokens: 1 turn." in str(report)
    assert len(verify(model, tokenizer, [chat(3)], max_tokens=1).rows[0].turns) == 1


def test_nothing_to_verify_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="`conversations` is empty"):
        verify(model_for(tokenizer), tokenizer, [])


# peft asks for it by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_compares_the_adapter(tokenizer):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)
    model = peft.get_peft_model(model_for(tokenizer), config)
    report = verify(model, tokenizer, CONVERSATIONS)
    assert report.ok, str(report)
    assert "lora" in report.rows[0].worst_parameter


HYBRID = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "initializer_range": 0.2,
}


@pytest.mark.parametrize(("dtype", "comes_on_trees"), [(torch.float64, False), (torch.float32, True)])
def test_a_model_with_recurrent_layers_agrees_and_is_left_as_it_was(tokenizer, dtype, comes_on_trees):
    model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(vocab_size=len(tokenizer), **HYBRID)).to(dtype)
    if comes_on_trees:
        enable_tree(model)
    attention = model.config._attn_implementation
    report = verify(model, tokenizer, CONVERSATIONS)
    assert report.ok, str(report)
    assert model.config._attn_implementation == attention
    assert any(map(runs_on_trees, model.modules())) == comes_on_trees


def state_of(model):
    return {
        "training": [module.training for module in model.modules()],
        "attention": model.config._attn_implementation,
        "parameters": {name: (p.data_ptr(), p.detach().clone(), p.grad) for name, p in model.named_parameters()},
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager", "tree_torch"])
def test_the_model_is_left_as_it_was(tokenizer, attention):
    model = model_for(tokenizer)
    model.set_attn_implementation(attention)
    model.lm_head.eval()  # a model may train only in part
    model.get_input_embeddings().weight.grad = torch.ones_like(model.get_input_embeddings().weight)
    before, random_state = state_of(model), torch.get_rng_state()
    verify(model, tokenizer, CONVERSATIONS)
    after = state_of(model)
    assert after["training"] == before["training"]
    assert after["attention"] == before["attention"]
    for name, (pointer, value, gradient) in before["parameters"].items():
        assert after["parameters"][name][0] == pointer
        assert torch.equal(after["parameters"][name][1], value)
        assert after["parameters"][name][2] is gradient
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_model_is_left_as_it_was_after_an_error(tokenizer, monkeypatch):
    def fail(*args):
        raise RuntimeError("out of memory")

    model = model_for(tokenizer)
    before = state_of(model)
    monkeypatch.setattr(single_pass, "_forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        verify(model, tokenizer, CONVERSATIONS)
    after = state_of(model)
    assert (after["training"], after["attention"]) == (before["training"], before["attention"])


@pytest.mark.parametrize("dtype", slow_but_for([torch.bfloat16], [torch.float64, torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_defects_are_found(tokenizer, monkeypatch, defect, dtype):
    plant_defect(monkeypatch, defect)
    report = verify(model_for(tokenizer, dtype=dtype), tokenizer, CONVERSATIONS)
    assert not report.ok
    assert "does NOT equal N-pass" in str(report)
