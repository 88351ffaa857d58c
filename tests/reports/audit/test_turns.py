"""What templates do to turns, as notes on real templates say it: reasoning, calls, stop tokens, prefixes, branches."""

from support.chat_templates import HARD_TEMPLATES
from support.chat_tokenizers import make_tokenizer, template_text
from support.conversations import TOOLS, agentic_chat, chat, plain_chat, tool_chat
from trl_singlepass.reports.audit import audit


def test_stripped_history_hides_reasoning_and_makes_turns_branch():
    stats = audit([chat(4)], make_tokenizer()).all_turns
    assert (stats.reasoning_found, stats.reasoning_hidden, stats.branches) == (4, 3, {"reasoning removed": 3})


def test_empty_reasoning_blocks_make_every_turn_branch():
    report = audit([plain_chat(4)], make_tokenizer())
    assert report.all_turns.branches == {"empty reasoning block": 3}
    assert report.num_chains == 4


def test_other_stop_token_in_history():
    report = audit([plain_chat(4)], make_tokenizer("gptoss"))
    facts = report.templates[0][0]
    assert (facts.last_ending, facts.history_ending) == ("<|return|>", "<|end|>")
    assert report.all_turns.branches == {"other stop token": 3}
    assert any("<|return|>" in finding and "<|end|>" in finding for finding in report.findings)


def test_missing_stop_token():
    report = audit([chat(3)], make_tokenizer("glm4moe"))
    assert report.all_turns.stop_added == 3
    assert any("<|user|> is added" in finding for finding in report.findings)
    assert audit([chat(3)], make_tokenizer()).all_turns.stop_added == 0


def test_reasoning_left_out_of_every_turn_is_put_back():
    report = audit([chat(3)], make_tokenizer("deepseek_r1_distill"))
    assert (report.all_turns.reasoning_found, report.all_turns.reasoning_restored) == (3, 3)
    assert report.num_trainable == 1


def test_dropped_tool_calls():
    report = audit([{"messages": tool_chat(), "tools": TOOLS}, chat(2)], make_tokenizer("deepseek_r1_distill"))
    assert (report.all_turns.with_calls, report.all_turns.calls_lost) == (1, 1)
    assert [(error.count, error.rows) for error in report.errors] == [(1, (0,))]
    assert "'add' is lost" in report.errors[0].reason
    assert report.num_trainable == 1
    assert audit([{"messages": tool_chat(), "tools": TOOLS}], make_tokenizer()).all_turns.calls_lost == 0


def test_reasoning_under_a_key_that_the_template_ignores():
    messages = [
        {("cot" if key == "reasoning_content" else key): value for key, value in message.items()}
        for message in chat(2)
    ]
    report = audit([messages, chat(2)], make_tokenizer())
    assert (report.all_turns.reasoning_under_other_key, report.all_turns.reasoning_found) == (2, 2)
    assert report.errors[0].count == 1
    assert "'cot'" in report.errors[0].reason


def test_reasoning_without_a_place_is_lost():
    stats = audit([chat(2)], make_tokenizer("llama3")).all_turns
    assert (stats.reasoning_lost, stats.reasoning_found) == (2, 0)


def test_prompts_that_are_not_token_prefixes():
    # The prompt ends in "\n", and in the rendering a token reaches over it.
    template = template_text("qwen3").replace("<|im_start|>assistant\\n' }}", "<|im_start|>assistant\\n<think>\\n' }}")
    assert template != template_text("qwen3")
    tokenizer = make_tokenizer(chat_template=template)
    assert len(tokenizer("\n\n")["input_ids"]) < 2 * len(tokenizer("\n")["input_ids"])
    stats = audit([plain_chat(3)], tokenizer).all_turns
    assert (stats.not_token_prefix, stats.prompt_changed) == (3, 0)
    assert audit([chat(3)], tokenizer).all_turns.not_token_prefix == 0
    assert audit([plain_chat(3)], make_tokenizer()).all_turns.not_token_prefix == 0


def test_prompts_that_the_answer_changes():
    report = audit([agentic_chat()], make_tokenizer("gptoss"))
    assert report.all_turns.prompt_changed == 3  # at each final answer, the analysis before its tool calls disappears
    assert report.all_turns.kinds == {"as served": 6, "history rewritten": 3}
    assert "In 3 of 9 turns, the template rewrites earlier messages once the answer is there." in str(report)


def test_turns_that_train_an_empty_block_of_reasoning_are_a_finding():
    report = audit([chat(2), plain_chat(3)], make_tokenizer())
    assert report.all_turns.empty_blocks == 3
    assert any("3 of 5 turns" in finding for finding in report.findings)
    report = audit([plain_chat(3)], make_tokenizer("qwen3_instruct_2507"))
    assert report.all_turns.empty_blocks == 0
    assert not any("no reasoning" in finding for finding in report.findings)


def test_turns_are_counted_by_how_they_were_rendered():
    lost = [plain_chat(1)[0], {"role": "assistant", "cot": "?", "content": "!"}]
    kinds = audit([chat(2), lost], make_tokenizer()).all_turns.kinds
    assert kinds == {"as served": 2, "refused": 1}
    assert audit([chat(2)], make_tokenizer("deepseek_r1_distill")).all_turns.kinds == {"reasoning restored": 2}
    closed = make_tokenizer(None, HARD_TEMPLATES["closed prompt"].source)
    assert audit([plain_chat(2)], closed).all_turns.kinds == {"opening continued": 2}
