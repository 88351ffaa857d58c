"""Trajectories of SWE-agent."""

import json

import pytest

from support.logs import assistant, import_files, take_apart, user
from trl_singlepass.data.bad_rows import BadRows
from trl_singlepass.data.logs.lines import LogError


def item(role, content, kind, **keys):
    return {"role": role, "content": content, "agent": "main", "message_type": kind, **keys}


CALL = {"id": "c1", "type": "function", "function": {"name": "bash", "arguments": '{"command": "ls"}'}}
SYSTEM = item("system", "You fix bugs.", "system_prompt")
TASK = item("user", [{"type": "text", "text": "Fix it.", "cache_control": {"type": "ephemeral"}}], "observation")
THOUGHTS = [{"type": "thinking", "thinking": "Look first.", "signature": "c2ln"}]
LOOK = item("assistant", "I look.", "action", action="ls", tool_calls=[CALL], thinking_blocks=THOUGHTS)
SEEN = item("tool", "a.py", "observation", tool_call_ids=["c1"])
DONE = item("assistant", "Done.", "action", action="submit", tool_calls=None)
ENDED = item("assistant", "Exit due to cost limit", "action", action="", tool_calls=None)

MESSAGES = [
    {"role": "system", "content": "You fix bugs."},
    user("Fix it."),
    assistant("I look.", reasoning_content="Look first.", tool_calls=[CALL]),
    {"role": "tool", "content": "a.py", "tool_call_id": "c1"},
    assistant("Done."),
]


def step(query, response):
    return {"query": query, "response": response, "thought": "", "action": "", "observation": "", "state": {}}


def config(*processors):
    return json.dumps({"agent": {"history_processors": [{"type": kind} for kind in processors]}})


def import_trajectory(folder, bad_lines=BadRows.ERROR, **trajectory):
    path = folder / "1.traj"
    path.write_text(json.dumps(trajectory, indent=2))
    examples, report = import_files("swe-agent", folder, bad_lines=bad_lines)
    return [request for example in examples for request in take_apart(example)], report


def error_of(folder, **trajectory):
    with pytest.raises(LogError) as raised:
        import_trajectory(folder, **trajectory)
    return str(raised.value).replace(str(folder), "folder")


def test_queries_are_contexts_and_calls_come_from_the_history(tmp_path):
    steps = [step([SYSTEM, TASK], "I look."), step([SYSTEM, TASK, LOOK, SEEN], "Done.")]
    rows, report = import_trajectory(tmp_path, trajectory=steps, history=[SYSTEM, TASK, LOOK, SEEN, DONE])
    assert rows == [{"messages": MESSAGES}]
    assert (report.num_turns, report.requests["reasoning"]) == (2, 1)


def test_a_rewritten_history_gives_each_query_its_own_context(tmp_path):
    elided = {**SEEN, "content": "Old environment output: (1 lines omitted)"}
    again = {**DONE, "content": "Once more."}
    queries = [[SYSTEM, TASK], [SYSTEM, TASK, LOOK, SEEN], [SYSTEM, TASK, LOOK, elided, DONE, TASK]]
    steps = [step(query, reply) for query, reply in zip(queries, ["I look.", "Done.", "Once more."], strict=True)]
    rows, _ = import_trajectory(tmp_path, trajectory=steps, history=[SYSTEM, TASK, LOOK, SEEN, DONE, TASK, again])
    context = [*MESSAGES[:3], {**MESSAGES[3], "content": elided["content"]}, MESSAGES[4], user("Fix it.")]
    assert rows == [{"messages": MESSAGES}, {"prompt": context, "completion": [assistant("Once more.")]}]


RETRY = [item("assistant", "Hm.", "assistant"), item("user", "Use a tool.", "user")]


