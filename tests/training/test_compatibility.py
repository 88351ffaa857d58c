"""What a single pass cannot honour: each refused by name, with the way out, before it costs anything."""

import pytest
import transformers
from transformers import BloomConfig, BloomForCausalLM

from support.conversations import chat, tool_chat
from support.tiny_multimodal import tiny_conditional
from support.trainers import float32_model, largest_difference, single_pass_trainer
from trl_singlepass.engine.enable import UnsupportedModelError, check_model, enable_tree


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


def test_a_refused_model_is_named_before_the_dataset_is_prepared(tmp_path, tokenizer, monkeypatch):
    model = float32_model(tokenizer)
    model.is_loaded_in_8bit = True
    monkeypatch.setattr(
        "trl_singlepass.training.dataset.prepare_dataset", lambda *_, **__: pytest.fail("prepared first")
    )
    with pytest.raises(UnsupportedModelError, match="load_in_8bit"):
        single_pass_trainer(tmp_path, tokenizer, CHATS, model)
