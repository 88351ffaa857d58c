"""Small conversations that show how a chat template treats messages."""

import json

from .conversation import Message, RenderingError
from .template import ChatTemplate


# Words that no template contains.
ANSWER, REASONING, VALUE, TEXT = "Aspen", "Rowan", "Maple", "Willow"
USER: Message = {"role": "user", "content": "Juniper"}
TOOL_RESULT: Message = {"role": "tool", "name": "oak", "tool_call_id": "call00000", "content": "Linden"}
_PARAMETERS = {"type": "object", "properties": {"elm": {"type": "string", "description": "Elm"}}, "required": ["elm"]}
TOOL = {"type": "function", "function": {"name": "oak", "description": "Oak", "parameters": _PARAMETERS}}


def render_probe(template: ChatTemplate, *messages: Message, add_generation_prompt: bool = False) -> str:
    """Return a rendering, or an empty string if the template refuses the messages."""
    try:
        return template.render(list(messages), add_generation_prompt)
    except RenderingError:
        return ""


def answer(**fields: str) -> Message:
    """Return an answer with further fields, such as its reasoning."""
    return {"role": "assistant", "content": ANSWER, **fields}


def tool_call(as_json: bool, with_content: bool) -> Message:
    """Return a message that calls a tool, its arguments as JSON or as a dict, with or without a content."""
    arguments = {"elm": VALUE}
    function = {"name": "oak", "arguments": json.dumps(arguments) if as_json else arguments}
    call = {"id": "call00000", "type": "function", "function": function}
    message: Message = {"role": "assistant", "tool_calls": [call]}
    return {**message, "content": ""} if with_content else message