def test_the_reply_of_a_repeated_step_is_trained_if_it_has_no_calls(tmp_path):
    look = {**LOOK, "tool_calls": None, "thinking_blocks": None}
    steps = [step([SYSTEM, TASK], "Hm."), step([SYSTEM, TASK, *RETRY], "I look.")]
    rows, _ = import_trajectory(tmp_path, trajectory=steps, history=[SYSTEM, TASK, look])
    assert rows == [{"messages": [*MESSAGES[:2], assistant("Hm."), user("Use a tool."), assistant("I look.")]}]


def test_the_calls_of_a_repeated_step_are_lost(tmp_path):
    steps = [step([SYSTEM, TASK], "Hm."), step([SYSTEM, TASK, *RETRY], "I look.")]
    trajectory = {"trajectory": steps, "history": [SYSTEM, TASK, LOOK]}
    assert "\n- folder/1.traj:1: The step was repeated, and the tool calls" in error_of(tmp_path, **trajectory)
    rows, _ = import_trajectory(tmp_path, BadRows.DROP, **trajectory)
    context = [*MESSAGES[:2], assistant("Hm."), user("Use a tool.")]
    assert rows == [{"prompt": context, "completion": [MESSAGES[2]]}]


@pytest.mark.parametrize("repeated", [True, False])
def test_what_swe_agent_says_itself_is_not_trained(tmp_path, repeated):
    steps = [step([SYSTEM, TASK], "Hm." if repeated else "I look."), step([{}], "Exit due to cost limit")]
    look = [] if repeated else [{**LOOK, "tool_calls": None, "thinking_blocks": None}]
    rows, _ = import_trajectory(tmp_path, trajectory=steps, history=[SYSTEM, TASK, *look, ENDED])
    assert rows == [{"messages": [*MESSAGES[:2], assistant("Hm." if repeated else "I look.")]}]


def test_steps_and_history_that_do_not_fit_are_refused(tmp_path):
    error = error_of(tmp_path, trajectory=[step([SYSTEM, TASK], "Other.")], history=[SYSTEM, TASK, LOOK])
    assert "\n- folder/1.traj:1: The step and the history do not match" in error


HISTORY = [SYSTEM, item("user", "Demo.", "demonstration", is_demo=True), TASK, LOOK, SEEN, DONE, ENDED]


@pytest.mark.parametrize("processors", [(), ("default",), ("cache_control", "tag_tool_call_observations")])
def test_without_queries_the_history_is_the_context(tmp_path, processors):
    other = item("assistant", "Sub.", "action", agent="sub", action="x")
    history = [*HISTORY[:2], {**other, "agent": "sub"}, *HISTORY[2:]]
    rows, _ = import_trajectory(tmp_path, BadRows.DROP, history=history, replay_config=config(*processors))
    assert rows[-1] == {"messages": [MESSAGES[0], user("Demo."), *MESSAGES[1:]]}


def test_without_queries_a_history_processor_that_rewrites_is_refused(tmp_path):
    error = error_of(tmp_path, history=HISTORY, replay_config=config("default", "last_n_observations"))
    assert "\n- folder/1.traj:1: The steps have no 'query', and the history processor 'last_n_observations'" in error


def test_without_queries_and_configuration_the_context_is_not_known(tmp_path):
    assert "\n- folder/1.traj:1: The steps have no 'query' and the file no 'replay_config'" in error_of(
        tmp_path, history=HISTORY
    )


def test_every_attempt_is_trained(tmp_path):
    attempts = [
        {"trajectory": [step([SYSTEM, TASK], "I look.")], "history": [SYSTEM, TASK, LOOK]},
        {"trajectory": [step([SYSTEM, TASK], "Done.")], "history": [SYSTEM, TASK, DONE]},
    ]
    rows, _ = import_trajectory(tmp_path, attempts=attempts, **attempts[0])
    assert rows == [{"messages": MESSAGES[:3]}, {"messages": [*MESSAGES[:2], MESSAGES[4]]}]


def test_other_json_is_bad(tmp_path):
    assert "'trajectory' and 'history' are missing" in error_of(tmp_path, messages=[])
