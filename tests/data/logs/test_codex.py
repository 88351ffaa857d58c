"""Transcripts of Codex."""

import json

from support.logs import assistant, get_error, import_entries, user
from trl_singlepass.data.bad_rows import BadRows
from trl_singlepass.data.logs import LogSource
from trl_singlepass.data.logs.importer import import_logs


META = {"type": "session_meta", "payload": {"id": "s", "base_instructions": {"text": "You are Codex."}}}
SYSTEM = {"role": "system", "content": "You are Codex."}
CALL = {"type": "function_call", "name": "shell", "arguments": '{"cmd": "ls"}', "call_id": "c1"}
CALLED = {"id": "c1", "type": "function", "function": {"name": "shell", "arguments": '{"cmd": "ls"}'}}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": '{"output": "a.py"}'}
RESULT = {"role": "tool", "content": '{"output": "a.py"}', "tool_call_id": "c1"}


def item(payload):
    return {"type": "response_item", "payload": payload}


def event(kind, **payload):
    return {"type": "event_msg", "payload": {"type": kind, **payload}}


def said(role, text):
    kind = "output_text" if role == "assistant" else "input_text"
    return item({"type": "message", "role": role, "content": [{"type": kind, "text": text}]})


def thought(text=None):
    content = None if text is None else [{"type": "reasoning_text", "text": text}]
    return item({"type": "reasoning", "summary": [], "content": content, "encrypted_content": "x"})


TURN = [
    said("developer", "Sandboxed."),
    said("user", "Hi."),
    event("user_message", message="Hi."),
    {"type": "turn_context", "payload": {"model": "gpt-5-codex"}},
    thought("Look."),
    event("agent_reasoning", text="**Looking**"),
    item(CALL),
    event("token_count"),
    item(OUTPUT),
    thought(),
    said("assistant", "There is a.py."),
]
MESSAGES = [
    SYSTEM,
    {"role": "developer", "content": "Sandboxed."},
    user("Hi."),
    {"role": "assistant", "reasoning_content": "Look.", "tool_calls": [CALLED]},
    RESULT,
    assistant("There is a.py."),
]


def test_replies_are_what_the_model_wrote_between_other_items(tmp_path):
    rows, report = import_entries(tmp_path, "codex", [META, *TURN])
    assert rows == [{"messages": MESSAGES}]
    assert (report.num_turns, report.requests["reasoning"], report.requests["hidden reasoning"]) == (2, 1, 1)
    assert "With tool calls but no tools: 2 requests" in str(report)


def test_compaction_begins_a_new_root(tmp_path):
    history = [said("user", "Hi.")["payload"], said("user", "Summary: a.py.")["payload"]]
    compacted = {"type": "compacted", "payload": {"message": "Summary: a.py.", "replacement_history": history}}
    lines = [META, *TURN, compacted, said("user", "Delete it."), said("assistant", "Done.")]
    later = [SYSTEM, user("Hi."), user("Summary: a.py."), user("Delete it."), assistant("Done.")]
    assert import_entries(tmp_path, "codex", lines)[0] == [{"messages": MESSAGES}, {"messages": later}]


def test_a_compaction_and_a_subagent_belong_to_their_session(tmp_path):
    history = [said("user", "Summary: a.py.")["payload"]]
    compacted = {"type": "compacted", "payload": {"message": "", "replacement_history": history}}
    source = {"subagent": {"thread_spawn": {"parent_thread_id": "s", "depth": 1}}}
    child = {"type": "session_meta", "payload": {"id": "c", "source": source}}
    sessions = {"a": [META, *TURN, compacted, said("assistant", "Done.")], "b": [child, *TURN]}
    for name, lines in sessions.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    examples, report = import_logs(LogSource.CODEX, [str(tmp_path)])
    (example,) = examples
    assert len(example["requests"]) == 3
    assert (report.requests["subagent"], report.requests["compaction"]) == (2, 1)


def test_what_follows_a_compaction_that_the_log_does_not_hold_is_refused_until_the_next_one(tmp_path):
    unknown = {"type": "compacted", "payload": {"message": "Summary."}}
    known = {"type": "compacted", "payload": {"message": "", "replacement_history": [said("user", "S.")["payload"]]}}
    lines = [META, *TURN, unknown, said("user", "Go."), said("assistant", "Gone."), known, said("assistant", "So.")]
    error = get_error(tmp_path, "codex", lines)
    assert "\n- log:13: The context was compacted here, and what replaced it is not in the log." in error
    assert "\n- log:15: Its context is unknown: The context was compacted here" in error
    rows, report = import_entries(tmp_path, "codex", lines, bad_lines=BadRows.DROP)
    assert rows == [{"messages": MESSAGES}, {"messages": [SYSTEM, user("S."), assistant("So.")]}]
    assert report.num_bad_lines == 2


def test_an_encrypted_compaction_is_refused(tmp_path):
    history = [{"type": "compaction", "encrypted_content": "x"}]
    compacted = {"type": "compacted", "payload": {"message": "", "replacement_history": history}}
    error = get_error(tmp_path, "codex", [META, *TURN, compacted, said("user", "Go."), said("assistant", "Gone.")])
    assert "\n- log:13: An item has the type 'compaction'" in error
    assert "\n- log:15: Its context is unknown" in error


def test_an_interrupted_reply_is_refused_and_stays_context(tmp_path):
    lines = [META, said("user", "Hi."), said("assistant", "I b"), event("turn_aborted", reason="interrupted")]
    lines += [said("user", "Go on."), said("assistant", "I begin.")]
    assert "\n- log:3: The reply was interrupted." in get_error(tmp_path, "codex", lines)
    rows, _ = import_entries(tmp_path, "codex", lines, bad_lines=BadRows.DROP)
    context = [SYSTEM, user("Hi."), assistant("I b"), user("Go on.")]
    assert rows == [{"prompt": context, "completion": [assistant("I begin.")]}]


def test_what_follows_a_rollback_is_refused(tmp_path):
    lines = [META, *TURN, event("thread_rolled_back", num_turns=1), said("user", "Go."), said("assistant", "Gone.")]
    error = get_error(tmp_path, "codex", lines)
    assert "\n- log:13: The thread was rolled back here" in error
    assert "\n- log:15: Its context is unknown" in error


def test_items_that_no_template_renders_make_the_context_unknown(tmp_path):
    search = item({"type": "web_search_call", "action": {"query": "q"}})
    error = get_error(tmp_path, "codex", [META, said("user", "Hi."), search, said("assistant", "Found.")])
    assert "\n- log:3: An item has the type 'web_search_call'" in error
    assert "\n- log:4: Its context is unknown" in error


def test_snapshots_are_not_sent(tmp_path):
    lines = [META, said("user", "Hi."), item({"type": "ghost_snapshot"}), said("assistant", "Hello.")]
    assert import_entries(tmp_path, "codex", lines)[0] == [{"messages": [SYSTEM, user("Hi."), assistant("Hello.")]}]


def test_older_transcripts_get_their_system_prompt_from_a_file(tmp_path):
    lines = [{"type": "session_meta", "payload": {"id": "s", "instructions": None}}, *TURN]
    rows, report = import_entries(tmp_path, "codex", lines, system_prompt="You are Codex.")
    assert rows == [{"messages": MESSAGES}]
    assert report.requests["no system prompt"] == 0


def test_lines_without_a_payload_are_bad(tmp_path):
    old = {"type": "message", "role": "user", "content": []}
    assert "\n- log:2: 'payload' is missing." in get_error(tmp_path, "codex", [META, old])
