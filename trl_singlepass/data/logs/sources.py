"""The formats that `trl-singlepass import` reads."""

from enum import StrEnum


class LogSource(StrEnum):
    """Format of a log."""

    OPENAI_CHAT = "openai-chat"
    """Requests to a Chat Completions API, as JSON Lines."""
    OPENAI_RESPONSES = "openai-responses"
    """Requests to a Responses API, as JSON Lines."""
    ANTHROPIC = "anthropic"
    """Requests to a Messages API, as JSON Lines."""
    CLAUDE_CODE = "claude-code"
    """Transcripts of Claude Code."""
    CODEX = "codex"
    """Transcripts of Codex."""
    SWE_AGENT = "swe-agent"
    """Trajectories of SWE-agent."""
    VLLM = "vllm"
    """Requests to vLLM with the tokens that it read and wrote, as JSON Lines."""
    SGLANG = "sglang"
    """Requests to SGLang with the tokens that it read and wrote, as JSON Lines."""


# They hold what was said, but not all that was sent: system prompt and tools may be missing.
TRANSCRIPTS = (LogSource.CLAUDE_CODE, LogSource.CODEX, LogSource.SWE_AGENT)
