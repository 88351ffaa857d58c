"""What other recipes would train."""

from support.chat_tokenizers import make_tokenizer, template_text
from support.conversations import chat
from trl_singlepass.rendering.samples import render_example
from trl_singlepass.reports.audit import audit


def test_other_recipes():
    report = audit([chat(4)], make_tokenizer())
    by_name = {recipe.name: recipe for recipe in report.recipes}
    swapped, last = by_name["TRL assistant_only_loss"], by_name["last turn only"]
    samples = render_example({"messages": chat(4)}, make_tokenizer())
    # TRL's training template for Qwen3 keeps all reasoning: it is trained, but in contexts that inference never shows.
    assert swapped.reasoning_not_trained == 0
    first = len(samples[0]) - samples[0].prompt_length
    assert 0 < swapped.trained_tokens - swapped.unlike_inference <= first
    assert last.reasoning_not_trained == sum(sample.reasoning_length for sample in samples[:-1])
    assert (last.unlike_inference, last.trained_tokens) == (0, len(samples[-1]) - samples[-1].prompt_length)


def test_recipes_whose_template_strips_lose_the_reasoning_of_earlier_turns():
    report = audit([chat(4)], make_tokenizer("glm4moe"))
    samples = render_example({"messages": chat(4)}, make_tokenizer("glm4moe"))
    recipe = next(recipe for recipe in report.recipes if recipe.name == "TRL assistant_only_loss")
    assert recipe.reasoning_not_trained == sum(sample.reasoning_length for sample in samples[:-1])
    assert any("would not train" in finding for finding in report.findings)


def test_recipes_that_cannot_be_used_say_why():
    template = template_text("qwen3") + "{# mine #}"
    report = audit([chat(2)], make_tokenizer(chat_template=template))
    assert any("assistant_only_loss cannot be used" in finding for finding in report.findings)


def test_prompt_and_completion_rows_are_audited_on_the_completion():
    messages = chat(2)
    report = audit([{"prompt": messages[:-1], "completion": messages[-1:]}], make_tokenizer())
    assert report.all_turns.turns == 1
    recipe = report.recipes[0]
    assert recipe.trained_tokens <= recipe.completion_tokens + 8  # nothing of the prompt's own assistant message
