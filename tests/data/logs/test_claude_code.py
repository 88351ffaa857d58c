"""Transcripts of Claude Code."""

import pytest

from support.logs import assistant, get_error, import_entries, import_whole, user
from trl_singlepass.data.bad_rows import BadRows
from trl_singlepass.data.logs.claude_code import CLEARED


def line(kind, uuid, parent, message=None, **keys):
    entry = {"type": kind, "uuid": uuid, "parentUuid": parent, "isSidechain": False, **keys}
    return entry if message is None else {**entry, "message": message}


def said(uuid, parent, content, **keys):
    return line("user", uuid, parent, user(content), **keys)


def part(uuid, parent, message_id, block, stop=None, **keys):
    """One content block of a reply, on a line of its own."""
    message = {"id": message_id, "role": "assistant", "model": "m", "content": [block], "stop_reason": stop}
    return line("assistant", uuid, parent, message, **keys)


def text(words):
    return {"type": "text", "text": words}


def thinking(words):
    return {"type": "thinking", "thinking": words, "signature": "c2ln"}


def use(call_id):
    return {"type": "tool_use", "id": call_id, "name": "Bash", "input": {"command": "ls"}}


def result(call_id, words):
    return [{"type": "tool_result", "tool_use_id": call_id, "content": words}]


def called(*ids):
    function = {"name": "Bash", "arguments": '{"command": "ls"}'}
    return [{"id": call_id, "type": "function", "function": function} for call_id in ids]


def returned(call_id, words):
    return {"role": "tool", "content": words, "tool_call_id": call_id}


HI = [said("1", None, "Hi."), part("2", "1", "m1", text("Hello."), "end_turn")]
# Two calls at once: the second part of the reply hangs off the first, and so does the first result.
PARALLEL = [
    said("1", None, "Hi."),
    part("2", "1", "m1", thinking("Look.")),
    part("3", "2", "m1", use("a")),
    part("4", "3", "m1", use("b"), "tool_use"),
    said("5", "3", result("a", "x")),
    said("6", "4", result("b", "y")),
    part("7", "6", "m2", text("x and y."), "end_turn"),
]
FOUND = [
    user("Hi."),
    {"role": "assistant", "reasoning_content": "Look.", "tool_calls": called("a", "b")},
    returned("a", "x"),
    returned("b", "y"),
    assistant("x and y."),
]


def rows(folder, *lines, **options):
    return import_entries(folder, "claude-code", lines, **options)[0]


def test_lines_that_share_a_message_id_are_one_reply_with_all_its_results(tmp_path):
    found, report = import_entries(tmp_path, "claude-code", PARALLEL)
    assert found == [{"messages": FOUND}]
    assert (report.num_turns, report.requests["no system prompt"], report.requests["no tools"]) == (2, 2, 2)


def test_results_stand_in_the_order_in_which_they_came(tmp_path):
    lines = [*PARALLEL[:4], said("6", "4", result("b", "y")), said("5", "3", result("a", "x")), PARALLEL[6]]
    assert rows(tmp_path, *lines)[0]["messages"][2:4] == [returned("b", "y"), returned("a", "x")]


def test_going_back_is_a_branch(tmp_path):
    lines = [*HI, said("3", "2", "One?"), part("4", "3", "m2", text("One."), "end_turn")]
    lines += [said("5", "2", "Two?"), part("6", "5", "m3", text("Two."), "end_turn")]
    start = [user("Hi."), assistant("Hello.")]
    assert rows(tmp_path, *lines) == [
        {"messages": [*start, user("One?"), assistant("One.")]},
        {"prompt": [*start, user("Two?")], "completion": [assistant("Two.")]},
    ]


def test_lines_around_the_conversation_are_passed_through(tmp_path):
    between = [
        {"type": "summary", "summary": "Hi", "leafUuid": "2"},
        {"type": "file-history-snapshot", "snapshot": {}},
        line("progress", "p", "1", data={}),
        line("system", "s", "p", subtype="turn_duration", durationMs=3),
    ]
    found = rows(tmp_path, HI[0], *between, part("2", "s", "m1", text("Hello."), "end_turn"))
    assert found == [{"messages": [user("Hi."), assistant("Hello.")]}]


