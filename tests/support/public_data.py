"""The released Qwen3 tokenizer, from a folder beside the repository; tests that need it are skipped without it."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from support.chat_tokenizers import CONTROL_TOKENS


FOLDER = Path(__file__).parents[3] / "shared"
CONVERSATIONS = ["llamafactory_reason_tool_use", "taubench_gpt4o_airline", "mathchat_follow_up_300"]


def released_qwen3_tokenizer():
    """Return Qwen3's tokenizer with the control tokens of all other templates."""
    folder = FOLDER / "tokenizers" / "qwen3"
    if not folder.exists():
        pytest.skip("no Qwen3 tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(CONTROL_TOKENS, special_tokens=True)
    return tokenizer
