"""What an import read, wrote and left out, in a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .bad_lines import BadLines
from .examples import Examples
from .requests import LoggedRequest, LoggedTokens


@dataclass(frozen=True, slots=True)
class ImportReport:
    """Counts of an import."""

    num_files: int
    num_requests: int  # with a reply
    num_duplicates: int  # requests that stand in the log twice, and are trained once
    num_examples: dict[str, int]  # by form: `messages`, `prompt + completion`, `tokens`
    num_turns: int  # replies that the examples train
    num_reasoning: int  # replies with reasoning
    num_hidden_reasoning: int  # replies whose reasoning the log holds only in encrypted form
    num_with_skipped_attachments: int  # requests whose context lacks attachments
    num_without_system_prompt: int  # requests without a system prompt
    num_without_tools: int  # requests that have tool calls in them, and no tools
    num_bad_lines: int  # lines that were left out
    bad_lines: tuple[str, ...]  # why, with line numbers

    @classmethod
    def from_import(
        cls, num_files: int, requests: Sequence[LoggedRequest | LoggedTokens], examples: Examples, bad_lines: BadLines
    ) -> ImportReport:
        """Count what an import read and wrote."""
        messages = [request for request in requests if isinstance(request, LoggedRequest)]
        forms = {"messages": "messages", "prompt + completion": "completion", "tokens": "prompt_ids"}
        counts = {form: sum(key in row for row in examples.rows) for form, key in forms.items()}
        return cls(
            num_files=num_files,
            num_requests=len(requests),
            num_duplicates=examples.num_duplicates,
            num_examples={form: count for form, count in counts.items() if count},
            num_turns=examples.num_turns,
            num_reasoning=sum("reasoning_content" in request.reply for request in messages),
            num_hidden_reasoning=sum(request.has_hidden_reasoning for request in messages),
            num_with_skipped_attachments=sum(request.has_skipped_attachments for request in messages),
            num_without_system_prompt=sum(not _has_system_prompt(request) for request in messages),
            num_without_tools=sum(_lacks_tools(request) for request in messages),
            num_bad_lines=len(bad_lines),
            bad_lines=tuple(bad_lines.group()),
        )

    def __str__(self) -> str:
        repeated = f", {_count(self.num_duplicates, 'repetition')} among them" if self.num_duplicates else ""
        forms = ", ".join(f"{count} as {form}" for form, count in self.num_examples.items())
        lines = [
            f"{_count(self.num_requests, 'request')} in {_count(self.num_files, 'file')}{repeated}",
            f"{_count(sum(self.num_examples.values()), 'example')} ({forms}) with {_count(self.num_turns, 'turn')}",
        ]
        if self.num_reasoning or self.num_hidden_reasoning:
            lines.append(f"Reasoning: {self.num_reasoning} of {_count(self.num_requests, 'request')}")
        if self.num_hidden_reasoning:
            lines[-1] += f"; of {self.num_hidden_reasoning} more the log holds it only in encrypted form"
        if self.num_with_skipped_attachments:
            lines.append(f"Without their attachments: {_count(self.num_with_skipped_attachments, 'request')}")
        if self.num_without_system_prompt:
            lines.append(f"Without a system prompt: {_count(self.num_without_system_prompt, 'request')}")
        if self.num_without_tools:
            lines.append(f"With tool calls but no tools: {_count(self.num_without_tools, 'request')}")
        if self.num_bad_lines:
            lines.append(f"Left out: {_count(self.num_bad_lines, 'bad line')}")
            lines += [f"- {reason}" for reason in self.bad_lines]
        return "\n".join(lines)


def _has_system_prompt(request: LoggedRequest) -> bool:
    return request.context[0]["role"] in ("system", "developer")


def _lacks_tools(request: LoggedRequest) -> bool:
    return not request.tools and any("tool_calls" in message for message in (*request.context, request.reply))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
