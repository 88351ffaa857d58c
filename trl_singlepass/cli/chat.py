"""`trl-singlepass chat`: a conversation with a trained model, in which each context is rendered as in training."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.text import Text
from transformers import TextStreamer

from ..rendering.conversation import Conversation, Message
from ..rendering.history import render_with_history
from ..rendering.reasoning import THINK, reasoning_tags
from .loading import load_model, load_tokenizer


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def chat(args: Namespace, console: Console) -> int:
    """Answer each line of the standard input until it ends."""
    tokenizer = load_tokenizer(args.model, chat_template=args.chat_template, trust_remote_code=args.trust_remote_code)
    model = load_model(
        args.model,
        dtype="auto",
        attn_implementation=None,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    ).eval()
    messages: list[Message] = [{"role": "system", "content": args.system}] if args.system else []
    for said in _read_lines(console):
        messages.append({"role": "user", "content": said})
        messages.append(answer(messages, model, tokenizer, args.history, args.max_new_tokens))
    return 0


def _read_lines(console: Console) -> Iterator[str]:
    asks = sys.stdin.isatty()
    if asks:
        console.print(Text("Ctrl-D ends the conversation.", style="dim"))
    while True:
        try:
            said = input("> " if asks else "")
        except EOFError:
            return
        if said.strip():
            yield said


def answer(
    messages: list[Message],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    history: str,
    max_new_tokens: int,
) -> Message:
    """
    Generate the reply to a conversation, print it as it comes, and return it with `reasoning_content`.

    `history` is the setting of that name. If the template cannot follow it, this raises `RenderingError`.
    """
    # Training renders a turn with its completion; of this one, only the prompt is used.
    placeholder: Message = {"role": "assistant", "content": "Yes."}
    conversation = Conversation([*messages, placeholder], first_trained=len(messages))
    (sample,) = render_with_history(conversation, tokenizer, history)
    prompt, completion = sample.token_ids[: sample.prompt_length].tolist(), sample.token_ids[sample.prompt_length :]
    stops = {*completion.tolist()[-2:]} & {*tokenizer.all_special_ids}  # white space may follow the stop token
    ids_BL = torch.tensor([prompt], device=model.device)
    generated = model.generate(
        ids_BL,
        attention_mask=torch.ones_like(ids_BL),
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops | _end_tokens(model, tokenizer)) or None,
        pad_token_id=tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )[0, len(prompt) :].tolist()
    written = generated[:-1] if generated and generated[-1] in stops else generated
    return to_message(tokenizer.decode(written), tokenizer.decode(prompt), tokenizer.get_chat_template())


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    given = model.generation_config.eos_token_id
    ends = given if isinstance(given, list) else [given]
    return {token for token in (*ends, tokenizer.eos_token_id) if token is not None}


def to_message(text: str, prompt: str, chat_template: str) -> Message:
    """
    Return what a model wrote, without its stop token, as a message; reasoning that was cut off has no answer.

    The template tells the tags around reasoning, and `prompt` may end with the opening one.
    """
    tags = reasoning_tags(chat_template) or THINK
    opened = prompt.rstrip().endswith(tags.opening) or text.lstrip().startswith(tags.opening)
    reasoning, closed, content = text.partition(tags.closing)
    if not (opened or closed):
        return {"role": "assistant", "content": text}
    reasoning = reasoning.lstrip().removeprefix(tags.opening).strip("\n")
    return {"role": "assistant", "reasoning_content": reasoning, "content": content.lstrip("\n")}
