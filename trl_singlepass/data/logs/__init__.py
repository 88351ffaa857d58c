"""
Agent logs as datasets: what is trained is what was sent.

One file per format reads the lines of a log (`lines`) as requests (`requests`), each with the context that was sent
and the reply that came back. `examples` joins the requests of a conversation where the log is append-only, and keeps
each with its own context where it is not. Lines that cannot be trained as they were sent are bad lines. Nothing here
imports torch.
"""

from enum import StrEnum


class LogSource(StrEnum):
    """A format that `trl-singlepass import` reads; requests to an API, and tokens of servers, are JSON Lines."""

    OPENAI_CHAT = "openai-chat"
    OPENAI_RESPONSES = "openai-responses"
    ANTHROPIC = "anthropic"
    CLAUDE_CODE = "claude-code"
    CODEX = "codex"
    SWE_AGENT = "swe-agent"
    VLLM = "vllm"
    SGLANG = "sglang"


# They hold what was said, but not all that was sent: system prompt and tools may be missing.
TRANSCRIPTS = (LogSource.CLAUDE_CODE, LogSource.CODEX, LogSource.SWE_AGENT)