def test_meta_lines_and_local_commands_were_sent(tmp_path):
    lines = [
        said("1", None, "Caveat.", isMeta=True),
        line("system", "2", "1", subtype="local_command", content="<ls>"),
    ]
    lines += [said("3", "2", "Hi."), part("4", "3", "m1", text("Hello."), "end_turn")]
    assert rows(tmp_path, *lines) == [{"messages": [user("Caveat."), user("<ls>"), user("Hi."), assistant("Hello.")]}]


BOUNDARY = line("system", "c", None, subtype="compact_boundary", logicalParentUuid="2", compactMetadata={})
SUMMARY = said("d", "c", "Summary.", isCompactSummary=True, isVisibleInTranscriptOnly=True)


@pytest.mark.parametrize("parent", [None, "2"])
def test_compaction_begins_a_new_root(tmp_path, parent):
    lines = [
        *HI,
        {**BOUNDARY, "parentUuid": parent},
        SUMMARY,
        said("e", "d", "Go."),
        part("f", "e", "m2", text("Gone."), "end_turn"),
    ]
    assert rows(tmp_path, *lines) == [
        {"messages": [user("Hi."), assistant("Hello.")]},
        {"messages": [user("Summary."), user("Go."), assistant("Gone.")]},
    ]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([BOUNDARY, said("e", "c", "Go.")], "the summary that replaced it is not in the log"),
        (
            [{**BOUNDARY, "compactMetadata": {"preservedSegment": {"headUuid": "1"}}}, SUMMARY, said("e", "d", "Go.")],
            "Its context was compacted in part",
        ),
    ],
)
def test_a_compaction_that_the_log_does_not_hold_is_refused(tmp_path, lines, reason):
    error = get_error(tmp_path, "claude-code", [*HI, *lines, part("f", "e", "m2", text("Gone."), "end_turn")])
    assert f"\n- log:{3 + len(lines)}: " in error
    assert reason in error


def test_after_a_microcompaction_cleared_results_are_sent_as_cleared(tmp_path):
    micro = line("system", "8", "7", subtype="microcompact_boundary", microcompactMetadata={"compactedToolIds": ["a"]})
    lines = [*PARALLEL, micro, said("9", "8", "Go."), part("10", "9", "m3", text("Gone."), "end_turn")]
    cleared = [*FOUND[:2], returned("a", CLEARED), *FOUND[3:], user("Go.")]
    assert rows(tmp_path, *lines) == [{"messages": FOUND}, {"prompt": cleared, "completion": [assistant("Gone.")]}]


def test_a_microcompaction_that_names_no_results_is_refused(tmp_path):
    micro = line("system", "3", "2", subtype="microcompact_boundary", microcompactMetadata={"preTokens": 9})
    lines = [*HI, micro, said("4", "3", "Go."), part("5", "4", "m2", text("Gone."), "end_turn")]
    assert "\n- log:5: 'compactedToolIds' is missing." in get_error(tmp_path, "claude-code", lines)


def test_a_microcompaction_that_nothing_follows_makes_what_comes_after_it_uncertain(tmp_path):
    micro = line("system", "8", "7", subtype="microcompact_boundary", microcompactMetadata={"compactedToolIds": ["a"]})
    lines = [*PARALLEL, micro, said("9", "7", "Go."), part("10", "9", "m3", text("Gone."), "end_turn")]
    error = get_error(tmp_path, "claude-code", lines)
    assert "\n- log:10: It is unknown whether it was sent before or after the clearing at log:8." in error
    assert rows(tmp_path, *PARALLEL, micro) == [{"messages": FOUND}]


def test_a_side_chain_is_a_conversation_of_its_own_without_the_system_prompt_of_the_main_one(tmp_path):
    side = [said("s", None, "Search.", isSidechain=True)]
    side += [part("t", "s", "m9", text("Found."), "end_turn", isSidechain=True)]
    tools = [{"type": "function", "function": {"name": "Bash"}}]
    found, report = import_entries(tmp_path, "claude-code", [*HI, *side], system_prompt="Be brief.", tools=tools)
    system = {"role": "system", "content": "Be brief."}
    assert found == [
        {"messages": [system, user("Hi."), assistant("Hello.")], "tools": tools},
        {"messages": [user("Search."), assistant("Found.")]},
    ]
    assert report.requests["no system prompt"] == 1


def in_session(name, lines):
    return [{**entry, "sessionId": name} for entry in lines]


