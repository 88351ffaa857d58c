"""Conversations of public datasets, where they are at hand: exactness under real templates, and what is shared."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from support.chat_tokenizers import make_tokenizer, template_text
from support.float64_comparison import assert_equal_to_npass
from support.tiny_models import FAMILIES, tiny_model
from support.trainers import float32_model, logged, single_pass_trainer
from trl_singlepass.rendering.samples import render_example


SHARED = Path(__file__).parents[3] / "shared"
# Each with a family of its own, so that real conversations meet windows, chunks, sinks and experts.
TEMPLATES = {
    "qwen3": "qwen3",
    "qwen3_5_think": "qwen3-moe",
    "gptoss": "gpt-oss",
    "glm4moe": "llama",
    "nemotron_3_nano": "mistral-sliding",
    "deepseek_r1_distill": "qwen2-sliding",
    "lfm2_2_5": "gemma2",
    "qwen3_8": "llama4",
    "gemma4_v5": "gemma3",
}
WITHOUT_TOOL_CALLS = ["deepseek_r1_distill"]

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the conversations in ../shared")


def conversations(name):
    with (SHARED / "data" / f"{name}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def shortest(name, num_turns, count):
    """The shortest conversations that have a number of assistant messages."""
    rows = [
        row
        for row in conversations(name)
        if sum(message["role"] == "assistant" for message in row["messages"]) >= num_turns
    ]
    return sorted(rows, key=lambda row: len(json.dumps(row)))[:count]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("template", TEMPLATES)
def test_reasoning_chats_are_exact(template):
    tokenizer = make_tokenizer(template)
    sets = [render_example(row, tokenizer) for row in shortest("mathchat_follow_up_300", num_turns=3, count=3)]
    assert [len(samples) for samples in sets] == [3, 3, 3]
    assert_equal_to_npass(tiny_model(TEMPLATES[template], len(tokenizer)), sets)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exact_under_every_template(family, template):
    tokenizer = make_tokenizer(template)
    sets = [render_example(row, tokenizer) for row in shortest("mathchat_follow_up_300", num_turns=3, count=2)]
    assert_equal_to_npass(tiny_model(family, len(tokenizer)), sets)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("template", [name for name in TEMPLATES if name not in WITHOUT_TOOL_CALLS])
def test_reasoning_chats_with_tool_calls_are_exact(template):
    tokenizer = make_tokenizer(template)
    (row,) = shortest("llamafactory_reason_tool_use", num_turns=3, count=1)
    samples = render_example(row, tokenizer)
    assert len(samples) >= 3
    assert_equal_to_npass(tiny_model("qwen3", len(tokenizer), attn_implementation="sdpa"), [samples])


DATASETS = [
    ("llamafactory_reason_tool_use", 1.84, 112),
    ("taubench_gpt4o_airline", 7.88, 642),
    ("mathchat_follow_up_300", 1.32, 900),
]


@pytest.fixture(scope="module")
def qwen3_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "qwen3")
    tokenizer.chat_template = template_text("qwen3")
    return tokenizer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*(is|are) deprecated.*:FutureWarning")
@pytest.mark.parametrize(("name", "sharing_factor", "num_samples"), DATASETS)
def test_all_conversations_become_rows_that_train(tmp_path, qwen3_tokenizer, name, sharing_factor, num_samples):
    rows = conversations(name)
    # Defaults of parameters are numbers in one tool and text in another: Arrow needs the tools as JSON.
    rows = [{**row, "tools": json.dumps(row["tools"])} if "tools" in row else row for row in rows]
    model = float32_model(qwen3_tokenizer, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    trainer = single_pass_trainer(tmp_path, qwen3_tokenizer, rows, model, max_steps=3, per_device_train_batch_size=1)
    trainer.train()
    # What Arrow filled in is not rendered: the rows are those of the conversations as they were.
    tokens = [(sum(row["multiplicity"]), len(row["input_ids"])) for row in trainer.train_dataset]
    assert sum(n for n, _ in tokens) / sum(t for _, t in tokens) == pytest.approx(sharing_factor, abs=0.01)
    losses = logged(trainer, "loss")
    assert len(losses) == 3
    assert all(0 < loss < 20 for loss in losses)
