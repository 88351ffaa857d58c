"""
Agent logs as datasets: what is trained is what was sent.

`files` yields the lines of a log, `importer` finds whose they are. One file per API or agent reads them (with `lines`;
OpenRouter's with `opentelemetry`, tokens of vLLM and SGLang with `openai_chat`) as requests, each with the context
that was sent and the reply that came back. `examples` joins the requests of a conversation where the log only grows,
and keeps each with its own context where it does not. Lines that cannot be trained as they were sent are bad lines.
Nothing here imports torch.
"""

from enum import StrEnum


class LogSource(StrEnum):
    """A format that `trl-singlepass import` reads."""

    AUTO = "auto"
    OPENAI_CHAT = "openai-chat"
    OPENAI_RESPONSES = "openai-responses"
    ANTHROPIC = "anthropic"
    LANGFUSE = "langfuse"
    OPENROUTER = "openrouter"
    OPENTELEMETRY = "opentelemetry"
    CLAUDE_CODE = "claude-code"
    CODEX = "codex"
    SWE_AGENT = "swe-agent"
    VLLM = "vllm"
    SGLANG = "sglang"


TOKENS = (LogSource.VLLM, LogSource.SGLANG)
