"""Token logs of vLLM and SGLang."""

import pytest

from support.logs import get_error, import_entries
from trl_singlepass.data.tokenized_turns import tokenized_turns_to_samples


def vllm(prompt, completion, reason="stop", **keys):
    response = {"prompt_token_ids": prompt, "choices": [{"token_ids": completion, "finish_reason": reason}]}
    return {"request": {"return_token_ids": True}, "response": response, **keys}


def sglang(prompt, completion, reason="stop", matched=2, **info):
    info = {"finish_reason": {"type": reason, "matched": matched}, **info}
    return {"request": {"input_ids": prompt}, "response": {"output_ids": completion, "meta_info": info}}


@pytest.mark.parametrize(("source", "entry"), [("vllm", vllm), ("sglang", sglang)])
def test_samples_are_the_tokens_of_the_log(tmp_path, source, entry):
    rows, report = import_entries(tmp_path, source, [entry([5, 6], [7, 2]), entry([5, 6, 7, 2, 8], [9, 2])])
    samples = [tokenized_turns_to_samples([row])[0] for row in rows]
    assert [sample.token_ids.tolist() for sample in samples] == [[5, 6, 7, 2], [5, 6, 7, 2, 8, 9, 2]]
    assert [sample.prompt_length for sample in samples] == [2, 5]
    assert len({row["conversation_id"] for row in rows}) == 1
    assert "2 examples (2 as tokens) with 2 turns" in str(report)


@pytest.mark.parametrize("key", ["conversation_id", "session_id"])
def test_the_log_may_name_the_conversation(tmp_path, key):
    named = [vllm([5], [2], **{key: "a"}), vllm([5, 2, 6], [2], **{key: 7})]
    assert [row["conversation_id"] for row in import_entries(tmp_path, "vllm", named)[0]] == ["a", "7"]


def test_prompts_of_vllm_may_stand_with_the_choice(tmp_path):
    line = vllm(None, [7, 2])
    line["response"]["choices"][0]["prompt_token_ids"] = [5, 6]
    assert import_entries(tmp_path, "vllm", [line])[0][0]["prompt_ids"] == [5, 6]


def test_tokens_of_sglang_may_stand_with_their_log_probabilities(tmp_path):
    line = sglang([5, 6], None, output_token_logprobs=[[-0.1, 7, None], [-0.2, 2, "x"]], completion_tokens=2)
    assert import_entries(tmp_path, "sglang", [line])[0][0]["completion_ids"] == [7, 2]


@pytest.mark.parametrize(
    ("source", "line", "reason"),
    [
        ("vllm", vllm([5], [7], "length"), "its finish_reason is 'length'"),
        ("vllm", vllm([5], None), "no tokens of the reply. Send requests with 'return_token_ids': true."),
        ("vllm", vllm(None, [7]), "no tokens of the prompt"),
        ("vllm", vllm([5.0], [7]), "'prompt_token_ids' must hold whole numbers only"),
        ("sglang", sglang([5], [7], "length"), "its finish_reason is 'length'"),
        ("sglang", sglang([5], [7], matched="END"), "cut at the stop string 'END'"),
        ("sglang", sglang(None, [7]), "no tokens of the prompt. Send requests with 'input_ids'"),
        ("sglang", sglang([5], [7], completion_tokens=2), "The log has 1 token ids, but 'completion_tokens' is 2"),
        ("sglang", sglang([5], [7], prompt_tokens=2), "The log has 1 token ids, but 'prompt_tokens' is 2"),
    ],
)
def test_lines_that_cannot_be_trained_as_they_were_sent_are_bad(tmp_path, source, line, reason):
    good = vllm([5], [2]) if source == "vllm" else sglang([5], [2])
    error = get_error(tmp_path, source, [good, line])
    assert "\n- log:2: " in error
    assert reason in error
