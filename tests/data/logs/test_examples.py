"""Requests of one conversation are joined where the log is append-only, and only there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.logs import assistant, take_apart, user
from trl_singlepass.data.logs.examples import MessageExamples, TokenExamples
from trl_singlepass.data.logs.lines import LoggedRequest, LoggedTokens, Place


def request(*messages, **keys):
    *context, reply = messages
    return LoggedRequest(Place("log", 1), list(context), reply, **keys)


U1, A1, U2, A2 = user("1"), assistant("one", reasoning_content="first"), user("2"), assistant("two")
BARE = assistant("one")


def take(examples, requests):
    for one in requests:
        examples.add(one)
    return examples


def rows(*requests):
    return [part for example in take(MessageExamples(), requests) for part in take_apart(example)]


def test_a_later_request_that_adds_to_an_earlier_one_is_the_same_conversation():
    assert rows(request(U1, A1), request(U1, A1, U2, A2)) == [{"messages": [U1, A1, U2, A2]}]


def test_the_order_of_the_log_does_not_matter():
    assert rows(request(U1, A1, U2, A2), request(U1, A1)) == [{"messages": [U1, A1, U2, A2]}]


def test_a_reply_that_is_echoed_without_its_reasoning_is_another_context():
    assert rows(request(U1, A1), request(U1, BARE, U2, A2)) == [
        {"messages": [U1, A1]},
        {"prompt": [U1, BARE, U2], "completion": [A2]},
    ]


def test_assistant_messages_that_are_no_replies_of_the_log_are_not_trained():
    assert rows(request(U1, A1, U2, A2)) == [{"prompt": [U1, A1, U2], "completion": [A2]}]
    later = request(U1, A1, U2, A2, U1, A1)
    assert rows(request(U1, A1, U2, A2), later) == [{"prompt": [U1, A1, U2], "completion": [A2, U1, A1]}]
    gap = request(U1, A1, U2, A2, U1, A1)
    assert rows(request(U1, A1), gap) == [
        {"messages": [U1, A1]},
        {"prompt": [U1, A1, U2, A2, U1], "completion": [A1]},
    ]


def test_where_a_conversation_branches_its_common_replies_are_trained_once():
    other, reply = user("3"), assistant("three")
    assert rows(request(U1, A1), request(U1, A1, U2, A2), request(U1, A1, other, reply)) == [
        {"messages": [U1, A1, U2, A2]},
        {"prompt": [U1, A1, other], "completion": [reply]},
    ]


def test_requests_that_stand_in_the_log_twice_are_trained_once():
    requests = [request(U1, A1), request(U1, A1), request(U1, A2)]
    assert rows(*requests) == [{"messages": [U1, A1]}, {"messages": [U1, A2]}]
    examples = take(MessageExamples(), requests)
    assert (examples.num_turns, examples.num_duplicates) == (2, 1)


def test_requests_of_a_conversation_are_one_example():
    requests = [request(U1, A1), request(U1, A2), request(U2, A2)]
    examples = take(MessageExamples(), requests)
    replies = [{"prompt": [U1], "completion": [reply]} for reply in (A1, A2)]
    assert list(examples) == [{"requests": replies}, {"messages": [U2, A2]}]
    assert examples.forms == {"requests": 1, "messages": 1}
    assert examples.columns == ["requests", "messages"]


def test_the_log_may_say_which_conversation_a_request_belongs_to():
    requests = [request(U1, A1, conversation=name) for name in "ab"]
    requests += [request(U1, A2, conversation="a"), request(U2, A2, conversation="a")]
    (one,) = take(MessageExamples(), requests)
    assert [part["completion"] for part in one["requests"]] == [[A1], [A2], [A2]]


def test_tools_stand_with_the_example_or_else_with_the_requests_that_have_them():
    tools = [{"type": "function", "function": {"name": "f"}}]
    same = [request(U1, A1, tools=tools), request(U1, A2, tools=tools)]
    assert [sorted(example) for example in take(MessageExamples(), same)] == [["requests", "tools"]]
    (other,) = take(MessageExamples(), [request(U1, A1, tools=tools), request(U1, A2)])
    assert [request.get("tools") for request in other["requests"]] == [tools, None]
    assert "tools" not in other


@pytest.mark.parametrize("key", ["tools", "chat_template_kwargs"])
def test_other_tools_or_arguments_are_another_prompt(key):
    value = [{"type": "function", "function": {"name": "f"}}] if key == "tools" else {"enable_thinking": True}
    assert rows(request(U1, A1), request(U1, A1, U2, A2, **{key: value})) == [
        {"messages": [U1, A1]},
        {"prompt": [U1, A1, U2], "completion": [A2], key: value},
    ]


MESSAGES = st.sampled_from([U1, A1, BARE, U2, A2])
CONTEXTS = st.lists(MESSAGES, min_size=1, max_size=5)
REPLIES = st.sampled_from([A1, BARE, A2])


@given(st.lists(st.tuples(CONTEXTS, REPLIES), max_size=12))
def test_examples_train_each_request_once_and_nothing_else(pairs):
    examples = take(MessageExamples(), [request(*context, reply) for context, reply in pairs])
    trained = []
    for row in (part for example in examples for part in take_apart(example)):
        prompt = row.get("prompt", [])
        messages = prompt + row.get("messages", row.get("completion"))
        roles = [message["role"] for message in messages]
        trained += [(messages[:k], messages[k]) for k in range(len(prompt), len(roles)) if roles[k] == "assistant"]
    expected = [pair for index, pair in enumerate(pairs) if pair not in pairs[:index]]
    assert len(trained) == len(expected) == examples.num_turns
    assert all(pair in trained for pair in expected)


def tokens(prompt, completion, conversation=None, line=1):
    return LoggedTokens(Place("log", line), prompt, completion, conversation)


def test_tokens_belong_to_the_conversation_that_the_log_names():
    examples = take(TokenExamples(), [tokens([1], [2], "a"), tokens([1, 2, 3], [4], "b")])
    assert [row["conversation_id"] for row in examples] == ["a", "b"]


def test_tokens_belong_to_the_conversation_whose_tokens_they_begin_with():
    turns = [tokens([1], [2], line=1), tokens([7], [8], line=2), tokens([1, 2, 3], [4], line=3)]
    turns += [tokens([1, 2, 3, 4, 5], [6], line=4), tokens([1, 2], [9], line=5), tokens([1], [2], line=6)]
    examples = take(TokenExamples(), turns)
    assert [row["conversation_id"] for row in examples] == ["log:1", "log:2", "log:1", "log:1", "log:1"]
    assert (examples.num_turns, examples.num_duplicates) == (5, 1)
