"""A small in-memory BPE tokenizer for any of TRL's chat templates, with the special tokens that they use."""

from functools import lru_cache
from pathlib import Path

import pytest
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


TEMPLATES = Path(trl.__file__).parent / "chat_templates"

# Control tokens: `special=True` in the released tokenizers.
CONTROL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>", "<|pad|>", "<s>", "</s>", "<bos>", "<eos>"),
    *("<|startoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|end|>"),
    *("<|call|>", "<|eot|>", "<|eom|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
    *("<|observation|>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", '<|"|>'),
    *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
    *("<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>", "<|tool_call_end|>"),
    *("<|tool_response_start|>", "<|tool_response_end|>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>"),
    *("<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>"),
    *("<|END_RESPONSE|>", "<end_of_utterance>"),
]
# Tags within the model's output: added tokens with `special=False` in the released tokenizers.
CONTENT_TOKENS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    *("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>"),
    *("<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
]
# First match wins: template name prefix -> (bos, eos, pad), as in the released tokenizers.
SPECIAL_ROLES = {
    "qwen": (None, "<|im_end|>", "<|endoftext|>"),
    "gptoss": ("<|startoftext|>", "<|return|>", "<|endoftext|>"),
    "glm4": (None, "<|endoftext|>", "<|endoftext|>"),
    "nemotron": ("<s>", "<|im_end|>", "<pad>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<pad>"),
    "lfm2": ("<|startoftext|>", "<|im_end|>", "<|pad|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", "<pad>"),
    "phi3": ("<s>", "<|endoftext|>", "<pad>"),
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<pad>"),
    "muse_glimmer": ("<|begin_of_text|>", "<|eot|>", "<pad>"),
    "idefics3": ("<|begin_of_text|>", "<end_of_utterance>", "<pad>"),
    "smolvlm": ("<|im_start|>", "<end_of_utterance>", "<pad>"),
    "llava": ("<s>", "</s>", "<pad>"),
    "": ("<bos>", "<eos>", "<pad>"),
}


def template_names() -> list[str]:
    """Return the names of all chat templates that TRL ships."""
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def template_text(name: str) -> str:
    """Return the source of one of TRL's chat templates; skip the test if this release of TRL lacks it."""
    path = TEMPLATES / f"{name}.jinja"
    if not path.exists():
        pytest.skip(f"TRL {trl.__version__} ships no template {name}")
    return path.read_text(encoding="utf-8")


def make_tokenizer(template_name: str | None = "qwen3", chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """
    Return a small tokenizer for tests.

    Args:
        template_name (`str`, *optional*, defaults to `"qwen3"`):
            One of TRL's chat templates; also decides BOS, EOS and padding token. `None` leaves the tokenizer without.
        chat_template (`str`, *optional*):
            Source of a template to carry instead of TRL's.
    """
    name = template_name or ""
    bos, eos, pad = next(roles for prefix, roles in SPECIAL_ROLES.items() if name.startswith(prefix))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level_bpe()), bos_token=bos, eos_token=eos, pad_token=pad
    )
    tokenizer.chat_template = chat_template or (template_text(template_name) if template_name else None)
    return tokenizer


@lru_cache(maxsize=1)
def _byte_level_bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(CONTROL_TOKENS) + 600,
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    prose = (TEMPLATES / "README.md").read_text(encoding="utf-8")[:20_000]
    tokenizer.train_from_iterator([prose, "user assistant system tool\n\n the answer is so we think\n\n" * 9], trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in CONTENT_TOKENS])
    return str(tokenizer.to_str())
