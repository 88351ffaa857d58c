"""What a single pass cannot honour: each refused by name, with the way out, before it costs anything."""

from functools import partial

import pytest
import torch
import transformers
from peft import AdaptionPromptConfig, LoraConfig, get_peft_model
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from support.conversations import chat, tool_chat
from support.pairs import SINGLE_TURNS
from support.tiny_multimodal import tiny_conditional
from support.trainers import SETTINGS, as_dataset, float32_model, largest_difference, single_pass_trainer
from trl_singlepass import SinglePassDPOConfig, SinglePassDPOTrainer, SinglePassSFTConfig, SinglePassSFTTrainer
from trl_singlepass.engine.enable import UnsupportedModelError, check_model, enable_tree


pytestmark = pytest.mark.filterwarnings(
    # Deprecations of TRL and transformers that a user who sets these arguments sees in stock training as well.
    "ignore:.*(is|are) deprecated.*:FutureWarning",
)
CHATS = [chat(3), chat(2, seed=1), tool_chat()]


@pytest.mark.parametrize(
    ("class_name", "message"),
    [
        ("Molmo2ForConditionalGeneration", "does not train on text alone: .*mm_token_type_ids.*Load another model"),
        ("GlmImageForConditionalGeneration", "has no head over the tokens that it reads.*Load another model"),
    ],
)
def test_models_that_do_not_train_on_text_are_refused(class_name, message):
    if not hasattr(transformers, class_name):
        pytest.skip(f"transformers has no {class_name}")
    with pytest.raises(UnsupportedModelError, match=f"{class_name} {message}"):
        check_model(tiny_conditional(class_name))


def test_models_that_do_not_take_attention_from_outside_are_refused():
    model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedModelError, match="BloomForCausalLM does not take its attention function"):
        enable_tree(model)


def test_images_are_refused(tmp_path, tokenizer):
    rows = [{"messages": chat(1), "images": ["a.png"]}]
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM .*get_image_features"):
        single_pass_trainer(tmp_path, tokenizer, rows)


@pytest.fixture
def no_data_is_prepared(monkeypatch):
    for name in ("training.dataset.prepare_dataset", "preference.trainer.prepare"):
        monkeypatch.setattr(f"trl_singlepass.{name}", lambda *_, **__: pytest.fail("prepared"))


@pytest.mark.usefixtures("no_data_is_prepared")
def test_adaption_prompts_are_refused_before_the_data_is_read(tmp_path, tokenizer):
    """PEFT keeps the forward that a model has without TRL's fused head: stock trainers stop in their first step."""
    config = AdaptionPromptConfig(adapter_len=4, adapter_layers=2, target_modules="self_attn", task_type="CAUSAL_LM")
    model = float32_model(tokenizer, "llama")
    with pytest.raises(ValueError, match="AdaptionPromptConfig"):
        single_pass_trainer(tmp_path, tokenizer, CHATS, model, kwargs={"peft_config": config})
    with pytest.raises(ValueError, match="AdaptionPromptConfig"):
        single_pass_trainer(tmp_path, tokenizer, CHATS, get_peft_model(model, config))


@pytest.mark.parametrize("role", ["model", "model with adapters", "policy", "reference"])
@pytest.mark.usefixtures("no_data_is_prepared")
def test_a_model_that_is_compiled_already_is_refused(tmp_path, tokenizer, role):
    model = float32_model(tokenizer)
    inside = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if role == "model with adapters" else model
    compiled = torch.compile(inside, backend="eager")
    if role in ("policy", "reference"):
        policy, reference = (compiled, model) if role == "policy" else (model, compiled)
        args, rows = SinglePassDPOConfig(str(tmp_path), **SETTINGS), as_dataset(SINGLE_TURNS)
        make = partial(SinglePassDPOTrainer, policy, reference)
    else:
        args, rows = SinglePassSFTConfig(str(tmp_path), **SETTINGS), as_dataset(CHATS)
        make = partial(SinglePassSFTTrainer, compiled)
    with pytest.raises(ValueError, match="torch_compile=True"):
        make(args=args, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_model_that_is_compiled_in_place_trains_as_one_that_is_not(tmp_path, tokenizer):
    graphs, both = [], []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    for is_compiled in (False, True):
        model = float32_model(tokenizer)
        if is_compiled:
            model.compile(backend=count)
        both.append(single_pass_trainer(tmp_path, tokenizer, CHATS, model, max_steps=2))
        both[-1].train()
    assert graphs
    assert largest_difference(*both) <= 1e-6


def test_a_collator_that_would_lose_the_tree_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="data_collator=function would drop the tree"):
        single_pass_trainer(tmp_path, tokenizer, CHATS, kwargs={"data_collator": lambda rows: rows})


def test_a_refused_model_is_named_before_the_dataset_is_prepared(tmp_path, tokenizer, monkeypatch):
    model = float32_model(tokenizer)
    model.is_loaded_in_8bit = True
    monkeypatch.setattr(
        "trl_singlepass.training.dataset.prepare_dataset", lambda *_, **__: pytest.fail("prepared first")
    )
    with pytest.raises(UnsupportedModelError, match="load_in_8bit"):
        single_pass_trainer(tmp_path, tokenizer, CHATS, model)


def test_attention_dropout_stops_the_first_step(tmp_path, tokenizer):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"GPT2Attention asks for attention dropout 0\.1"):
        single_pass_trainer(tmp_path, tokenizer, CHATS, model).train()
