"""What of an audit deserves attention, in plain sentences."""

from __future__ import annotations

from collections.abc import Iterator

from ...trees.sample import CompletionKind
from .facts import AuditFacts, RecipeReport
from .recipes import LAST_TURN
from .templates import MIXED, STRIPPED, STRIPPED_EVERYWHERE, TemplateFacts
from .turns import EARLIER_HISTORY, EMPTY_BLOCK, OTHER_STOP, OTHERWISE, REASONING_REMOVED


_KINDS = {
    STRIPPED: "shows reasoning in the last turn and removes it from history",
    STRIPPED_EVERYWHERE: "leaves reasoning out of every turn, the last one too",
    MIXED: "keeps the reasoning of some earlier turns and removes that of others",
}
_CAUSES = {
    REASONING_REMOVED: "their reasoning is removed from history",
    EMPTY_BLOCK: "they have no reasoning, and the template writes an empty block that history does not have",
    OTHER_STOP: "history ends them with another token",
    EARLIER_HISTORY: "the history before them is rewritten as well",
    OTHERWISE: "history shows them differently",
}


def findings_of(report: AuditFacts) -> list[str]:
    """
    Put what deserves attention in sentences.

    Args:
        report ([`AuditFacts`]):
            The audit.

    Returns:
        `list[str]`: One sentence per finding; the forecast's verdict is not among them.
    """
    findings = [*_about_rows(report)]
    for facts, conversations in report.templates:
        findings += _about_template(
            facts, "" if len(report.templates) == 1 else f" (in {conversations} conversations)"
        )
    findings += [*_about_turns(report), *_about_prompts(report), *_about_branches(report)]
    for recipe in report.recipes:
        findings += _about_recipe(recipe)
    return findings


def _about_rows(report: AuditFacts) -> Iterator[str]:
    lost = report.num_audited - report.num_trainable
    if lost:
        yield f"{lost} of {report.num_audited} rows cannot be trained as they are: see their reasons."


def _about_template(facts: TemplateFacts, where: str) -> Iterator[str]:
    if facts.kind in _KINDS:
        yield f"The {facts.name} {_KINDS[facts.kind]}{where}."
    if facts.added_stop:
        yield f"The template writes no stop token after a last answer; {facts.added_stop} is added{where}."
    elif facts.last_ending != facts.history_ending:
        last, history = facts.last_ending or "nothing", facts.history_ending or "nothing"
        yield f"A last answer ends with {last}, the same answer in history with {history}{where}."


def _about_turns(report: AuditFacts) -> Iterator[str]:
    turns = report.all_turns
    if turns.reasoning_under_other_key:
        yield (
            f"{_of(turns.reasoning_under_other_key, turns.turns)} have reasoning under a key that the template "
            "ignores. Rename it to 'reasoning_content'."
        )
    if turns.reasoning_restored:
        yield (
            f"The template leaves out the reasoning of {_of(turns.reasoning_restored, turns.turns)}; it is put back "
            "between its tags."
        )
    if turns.reasoning_lost:
        yield f"{_of(turns.reasoning_lost, turns.turns)} lose their reasoning."
    if turns.calls_lost:
        yield f"{_of(turns.calls_lost, turns.with_calls)} with tool calls lose a call or a part of one."
    if turns.over_max_length:
        yield f"{_of(turns.over_max_length, turns.trainable)} are longer than {report.max_length} tokens."


def _about_prompts(report: AuditFacts) -> Iterator[str]:
    turns = report.all_turns
    if turns.not_token_prefix:
        yield (
            f"In {_of(turns.not_token_prefix, turns.turns)}, a token of the rendering reaches over the end of the "
            "prompt; the completion is tokenised on its own there, as the model would write it."
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
            f"In {_of(continued, turns.turns)}, the prompt begins the answer in words that the template leaves out "
            "before such a message. The completion continues from there."
        )
    refused = turns.kinds.get("refused")
    if refused:
        yield f"{_of(refused, turns.turns)} are refused; the errors below say why."


def _about_branches(report: AuditFacts) -> Iterator[str]:
    turns = report.all_turns
    for cause, count in turns.branches.items():
        yield f"{count} of {turns.followed} turns that another follows branch off, because {_CAUSES[cause]}."


def _about_recipe(recipe: RecipeReport) -> Iterator[str]:
    if recipe.conversations == 0:
        if recipe.refusal:
            yield f"{recipe.name} cannot be used: {recipe.refusal}."
        return
    lost = recipe.reasoning_not_trained
    if lost:
        yield f"{recipe.name} would not train {_share(lost, recipe.reasoning_tokens)} of the reasoning tokens."
    if recipe.unlike_inference:
        share = _share(recipe.unlike_inference, recipe.trained_tokens)
        yield f"{recipe.name} would train {share} of its tokens in a context that inference never shows."
    untrained = recipe.completion_tokens - recipe.trained_tokens
    if recipe.name == LAST_TURN and untrained:
        yield f"{recipe.name} would leave {_share(untrained, recipe.completion_tokens)} of the completions untrained."


def _of(count: int, total: int) -> str:
    return f"{count} of {total} turns"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if part / whole >= 0.01 else "less than 1%"
