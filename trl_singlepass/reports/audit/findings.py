"""What in an audit deserves attention, in plain sentences."""

from __future__ import annotations

from collections.abc import Iterator

from ...trees.sample import CompletionKind
from ..wording import count_of
from .facts import AuditFacts
from .recipes import Recipe, RecipeReport
from .templates import ReasoningPolicy, TemplateFacts
from .turns import BranchCause


_POLICIES = {
    ReasoningPolicy.STRIPPED: "renders reasoning in the last turn and removes it from history",
    ReasoningPolicy.STRIPPED_EVERYWHERE: "leaves reasoning out of every turn, even the last one",
    ReasoningPolicy.MIXED: "keeps the reasoning of some earlier turns and removes that of others",
}
_CAUSES = {
    BranchCause.REASONING_REMOVED: "the reasoning is removed from history",
    BranchCause.EMPTY_BLOCK: (
        "the template writes an empty block in the place of missing reasoning, and leaves it out of history"
    ),
    BranchCause.OTHER_STOP: "the answer ends with a different token in history",
    BranchCause.EARLIER_HISTORY: "earlier history is rewritten too",
    BranchCause.OTHERWISE: "history shows the turn differently",
}
_REASONS = "The table of such rows gives the reasons."


def get_findings(report: AuditFacts) -> list[str]:
    """
    Put what deserves attention into sentences.

    Args:
        report ([`AuditFacts`]):
            The audit.

    Returns:
        `list[str]`: One or two sentences per finding, without the forecast's verdict.
    """
    findings = [*_about_rows(report)]
    for facts, conversations in report.templates:
        where = "" if len(report.templates) == 1 else f" (in {count_of(conversations, 'conversation')})"
        findings += _about_template(facts, where)
    findings += [*_about_turns(report), *_about_prompts(report), *_about_branches(report)]
    for recipe in report.recipes:
        findings += _about_recipe(recipe)
    return findings


def _about_rows(report: AuditFacts) -> Iterator[str]:
    lost = report.num_audited - report.num_trainable
    if lost:
        yield f"{lost:,} of {count_of(report.num_audited, 'row')} cannot be trained without changes. {_REASONS}"


def _about_template(facts: TemplateFacts, where: str) -> Iterator[str]:
    if facts.kind in _POLICIES:
        yield f"The {facts.name} {_POLICIES[facts.kind]}{where}."
    if facts.added_stop:
        yield f"The template writes no stop token after a last answer, so {facts.added_stop} is added{where}."
    elif facts.last_ending != facts.history_ending:
        last, history = facts.last_ending or "nothing", facts.history_ending or "nothing"
        yield f"A last answer ends with {last}, but the same answer in history with {history}{where}."


def _about_turns(report: AuditFacts) -> Iterator[str]:
    turns = report.all_turns
    if turns.reasoning_under_other_key:
        yield (
            f"In {_of(turns.reasoning_under_other_key, turns.turns)}, reasoning stands under a key that the template "
            "ignores. Rename it to 'reasoning_content'."
        )
    if turns.reasoning_restored:
        yield (
            f"The template leaves out the reasoning of {_of(turns.reasoning_restored, turns.turns)}. It is put back "
            "between its tags."
        )
    if turns.reasoning_lost:
        yield f"In {_of(turns.reasoning_lost, turns.turns)}, the reasoning is lost."
    if turns.empty_blocks:
        yield (
            f"In {_of(turns.empty_blocks, turns.turns)}, there is no reasoning, and the template writes an empty "
            "block for it, which trains the model not to think."
        )
    if turns.calls_lost:
        yield f"In {_of(turns.calls_lost, turns.with_calls)} with tool calls, a call or part of one is lost."
    if turns.over_max_length:
        assert report.max_length is not None, "nothing is too long without a limit"
        limit = count_of(report.max_length, "token")
        yield f"The limit of {limit} is too short for {_of(turns.over_max_length, turns.trainable)}."


def _about_prompts(report: AuditFacts) -> Iterator[str]:
    turns = report.all_turns
    if turns.not_token_prefix:
        yield (
            f"In {_of(turns.not_token_prefix, turns.turns)}, a token of the rendering spans the end of the prompt. "
            "The completion is tokenized on its own there, as the model would write it."
        )
    rewritten = turns.kinds.get(CompletionKind.HISTORY_REWRITTEN)
    if rewritten:
        yield (
            f"In {_of(rewritten, turns.turns)}, the template rewrites earlier messages once the answer is there. The "
            "prompt is trained as it is served, followed by the answer's own text."
        )
    continued = turns.kinds.get(CompletionKind.OPENING_CONTINUED)
    if continued:
        yield (
            f"In {_of(continued, turns.turns)}, the prompt begins the answer with words that the template does not "
            "write before such a message. The completion continues from there."
        )
    refused = turns.kinds.get("refused")
    if refused:
        yield f"{_of(refused, turns.turns)} cannot be rendered without losing something. {_REASONS}"


def _about_branches(report: AuditFacts) -> Iterator[str]:
    turns = report.all_turns
    for cause, count in turns.branches.items():
        reason = _CAUSES[BranchCause(cause)]
        yield f"The tree forks after {_of(count, turns.followed)} with a successor, because {reason}."


def _about_recipe(recipe: RecipeReport) -> Iterator[str]:
    name = f"{recipe.name[0].upper()}{recipe.name[1:]}"
    if recipe.conversations == 0:
        if recipe.refusal:
            yield f"{name} cannot be used: {recipe.refusal}."
        return
    lost = recipe.reasoning_not_trained
    if lost:
        yield f"{name} would not train {_share(lost, recipe.reasoning_tokens)} of the reasoning tokens."
    if recipe.unlike_inference:
        share = _share(recipe.unlike_inference, recipe.trained_tokens)
        yield f"{name} would train {share} of its tokens in a context that never occurs at inference."
    untrained = recipe.completion_tokens - recipe.trained_tokens
    if recipe.name == Recipe.LAST_TURN and untrained:
        share = _share(untrained, recipe.completion_tokens)
        yield f"{name} would leave {share} of the completion tokens untrained."


def _of(count: int, total: int) -> str:
    return f"{count:,} of {count_of(total, 'turn')}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if part / whole >= 0.01 else "less than 1%"