def test_a_compaction_and_a_subagent_belong_to_their_session(tmp_path):
    compacted = [BOUNDARY, SUMMARY, said("e", "d", "Go."), part("f", "e", "m2", text("Gone."), "end_turn")]
    side = [said("s", None, "Search.", isSidechain=True)]
    side += [part("t", "s", "m9", text("Found."), "end_turn", isSidechain=True)]
    lines = [*in_session("a", [*HI, *side]), *in_session("b", compacted)]
    (example,), report = import_whole(tmp_path, "claude-code", lines)
    assert [request["completion"][0]["content"] for request in example["requests"]] == ["Hello.", "Found.", "Gone."]
    assert (report.requests["subagent"], report.requests["compaction"]) == (1, 1)
    assert "By subagents: 1 request\nAfter a compaction: 1 request\n" in str(report)


def test_a_session_that_was_copied_is_trained_once(tmp_path):
    assert rows(tmp_path, *HI, *HI) == [{"messages": [user("Hi."), assistant("Hello.")]}]


def test_attachments_are_refused_or_left_out_and_counted(tmp_path):
    attachment = line("attachment", "a", "1", attachment={"type": "todo_reminder"})
    lines = [HI[0], attachment, part("2", "a", "m1", text("Hello."), "end_turn")]
    assert "\n- log:3: Its context includes an attachment (line 2)" in get_error(tmp_path, "claude-code", lines)
    found, report = import_entries(tmp_path, "claude-code", lines, skip_attachments=True)
    assert found == [{"messages": [user("Hi."), assistant("Hello.")]}]
    assert "Without their attachments: 1 request" in str(report)


def test_withheld_thinking_is_counted(tmp_path):
    lines = [HI[0], part("2", "1", "m1", thinking("")), part("3", "2", "m1", text("Hello."), "end_turn")]
    assert import_entries(tmp_path, "claude-code", lines)[1].requests["hidden reasoning"] == 1


def test_errors_that_the_user_was_shown_are_no_replies(tmp_path):
    shown = {"role": "assistant", "model": "<synthetic>", "content": [text("API Error")]}
    lines = [HI[0], line("assistant", "x", "1", shown, isApiErrorMessage=True), said("y", "x", "Again.")]
    lines += [part("z", "y", "m1", text("Hello."), "end_turn")]
    assert rows(tmp_path, *lines) == [{"messages": [user("Hi."), user("Again."), assistant("Hello.")]}]


def test_an_interrupted_reply_is_refused_and_stays_context(tmp_path):
    lines = [HI[0], part("2", "1", "m1", text("Hel")), said("3", "2", [text("[Request interrupted by user]")])]
    lines += [said("4", "3", "Go on."), part("5", "4", "m2", text("Hello."), "end_turn")]
    assert "\n- log:2: The reply was interrupted." in get_error(tmp_path, "claude-code", lines)
    (row,) = rows(tmp_path, *lines, bad_lines=BadRows.DROP)
    assert row["prompt"][1] == assistant("Hel")
    assert row["completion"] == [assistant("Hello.")]


SYNTHETIC = {"role": "assistant", "model": "<synthetic>", "content": [text("No response requested.")]}


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([part("5", "4", "m2", text("Cut"), "max_tokens")], "its stop_reason is 'max_tokens'"),
        ([part("5", "4", "m2", thinking("Hm."), "end_turn")], "neither text nor tool calls"),
        ([part("5", "9", "m2", text("So."), "end_turn")], "there is no line '9'"),
        ([line("assistant", "5", "2", SYNTHETIC), part("6", "5", "m2", text("So."), "end_turn")], "the model's place"),
        ([part("5", "2", "m2", use("a")), said("6", "5", "Stop."), part("7", "6", "m3", text("So."), "end_turn")],
         "the tool call 'a' with 0 results"),
    ],
)  # fmt: skip
def test_replies_whose_context_is_not_known_are_bad(tmp_path, lines, reason):
    error = get_error(tmp_path, "claude-code", [*HI, said("4", "2", "Go."), *lines])
    assert f"\n- log:{3 + len(lines)}: " in error
    assert reason in error


def test_lines_of_another_format_are_bad(tmp_path):
    assert "\n- log:3: 'type' is missing." in get_error(tmp_path, "claude-code", [*HI, {"messages": []}])
