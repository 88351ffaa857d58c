"""
Train the demo's tokenizer on its conversations: byte-level BPE with Qwen3's control tokens.

    python -m demo.make_tokenizer
"""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trl_singlepass.cli.demo import DATA, TOKENIZER


VOCABULARY = 2048
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Not special, so that decoding keeps them, as with Qwen3.
MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
# Words with their leading space, single digits, runs of punctuation, line breaks, other white space.
WORDS = r"""'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""


def main() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in CONTROL]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(MARKS),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = (TOKENIZER / "chat_template.jinja").read_text()
    fast.save_pretrained(TOKENIZER)


def texts() -> list[str]:
    """Return all texts in the conversations, including tool schemas and arguments as JSON."""
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    found = [json.dumps(tool) for row in rows for tool in row.get("tools", [])]
    for message in (message for row in rows for message in row["messages"]):
        found += [message["role"], message["content"], message.get("reasoning_content", "")]
        found += [json.dumps(call["function"]) for call in message.get("tool_calls", [])]
    return found


if __name__ == "__main__":
    main()
